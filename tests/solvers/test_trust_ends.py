"""How trust-region runs end, and which options do not go together."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import classifier
from mpi4py import MPI
from petsc4py import PETSc
from whole_runs import Training

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective
from ddml.parallel import cause

Train = Callable[..., SimpleNamespace]


Make = Callable[..., Loss]


def test_a_run_ends_where_nothing_decreases_the_loss(train: Train, sum_over_rows: Any) -> None:
    loss = sum_over_rows(lambda theta, rows: (rows * theta**2).sum(dim=1), np.ones((3, 2)), [2], np.array([1.0, -3.0]))
    run = train(loss, "tr", 400, norm="2", momentum=0.0)
    assert run.reason == PETSc.TAO.ConvergedReason.CONVERGED_STEPTOL
    assert np.abs(run.theta[-1]).max() < 1e-7


def least_loss(table: np.ndarray, bend: float, start: np.ndarray) -> float:
    """The minimum of :func:`least_squares`, by Newton's method in extended precision."""
    A, b, theta = table[:, :-1].astype(np.longdouble), table[:, -1].astype(np.longdouble), start.astype(np.longdouble)
    for _ in range(60):
        z = A @ theta
        r, slope = z + bend * z**3 - b, 1 + 3 * bend * z**2
        H = (A.T * (slope**2 + 6 * bend * z * r)) @ A
        theta = theta - np.linalg.solve(H.astype(float), (A.T @ (slope * r)).astype(float))
    return float((r @ r) / 2)


@pytest.mark.parametrize(
    ("solver", "given"),
    [
        ("tr", {"norm": "2", "momentum": 0.0}),
        ("tr", {"norm": "2"}),
        ("tr", {"norm": "infinity"}),
        ("tr", {"model": "sr1"}),
        ("tr", {"model": "sr1", "nonmonotone": 3}),
        ("tr", {"model": "lbfgs"}),
        ("tr", {"model": "hessian"}),
        ("apts_data", {"norm": "2", "subdomains": 2}),
        ("apts_weights", {"norm": "2", "decomposition": "layers", "subdomains": 2}),
    ],
)
def test_a_run_at_rounding_has_converged(train: Train, least_squares: Make, solver: str, given: dict[str, Any]) -> None:
    bend = 0.1
    loss = least_squares([6, 4], bend=bend)
    run = train(loss, solver, 3000, gathered=True, blocks=4, **given)
    assert run.reason == PETSc.TAO.ConvergedReason.CONVERGED_STEPTOL
    least = least_loss(loss.rows.numpy(), bend, run.theta[-1])
    assert abs(run.losses[-1] - least) <= 1e-13 * least


@pytest.mark.parametrize("given", [{"norm": "2", "momentum": 0.0}, {"norm": "infinity"}, {"model": "lbfgs"}])
def test_a_run_on_wrong_gradients_has_failed(train: Train, sum_over_rows: Any, given: dict[str, Any]) -> None:
    """Its negative points to where the loss grows: no step decreases the loss, at any length."""

    def wrong(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        other = -(rows * theta).sum(dim=1)
        return (rows * theta**2).sum(dim=1).detach() + other - other.detach()

    run = train(sum_over_rows(wrong, np.ones((3, 2)), [2], np.array([1.0, 3.0])), "tr", 400, **given)
    assert run.reason == PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION
    assert run.losses[-1] == 30.0


class Still:
    """Samples that stay."""

    interval = 10**9

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def move(self, theta: torch.Tensor) -> None:
        raise AssertionError

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return


def test_the_last_line_of_a_run_at_rounding_says_so(comm: MPI.Comm, prefix: str, least_squares: Make) -> None:
    loss = least_squares([6, 4])
    PETSc.Options().setValue(prefix + "model", "sr1")
    done = Training(Still(Objective(loss, ParameterLayout(loss.parameters, comm))), prefix, "tr", max_it=1000)
    assert done.good
    assert done.run.summary().startswith("stopped: the step is below tao_steptol, or what is left to gain is rounding.")
    done.result()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "sr1", "norm": "modular"}, "needs -[a-z0-9_]*norm 2"),
        ({"model": "lbfgs", "norm": "infinity"}, "needs -[a-z0-9_]*norm 2"),
        ({"curvature_fraction": 1.5}, "curvature_fraction must be at most 1"),
        ({"shrink": 1.0}, "must be less than 1"),
        ({"accept": 0.8}, "must be less than -"),
        ({"momentum": 1.0}, "must be less than 1"),
        ({"polar_tolerance": 1.0}, "polar_tolerance must be less than 1"),
        ({"polar_tolerance": 0.0}, "polar_tolerance must be more than 0"),
        ({"polar_exact": -1}, "polar_exact must be 0 or more"),
        ({"masses": "1,x"}, "numbers separated by commas"),
        ({"masses": "1,2"}, "3 masses are needed"),
    ],
)
def test_what_does_not_go_together(train: Train, given: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, PETSc.Error)) as error:
        train(classifier(), "tr", 1, **given)
    found = cause(error.value, InputError)
    assert found is not None
    assert re.search(message, str(found))
