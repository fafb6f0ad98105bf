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
FURTHER = 10  # iterations after a run that a signal stopped


def train(path: Path, ranks: int, iterations: int, *options: object) -> str:
    """Run to so many iterations, from the run file and with its options if it is there; what was printed."""
    where = ("-restart", path) if path.exists() else ("-output", path, *SMALL)
    result = launch(ranks, *where, *options, "-max_it", iterations)
    assert result.rc == 0, result.out + result.err
    return result.out


def test_other_numbers_of_ranks_go_on_to_the_last_bit(tmp_path: Path) -> None:
    """Every start anew; see test_ranks.py for the other solvers."""
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(whole, 2, 10, *SCHWARZ)
    train(parts, 1, 4, *SCHWARZ)
    for ranks, iterations in ((2, 7), (3, 10)):
        train(parts, ranks, iterations)
    assert_same(whole, parts, errors=1e-13)  # which are summed by ranks
    assert list(content(whole).history["iteration"]) == list(range(11))
    assert np.all(np.diff(content(parts).history["time"]) > 0)


@pytest.mark.parametrize("options", [("-secant", "half"), ("-coarse_step", "-additive_step", "0.5")])
def test_same_ranks_go_on_to_the_last_bit(options: tuple[str, ...], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(whole, 2, 10, *SCHWARZ, *options)
    train(parts, 2, 5, *SCHWARZ, *options)
    train(parts, 2, 10)
    assert_same(whole, parts)


def test_sums_by_ranks_go_on_to_rounding(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    options = ("-solver", "lbfgs", "-summation_blocks", "0")
    train(whole, 2, 10, *options)
    train(parts, 1, 5, *options)
    train(parts, 2, 10)
    assert_same(whole, parts, 1e-8)


def test_solver_of_petsc_goes_on_from_the_parameters(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    train(path, 2, 5, "-solver", "lmvm")
    before = content(path).history
    out = train(path, 2, 10)
    after = content(path).history
    assert "note: the solver begins afresh" in out
    assert list(after["iteration"]) == list(range(11))
    np.testing.assert_array_equal(after["loss"][:6], before["loss"])
    assert after["loss"][10] < before["loss"][5]
    assert np.all(np.diff(after["work"]) > 0)


def test_another_solver_goes_on_from_the_parameters(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    train(path, 2, 4, "-solver", "lbfgs")
    out = train(path, 2, 8, *SCHWARZ, "-points", "250")
    history = content(path).history
    assert "note: -solver aspqn in the place of lbfgs" in out
    assert "note: -points 250 in the place of 200" in out
    assert "note: the solver begins afresh" in out
    assert list(history["iteration"]) == list(range(9))
    assert history["loss"][8] < history["loss"][4]
    out = train(path, 2, 10)
    assert "note: the solver begins afresh" not in out
    assert list(content(path).history["iteration"]) == list(range(11))


def to_mpiexec(mpiexec: int, ranks: dict[int, int]) -> int:
    return mpiexec


def to_rank_1(mpiexec: int, ranks: dict[int, int]) -> int:
    return ranks[1]


@pytest.mark.parametrize(
    ("number", "receiver"),
    [(signal.SIGTERM, to_mpiexec), (signal.SIGUSR1, to_mpiexec), (signal.SIGINT, to_rank_1)],
)
def test_signal_stops_a_run_that_can_go_on(
    number: signal.Signals,
    receiver: Callable[[int, dict[int, int]], int],
    tmp_path: Path,
) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "run.h5"
    process = start(2, *SMALL, *SCHWARZ, *ENDLESS, "-output", path, "-checkpoint_interval", 0)
    assert any(line.startswith("     2 ") for line in process.stdout)
    ranks = {rank: pid for pid, rank in processes(process.pid).items() if rank >= 0}
    os.kill(receiver(process.pid, ranks), number)
    result = finish(process)
    # Open MPI's mpiexec answers SIGTERM with SIGTERM to the ranks, SIGKILL a second later, and exit code 1
    assert result.rc == 0 or (number, receiver) == (signal.SIGTERM, to_mpiexec), result.err
    assert "stopped: a signal asked to stop" in result.out
    assert f"to go on: the same driver with -restart {path}" in result.out
    stopped_at = int(content(path).history["iteration"][-1])
    assert stopped_at >= 2
    for run in (path, whole):
        train(run, 2, stopped_at + FURTHER, *SCHWARZ)
    assert_same(whole, path)
