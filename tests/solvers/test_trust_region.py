"""Trust-region methods against dense implementations."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from classifiers import batches, classifier, value_gradient
from mpi4py import MPI
from petsc4py import PETSc
from whole_runs import Training

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.norms.kronecker import KroneckerNorm
from ddml.objectives.objective import Objective
from ddml.parallel import cause
from ddml.problems import Burgers, PDELoss
from ddml.runs import run_file
from ddml.runs.history import History
from solvers.trust_region.radius import TrustRadius

Train = Callable[..., SimpleNamespace]
Make = Callable[..., Loss]
MODELS = [
    ("first", "modular"), ("first", "2"), ("first", "infinity"), ("sr1", "2"), ("lbfgs", "2"), ("hessian", "2"),
    ("gauss_newton", "2"), ("first", "kfac"), ("sr1", "kfac"), ("lbfgs", "kfac"), ("gauss_newton", "kfac"),
]  # fmt: skip
every = pytest.mark.parametrize(("model", "norm"), MODELS)


def dense_dual(norm: str, g: np.ndarray) -> np.ndarray:
    """The duality map on the chain 6-5-4-3, by singular value decompositions."""
    if norm == "2":
        return g / np.linalg.norm(g)
    if norm == "infinity":
        return np.sign(g)
    direction, end = np.zeros_like(g), 0
    for inputs, outputs in ((6, 5), (5, 4), (4, 3)):
        begin, end = end, end + (inputs + 1) * outputs
        W = np.column_stack([g[begin : end - outputs].reshape(outputs, inputs), g[end - outputs : end]])
        U, sigma, V = np.linalg.svd(W, full_matrices=False)
        kept = sigma > 1e-10 * sigma[0]  # outputs' gradients sum to zero: the last layer's has rank 2
        D = math.sqrt(outputs / (inputs + 1)) / 3 * U[:, kept] @ V[kept]
        direction[begin:end] = np.concatenate([D[:, :-1].ravel(), D[:, -1]])
    return direction


def dense_first_order(norm: str, iterations: int, delta: float, momentum: float, losses: Any) -> tuple[Any, Any]:
    """Iterates and accepted losses; ``losses`` gives the loss of each iteration."""
    theta = losses(0).initial().numpy().copy()
    loss = losses(0)
    (f, g), m = value_gradient(loss, theta), np.zeros_like(theta)
    start, first = theta, g
    iterates, values = [theta], [f]
    for k in range(iterations):
        if losses(k) is not loss:
            loss = losses(k)
            f, g = value_gradient(loss, theta)
            S = theta - start
            if first @ S < 0 and (1 + (g @ S) / (first @ S)) / 2 < 0.25:
                delta /= math.sqrt(2)
            delta = max(delta, 1e-4)
            start, first = theta, g
        m = momentum * m + (1 - momentum) * g
        s = -delta * dense_dual(norm, momentum * m + (1 - momentum) * g)
        if -g @ s <= 0:
            m, s = g, -delta * dense_dual(norm, g)
        trial, gradient = value_gradient(loss, theta + s)
        e = 10 * 2.0**-52 * max(1, abs(f))
        rho = (f - trial + e) / (-g @ s + e)
        accepted = rho > 1e-4 and trial <= f
        if rho < 0.25 or not accepted:
            delta /= 2
        elif rho > (0.9 if momentum else 0.75) and -g @ s > 10 * e:
            delta = min(2 * delta, 1.0)
        if accepted:
            theta, f, g = theta + s, trial, gradient
        iterates.append(theta)
        values.append(f)
    return np.array(iterates), np.array(values)


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


class Batches:
    """Replaces the objective's loss every few iterations, as a sampler does."""

    def __init__(self, losses: list[Any], interval: int, first: int = 0, at: int = -1, copied: Any = None) -> None:
        self.losses, self.interval, self.first = losses, interval, first
        self.at, self.copied, self.state = at, copied, None

    def __call__(self, context: Any, iteration: int) -> None:
        if iteration > 0 and iteration % self.interval == 0 and iteration > self.first:
            context.objective.replace(self.losses[iteration // self.interval])
        if iteration == self.at:
            self.state = self.copied(context.state())


def test_new_batches_and_the_brake(train: Train) -> None:
    parts = batches(classifier(), 12, 9)
    run = train(parts[0], "tr", 40, watch=Batches(parts, 5))
    iterates, values = dense_first_order("modular", 40, 0.1, 0.9, lambda k: parts[k // 5])
    assert np.abs(run.theta - iterates).max() <= 1e-8
    assert run.losses == pytest.approx(values, rel=1e-8)
    assert run.gradients[-1] == 41 + 7


@pytest.mark.parametrize("first", [True, False])
def test_the_brake_is_needed_for_those_iterates(first: bool) -> None:
    """The reference itself brakes on these batches: without that it takes another way."""
    parts = batches(classifier(), 12, 9)
    original = dense_first_order("modular", 40, 0.1, 0.9, lambda k: parts[k // 5])[0]
    reference, root = math.sqrt, math.sqrt
    try:
        math.sqrt = lambda x: 1.0 if x == 2 and first else root(x)
        other = dense_first_order("modular", 40, 0.1, 0.9, lambda k: parts[k // 5])[0]
    finally:
        math.sqrt = reference
    assert (np.abs(original - other).max() > 1e-3) == first


@every
@pytest.mark.parametrize("float32", [False, True])
def test_monotone_methods_never_increase_the_loss(train: Train, model: str, norm: str, float32: bool) -> None:
    loss = classifier(dtype=torch.float32 if float32 else torch.float64)
    run = train(loss, "tr", 80, model=model, norm=norm, delta0=0.5)
    assert (np.diff(run.losses) <= 0).all()
    assert run.losses[-1] < (0.05 if model == "first" else 0.01) * run.losses[0]
    moved = np.abs(np.diff(run.theta, axis=0)).max(axis=1) > 0
    assert ((run.steps[1:] > 0) == moved).all()


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
    exact = train(loss, "tr", 60, **{**given, "polar_exact": 256})
    seen = Batches([], 1000, at=20, copied=copied)
    near = train(loss, "tr", 60, blocks=12, gathered=True, watch=seen, **given)
    assert np.abs(near.theta[1] - exact.theta[1]).max() > 1e-6
    assert near.losses[-1] < max(2 * exact.losses[-1], 0.01 * exact.losses[0])
    alone = train(loss, "tr", 60, comm=MPI.COMM_SELF, blocks=12, gathered=True, **given)
    assert alone.theta.tobytes() == near.theta.tobytes()
    rest = train(loss, "tr", 60, blocks=12, gathered=True, start=near.theta[20], state=seen.state, **given)
    assert rest.theta.tobytes() == near.theta[21:].tobytes()


def norm_of_chain(theta: np.ndarray) -> float:
    """The modular norm of the chain 6-5-4-3, by singular values."""
    found, end = [], 0
    for inputs, outputs in ((6, 5), (5, 4), (4, 3)):
        begin, end = end, end + (inputs + 1) * outputs
        W = np.column_stack([theta[begin : end - outputs].reshape(outputs, inputs), theta[end - outputs : end]])
        found.append(3 * math.sqrt((inputs + 1) / outputs) * np.linalg.norm(W, 2))
    return max(found)


def test_a_first_order_method_keeps_seven_vectors(train: Train) -> None:
    held: list[int] = []

    def watch(context: Any, iteration: int) -> None:
        held.append(len({vec.handle for vec in context.vectors.values()}))

    train(classifier(), "tr", 2, watch=watch)
    assert set(held) == {5}  # besides theta and the momentum


@every
def test_a_run_file_goes_on_on_another_number_of_ranks(
    train: Train, copied: Any, comm: MPI.Comm, shared_tmp: Path, model: str, norm: str
) -> None:
    loss, settings = classifier(), {"model": model, "norm": norm, "delta0": 0.3}
    if model == "gauss_newton":  # long steps of conjugate gradients that end early make the most of rounding errors
        settings |= {"delta0": 0.1, "delta_max": 0.1}
    watch = Batches([], 1000, at=7, copied=copied)
    whole = train(loss, "tr", 15, watch=watch, **settings)
    layout, alone = ParameterLayout(loss.parameters, comm), ParameterLayout(loss.parameters, MPI.COMM_SELF)
    x, y = layout.vector(), alone.vector()
    begin, end = x.getOwnershipRange()
    x.setArray(whole.theta[7][begin:end])
    path = str(shared_tmp / "run.h5")
    run_file.write(path, x, parameters=loss.parameters, state={"solver": watch.state}, history=History(), attributes={})
    state, _ = run_file.read(path, y)
    rest = train(loss, "tr", 15, comm=MPI.COMM_SELF, start=y.array_r.copy(), state=state["solver"], **settings)
    assert np.abs(rest.theta - whole.theta[8:]).max() <= 1e-10
    x.destroy()
    y.destroy()


def test_sr1_with_memory_n_solves_a_quadratic_of_dimension_n(train: Train, least_squares: Make) -> None:
    loss = least_squares([5, 7])
    run = train(loss, "tr", 40, model="sr1", memory=12, delta0=1.0)
    A, b = loss.rows[:, :-1].numpy(), loss.rows[:, -1].numpy()
    assert np.abs(run.theta[-1] - np.linalg.lstsq(A, b)[0]).max() <= 1e-9
    assert run.norms[-1] <= 1e-9


def test_hessian_products_give_newton_steps(train: Train, least_squares: Make) -> None:
    loss = least_squares([5, 7])
    run = train(loss, "tr", 1, model="hessian", delta0=100.0, tr_ksp_rtol=1e-12, tr_ksp_max_it=50)
    A, b = loss.rows[:, :-1].numpy(), loss.rows[:, -1].numpy()
    assert np.abs(run.theta[-1] - np.linalg.lstsq(A, b)[0]).max() <= 1e-9
    for ksp in ("stcg", "nash", "gltr"):
        run = train(classifier(), "tr", 60, model="hessian", tr_ksp_type=ksp)
        assert run.losses[-1] < 1e-4


def dense_secant(kind: str, M: np.ndarray, loss: Any, iterations: int, delta: float) -> np.ndarray:
    """Iterates of the method in the norm of M with Hessian approximations that begin as M, by dense matrices."""
    theta, B = loss.initial().numpy().copy(), M.copy()
    f, g = value_gradient(loss, theta)
    iterates = [theta]
    for _ in range(iterations):
        # generalised eigenvectors make M the identity and B diagonal
        values, V = scipy.linalg.eigh(B, M)
        a = V.T @ g

        def length(sigma: float, values: np.ndarray = values, a: np.ndarray = a, delta: float = delta) -> float:
            return float(np.linalg.norm(a / (values + sigma))) - delta

        sigma, low = 0.0, max(0.0, -values[0])
        if values[0] <= 0 or length(0.0) > 0:
            sigma = scipy.optimize.brentq(length, low + 1e-13, low + np.linalg.norm(a) / delta + 1, xtol=1e-15)
        s = -V @ (a / (values + sigma))
        predicted = -(g @ s + s @ B @ s / 2)
        trial, gradient = value_gradient(loss, theta + s)
        y, e = gradient - g, 10 * 2.0**-52 * max(1, abs(f))
        rho = (f - trial + e) / (predicted + e)
        accepted, size = rho > 1e-4 and trial <= f, math.sqrt(s @ M @ s)
        if not accepted:
            delta = min(delta, size) / 2
        elif rho < 0.25:
            delta /= 2
        elif rho > 0.75 and size >= 0.9 * delta:
            delta *= 2
        r = y - B @ s
        if kind == "sr1":
            B = B + np.outer(r, r) / (r @ s)
        elif s @ y > 1e-8 * np.linalg.norm(s) * np.linalg.norm(y):
            B = B - np.outer(B @ s, B @ s) / (s @ B @ s) + np.outer(y, y) / (s @ y)
        if accepted:
            theta, f, g = theta + s, trial, gradient
        iterates.append(theta)
    return np.array(iterates)


def dense_matrix(norm: KroneckerNorm) -> np.ndarray:
    """M of the K-FAC norm."""
    M = np.zeros((norm.objective.size, norm.objective.size))
    for number, layer in enumerate(norm.layers):
        A, G = (
            norm.factors[norm.places[2 * number + i] : norm.places[2 * number + i + 1]].reshape(size, size)
            for i, size in enumerate(layer.sizes)
        )
        entries = layer.entries.ravel()
        M[np.ix_(entries, entries)] = np.kron(*(C + np.trace(C) / len(C) * np.eye(len(C)) for C in (G, A)))
    return M


@pytest.mark.parametrize("kind", ["sr1", "lbfgs"])
@pytest.mark.parametrize("delta", [0.3, 4.0])
def test_secant_models_in_the_kfac_norm_are_those_of_a_dense_implementation(
    train: Train, kind: str, delta: float
) -> None:
    loss, found = classifier(), []

    def watch(context: Any, iteration: int) -> None:
        if iteration == 0:
            found.append(context.norm)

    run = train(
        loss, "tr", 12, model=kind, norm="kfac", memory=50, delta0=delta, curvature_interval=1000,
        curvature_fraction=0.5, watch=watch,
    )  # fmt: skip
    assert np.abs(run.theta - dense_secant(kind, dense_matrix(*found), loss, 12, delta)).max() <= 1e-7
    assert (run.steps[1:] == 0).any()  # some steps were rejected


def test_kfac_factors_are_measured_again(train: Train) -> None:
    versions: list[int] = []
    parts = batches(classifier(), 30, 3)
    train(
        parts[0], "tr", 14, norm="kfac", curvature_interval=3,
        watch=lambda context, k: (versions.append(context.norm.version), Batches(parts, 5)(context, k)),
    )  # fmt: skip
    # behind every third step, and with each new batch
    assert versions == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6]


def test_gauss_newton_products_of_cross_entropy_in_the_kfac_norm(train: Train) -> None:
    """KSP's k-th step minimises the model over the Krylov space of M^-1 H, and keeps the radius."""
    loss, found = classifier(), []

    def watch(context: Any, iteration: int) -> None:
        if iteration == 0:
            s = context.g.duplicate()
            decrease, length = context.model.step(context.point, context.g, 1e9, s)
            full = context.objective.layout.gather(s).numpy().copy()
            found.append((full, decrease, length, dense_matrix(context.norm)))
            s.destroy()

    given = {"model": "gauss_newton", "norm": "kfac", "tr_ksp_rtol": 1e-13}
    run = train(loss, "tr", 1, watch=watch, tr_ksp_max_it=6, **given)
    ((s, decrease, length, M),) = found
    theta = torch.as_tensor(run.theta[0])
    H = np.stack([gauss_newton_column(loss, theta, k) for k in range(loss.size)])
    g = value_gradient(loss, run.theta[0])[1]
    space = [np.linalg.solve(M, g)]
    for _ in range(5):
        space.append(np.linalg.solve(M, H @ space[-1]))
        space[-1] /= np.linalg.norm(space[-1])
    Q = np.linalg.qr(np.array(space).T)[0]
    best = -Q @ np.linalg.solve(Q.T @ H @ Q, Q.T @ g)
    assert np.linalg.norm(s - best) <= 1e-8 * np.linalg.norm(best)
    assert decrease == pytest.approx(-(g @ best + best @ H @ best / 2), rel=1e-9)
    assert length == pytest.approx(math.sqrt(best @ M @ best), rel=1e-8)
    short = train(loss, "tr", 1, delta0=1e-3, **given)
    assert short.steps[1] == pytest.approx(1e-3, rel=1e-6)


def gauss_newton_column(loss: Any, theta: torch.Tensor, k: int) -> np.ndarray:
    unit, column = torch.zeros(loss.size, dtype=theta.dtype), torch.zeros(loss.size, dtype=theta.dtype)
    unit[k] = 1.0
    loss.gauss_newton_product(theta, unit, column)
    return column.numpy()


def test_products_on_a_part_of_the_samples(train: Train) -> None:
    run = train(classifier(), "tr", 30, model="gauss_newton", curvature_fraction=0.5)
    assert run.losses[-1] < 0.05 * run.losses[0]
    whole = train(classifier(), "tr", 1, model="gauss_newton", tr_ksp_max_it=3, tr_ksp_rtol=1e-12)
    half = train(
        classifier(), "tr", 1, model="gauss_newton", tr_ksp_max_it=3, tr_ksp_rtol=1e-12, curvature_fraction=0.5
    )
    products = whole.total[-1] - 2
    assert products >= 2 and (half.total[-1] - 2) / products == pytest.approx(0.5, abs=1e-12)


def test_gauss_newton_products(train: Train) -> None:
    network = TanhNetwork(2, 6, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(Burgers(), network, 60)
    run = train(loss, "tr", 80, model="gauss_newton", tr_ksp_rtol=1e-10, tr_ksp_max_it=100)
    assert (np.diff(run.losses) <= 0).all()
    assert run.losses[-1] < 0.05 * run.losses[0]
    theta = torch.as_tensor(run.theta[0])
    J, r = loss.jacobian(theta).numpy(), loss.residual(theta).numpy()
    step = run.theta[1] - run.theta[0]
    assert np.linalg.norm(step) <= 0.1 * (1 + 1e-9)
    # a minimiser of |r + J s|^2 on a Krylov space, on the boundary, and downhill
    assert ((r + J @ step) ** 2).sum() < (r**2).sum()


@pytest.mark.parametrize("model", ["sr1", "lbfgs"])
def test_pairs_of_rejected_steps_are_stored(train: Train, model: str) -> None:
    lengths: dict[int, int] = {}

    def watch(context: Any, iteration: int) -> None:
        lengths[iteration] = len(context.model.pairs)

    run = train(classifier(), "tr", 8, model=model, memory=20, delta0=20.0, watch=watch)
    rejected = np.flatnonzero(run.steps[1:] == 0)
    assert rejected.size
    assert any(lengths[int(k) + 1] == lengths[int(k)] + 1 for k in rejected)
    if model == "sr1":
        assert lengths == {k: k for k in range(9)}


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


@pytest.mark.parametrize("kind", ["sr1", "lbfgs"])
def test_pairs_on_the_overlap_of_batches(train: Train, kind: str) -> None:
    """A batch a step, a third of it from the batch before: the pair is that of the samples in both."""
    loss, rng = classifier(), np.random.default_rng(3)
    rows = [np.sort(rng.permutation(60)[:30]) for _ in range(4)]
    parts = [loss.sampled(torch.as_tensor(r)) for r in rows]
    pairs: list[Any] = []

    def watch(context: Any, iteration: int) -> None:
        pairs.append([(layout_gather(context, s), layout_gather(context, y)) for s, y in zip(
            context.model.pairs.S, context.model.pairs.Y, strict=True)])  # fmt: skip
        if iteration in (1, 2):
            shared = np.searchsorted(rows[iteration], np.intersect1d(rows[iteration], rows[iteration - 1]))
            context.objective.replace(parts[iteration], overlap=shared)

    def layout_gather(context: Any, vec: PETSc.Vec) -> np.ndarray:
        return context.objective.layout.gather(vec).numpy().copy()

    run = train(parts[0], "tr", 3, model=kind, overlap_pairs=True, memory=20, watch=watch)
    plain = train(parts[0], "tr", 1, model=kind, memory=20)
    assert run.theta[1].tobytes() == plain.theta[1].tobytes()
    # the pair of the batch's own step, that of the overlap, that of the next step
    assert [len(p) for p in pairs] == [0, 1, 3, 5]
    for k in (1, 2):
        step = run.theta[k] - run.theta[k - 1]
        common = loss.sampled(torch.as_tensor(np.intersect1d(rows[k], rows[k - 1])))
        change = value_gradient(common, run.theta[k])[1] - value_gradient(common, run.theta[k - 1])[1]
        s, y = pairs[-1][2 * k - 1]
        assert s == pytest.approx(step / np.linalg.norm(step), rel=1e-9, abs=1e-12)
        assert y == pytest.approx(change / np.linalg.norm(step), rel=1e-9, abs=1e-12)


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
