"""First-order trust-region steps in little memory: the same run as in much."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from classifiers import classifier
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc
from whole_runs import Training, make_batches

from ddml.problems.classification import ClassificationLoss


class Large(ClassificationLoss):
    """One that saves memory whatever its size is."""

    large_from: ClassVar[int] = 0


def made(comm: MPI.Comm, large: bool, blocks: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    loss: ClassificationLoss = classifier(dtype=dtype)
    if large:
        loss = Large(loss.module, loss.samples, 3)
    return make_batches(loss, comm, blocks=blocks, **{"batch_size": 15, "batch_steps": 4} | settings)


@pytest.mark.parametrize("blocks", [0, 6])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.0}, {"delta0": 3.0, "delta_max": 5.0}, {"polar_exact": 2, "polar_tolerance": 0.3}],
    ids=["", "steepest descent", "long steps", "near factors"],
)
def test_runs_are_those_of_a_small_network(
    settings: dict[str, float], blocks: int, comm: MPI.Comm, prefix: str
) -> None:
    for key, value in settings.items():
        PETSc.Options().setValue(prefix + key, value)
    both = [Training(made(comm, large, blocks), prefix, "tr", max_it=50) for large in (False, True)]
    steps = both[1].run.history["step"]
    if "delta0" in settings:
        assert (steps[1:] == 0).any()  # refused
    spares = [one.tao.getPythonContext().spares_memory for one in both]
    small, large = (one.result()[:2] for one in both)
    assert spares == [False, True]
    assert large == small
    if comm.size > 1 and blocks:
        alone = on_one_rank(lambda comm: Training(made(comm, True, blocks), prefix, "tr", max_it=50).result())
        assert alone[:2] == small


@pytest.mark.parametrize("at", [6, 8])  # within a batch and at its end
def test_restarts_are_exact(at: int, comm: MPI.Comm, prefix: str, shared_tmp: Path) -> None:
    file = str(shared_tmp / "run.h5")
    whole = Training(made(comm, True), prefix, "tr", max_it=21).result()
    Training(made(comm, True), prefix, "tr", max_it=at, output=file).result()
    assert Training(made(comm, True), prefix, "tr", max_it=21, restart=file).result() == whole


@pytest.mark.parametrize("large", [False, True])
def test_runs_go_on_in_more_or_less_memory(large: bool, comm: MPI.Comm, prefix: str, shared_tmp: Path) -> None:
    file = str(shared_tmp / "run.h5")
    whole = Training(made(comm, large), prefix, "tr", max_it=21).result()
    Training(made(comm, not large), prefix, "tr", max_it=6, output=file).result()
    assert Training(made(comm, large), prefix, "tr", max_it=21, restart=file).result()[:2] == whole[:2]


def test_it_keeps_three_vectors_and_the_point(comm: MPI.Comm, prefix: str) -> None:
    run = Training(made(comm, True), prefix, "tr", max_it=9)
    context = run.tao.getPythonContext()
    assert len({vec.handle for vec in (*context.vectors.values(), context.model.m)}) == 3
    halves = context.frugal.begin_g.short, context.frugal.displacement
    assert [array.dtype for array in halves] == [np.float32] * 2
    run.result()


@pytest.mark.parametrize(
    ("solver", "dtype", "settings"),
    [
        ("tr", torch.float64, {}),
        ("tr", torch.float32, {"norm": "2"}),
        ("tr", torch.float32, {"model": "sr1"}),
        ("apts_weights", torch.float32, {}),
    ],
    ids=["float64", "2-norm", "secant pairs", "APTS"],
)
def test_other_methods_do_as_always(
    solver: str, dtype: torch.dtype, settings: dict[str, str], comm: MPI.Comm, prefix: str
) -> None:
    for key, value in settings.items():
        PETSc.Options().setValue(prefix + key, value)
    both = [Training(made(comm, large, dtype=dtype), prefix, solver, max_it=9) for large in (False, True)]
    assert not both[1].tao.getPythonContext().spares_memory
    small, large = (one.result()[:2] for one in both)
    assert large == small


def test_initial_parameters_that_have_been_dropped_are_asked_for() -> None:
    loss = classifier()
    theta, g = loss.initial(), torch.zeros(loss.size, dtype=torch.float64)
    before = loss.value_gradient(theta, g)
    loss.drop_initial()
    with pytest.raises(RuntimeError, match="dropped"):
        loss.initial()
    again = torch.zeros_like(g)
    assert loss.value_gradient(theta, again) == before
    assert torch.equal(again, g)
    assert float(next(iter(loss.terms(theta)))) == pytest.approx(before)
    loss.assign(theta)
    assert torch.equal(loss.initial(), theta)
    assert all(
        p.shape == q.shape for p, q in zip(loss.module.parameters(), classifier().module.parameters(), strict=True)
    )
