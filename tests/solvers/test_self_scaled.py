"""Self-scaled quasi-Newton methods against dense implementations that are driven with the step lengths they took."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss

Train = Callable[..., SimpleNamespace]
Make = Callable[..., Loss]
BOTH = pytest.mark.parametrize("solver", ["ssbroyden", "ssbfgs"])
FORMS = pytest.mark.parametrize("form", ["symmetric", "factored"])


def burgers() -> PDELoss:
    network = TanhNetwork(2, 6, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, 60)


def broyden_factors(b: float, h: float, n: int) -> tuple[float, float]:
    """Tau and phi of SSBroyden2, as in the published code."""
    a = b * h - 1
    c = min(1, h * (1 - math.sqrt(abs(a) / (1 + a))))
    low, high = (c - 1) / a, 1 / c
    theta = max(low, min(high, (1 - b) / b))
    sigma = 1 + theta * a
    bar = abs(sigma) ** (1 / (1 - n))
    tau = min(min(1, 1 / b) * bar, sigma) if theta <= 0 else min(1, 1 / b) * min(bar, 1 / theta)
    return tau, (1 - theta) / (1 + a * theta)


def dense_run(loss: Loss, steps: np.ndarray, solver: str) -> np.ndarray:
    """Iterates (k, n), with H and its inverse as matrices."""

    def gradient(theta: np.ndarray) -> np.ndarray:
        g = torch.zeros(loss.size, dtype=torch.float64)
        loss.value_gradient(torch.as_tensor(theta), g)
        return g.numpy()

    theta = loss.initial().numpy().copy()
    n, iterates = len(theta), [theta]
    H, g = np.eye(n), gradient(theta)
    for step in steps[1:]:
        s = -step * H @ g
        theta = theta + s
        new = gradient(theta)
        y = new - g
        Hy, rho = H @ y, 1 / (y @ s)
        # s.Bs with the matrix B = H^-1 itself, not by the relation of s and g
        b, h = rho * s @ np.linalg.solve(H, s), rho * y @ Hy
        tau, phi = broyden_factors(b, h, n) if solver == "ssbroyden" else (min(1, 1 / b), 1.0)
        v = rho * s - Hy / (y @ Hy)
        H = (H - np.outer(Hy, Hy) / (y @ Hy) + phi * (y @ Hy) * np.outer(v, v)) / tau + rho * np.outer(s, s)
        g = new
        iterates.append(theta)
    return np.array(iterates)


@BOTH
@FORMS
def test_iterates_are_those_of_a_dense_implementation(
    train: Train, least_squares: Make, solver: str, form: str
) -> None:
    loss = least_squares([10, 12, 15], rows=120, bend=1.0, seed=3)
    run = train(loss, solver, 50, matrix_form=form)
    assert len(run.losses) == 51
    assert (run.steps[1:] > 0).all()
    assert (np.diff(run.losses) < 0).all()
    expected = dense_run(loss, run.steps, solver)
    assert np.abs(run.theta - expected).max() <= 1e-10 * np.abs(expected).max()


@BOTH
@FORMS
def test_iterates_on_a_network_are_those_of_a_dense_implementation(train: Train, solver: str, form: str) -> None:
    run = train(burgers(), solver, 15, matrix_form=form)
    expected = dense_run(burgers(), run.steps, solver)
    assert np.abs(run.theta - expected).max() <= 1e-8 * np.abs(expected).max()
    assert run.losses[-1] < 0.5 * run.losses[0]


def test_the_two_methods_differ(train: Train) -> None:
    runs = [train(burgers(), solver, 15).theta for solver in ("ssbroyden", "ssbfgs")]
    assert np.abs(runs[0] - runs[1]).max() > 1e-3


@pytest.mark.ranks
@BOTH
@FORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks(
    train: Train, solver: str, dtype: str, form: str
) -> None:
    settings = {"blocks": 12, "matrix_dtype": dtype, "matrix_form": form}
    together = train(burgers(), solver, 20, **settings)
    alone = train(burgers(), solver, 20, comm=MPI.COMM_SELF, **settings)
    assert together.theta.tobytes() == alone.theta.tobytes()
    assert together.losses.tobytes() == alone.losses.tobytes()
    assert together.losses[-1] < 0.6 * together.losses[0]


@pytest.mark.ranks
@FORMS
def test_without_blocks_a_run_is_the_same_to_rounding(train: Train, form: str) -> None:
    together = train(burgers(), "ssbroyden", 15, matrix_form=form)
    alone = train(burgers(), "ssbroyden", 15, comm=MPI.COMM_SELF, matrix_form=form)
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)


@FORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_resumed_run_goes_on_to_the_last_bit_if_it_kept_the_matrix(
    train: Train, copied: Callable[[Any], Any], dtype: str, keep: bool, form: str
) -> None:
    kept: dict[str, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        if iteration == 7:
            kept.update(copied(context.state()))

    settings = {"matrix_dtype": dtype, "keep_matrix": keep, "matrix_form": form}
    whole = train(burgers(), "ssbroyden", 20, watch=watch, **settings)
    assert (kept["matrix"] is not None) == keep
    rest = train(burgers(), "ssbroyden", 20, start=whole.theta[7], state=kept, **settings)
    assert len(rest.losses) == 13
    assert (rest.losses.tobytes() == whole.losses[8:].tobytes()) == keep
    assert (np.diff(rest.losses) < 0).all()


@BOTH
@FORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_parameter_whose_gradient_vanishes(
    train: Train, sum_over_rows: Any, solver: str, dtype: str, form: str
) -> None:
    loss = sum_over_rows(lambda theta, rows: rows[:, 0] * (theta[0] - 2) ** 2, np.ones((4, 1)), [1], np.array([1.0]))
    run = train(loss, solver, 20, matrix_dtype=dtype, matrix_form=form)
    assert run.theta[-1] == pytest.approx([2.0], abs=1e-8)
    assert np.isfinite(run.losses).all()


def test_a_state_of_another_version_is_refused(train: Train) -> None:
    with pytest.raises(InputError, match="older ddml"):
        train(burgers(), "lbfgs", 2, state={"iteration": 1, "f": 1.0})


def diagonal(sum_over_rows: Any, orders: float, n: int = 20) -> Loss:
    """A quadratic whose curvatures are so many orders of magnitude apart: H has to become as badly conditioned."""
    curvature = np.logspace(0, orders, n)

    def squares(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * rows[:, 0] * (theta[rows[:, 1].long()] - 1) ** 2

    loss: Loss = sum_over_rows(squares, np.column_stack([curvature, np.arange(n)]), [8, n - 8], np.zeros(n))
    return loss


@pytest.mark.parametrize(("form", "orders"), [("symmetric", 10), ("factored", 14)])
def test_single_precision_gives_way_before_it_fails(train: Train, sum_over_rows: Any, form: str, orders: float) -> None:
    seen: list[str] = []
    run = train(
        diagonal(sum_over_rows, orders), "ssbroyden", 300, matrix_dtype="float32", matrix_form=form,
        watch=lambda c, _: seen.append(str(c.inverse.matrix.values.dtype)),
    )  # fmt: skip
    assert seen[0] == "float32"
    assert seen[-1] == "float64"
    assert run.losses[-1] < 1e-8 * run.losses[0]
    assert (np.diff(run.losses) <= 0).all()


def rotated(sum_over_rows: Any, n: int = 20) -> Loss:
    """A quadratic whose curvatures are 1e20 apart and whose directions all have the same share of the loss."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    rows = np.sqrt(np.logspace(0, 20, n))[:, None] * turn

    def squares(theta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * (rows @ theta) ** 2

    loss: Loss = sum_over_rows(squares, rows, [8, n - 8], np.linalg.solve(rows, np.ones(n)))
    return loss


def test_the_factor_holds_curvatures_that_the_matrix_does_not(train: Train, sum_over_rows: Any) -> None:
    runs = {f: train(rotated(sum_over_rows), "ssbroyden", 100, matrix_form=f) for f in ("symmetric", "factored")}
    assert runs["factored"].losses[-1] < 1e-10
    assert runs["symmetric"].losses[-1] > 1e-3


def test_where_rounding_shows_the_factor_takes_over(
    train: Train, sum_over_rows: Any, copied: Callable[[Any], Any]
) -> None:
    forms: list[str] = []
    kept: dict[int, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        forms.append(context.form)
        if iteration in (3, 60):
            kept[iteration] = copied(context.state())

    loss = rotated(sum_over_rows)
    settings = {"blocks": 12}
    whole = train(loss, "ssbroyden", 90, watch=watch, **settings)
    assert (forms[3], forms[60]) == ("symmetric", "factored")
    assert whole.losses[-1] < 1e-6
    assert (np.diff(whole.losses) <= 0).all()
    if MPI.COMM_WORLD.size > 1:
        alone = train(loss, "ssbroyden", 90, comm=MPI.COMM_SELF, **settings)
        assert alone.losses.tobytes() == whole.losses.tobytes()
        del kept[3]  # the whole run again, nearly: on one rank
    for iteration, state in kept.items():
        rest = train(loss, "ssbroyden", 90, start=whole.theta[iteration], state=copied(state), **settings)
        assert rest.losses.tobytes() == whole.losses[iteration + 1 :].tobytes()
    if MPI.COMM_WORLD.size == 1:
        factored = train(loss, "ssbroyden", 90, start=whole.theta[3], state=kept[3], matrix_form="factored", **settings)
        assert factored.losses[-1] < 1e-6


def test_states_from_before_there_was_a_factor_go_on(train: Train, copied: Callable[[Any], Any]) -> None:
    kept: dict[str, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        if iteration == 5:
            kept.update(copied(context.state()))

    whole = train(burgers(), "ssbroyden", 10, watch=watch)
    del kept["form"]
    rest = train(burgers(), "ssbroyden", 10, start=whole.theta[5], state=kept)
    assert rest.losses.tobytes() == whole.losses[6:].tobytes()
