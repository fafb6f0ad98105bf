"""Runs that are killed at random moments and restarted end as one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from launch import SMALL, assert_same, finish, kill, launch, start, warm

KILLS = int(os.environ.get("DDML_KILLS", "4"))
EACH = min(KILLS, 25)  # kills of one run
OPTIONS = (*SMALL, "-solver", "aspqn", "-local_steps", "3", "-checkpoint_interval", "1")
LENGTH = 12 * EACH


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    assert launch(2, *OPTIONS, "-max_it", LENGTH, "-output", path, timeout=600).rc == 0
    return path


@pytest.mark.parametrize("number", range(-(-KILLS // EACH)))
def test_every_restart_after_a_kill_succeeds(whole: Path, tmp_path: Path, number: int) -> None:
    killed, moments = tmp_path / "killed.h5", random.Random(number)

    def go_on() -> subprocess.Popen[str]:
        where = ("-restart", killed) if killed.exists() else ("-output", killed)
        return start(2, *OPTIONS, "-max_it", LENGTH, *where, fresh=False)

    warm()
    before = time.monotonic()
    assert finish(start(2, *OPTIONS, "-max_it", 0, fresh=False)).rc == 0
    pace = time.monotonic() - before
    for _ in range(EACH):
        process = go_on()
        time.sleep(pace * moments.uniform(0.2, 2.0))  # in the start, in an iteration, in a checkpoint
        assert process.poll() in (None, 0), finish(process).err
        kill(process)
        finish(process)
    result = finish(go_on(), timeout=600)
    assert result.rc == 0, result.err
    assert_same(whole, killed)
