"""A run that was stopped, by a limit or a signal, goes on as if it had not been."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launch import SMALL, assert_same, content, finish, launch, processes, start

SCHWARZ = ("-solver", "aspqn", "-local_steps", "5")
ENDLESS = ("-max_it", 10**6, "-max_time", 100)  # a run that only a signal ends, however busy the machine
FURTHER = 5  # iterations after a run that a signal stopped


def train(path: Path, ranks: int, iterations: int, *options: object) -> str:
    """Run to so many iterations, from the run file and with its options if it is there; what was printed."""
    where = ("-restart", path) if path.exists() else ("-output", path, *SMALL)
    result = launch(ranks, *where, *options, "-max_it", iterations)
    assert result.rc == 0, result.out + result.err
    return result.out


def test_other_numbers_of_ranks_go_on_to_the_last_bit(tmp_path: Path) -> None:
    """In processes of their own; see test_ranks.py for the other solvers."""
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(whole, 2, 10, *SCHWARZ)
    train(parts, 1, 4, *SCHWARZ)
    train(parts, 2, 7)
    train(parts, 3, 10)
    assert_same(whole, parts, errors=1e-13)  # which are summed by ranks
    assert list(content(whole).history["iteration"]) == list(range(11))
    assert np.all(np.diff(content(parts).history["time"]) > 0)


def to_mpiexec(mpiexec: int, ranks: dict[int, int]) -> int:
    return mpiexec


def to_rank_1(mpiexec: int, ranks: dict[int, int]) -> int:
    return ranks[1]


@pytest.mark.parametrize(
    ("number", "receiver"),
    [
        (signal.SIGTERM, to_mpiexec),
        pytest.param(signal.SIGUSR1, to_mpiexec, marks=pytest.mark.long),
        (signal.SIGINT, to_rank_1),
    ],
)
def test_signal_stops_a_run_that_can_go_on(
    number: signal.Signals,
    receiver: Callable[[int, dict[int, int]], int],
    tmp_path: Path,
) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "run.h5"
    patient = {"OMPI_MCA_odls_base_sigkill_timeout": "3"}  # seconds, all of which it waits
    process = start(2, *SMALL, *SCHWARZ, *ENDLESS, "-output", path, "-checkpoint_interval", 0, **patient)
    assert any(line.startswith("     2 ") for line in process.stdout)
    ranks = {rank: pid for pid, rank in processes(process.pid).items() if rank >= 0}
    os.kill(receiver(process.pid, ranks), number)
    result = finish(process)
    # Open MPI's mpiexec answers SIGTERM with SIGTERM to the ranks, SIGKILL later, and exit code 1
    assert result.rc == 0 or (number, receiver) == (signal.SIGTERM, to_mpiexec), result.err
    assert "stopped: a signal asked to stop" in result.out
    assert f"to go on: the same driver with -restart {path}" in result.out
    stopped_at = int(content(path).history["iteration"][-1])
    assert stopped_at >= 2
    for run in (path, whole):
        train(run, 2, stopped_at + FURTHER, *SCHWARZ)
    assert_same(whole, path)
