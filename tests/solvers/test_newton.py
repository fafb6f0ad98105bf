"""Newton's method by conjugate gradients, against dense matrices."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dense_newton import Logistic, data, linear_loss, steihaug
from mpi4py import MPI

from ddml.errors import InputError

Train = Callable[..., SimpleNamespace]

X, y = data(200, 18, seed=1)
DENSE, START = Logistic(X, y), np.zeros(18)


def loss(start: Any = START) -> Any:
    return linear_loss(X, y, start)


def test_iterates_are_those_of_dense_conjugate_gradients(train: Train) -> None:
    run, theta = train(loss(), "newton", 5), START
    assert np.array_equal(run.steps[1:], np.ones(5))
    for k in range(5):
        theta = theta + steihaug(DENSE.hessian(theta), DENSE.gradient(theta), math.inf, 0.0, 1e-9, 10)
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-10
    assert run.norms[-1] < 1e-2 * run.norms[0]


def test_solved_exactly_it_is_newtons_method_with_a_rate(train: Train) -> None:
    given = {"newton_ksp_type": "cg", "newton_ksp_max_it": 60, "newton_ksp_atol": 1e-14}
    run = train(loss(), "newton", 4, rate=0.5, line_search=False, **given)
    theta = START
    for k in range(4):
        theta = theta - 0.5 * np.linalg.solve(DENSE.hessian(theta), DENSE.gradient(theta))
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-9
    assert np.array_equal(run.steps[1:], np.full(4, 0.5))
    few = train(loss(), "newton", 1, newton_ksp_max_it=3).theta[1]
    assert np.abs(few - steihaug(DENSE.hessian(START), DENSE.gradient(START), math.inf, 0.0, 1e-9, 3)).max() <= 1e-12


def test_steps_that_are_too_long_are_halved_until_the_loss_decreases(train: Train) -> None:
    far = 3.0 * DENSE.minimiser()
    given = {"newton_ksp_type": "cg", "newton_ksp_max_it": 60, "newton_ksp_atol": 1e-14}
    run = train(loss(far), "newton", 1, **given)
    p = -np.linalg.solve(DENSE.hessian(far), DENSE.gradient(far))
    step, before = 1.0, DENSE.value(far)
    while not DENSE.value(far + step * p) < before:
        step /= 2
    assert run.steps[1] == step < 1 and run.gradients[-1] == 2 + round(math.log2(1 / step))
    assert np.abs(run.theta[1] - far - step * p).max() <= 1e-6 * np.abs(p).max()
    pure = train(loss(far), "newton", 1, line_search=False, **given)
    assert pure.losses[1] > pure.losses[0]
    assert np.abs(pure.theta[1] - far - p).max() <= 1e-6 * np.abs(p).max()


def well(theta: Any, rows: Any) -> Any:
    """sum (theta^2 - 1)^2, whose curvature is 12 theta^2 - 4."""
    return rows[:, 0] * ((theta**2 - 1) ** 2).sum()


@pytest.mark.parametrize(
    ("start", "before"), [([1.2, -0.9, 0.3, 2.0], False), ([0.2, -0.3, 0.1, 0.4], True), ([1.0, 0.9, 1.4, 2.0], False)]
)
def test_conjugate_gradients_end_before_negative_curvature(
    train: Train, sum_over_rows: Any, start: list[float], before: bool
) -> None:
    theta = np.array(start)
    run = train(sum_over_rows(well, np.full((8, 1), 1 / 8), [4], theta), "newton", 1)
    g, H = 4 * theta * (theta**2 - 1), np.diag(12 * theta**2 - 4)
    p = steihaug(H, g, math.inf, 0.0, 1e-9, 10)
    assert before == (not p.any())  # negative at once
    p = -g if before else p
    assert g @ p < 0 and (H.diagonal().min() < 0) == (min(np.abs(start)) < 0.5)
    assert np.abs(run.theta[1] - theta - run.steps[1] * p).max() <= 1e-12
    assert run.losses[1] < run.losses[0]


def test_it_fails_where_no_trial_decreases_the_loss(train: Train, sum_over_rows: Any) -> None:
    """|theta| has the curvature 0, and its gradient a step that is too long for 15 halvings."""
    kink = sum_over_rows(lambda theta, rows: rows[:, 0] * theta.abs().sum(), np.full((8, 1), 1 / 8), [1], [1e-6])
    run = train(kink, "newton", 5)
    assert run.reason < 0 and len(run.losses) == 1 and run.gradients[-1] == 1


def test_a_pure_step_to_where_there_is_no_loss_is_not_taken(train: Train, sum_over_rows: Any) -> None:
    """Newton's step for theta - log(theta) from 3 leads to -3; half of it to 0, a quarter to 1.5."""
    barrier = sum_over_rows(
        lambda theta, rows: rows[:, 0] * (theta - theta.log()).sum(), np.full((8, 1), 1 / 8), [1], np.array([3.0])
    )
    run = train(barrier, "newton", 5, line_search=False)
    assert run.reason < 0 and len(run.losses) == 1
    found = train(barrier, "newton", 8)
    assert found.steps[1] == 0.25 and found.theta[1] == pytest.approx(1.5) and found.theta[-1] == pytest.approx(1.0)


@pytest.mark.ranks
def test_the_iterates_are_the_same_on_any_number_of_ranks(train: Train) -> None:
    together, alone = (
        train(loss(), "newton", 6, comm=comm, blocks=6, gathered=True) for comm in (MPI.COMM_WORLD, MPI.COMM_SELF)
    )
    assert together.theta.tobytes() == alone.theta.tobytes() and len(np.unique(together.losses)) == 7


def test_a_run_goes_on_from_the_middle_to_the_last_bit(train: Train, copied: Callable[[Any], Any]) -> None:
    kept: list[Any] = []
    whole = train(loss(), "newton", 6, watch=lambda context, _: kept.append(copied(context.state())))
    rest = train(loss(), "newton", 6, start=whole.theta[3], state=kept[3])
    assert rest.theta.tobytes() == whole.theta[4:].tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rate": 0}, "rate must be more than 0"), ({"rate": "fast"}, "rate must be a number"),
     ({"line_search": "maybe"}, "line_search must be true or false"),
     ({"newton_ksp_type": "nothing"}, "PETSc refuses an option")],
)  # fmt: skip
def test_bad_options_are_refused(train: Train, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        train(loss(), "newton", 1, **settings)
    assert "\n" not in str(error.value)
