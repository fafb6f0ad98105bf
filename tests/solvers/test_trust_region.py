"""Trust-region methods against dense implementations."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import batches, classifier
from dense_trust_region import Batches, dense_first_order, every, norm_of_chain
from mpi4py import MPI

from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.runs import run_file
from ddml.runs.history import History

Train = Callable[..., SimpleNamespace]


Make = Callable[..., Loss]


@pytest.mark.parametrize("norm", ["modular", "2", "infinity"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_first_order_iterates_are_those_of_a_dense_implementation(train: Train, norm: str, momentum: float) -> None:
    loss = classifier()
    run = train(loss, "tr", 40, norm=norm, momentum=momentum, delta0=0.4, delta_max=1.0)
    iterates, values = dense_first_order(norm, 40, 0.4, momentum, lambda k: loss)
    assert np.abs(run.theta - iterates).max() <= 1e-9
    assert run.losses == pytest.approx(values, rel=1e-9)
    assert (run.steps[1:] == 0).any()  # some steps were rejected
    assert run.gradients[-1] == 41  # an evaluation an iteration


def test_defaults_are_the_modular_norm_and_the_measured_constants(train: Train) -> None:
    loss = classifier()
    run = train(loss, "tr", 15)
    assert np.abs(run.theta - dense_first_order("modular", 15, 0.1, 0.9, lambda k: loss)[0]).max() <= 1e-9


def test_new_batches_and_the_brake(train: Train) -> None:
    parts = batches(classifier(), 12, 9)
    run = train(parts[0], "tr", 40, watch=Batches(parts, 5))
    iterates, values = dense_first_order("modular", 40, 0.1, 0.9, lambda k: parts[k // 5])
    assert np.abs(run.theta - iterates).max() <= 1e-8
    assert run.losses == pytest.approx(values, rel=1e-8)
    assert run.gradients[-1] == 41 + 7


def test_the_brake_is_needed_for_those_iterates() -> None:
    """The reference itself brakes on these batches: without that it takes another way."""
    parts = batches(classifier(), 12, 9)
    ways = [dense_first_order("modular", 40, 0.1, 0.9, lambda k: parts[k // 5], b)[0] for b in (math.sqrt(2), 1.0)]
    assert np.abs(ways[0] - ways[1]).max() > 1e-3


@every
@pytest.mark.parametrize("float32", [False, True])
def test_monotone_methods_never_increase_the_loss(train: Train, model: str, norm: str, float32: bool) -> None:
    loss = classifier(dtype=torch.float32 if float32 else torch.float64)
    run = train(loss, "tr", 80, model=model, norm=norm, delta0=0.5)
    assert (np.diff(run.losses) <= 0).all()
    assert run.losses[-1] < (0.05 if model == "first" else 0.01) * run.losses[0]
    moved = np.abs(np.diff(run.theta, axis=0)).max(axis=1) > 0
    assert ((run.steps[1:] > 0) == moved).all()


@pytest.mark.ranks
@every
def test_the_trajectory_is_that_on_one_rank(train: Train, model: str, norm: str) -> None:
    parts = batches(classifier(), 30, 4)
    settings = {"model": model, "norm": norm, "delta0": 0.3}
    together = train(parts[0], "tr", 15, watch=Batches(parts, 5), **settings)
    alone = train(parts[0], "tr", 15, comm=MPI.COMM_SELF, watch=Batches(parts, 5), **settings)
    assert np.abs(together.theta - alone.theta).max() <= 1e-8
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)
    assert together.total == pytest.approx(alone.total, rel=1e-12)


@every
@pytest.mark.parametrize("at", [7, 10])
def test_a_resumed_run_goes_on_to_the_last_bit(train: Train, copied: Any, model: str, norm: str, at: int) -> None:
    """Also where the batch has just been replaced, at iteration 10."""
    parts, settings = batches(classifier(), 30, 5), {"model": model, "norm": norm, "delta0": 0.3, "nonmonotone": 3}
    watch = Batches(parts, 5, at=at, copied=copied)
    whole = train(parts[0], "tr", 22, watch=watch, **settings)
    now = parts[at // 5]
    # the batch that was replaced at iteration 10 has been seen by the run's state only
    rest = train(now, "tr", 22, start=whole.theta[at], state=watch.state, watch=Batches(parts, 5, first=at), **settings)
    assert rest.theta.tobytes() == whole.theta[at + 1 :].tobytes()
    assert rest.losses.tobytes() == whole.losses[at + 1 :].tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_near_directions_of_large_matrices(train: Train, copied: Any, momentum: float) -> None:
    """Steps within the norm, a true prediction, the same bits in one and in two runs and on all ranks."""
    loss = classifier()
    given = {"momentum": momentum, "delta0": 0.3, "polar_exact": 2, "polar_tolerance": 0.3}
    promises: list[tuple[float, float, float]] = []

    def watch(context: Any, iteration: int) -> None:
        if iteration == 3:
            s = context.g.duplicate()
            predicted, length = context.model.step(context.point, context.g, 0.2, s)
            promises.append((predicted, -float(context.g.dot(s)), length))
            full = context.objective.layout.gather(s).numpy()
            promises.append((norm_of_chain(full), 0.2, norm_of_chain(full)))
            s.destroy()

    train(loss, "tr", 3, watch=watch, **given)
    (predicted, true, length), (largest, delta, _) = promises
    assert predicted == pytest.approx(true, rel=1e-12)
    assert length == delta
    assert 0.99 * delta <= largest <= delta * (1 + 1e-12)
    exact = train(loss, "tr", 30, **{**given, "polar_exact": 256})
    seen = Batches([], 1000, at=10, copied=copied)
    near = train(loss, "tr", 30, blocks=12, gathered=True, watch=seen, **given)
    assert np.abs(near.theta[1] - exact.theta[1]).max() > 1e-6
    assert near.losses[-1] < max(2 * exact.losses[-1], 0.01 * exact.losses[0])
    alone = train(loss, "tr", 30, comm=MPI.COMM_SELF, blocks=12, gathered=True, **given)
    assert alone.theta.tobytes() == near.theta.tobytes()
    rest = train(loss, "tr", 30, blocks=12, gathered=True, start=near.theta[10], state=seen.state, **given)
    assert rest.theta.tobytes() == near.theta[11:].tobytes()


def test_a_first_order_method_keeps_seven_vectors(train: Train) -> None:
    held: list[int] = []

    def watch(context: Any, iteration: int) -> None:
        held.append(len({vec.handle for vec in context.vectors.values()}))

    train(classifier(), "tr", 2, watch=watch)
    assert set(held) == {5}  # besides theta and the momentum


@pytest.mark.ranks
@every
def test_a_run_file_goes_on_on_another_number_of_ranks(
    train: Train, copied: Any, comm: MPI.Comm, shared_tmp: Path, model: str, norm: str
) -> None:
    loss, settings = classifier(), {"model": model, "norm": norm, "delta0": 0.3}
    if model == "gauss_newton":  # long steps of conjugate gradients that end early make the most of rounding errors
        settings |= {"delta0": 0.1, "delta_max": 0.1}
    watch = Batches([], 1000, at=7, copied=copied)
    whole = train(loss, "tr", 11, watch=watch, **settings)
    layout, alone = ParameterLayout(loss.parameters, comm), ParameterLayout(loss.parameters, MPI.COMM_SELF)
    x, y = layout.vector(), alone.vector()
    begin, end = x.getOwnershipRange()
    x.setArray(whole.theta[7][begin:end])
    path = str(shared_tmp / "run.h5")
    run_file.write(path, x, parameters=loss.parameters, state={"solver": watch.state}, history=History(), attributes={})
    state, _ = run_file.read(path, y)
    rest = train(loss, "tr", 11, comm=MPI.COMM_SELF, start=y.array_r.copy(), state=state["solver"], **settings)
    assert np.abs(rest.theta - whole.theta[8:]).max() <= 1e-10
    x.destroy()
    y.destroy()
