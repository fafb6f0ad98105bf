"""Models with curvature: secant pairs and products, against dense implementations."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from classifiers import batches, classifier, value_gradient
from dense_trust_region import Batches
from petsc4py import PETSc

from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.norms.kronecker import KroneckerNorm
from ddml.problems import Burgers, PDELoss

Train = Callable[..., SimpleNamespace]


Make = Callable[..., Loss]


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
    M = np.zeros((norm.objective.layout.size, norm.objective.layout.size))
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
