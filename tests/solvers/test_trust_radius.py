"""The radius: when it shrinks and grows, and what is accepted."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import batches, classifier, value_gradient
from dense_trust_region import every
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.parallel import cause
from solvers.trust_region.radius import TrustRadius

Train = Callable[..., SimpleNamespace]


Make = Callable[..., Loss]


@every
def test_trials_that_are_not_finite_shrink_the_radius(train: Train, sum_over_rows: Any, model: str, norm: str) -> None:
    """log theta, with a first trial far beyond 0."""
    rng = np.random.default_rng(0)

    def barrier(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (rows * theta).sum(dim=1) - torch.log(theta).sum() / 8

    loss = sum_over_rows(barrier, rng.uniform(0.5, 1.5, (8, 3)), [1, 2], np.full(3, 2.0))
    if norm in ("modular", "kfac"):
        with pytest.raises((InputError, PETSc.Error)):
            train(loss, "tr", 1, norm=norm)
        return
    if model == "gauss_newton":
        with pytest.raises((InputError, PETSc.Error)) as error:
            train(loss, "tr", 1, model=model)
        assert "convex in a network's outputs" in str(cause(error.value, InputError))
        return
    radii: list[float] = []
    run = train(
        loss, "tr", 120, model=model, norm=norm, delta0=50.0, delta_max=100.0,
        watch=lambda context, _: radii.append(context.radius.value),
    )  # fmt: skip
    assert np.isfinite(run.losses).all() and np.isfinite(run.theta).all() and (run.theta > 0).all()
    assert run.steps[1] == 0 and radii[1] == 25.0
    exact = 1 / loss.rows.numpy().sum(axis=0)
    assert np.abs(run.theta[-1] - exact).max() <= (1e-6 if model != "first" else 0.05)


def settings(**changed: Any) -> Any:
    values = {
        "delta0": 1.0, "delta_min": 1e-4, "delta_max": 8.0, "accept": 1e-4, "shrink_below": 0.25, "grow_above": 0.75,
        "shrink": 0.5, "grow": 2.0, "nonmonotone": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def test_the_controller() -> None:
    eps = float(np.finfo(np.float32).eps)
    radius = TrustRadius(settings(), "modular", eps)
    radius.begin(2.0)
    assert radius.judge(1.0, 1.0) and radius.value == 2.0
    assert radius.judge(0.5, 1.0) and radius.value == 2.0
    assert not radius.judge(0.6, 1e-12) and radius.value == 1.0  # a tiny prediction is no reason to accept an increase
    assert radius.judge(0.5, 1e-9) and radius.value == 1.0  # nor one to shrink; and no growth on rounding errors
    assert radius.judge(0.4, 1.0) and radius.value == 0.5
    assert not radius.judge(0.39999, 1.0) and radius.value == 0.25
    assert not radius.judge(math.nan, 1.0) and not radius.judge(-math.inf, 1.0) and radius.value == 0.0625
    assert not radius.judge(0.3, -1.0)
    assert radius.judge(0.3, 0.1, limited=False) and radius.value == 0.03125
    radius.renew(5.0, 1e-9)
    assert radius.value == 1e-4 and radius.reference == 5.0
    for _ in range(40):
        assert radius.judge(radius.reference - 0.1, 0.1)
    assert radius.value == 8.0
    assert radius.rejected == 5


@pytest.mark.parametrize(("given", "momentum", "limit"), [(None, False, 0.75), (None, True, 0.9), (0.6, True, 0.6)])
def test_it_grows_above_another_ratio_with_momentum(given: float | None, momentum: bool, limit: float) -> None:
    radius = TrustRadius(settings(grow_above=given), "modular", 1e-16)
    radius.begin(1.0)
    assert radius.judge(1.01 - limit, 1.0, True, momentum) and radius.value == 1.0
    assert radius.judge(1.0 - 2 * limit, 1.0, True, momentum) and radius.value == 2.0


def test_a_refused_interior_step_is_not_tried_again(train: Train, sum_over_rows: Any) -> None:
    """A Newton step that lies well inside of the radius and increases the loss."""
    trials: list[np.ndarray] = []

    def well(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * (2 - torch.exp(-(theta[0] ** 2) / 2)) + rows[:, 0] * theta[1] ** 2

    def watch(context: Any, iteration: int) -> None:
        if iteration:
            trials.append(context.objective.layout.gather(context.vectors["trial"]).numpy().copy())

    loss = sum_over_rows(well, np.ones((4, 1)), [1, 1], np.array([0.9, 0.1]))
    run = train(loss, "tr", 8, watch=watch, model="hessian", delta0=100.0)
    assert run.steps[1] == 0  # refused
    assert np.abs(trials[0]).max() < 10  # and short
    assert all((one != other).any() for one, other in itertools.pairwise(trials[:4]))
    assert run.losses[-1] < run.losses[0]


def test_after_a_refusal_the_radius_is_less_than_the_step() -> None:
    radius = TrustRadius(settings(), "modular", float(np.finfo(np.float32).eps))
    radius.begin(2.0)
    radius.value = 8.0
    assert not radius.judge(3.0, 1.0, size=1.5) and radius.value == 0.75
    assert not radius.judge(3.0, 1.0, size=1.5) and radius.value == 0.375
    assert radius.judge(1.99, 1.0, size=0.1) and radius.value == 0.1875


def test_the_window() -> None:
    radius = TrustRadius(settings(nonmonotone=2), "modular", 1e-16)
    radius.begin(3.0)
    for f in (1.0, 2.0, 1.5):
        assert radius.judge(f, 0.5)
    assert radius.recent == [1.0, 2.0, 1.5]
    assert not radius.judge(2.1, 0.5) and radius.judge(1.9, 0.2)
    assert radius.recent == [2.0, 1.5, 1.9]
    again = TrustRadius(settings(nonmonotone=2), "modular", 1e-16)
    again.restore(radius.state())
    assert again.state() == radius.state()


def test_agreement_of_batches(train: Train) -> None:
    """The decrease that the old batch's gradient promised, by the trapezoidal rule on the new one."""
    parts, found, told = batches(classifier(), 12, 9), [], []

    def watch(context: Any, iteration: int) -> None:
        found.append(told[-1] if told else math.nan)
        if iteration in (5, 10):
            context.objective.replace(parts[iteration // 5], report=told.append)

    run = train(parts[0], "tr", 12, watch=watch)
    assert np.isnan(found[:6]).all()
    for k, value in ((5, found[6]), (10, found[11])):
        S = run.theta[k] - run.theta[k - 5]
        promised = value_gradient(parts[k // 5 - 1], run.theta[k - 5])[1] @ S
        there = value_gradient(parts[k // 5], run.theta[k])[1] @ S
        assert value == pytest.approx((1 + there / promised) / 2, rel=1e-8) or (promised >= 0 and math.isnan(value))


def test_windowed_runs(train: Train) -> None:
    run = train(classifier(), "tr", 60, norm="2", nonmonotone=4, delta0=8.0, momentum=0.0)
    assert (np.diff(run.losses) > 0).any()
    for k in range(1, len(run.losses)):
        accepted = [f for i, f in enumerate(run.losses[:k]) if i == 0 or run.steps[i] > 0]
        assert run.losses[k] <= max(accepted[-5:])
