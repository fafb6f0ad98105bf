"""Batches: every sample once an epoch, the same on any number of ranks, with their overlap, and through a restart."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from whole_runs import Training, assert_goes_on, make_batches

from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.objectives.composed import sampled
from ddml.problems.classification import cross_entropy
from ddml.sampling.batches import Batches

NONE = torch.empty(0)


def loss_of(count: int) -> ModuleLoss:
    g = torch.Generator().manual_seed(0)
    inputs = torch.rand(count, 6, generator=g, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    return ModuleLoss(module, cross_entropy, inputs, (3 * inputs.mean(dim=1)).long())


def made(comm: MPI.Comm, count: int = 103, **settings: Any) -> Batches:
    return make_batches(loss_of(count), comm, **settings)


def trained(comm: MPI.Comm, prefix: str, solver: str, **limits: Any) -> Training:
    return Training(made(comm, batch_overlap=0.1, batch_steps=3), prefix, solver, **limits)


def drawn(batches: Batches, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [(batches.rows, batches.shared)]
    for _ in range(count - 1):
        batches.move(NONE)
        found.append((batches.rows, batches.shared))
    return found


@pytest.mark.parametrize("overlap", [0.0, 0.1, 1.0])
def test_an_epoch_has_every_sample_and_batches_overlap(comm: MPI.Comm, overlap: float) -> None:
    batches = made(comm, batch_overlap=overlap)
    found = drawn(batches, 12)
    wanted = round(overlap * 26)
    for epoch in range(3):
        seen = np.concatenate([rows for rows, _ in found[4 * epoch : 4 * epoch + 4]])
        assert np.array_equal(np.unique(seen), np.arange(103))
        if not overlap:
            assert len(seen) == 103
    for (rows, shared), (before, _) in zip(found[1:], found, strict=False):
        assert np.array_equal(shared, np.intersect1d(rows, before))
        assert len(shared) >= min(wanted, 25)
        assert np.array_equal(rows, np.unique(rows))
    within = [len(shared) for i, (_, shared) in enumerate(found) if i % 4]
    assert overlap == 1 or within == [wanted] * len(within)  # an epoch's end may have more by chance
    assert len(found[0][1]) == 0
    assert not np.array_equal(found[0][0], found[4][0])
    assert not np.array_equal(made(comm, seed=6).rows, found[0][0])


@pytest.mark.ranks
def test_batches_do_not_depend_on_the_number_of_ranks(comm: MPI.Comm) -> None:
    for ours, alone in zip(drawn(made(comm), 9), drawn(made(MPI.COMM_SELF), 9), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, alone, strict=True))
    everywhere = comm.allgather(made(comm).rows.tolist())
    assert all(rows == everywhere[0] for rows in everywhere)


def test_the_objective_is_the_mean_over_the_batch_and_its_work_a_fraction(comm: MPI.Comm) -> None:
    batches = made(comm, batch_overlap=0.2)
    objective, whole = batches.objective, loss_of(103)
    x = objective.layout.vector()
    objective.initial(x)
    g = x.duplicate()
    theta = whole.initial()
    for number in range(3):
        before = objective.work.total
        value = objective.value_gradient(x, g)
        rows = batches.rows
        expected = torch.zeros(whole.size, dtype=torch.float64)
        outputs = whole.module(whole.inputs[torch.as_tensor(rows)])
        mean = torch.nn.functional.cross_entropy(outputs, whole.targets[torch.as_tensor(rows)])
        assert value == pytest.approx(float(mean.detach()), rel=1e-12)
        whole.sampled(torch.as_tensor(rows)).value_gradient(theta, expected)
        np.testing.assert_allclose(objective.layout.gather(g).numpy(), expected.numpy(), rtol=1e-10, atol=1e-14)
        assert objective.work.total - before == pytest.approx(len(rows) / 103)
        assert objective.version == number + 1
        if number:
            before = objective.work.total
            common = sampled(objective, objective.replacement.overlap)
            there = whole.sampled(torch.as_tensor(batches.shared)).value(theta)
            assert common.value(x) == pytest.approx(there, rel=1e-12)
            assert objective.work.total - before == pytest.approx(
                len(batches.shared) / 103 * whole.charges.evaluation(gradient=False)
            )
        batches.move(NONE)
    x.destroy()
    g.destroy()


@pytest.mark.parametrize(("size", "count", "steps"), [(30, 103, 2), (2500, 5000, 2), (2501, 5002, 5), (2501, 5000, 2)])
def test_iterations_on_a_batch(comm: MPI.Comm, size: int, count: int, steps: int) -> None:
    assert made(comm, count, batch_size=size).interval == steps
    assert made(comm, count, batch_size=size, batch_steps=7).interval == 7


def test_batches_grow_where_a_new_one_belies_the_old(comm: MPI.Comm) -> None:
    batches = made(comm, count=6000, batch_size=1000, batch_growth=1.7, batch_overlap=0.1)
    objective = batches.objective
    sizes, starts = [], []
    for agreement in (math.nan, 0.3, 0.2, 0.2, 0.9, -1.0, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1):
        before, version = batches.rows, objective.version
        objective.replacement.report(agreement)
        batches.move(NONE)
        sizes.append(batches.per_epoch)
        starts.append(batches.index)
        assert batches.wanted == round(0.1 * -(-6000 // batches.per_epoch))
        assert batches.interval == (5 if batches.per_epoch < 3 else 2)
        if len(before) < 6000:
            assert np.array_equal(batches.shared, np.intersect1d(batches.rows, before))
        assert objective.version == version + (len(before) < 6000)  # all samples stay what they are
        assert objective.fraction == len(batches.rows) / 6000
    assert sizes == [6, 6, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1]
    assert starts == [1, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert np.array_equal(batches.rows, np.arange(6000))
    fixed = made(comm, count=6000, batch_size=1000)
    fixed.judge(-1.0)
    fixed.move(NONE)
    assert fixed.per_epoch == 6
    for number in (2, 5):  # a state goes on as the batches it is of
        first = made(comm, count=600, batch_size=100, batch_growth=1.5)
        for _ in range(number):
            first.judge(0.1)
            first.move(NONE)
        second = made(comm, count=600, batch_size=100, batch_growth=1.5)
        second.restore(first.state())
        assert (second.per_epoch, second.interval) == (first.per_epoch, first.interval)
        for agreement in (0.9, 0.1, 0.9):
            for batches in (first, second):
                batches.judge(agreement)
                batches.move(NONE)
            assert np.array_equal(first.rows, second.rows) and np.array_equal(first.shared, second.shared)


def test_what_is_refused(comm: MPI.Comm) -> None:
    with pytest.raises(InputError, match="-batch_overlap must be at most 1"):
        made(comm, batch_overlap=1.5)
    state = made(comm, count=100).state()
    for wrong in (state, {"draws": 3, "points": {}}):
        with pytest.raises(InputError, match="there are 103"):
            made(comm).restore(wrong)


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["lbfgs", "ssbroyden", "aspqn", "mspqn"])
def test_runs_restart_exactly_and_are_the_same_on_any_number_of_ranks(
    comm: MPI.Comm, prefix: str, shared_tmp: Path, solver: str
) -> None:
    if "spqn" in solver:
        PETSc.Options().setValue(prefix + "local_steps", 2)

    def made(comm: MPI.Comm, max_it: int, **limits: Any) -> Training:
        run = trained(comm, prefix, solver, max_it=max_it, **limits)
        assert max_it < 14 or run.moving.number == 4
        return run

    # within the first batch and another, at the end of one that is the end of an epoch, too
    assert_goes_on(made, comm, str(shared_tmp / "run.h5"), 14, [1, 4, 12])


def test_local_solves_are_charged_for_the_batch(comm: MPI.Comm, prefix: str) -> None:
    """An iteration of MSPQN costs the same fraction of what it costs on all samples as a batch has of them."""
    PETSc.Options().setValue(prefix + "local_steps", 2)
    run = trained(comm, prefix, "mspqn", max_it=2)
    fraction = len(run.moving.rows) / run.moving.total
    work, calls = run.objective.work.total, run.objective.work.gradients
    assert work < 1.2 * calls * fraction
    run.result()


def test_solvers_of_petsc_begin_afresh_on_every_batch(comm: MPI.Comm, prefix: str) -> None:
    run = trained(comm, prefix, "lmvm", max_it=8)
    assert run.moving.number == 2
    assert run.run.history["iteration"].tolist() == list(range(9))
    run.result()
