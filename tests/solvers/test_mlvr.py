"""Cycles over nested sets of samples, against dense NumPy: sub-sampled Newton, SVRG and SARAH are cases of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_newton import Logistic, data, linear_loss
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.sampling.nested import NestedSets
from solvers import Minimisation

Train = Callable[..., SimpleNamespace]
Array = NDArray[np.float64]

N = 300
X, y = data(N, 8)
DENSE, START = Logistic(X, y), np.zeros(8)
EXACT = {"coarse_newton_ksp_max_it": 60, "coarse_newton_ksp_atol": 1e-15}


def loss() -> Any:
    return linear_loss(X, y, START)


def sets(size: int, number: int, seed: int = 0) -> NestedSets:
    """Those of a cycle."""
    found = NestedSets(N, [size, N], seed)
    found.draw(number)
    return found


def test_one_newton_step_on_two_levels_is_subsampled_newton(train: Train) -> None:
    run = train(loss(), "ssn", 6, coarse_rate=0.5, **EXACT)
    theta = START
    for k in range(6):
        H = DENSE.on(sets(30, k).rows(0)).hessian(theta)
        theta = theta - 0.5 * np.linalg.solve(H, DENSE.gradient(theta))
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-11  # the matrix has condition 1e3


def test_with_a_search_any_decrease_is_taken(train: Train) -> None:
    """Of -2 H_D^-1 g as the coarse correction, halved until the loss decreases."""
    given = {"coarse_solver": "newton", "coarse_steps": 1, "coarse_line_search": False, "coarse_rate": 4.0}
    run = train(loss(), "mlvr", 9, **given, **EXACT)
    theta, halved, dropped = START, 0, 0
    for k in range(len(run.theta) - 1):
        part, g = DENSE.on(sets(30, k).rows(0)), DENSE.gradient(theta)
        step, length = -4.0 * np.linalg.solve(part.hessian(theta), g), 1.0
        if part.value(theta + step) + (g - part.gradient(theta)) @ step < part.value(theta):
            while not DENSE.value(theta + length * step) < DENSE.value(theta):
                length /= 2
            halved += length < 1
            theta = theta + length * step
        else:
            dropped += 1
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-9
    assert halved and dropped


def test_gradient_steps_on_drawn_samples_are_svrg(train: Train) -> None:
    rate = 0.3
    run = train(loss(), "svrg", 2, coarse_rate=rate)
    theta = START
    for k in range(2):
        order, snapshot, whole = sets(16, k).order, theta.copy(), DENSE.gradient(theta)
        for i in range(-(-N // 16)):
            first = i * 16 % (N - 15)
            part = DENSE.on(np.sort(order[:16]) if i == 0 else order[first : first + 16])
            theta = theta - rate * (part.gradient(theta) - part.gradient(snapshot) + whole)
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-13
    assert run.losses[-1] < 0.8 * run.losses[0]


def test_with_a_moving_snapshot_they_are_sarah(train: Train) -> None:
    rate = 0.3
    run = train(loss(), "sarah", 2, coarse_rate=rate)
    theta = START
    for k in range(2):
        order, estimate, before = sets(16, k).order, DENSE.gradient(theta), theta
        for i in range(-(-N // 16)):
            if i:
                first = i * 16 % (N - 15)
                part = DENSE.on(order[first : first + 16])
                estimate = part.gradient(theta) - part.gradient(before) + estimate
            before, theta = theta, theta - rate * estimate
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-13


@pytest.mark.parametrize("solver", ["svrg", "sarah"])
def test_steps_to_where_the_loss_is_not_finite_are_taken_back(train: Train, solver: str) -> None:
    """Each step's end is evaluated on the samples of the next one; here all samples are the same."""
    walls = linear_loss(np.ones((60, 1)), np.zeros(60), np.array([0.5]), lambda t, _: -torch.log(1 - t[:, 0] ** 2))
    run = train(walls, solver, 1, coarse_rate=0.9)
    assert run.theta[-1] == pytest.approx(0.5 - 0.9 * 1 / 0.75, rel=1e-12)  # the second one leads behind a wall


