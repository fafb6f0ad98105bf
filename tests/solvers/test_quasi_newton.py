"""L-BFGS with momentum against a dense implementation that is driven with the step lengths the solver took."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from petsc4py import PETSc

from ddml.losses.loss import Loss
from solvers import LBFGS

Train = Callable[..., SimpleNamespace]
Make = Callable[..., Loss]
BEND = 0.1


class GradientStepFirst(LBFGS):
    """L-BFGS behind a small gradient step, so that the two secant rules differ."""

    def precondition(self, x: PETSc.Vec) -> float:
        x.axpy(-0.05, self.g)
        return self.objective.value_gradient(x, self.g)


def dense_gradient(loss: Any) -> Callable[[np.ndarray], np.ndarray]:
    A, b = loss.rows[:, :-1].numpy(), loss.rows[:, -1].numpy()

    def gradient(theta: np.ndarray) -> np.ndarray:
        z = A @ theta
        return A.T @ ((z + BEND * z**3 - b) * (1 + 3 * BEND * z**2))

    return gradient


def dense_inverse(pairs: list[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    if not pairs:
        return np.eye(n)
    s, y = pairs[-1]
    H = (s @ y) / (y @ y) * np.eye(n)
    for s, y in pairs:
        V = np.eye(n) - np.outer(y, s) / (s @ y)
        H = V.T @ H @ V + np.outer(s, s) / (s @ y)
    return H


def dense_lbfgs(
    loss: Any, steps: np.ndarray, memory: int, momentum: float, skip: float, secant: str, move: float
) -> tuple[np.ndarray, list[bool]]:
    """Iterates (k, n), the first included, and which secant pairs were stored."""
    gradient, theta, stored = dense_gradient(loss), loss.initial().numpy().copy(), []
    n, v, iterates = len(theta), np.zeros(len(theta)), [theta]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    waiting: tuple[np.ndarray, np.ndarray] | None = None

    def store(s: np.ndarray, y: np.ndarray) -> None:
        nonlocal pairs
        stored.append(bool(s @ y > skip))
        if stored[-1]:
            pairs = [*pairs, (s, y)][-memory:] if memory else []

    for step in steps[1:]:
        half = theta - move * gradient(theta)
        g = gradient(half)
        if waiting is not None:
            store(waiting[0], g - waiting[1])
        p = -dense_inverse(pairs, n) @ g
        trial = (1 - momentum) * v + momentum * p
        v = trial if g @ trial < 0 else p
        theta = half + step * v
        if secant == "half":
            waiting = step * v, g
        else:
            store(step * v, gradient(theta) - g)
        iterates.append(theta)
    return np.array(iterates), stored


@pytest.mark.parametrize("move", [0.0, 0.05])
@pytest.mark.parametrize("secant", ["step", "half"])
@pytest.mark.parametrize(
    ("memory", "momentum", "skip"),
    [
        (3, 0.9, 1e-15), (3, 1.0, 1e-15), (1, 0.5, 1e-15), (8, 0.9, 1e-15), (0, 0.9, 1e-15),
        (3, 0.9, 1e-3), (3, 0.9, 1e9),
    ],
)  # fmt: skip
def test_iterates_are_those_of_a_dense_implementation(
    train: Train, least_squares: Make, memory: int, momentum: float, skip: float, secant: str, move: float
) -> None:
    loss = least_squares([4, 5, 6], bend=BEND, seed=3)
    settings = {"memory": memory, "momentum": momentum, "curvature_skip": skip, "secant": secant, "first_step": "0.1"}
    run = train(loss, GradientStepFirst() if move else "lbfgs", 15, **settings)
    assert len(run.losses) == 16
    assert (run.steps[1:] > 0).all()
    expected, stored = dense_lbfgs(loss, run.steps, memory, momentum, skip, secant, move)
    assert np.abs(run.theta - expected).max() <= 1e-10 * np.abs(expected).max()
    assert not np.allclose(expected[-1], expected[0], rtol=0.1)
    assert {1e-15: all(stored), 1e-3: any(stored) and not all(stored), 1e9: not any(stored)}[skip]


def test_the_two_secant_rules_differ_behind_a_preconditioner_only(train: Train, least_squares: Make) -> None:
    loss = least_squares([4, 5, 6], bend=BEND)
    plain = [train(loss, "lbfgs", 8, secant=rule).theta for rule in ("step", "half")]
    moved = [train(loss, GradientStepFirst(), 8, secant=rule).theta for rule in ("step", "half")]
    assert np.array_equal(*plain)
    assert np.array_equal(moved[0][:2], moved[1][:2])
    assert np.abs(moved[0][-1] - moved[1][-1]).max() > 1e-8


@pytest.mark.parametrize("momentum", [0.9, 1.0])
@pytest.mark.parametrize("memory", [3, 10])
def test_a_quadratic_is_minimised(train: Train, least_squares: Make, memory: int, momentum: float) -> None:
    loss: Any = least_squares([4, 5, 6], seed=1)
    run = train(loss, "lbfgs", 60, memory=memory, momentum=momentum)
    A, b = loss.rows[:, :-1].numpy(), loss.rows[:, -1].numpy()
    solution, squares, *_ = np.linalg.lstsq(A, b)
    assert (np.diff(run.losses) <= 1e-15 * run.losses[0]).all()  # PETSc's Wolfe test forgives rounding
    assert run.losses[-1] == pytest.approx(squares[0] / 2, rel=1e-12)
    assert np.linalg.norm(run.theta[-1] - solution) <= 1e-6 * np.linalg.norm(solution)


def test_the_reported_losses_and_norms_are_those_of_the_iterates(train: Train, least_squares: Make) -> None:
    loss: Any = least_squares([4, 5, 6], bend=BEND)
    run = train(loss, "lbfgs", 10)
    gradient, A, b = dense_gradient(loss), loss.rows[:, :-1].numpy(), loss.rows[:, -1].numpy()
    for theta, f, norm in zip(run.theta, run.losses, run.norms, strict=True):
        z = A @ theta
        assert f == pytest.approx(np.sum((z + BEND * z**3 - b) ** 2) / 2, rel=1e-13)
        assert norm == pytest.approx(np.linalg.norm(gradient(theta)), rel=1e-10)


@pytest.mark.parametrize(("first_step", "expected"), [("1", 1.0), ("0.25", 0.25), ("scaled", None)])
def test_the_first_trial_step_is_the_one_asked_for(
    train: Train, sum_over_rows: Any, first_step: str, expected: float | None
) -> None:
    """On 1/2 |theta|^2 along steepest descent all three meet the Wolfe conditions at once."""
    start = np.array([1.0, -2.0, 3.0])
    loss = sum_over_rows(lambda theta, rows: rows[:, 0] * (theta @ theta) / 12, np.ones((6, 1)), [2, 1], start)
    run = train(loss, "lbfgs", 1, first_step=first_step, momentum=1)
    assert run.steps[1] == pytest.approx(1 / 6 if expected is None else expected, rel=1e-14)
    assert np.allclose(run.theta[1], (1 - run.steps[1]) * start, rtol=1e-14, atol=1e-15)
    assert run.gradients[1] == 2


def test_the_number_of_iterations_and_the_reason_are_reported(train: Train, least_squares: Make) -> None:
    run = train(least_squares([3, 3], bend=BEND), "lbfgs", 4)
    assert len(run.losses) == 5
    assert run.reason == PETSc.TAO.ConvergedReason.DIVERGED_MAXITS
