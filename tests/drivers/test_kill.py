"""A run that is killed at random moments and restarted ends as one that was not."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from launch import SMALL, assert_same, finish, kill, launch, start

KILLS = int(os.environ.get("DDML_KILLS", "2"))
OPTIONS = (*SMALL, "-solver", "aspqn", "-local_steps", "3", "-checkpoint_interval", "1")


def begin_or_go_on(path: Path, length: int) -> tuple[object, ...]:
    """What a user gives: all options and a run file, or the run file alone, which has them."""
    return ("-restart", path) if path.exists() else (*OPTIONS, "-max_it", length, "-output", path)


def test_every_restart_after_a_kill_succeeds(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.h5", tmp_path / "killed.h5"
    length = 12 * KILLS
    assert launch(2, *OPTIONS, "-max_it", length, "-output", whole, timeout=600).rc == 0
    moments = random.Random(KILLS)
    kills = 0
    while kills < KILLS:
        process = start(2, *begin_or_go_on(killed, length))
        time.sleep(moments.uniform(2.5, 7.0))  # in the start, in an iteration, in a checkpoint
        assert process.poll() in (None, 0), finish(process).err
        kill(process)
        finish(process)
        kills += 1
    result = launch(2, *begin_or_go_on(killed, length), timeout=600)
    assert result.rc == 0, result.err
    assert_same(whole, killed)