def test_a_step_takes_two_gradients_of_its_samples(train: Train) -> None:
    """The first one begins where the gradients agree, and the end of the last one is evaluated."""
    steps = -(-N // 16)
    for solver in ("svrg", "sarah"):
        run = train(loss(), solver, 2, coarse_rate=0.1)
        assert np.diff(run.total) == pytest.approx(16 / N * 2 * steps + 1)


@pytest.mark.parametrize(
    ("settings", "cycles"),
    [
        ({"coarsening": 4}, 20), ({"levels": 3, "coarsening": 2}, 20),
        ({"cycle": "W", "levels": 3, "coarsening": 2}, 12), ({"fixed_sets": True, "coarsening": 3}, 40),
        ({"smoother": "gradient", "post_steps": 1, "coarsening": 4}, 16),
        ({"levels": 4, "coarsening": 2, "cycle": "F", "smoother": "lbfgs"}, 8), ({"coarse_solver": "bntr"}, 40),
    ],
)  # fmt: skip
def test_it_comes_to_the_minimiser(train: Train, settings: dict[str, Any], cycles: int) -> None:
    run = train(loss(), "mlvr", cycles, **settings)
    assert np.abs(run.theta[-1] - DENSE.minimiser()).max() <= 1e-5
    assert (np.diff(run.losses) <= 1e-15).all()


def test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly(
    train: Train, copied: Any, comm: MPI.Comm
) -> None:
    settings = {"levels": 3, "coarsening": 4, "smoother": "lbfgs"}
    alone = train(loss(), "mlvr", 6, MPI.COMM_SELF, blocks=8, **settings)
    run = train(loss(), "mlvr", 6, blocks=8, **settings)
    assert (run.theta == alone.theta).all() and (run.losses == alone.losses).all()
    states: list[Any] = []

    def keep(context: Any, iteration: int) -> None:
        if iteration == 3:
            states.append(copied(context.state()))

    train(loss(), "mlvr", 3, blocks=8, watch=keep, **settings)
    again = train(loss(), "mlvr", 6, blocks=8, start=run.theta[3], state=states[0], **settings)
    assert (again.theta[-1] == run.theta[-1]).all()


def test_work_is_that_of_the_samples(train: Train) -> None:
    """A Newton step of two products on a tenth, and the gradient; with a search the coarse ones before and behind."""
    run = train(loss(), "ssn", 3, coarse_newton_ksp_max_it=2)
    made = loss()
    product = made.charges.hessian()
    assert np.diff(run.total) == pytest.approx(0.1 * 2 * product + 1)
    searched = train(loss(), "ssn", 3, coarse_newton_ksp_max_it=2, coarse_line_search=True)
    assert np.diff(searched.total) == pytest.approx(0.1 * (1 + 2 * product + 1) + 1)
    assert run.total == pytest.approx(run.critical)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"levels": 5}, "too many for 300 samples"),
        ({"coarsening": 1.0}, "must be more than 1"),
        ({"coarse_samples": 300}, "coarse_samples must be less than the 300"),
        ({"redrawn": True, "levels": 3, "coarsening": 4}, "is for two levels"),
        ({"coarse_solver": "nothing"}, "nothing"),
        ({"coarse_solver": "gauss_newton"}, "residual"),
    ],
)
def test_bad_options_are_refused(comm: MPI.Comm, settings: dict[str, Any], said: str) -> None:
    database = PETSc.Options()
    for key, value in settings.items():
        database.setValue(f"bad_{key}", value)
    try:
        with pytest.raises((InputError, PETSc.Error), match=said):
            Minimisation(loss(), "mlvr", comm, "bad_").tao.solve()
    finally:
        for key in settings:
            database.delValue(f"bad_{key}")
