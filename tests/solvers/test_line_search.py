"""The line search: strong Wolfe conditions, trials that are no numbers, failures, and what it costs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective
from solvers.line_search import LineSearch


class Searched:
    """A search from the loss's initial point along a multiple of steepest descent."""

    def __init__(self, comm: MPI.Comm, prefix: str, loss: Loss, scale: float = 1.0) -> None:
        self.objective = Objective(loss, ParameterLayout(loss.parameters, comm))
        self.search = LineSearch(self.objective, prefix)
        self.x, self.g, self.d = (self.objective.layout.vector() for _ in range(3))
        self.objective.initial(self.x)
        self.f = self.objective.value_gradient(self.x, self.g)
        self.g.copy(self.d)
        self.d.scale(-scale)
        self.start = self.x.array_r.copy(), self.g.array_r.copy()
        self.slope = self.g.dot(self.d)
        self.x0 = self.x.copy()
        self.objective.work.reset()

    def __call__(self, first: float = 1.0) -> Any:
        return self.search(self.x, self.f, self.g, self.d, first)

    @property
    def evaluations(self) -> int:
        return self.objective.work.gradients

    def assert_consistent(self, value: float, step: float) -> None:
        """x is start + step d, value and g are those there."""
        self.x0.axpy(step, self.d)
        self.x0.axpy(-1.0, self.x)
        assert self.x0.norm() <= 1e-14 * (1 + self.x.norm())
        g = self.objective.layout.vector()
        assert self.objective.value_gradient(self.x, g) == value
        assert np.array_equal(g.array_r, self.g.array_r)

    def assert_restored(self) -> None:
        assert np.array_equal(self.x.array_r, self.start[0])
        assert np.array_equal(self.g.array_r, self.start[1])


@pytest.mark.parametrize("first", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("bend", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_accepted_steps_meet_the_strong_wolfe_conditions(
    comm: MPI.Comm, prefix: str, least_squares: Callable[..., Loss], first: float, bend: float, seed: int
) -> None:
    searched = Searched(comm, prefix, least_squares([3, 4, 5], bend=bend, seed=seed))
    result = searched(first)
    assert result.success
    assert result.step > 0
    assert result.value <= searched.f + 1e-4 * result.step * searched.slope
    assert abs(searched.g.dot(searched.d)) <= 0.9 * abs(searched.slope)
    searched.assert_consistent(result.value, result.step)


@pytest.mark.parametrize("seed", range(4))
def test_a_first_trial_that_is_accepted_costs_one_evaluation(
    comm: MPI.Comm, prefix: str, least_squares: Callable[..., Loss], seed: int
) -> None:
    loss = least_squares([3, 4], seed=seed)
    searched = Searched(comm, prefix, loss)
    A = loss.rows[:, :-1].numpy()
    d = searched.objective.layout.gather(searched.d).numpy()
    minimiser = -searched.slope / np.sum((A @ d) ** 2)
    result = searched(minimiser)
    assert result.success
    assert result.step == minimiser
    assert searched.evaluations == 1


BEYOND = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf"), "huge": 1e13}


@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("limit", [0.5, 1e-3, 1e-6])
def test_trials_that_are_no_use_are_given_up_for_shorter_ones(
    comm: MPI.Comm, prefix: str, sum_over_rows: Any, kind: str, limit: float
) -> None:
    """The loss falls on the way to x = 1, and behind ``limit`` it is no number."""

    def function(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * (theta[0] - 1) ** 2 + (BEYOND[kind] if abs(theta[0]) >= limit else 0.0)

    loss = sum_over_rows(function, np.full((6, 1), 1 / 6), [1, 3], np.zeros(4))
    searched = Searched(comm, prefix, loss)
    result = searched()
    assert result.success
    assert 0 < 2 * result.step < limit
    assert 0 < result.value < searched.f
    searched.assert_consistent(result.value, result.step)


@pytest.mark.parametrize("kind", BEYOND)
def test_what_the_search_started_from_is_restored_where_every_trial_is_useless(
    comm: MPI.Comm, prefix: str, sum_over_rows: Any, kind: str
) -> None:
    def function(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * (theta[0] - 1) ** 2 + (BEYOND[kind] if theta[0] != 0 else 0.0)

    loss = sum_over_rows(function, np.ones((6, 1)), [1, 3], np.zeros(4))
    searched = Searched(comm, prefix, loss)
    result = searched()
    assert not result.success
    assert (result.value, result.step) == (searched.f, 0.0)
    assert searched.evaluations > 1
    searched.assert_restored()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_gradient_that_is_no_number_is_rejected_as_well(
    comm: MPI.Comm, prefix: str, sum_over_rows: Any, part: int
) -> None:
    """sqrt(max(0.1 - x, 0)) is finite for all x and has an infinite or undefined gradient from x = 0.1 on."""

    def function(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * torch.sqrt(torch.clamp(0.1 - theta[part], min=0.0)) + rows[:, 1]

    loss = sum_over_rows(function, np.ones((6, 2)), [1, 1, 1], np.zeros(3))
    searched = Searched(comm, prefix, loss)
    result = searched()
    assert result.success
    assert result.value < searched.f
    assert np.isfinite(searched.g.norm())
    searched.assert_consistent(result.value, result.step)


def test_no_step_is_found_uphill(comm: MPI.Comm, prefix: str, least_squares: Callable[..., Loss]) -> None:
    searched = Searched(comm, prefix, least_squares([3, 4]), scale=-1.0)
    result = searched()
    assert not result.success
    assert (result.value, result.step) == (searched.f, 0.0)
    searched.assert_restored()


def test_petsc_options_change_the_conditions(comm: MPI.Comm, prefix: str, least_squares: Callable[..., Loss]) -> None:
    PETSc.Options().setValue(f"{prefix}tao_ls_gtol", 1e-3)
    searched = Searched(comm, prefix, least_squares([3, 4, 5], bend=0.3))
    result = searched(1e-2)
    assert result.success
    assert abs(searched.g.dot(searched.d)) <= 1e-3 * abs(searched.slope)


@pytest.mark.parametrize("place", [1e-11, 1e-10, 1e-9])
def test_a_search_that_ends_in_rounding_leaves_nothing_to_the_next(
    comm: MPI.Comm, prefix: str, sum_over_rows: Any, place: float
) -> None:
    """1 + x^4 falls by nothing, where x is 1e-10; from x = 1 PETSc needs several trials."""

    def function(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * (1 + theta[0] ** 4)

    def searched(start: float) -> Searched:
        return Searched(comm, prefix, sum_over_rows(function, np.full((6, 1), 1 / 6), [1, 3], [start, 0.0, 0.0, 0.0]))

    tired, fresh = searched(place), searched(1.0)
    assert not tired().success
    tired.assert_restored()
    for vec in ("x", "g", "d"):
        getattr(fresh, vec).copy(getattr(tired, vec))
    tired.f = fresh.f
    tired.objective.work.reset()
    again, expected = tired(), fresh()
    assert again == expected
    assert expected.success and tired.evaluations == fresh.evaluations > 1
