"""Runs of drivers on several numbers of ranks, one after another in this process, and where they stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from calling import call
from launch import SMALL, assert_same, content
from mpi4py import MPI
from own_data import BATCHES

OWN: dict[str, tuple[str, ...]] = {
    "lbfgs": (),
    "ssbroyden": ("-resample_interval", "3"),
    "gauss_newton": ("-form", "primal", "-gn_rank", "20"),
    "gauss_newton with Schwarz": ("-form", "primal", "-preconditioner", "schwarz"),
    "gauss_newton in dual form": ("-form", "dual"),
    "mspqn_dense": ("-side_by_side", "0"),
    "aspqn": ("-local_steps", "5"),
    "mspqn": ("-local_steps", "5"),
    "lbfgs on a scaled problem": ("-problem", f"{Path(__file__).with_name('scaled_problems.py')}:RodOfTerms"),
}


@contextmanager
def first(ranks: int) -> Iterator[MPI.Comm | None]:
    """The first ranks of all, None on the others."""
    world = MPI.COMM_WORLD
    comm = world.Split(0 if world.rank < ranks else MPI.UNDEFINED)
    yield comm if comm != MPI.COMM_NULL else None
    world.barrier()
    if comm != MPI.COMM_NULL:
        comm.Free()


def train(name: str, path: Path, ranks: int, iterations: int, *options: object) -> None:
    """Run to so many iterations, from the run file if it is there."""
    where = "-restart" if path.exists() else "-output"
    MPI.COMM_WORLD.barrier()
    with first(ranks) as comm:
        if comm is not None:
            assert call(name, *options, "-max_it", iterations, where, path, "-progress", "none", comm=comm) == 0


needs_three = pytest.mark.skipif(MPI.COMM_WORLD.size < 3, reason="needs three ranks")


@pytest.mark.ranks
@needs_three
@pytest.mark.parametrize("solver", OWN)
def test_other_numbers_of_ranks_go_on_to_the_last_bit(solver: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = (*SMALL, "-solver", solver.split()[0], *OWN[solver])
    train("pinn", whole, 1, 7, *options)
    for ranks, iterations in ((1, 3), (2, 5), (3, 7)):
        train("pinn", parts, ranks, iterations, *options)
    assert_same(whole, parts, errors=1e-13)  # which are summed by ranks
    assert list(content(whole).history["iteration"]) == list(range(8))
    assert np.all(np.diff(content(parts).history["time"]) > 0)
    comm.barrier()


@pytest.mark.ranks
@needs_three
def test_other_numbers_of_ranks_go_on_with_the_same_batches(comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = ("-solver", "lbfgs", *BATCHES)
    train("classify", whole, 1, 12, *options)
    for ranks, iterations in ((1, 5), (3, 8), (2, 12)):
        train("classify", parts, ranks, iterations, *options)
    assert_same(whole, parts)
    history = content(whole).history
    measured = np.isfinite(history["accuracy"])
    assert (measured == (np.arange(13) % 6 == 0)).all()  # 6 batches of 288 cost ten times what 360 test samples do
    assert history["work"][0] == pytest.approx(287 / 1437)
    comm.barrier()


@pytest.mark.parametrize("solver", ["tr", "apts_weights"])
@pytest.mark.parametrize("stop", [2, 3])  # before a batch, and within one
def test_secant_pairs_in_a_norm_that_changes_are_charged_once(
    solver: str, stop: int, comm: MPI.Comm, shared_tmp: Path
) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    words = ("-data", "digits", "-samples", 203, "-widths", "8,8", "-solver", solver, "-norm", "kfac")
    options = (*words, "-model", "lbfgs", "-batch_size", 20, "-batch_steps", 2)
    train("classify", whole, comm.size, 5, *options)
    for iterations in (stop, 5):
        train("classify", parts, comm.size, iterations, *options)
    assert_same(whole, parts)
    comm.barrier()


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("max_work", 20, "max_work is reached"),
        ("max_time", 0.2, "max_time is reached"),
        ("target_error", 0.6, "target_error is reached"),
        ("tao_fmin", 0.8, "the loss is below tao_fmin"),
        ("max_it", 3, "max_it is reached"),
    ],
)
def test_limits_stop_with_their_reason(
    limit: str, value: float, reason: str, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    assert call("pinn", *SMALL, "-solver", "lbfgs", "-output", path, "-max_it", 5000, f"-{limit}", value) == 0
    assert comm.rank > 0 or f"stopped: {reason}" in capfd.readouterr().out
    comm.barrier()
    history = content(path).history
    columns = {"max_work": "work", "max_time": "time", "target_error": "error", "tao_fmin": "loss"}
    column = columns.get(limit, "iteration")
    sign = -1 if column in ("error", "loss") else 1
    assert sign * history[column][-1] >= sign * value
    assert np.all(sign * history[column][:-1] < sign * value)
    comm.barrier()


@pytest.mark.parametrize("options", [("-secant", "half"), ("-coarse_step", "-additive_step", "0.5")])
def test_same_ranks_go_on_to_the_last_bit(options: tuple[str, ...], comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = (*SMALL, "-solver", "aspqn", "-local_steps", "5", *options)
    train("pinn", whole, comm.size, 6, *options)
    for iterations in (3, 6):
        train("pinn", parts, comm.size, iterations, *options)
    assert_same(whole, parts)
    comm.barrier()


@needs_three
def test_sums_by_ranks_go_on_to_rounding(comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = (*SMALL, "-solver", "lbfgs", "-summation_blocks", "0")
    train("pinn", whole, 1, 10, *options)
    for ranks, iterations in ((1, 5), (3, 10)):
        train("pinn", parts, ranks, iterations, *options)
    assert_same(whole, parts, 1e-8)
    comm.barrier()


def test_solver_of_petsc_goes_on_from_the_parameters(
    comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    train("pinn", path, comm.size, 5, *SMALL, "-solver", "lmvm")
    before = content(path).history
    train("pinn", path, comm.size, 10)
    after = content(path).history
    assert comm.rank > 0 or "note: the solver begins afresh" in capfd.readouterr().out
    assert list(after["iteration"]) == list(range(11))
    np.testing.assert_array_equal(after["loss"][:6], before["loss"])
    assert after["loss"][10] < before["loss"][5]
    assert np.all(np.diff(after["work"]) > 0)
    comm.barrier()


def test_another_solver_goes_on_from_the_parameters(
    comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    train("pinn", path, comm.size, 4, *SMALL, "-solver", "lbfgs")
    train("pinn", path, comm.size, 8, "-solver", "aspqn", "-local_steps", "5", "-points", "250")
    out, history = capfd.readouterr().out, content(path).history
    for note in ("-solver aspqn in the place of lbfgs", "-points 250 in the place of 200", "the solver begins afresh"):
        assert comm.rank > 0 or f"note: {note}" in out
    assert list(history["iteration"]) == list(range(9))
    assert history["loss"][8] < history["loss"][4]
    train("pinn", path, comm.size, 10)
    assert "note: the solver begins afresh" not in capfd.readouterr().out
    assert list(content(path).history["iteration"]) == list(range(11))
    comm.barrier()
