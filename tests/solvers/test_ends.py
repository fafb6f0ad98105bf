"""Runs of solvers where a line search finds no bracket, or a step leads to where the loss is no number."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from ddml.losses.loss import Loss
from solvers import minimise

Make = Callable[..., Loss]
ROWS = np.linspace(0.5, 1.5, 8)[:, None]


def far(theta: Tensor, rows: Tensor) -> Tensor:
    return (1e-8 * theta * rows - rows).square().sum(1)


def straight(theta: Tensor, rows: Tensor) -> Tensor:
    return -(rows * theta).sum(1)


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["lbfgs", "ssbroyden", "mspqn"])
def test_a_search_without_a_bracket_takes_its_last_and_best_trial(
    comm: MPI.Comm, sum_over_rows: Make, solver: str
) -> None:
    """PETSc raises an error at the limit of evaluations then."""
    result = minimise(sum_over_rows(far, ROWS, [1, 1], np.zeros(2)), solver, comm, iterations=30)
    assert result.success and result.loss < 1e-15 * result.losses[0]
    loss = sum_over_rows(straight, ROWS, [1, 1], np.zeros(2))
    result = minimise(loss, solver, comm, {"local_steps": 2} if solver == "mspqn" else {}, iterations=3)
    assert result.iterations == 3 and (np.diff(result.losses) < 0).all()
    assert float(loss.value(result.theta)) == pytest.approx(result.loss, rel=1e-14)


def barrier(theta: Tensor, rows: Tensor) -> Tensor:
    """No number where an entry is negative."""
    return (4 * rows * theta - torch.log(theta)).sum(1)


def steep(theta: Tensor, rows: Tensor) -> Tensor:
    """At 0 the loss is finite and its first derivative is not."""
    return rows[:, 0] * theta[0].clamp(min=0) ** theta[1] + (theta[1] - 0.5) ** 2


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("adagrad", {"rate": 1.0}),
        ("asadagrad", {"rate": 1.0}),
        ("ssn", {"coarse_samples": 4, "coarse_rate": 20.0}),
        ("svrg", {"coarse_samples": 2, "coarse_rate": 3.0}),
        ("adam", {"rate": 3.0}),
        ("gradient", {"rate": 3.0, "line_search": False}),
    ],
)
def test_a_run_ends_where_its_loss_was_a_number(
    comm: MPI.Comm, sum_over_rows: Make, solver: str, options: dict[str, Any]
) -> None:
    loss = sum_over_rows(barrier, ROWS, [1, 1], np.array([0.9, 2.0]))
    result = minimise(loss, solver, comm, options, iterations=12)
    assert np.isfinite(result.loss) and np.isfinite(result.losses).all()
    assert float(loss.value(result.theta)) == pytest.approx(result.loss, rel=1e-13)


@pytest.mark.ranks
@pytest.mark.parametrize("options", [("mspqn", {}), ("aspqn", {"additive_step": 1})], ids=["mspqn", "aspqn"])
def test_corrections_to_where_the_gradient_is_infinite_are_left_out(
    comm: MPI.Comm, sum_over_rows: Make, options: tuple[str, dict[str, Any]]
) -> None:
    loss = sum_over_rows(steep, ROWS, [1, 1], np.array([0.0, 2.0]))
    result = minimise(loss, options[0], comm, {"local_steps": 4, **options[1]}, iterations=8)
    assert result.loss < result.losses[0]
    assert np.isfinite(result.gradient_norm)


@pytest.mark.ranks
@pytest.mark.parametrize("model", ["sr1", "lbfgs", "hessian"])
def test_a_gradient_whose_square_overflows_is_no_convergence(comm: MPI.Comm, sum_over_rows: Make, model: str) -> None:
    loss = sum_over_rows(lambda t, rows: 1e160 * ((t - 1) ** 2 * rows).sum(1), ROWS, [1, 1], np.array([2.0, 5.0]))
    result = minimise(loss, "tr", comm, {"model": model, "norm": "2"}, iterations=40)
    assert not (result.success and result.loss > 1.0)
