"""The logistic loss against a dense one in plain NumPy, its parts, subsets and bits, and how well it classifies."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy import sparse

import solvers
from ddml.data import wide
from ddml.data.rows import DENSE, DenseRows, SparseRows, Table, TwoClasses
from ddml.layout import ParameterLayout
from ddml.losses.residual import restricted_loss
from ddml.objectives.objective import Objective
from ddml.problems.logistic import LogisticLoss, TwoClassTest

N, D = 203, 60  # more numbers in all than small matrices have, fewer in the parts
KINDS = ("dense", "sparse", "dense file", "sparse images")
CASES = [(kind, intercept, penalty) for kind in KINDS for intercept, penalty in ((False, 0.1), (True, 0.02))]


def numbers(kind: str) -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, D))
    if kind.startswith("sparse"):
        x *= rng.random((N, D)) < 0.3
        x[5] = 0
    return x, rng.integers(1, 3, N)


def table(kind: str) -> Table:
    x, labels = numbers(kind)
    if kind in ("dense", "sparse images"):
        found = DenseRows(8 * x.reshape(N, D // 2, 2), labels, 8.0)
        return found if kind == "dense" else found.compressed(np.arange(N), MPI.COMM_SELF)
    packed = sparse.csr_array(x)
    return SparseRows(packed.data, packed.indices, packed.indptr, labels.astype(float), D, kind)


def made(kind: str, intercept: bool, penalty: float) -> tuple[LogisticLoss, Any, Any]:
    """A loss, and X with a column of ones where there is an intercept, and y in plain NumPy."""
    x, labels = numbers(kind)
    loss = LogisticLoss(TwoClasses(table(kind), (1.0, 2.0)), penalty, intercept)
    return loss, np.column_stack([x, np.ones(N)]) if intercept else x, np.where(labels == 2, 1.0, -1.0)


def dense(X: Any, y: Any, theta: Any, penalty: float, intercept: bool) -> SimpleNamespace:
    """Value, gradient and Hessian by their textbook formulas."""
    P = penalty * np.diag([1.0] * D + [0.0] * intercept)
    z = X @ theta
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    return SimpleNamespace(
        value=-np.log(np.where(y > 0, p, q)).mean() + theta @ P @ theta / 2,
        gradient=X.T @ np.where(y > 0, -q, p) / len(y) + P @ theta,
        hessian=X.T @ np.diag(p * q) @ X / len(y) + P,
    )


def evaluated(loss: Any, theta: Any, v: Any) -> tuple[float, Any, Any]:
    theta, v = torch.as_tensor(theta), torch.as_tensor(v)
    g, h = torch.zeros_like(theta), torch.zeros_like(theta)
    value = loss.value_gradient(theta, g)
    assert loss.value(theta) == value
    loss.hessian_product(theta, v, h)
    return value, g.numpy(), h.numpy()


@pytest.mark.parametrize(("kind", "intercept", "penalty"), CASES)
def test_it_is_the_textbook_loss(kind: str, intercept: bool, penalty: float) -> None:
    loss, X, y = made(kind, intercept, penalty)
    assert sparse.issparse(loss.samples.matrix) == kind.startswith("sparse")
    rng = np.random.default_rng(1)
    for scale in (0.0, 1.0, 20.0):
        theta, v = scale * rng.standard_normal(loss.size), rng.standard_normal(loss.size)
        expected = dense(X, y, theta, penalty, intercept) if scale < 20 else None
        value, g, h = evaluated(loss, theta, v)
        again = evaluated(loss.on(loss.samples), theta, v)  # nothing kept
        assert (again[0], again[1].tolist(), again[2].tolist()) == (value, g.tolist(), h.tolist())
        if expected is not None:
            assert value == pytest.approx(expected.value, rel=1e-14)
            np.testing.assert_allclose(g, expected.gradient, rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(h, expected.hessian @ v, rtol=1e-11, atol=1e-14)
        leaf = torch.as_tensor(theta).requires_grad_()  # the terms, which restricted losses differentiate
        first = torch.autograd.grad(sum(loss.terms(leaf)), leaf, create_graph=True)[0]
        second = torch.autograd.grad(first, leaf, torch.as_tensor(v))[0]
        np.testing.assert_allclose(first.detach(), g, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(second, h, rtol=1e-11, atol=1e-14)


def test_margins_of_any_size_give_finite_numbers() -> None:
    x = np.array([[1e4], [-1e4], [1.0]])
    loss = LogisticLoss(TwoClasses(DenseRows(x, np.array([1, 1, 0])), (0.0, 1.0)))
    value, g, h = evaluated(loss, np.array([1.0]), np.array([1.0]))
    tail = np.exp(-1) / (1 + np.exp(-1)) ** 2
    assert value == pytest.approx((1e4 + np.log1p(np.exp(1))) / 3, rel=1e-15)
    assert g[0] == pytest.approx((1e4 + 1 / (1 + np.exp(-1))) / 3, rel=1e-15)
    assert h[0] == pytest.approx(tail / 3, rel=1e-14)


@pytest.mark.parametrize(("kind", "intercept", "penalty"), CASES)
def test_parts_sum_to_the_loss_and_subsets_are_normalised_anew(kind: str, intercept: bool, penalty: float) -> None:
    loss, X, y = made(kind, intercept, penalty)
    rng = np.random.default_rng(2)
    theta, v = rng.standard_normal(loss.size), rng.standard_normal(loss.size)
    rows = np.sort(rng.choice(N, 40, replace=False))
    some = loss.sampled(torch.as_tensor(rows)).sampled(torch.arange(0, 40, 2))
    for whole, chosen in ((loss, np.arange(N)), (some, rows[::2])):
        expected = dense(X[chosen], y[chosen], theta, penalty, intercept)
        for edges in ([0, whole.count], [0, 1, 1, 12, whole.count]):
            pieces = [whole.part(a, b) for a, b in pairwise(edges)]
            found = [sum(column) for column in zip(*(evaluated(p, theta, v) for p in pieces), strict=True)]
            assert found[0] == pytest.approx(expected.value, rel=1e-13)
            np.testing.assert_allclose(found[1], expected.gradient, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(found[2], expected.hessian @ v, rtol=1e-12, atol=1e-14)
    parts = [some.part(0, 7), some.part(7, 20)]
    assert sum(p.share for p in parts) == pytest.approx(1, rel=1e-15)
    halves = [p.sampled(torch.arange(3)) for p in parts]
    assert halves[1].value(torch.as_tensor(theta)) == pytest.approx(
        dense(X[rows[14:20:2]], y[rows[14:20:2]], theta, penalty, intercept).value, rel=1e-13
    )


def test_a_part_makes_matrices_of_its_own_samples_only() -> None:
    loss, _, _ = made("sparse images", False, 0.1)
    part = loss.sampled(torch.arange(0, N, 2)).part(3, 9)
    part.value(part.initial())
    assert part.samples.matrix.shape == (6, D)
    assert "matrix" not in vars(loss.samples)


@pytest.mark.parametrize("intercept", [False, True])
def test_restricted_it_is_the_loss_of_some_parameters(intercept: bool) -> None:
    loss, X, y = made("sparse", intercept, 0.1)
    rng = np.random.default_rng(3)
    theta, v = rng.standard_normal(loss.size), rng.standard_normal(loss.size)
    ranges = [slice(1, 3), slice(5, loss.size)]
    mine = np.r_[tuple(ranges)]
    expected = dense(X, y, theta, 0.1, intercept)
    found = restricted_loss(loss, ranges)
    found.freeze(torch.as_tensor(theta))
    value, g, h = evaluated(found, theta[mine], v[mine])
    assert value == pytest.approx(expected.value, rel=1e-14)
    np.testing.assert_allclose(g, expected.gradient[mine], rtol=1e-12)
    np.testing.assert_allclose(h, expected.hessian[np.ix_(mine, mine)] @ v[mine], rtol=1e-12)
    product = torch.zeros(len(mine), dtype=torch.float64)
    found.gauss_newton_product(torch.as_tensor(theta[mine]), torch.as_tensor(v[mine]), product)
    np.testing.assert_allclose(product, h, rtol=1e-12)


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "intercept", "penalty"), CASES)
def test_sums_in_blocks_have_the_same_bits_on_any_number_of_ranks(
    comm: MPI.Comm, kind: str, intercept: bool, penalty: float
) -> None:
    found = []
    for ranks in (MPI.COMM_SELF, comm):
        loss, X, y = made(kind, intercept, penalty)
        objective = Objective(loss, ParameterLayout(loss.parameters, ranks), blocks=8)
        x = objective.layout.vector()
        begin, end = x.getOwnershipRange()
        theta, v = np.random.default_rng(4).standard_normal((2, loss.size))
        x.setArray(theta[begin:end])
        g, direction, h, h2 = (x.duplicate() for _ in range(4))
        direction.setArray(v[begin:end])
        value = objective.value_gradient(x, g)
        objective.hessian_product(x, direction, h)
        objective.gauss_newton_product(x, direction, h2)
        mine = [value, *(objective.layout.gather(q).numpy().copy() for q in (g, h, h2))]
        found.append(mine)
        expected = dense(X, y, theta, penalty, intercept)
        assert value == pytest.approx(expected.value, rel=1e-13)
        np.testing.assert_allclose(mine[2], expected.hessian @ v, rtol=1e-11, atol=1e-14)
    for alone, together in zip(*found, strict=True):
        assert np.array_equal(alone, together)
    assert np.array_equal(found[0][2], found[0][3])


@pytest.mark.parametrize(("kind", "intercept"), [("dense", False), ("sparse", True)])
def test_the_optimum_is_that_of_a_dense_newton_method(comm: MPI.Comm, kind: str, intercept: bool) -> None:
    loss, X, y = made(kind, intercept, 0.01)
    best = np.zeros(loss.size)
    for _ in range(20):
        at = dense(X, y, best, 0.01, intercept)
        best = best - np.linalg.solve(at.hessian, at.gradient)
    assert np.abs(dense(X, y, best, 0.01, intercept).gradient).max() < 1e-15
    for solver, options in (("tr", {"model": "hessian"}), ("tr", {"model": "gauss_newton"}), ("lbfgs", {})):
        result = solvers.minimise(loss, solver, comm, options, iterations=200, tolerance=1e-9)
        np.testing.assert_allclose(result.theta, best, rtol=0, atol=1e-7)
        assert result.reason == "CONVERGED_GATOL"


def test_what_is_charged() -> None:
    for kind in ("dense", "sparse"):
        loss, X, _ = made(kind, False, 0.1)
        (c,) = loss.costs
        assert c == pytest.approx(D if kind == "dense" else np.count_nonzero(X) / N)
        assert loss.charges.evaluation(gradient=False) == pytest.approx(0.5)
        e, k = (20, 8) if kind == "dense" else (10, 5)
        assert loss.charges.hessian() == pytest.approx((2 * c + k) / (2 * c + 2 * e))
        assert loss.charges.gauss_newton() == loss.charges.hessian()
    wider = LogisticLoss(TwoClasses(DenseRows(np.ones((4, 5000)), np.array([0, 1, 0, 1])), (0, 1)))
    assert 0.99 < wider.charges.hessian() < 1


@pytest.mark.ranks
@pytest.mark.parametrize("blocks", [0, 5])
def test_accuracy_and_loss_of_other_samples(comm: MPI.Comm, blocks: int) -> None:
    loss, X, y = made("sparse", True, 0.1)
    theta = np.random.default_rng(5).standard_normal(loss.size)
    samples = loss.samples.part(20, 81)
    z = X[20:81] @ theta
    found = TwoClassTest(loss, samples, comm, blocks)(torch.as_tensor(theta))
    assert found["accuracy"] == np.mean(np.where(z > 0, 1, -1) == y[20:81])
    assert found["test_loss"] == pytest.approx(np.log1p(np.exp(-y[20:81] * z)).mean(), rel=1e-13)
    if blocks:
        assert TwoClassTest(loss, samples, MPI.COMM_SELF, blocks)(torch.as_tensor(theta)) == found
    nothing = TwoClassTest(loss, samples, comm, blocks)(loss.initial())
    assert nothing["accuracy"] == np.mean(y[20:81] < 0)
    assert nothing["test_loss"] == pytest.approx(np.log(2), rel=1e-15)
    assert TwoClassTest(loss, samples, comm, blocks)(torch.full((loss.size,), np.nan).double())["accuracy"] == 0


def test_the_generated_wide_set(comm: MPI.Comm) -> None:
    train, test = wide.generate(0, comm, 300, 100)
    assert (len(train.labels), len(test.labels), train.features) == (300, 100, 5000)
    assert train.density == pytest.approx(0.2, abs=0.005) and train.density < DENSE
    assert train.data.min() >= 0 and train.data.max() <= 1
    assert abs(np.mean(train.labels)) < 0.2 and set(test.labels) == {-1.0, 1.0}
    alone, _ = wide.generate(0, MPI.COMM_SELF, 300, 100)
    other, _ = wide.generate(1, MPI.COMM_SELF, 300, 100)
    assert np.array_equal(alone.data, train.data) and np.array_equal(alone.labels, train.labels)
    assert not np.array_equal(alone.labels, other.labels)
    comm.barrier()
    train.free()
    test.free()


def test_rows_of_a_data_set_are_compressed_by_shares(comm: MPI.Comm) -> None:
    x, labels = numbers("sparse")
    rows = np.arange(3, N, 2)
    found = DenseRows(np.round(9 * x).astype(np.float32), labels, 9.0).compressed(rows, comm)
    assert np.array_equal(found.matrix(slice(0, len(rows))), np.round(9 * x)[rows] / 9)
    assert np.array_equal(found.labels, labels[rows])
    some = np.array([1, 7, 90])
    assert np.array_equal(found.matrix(some), np.round(9 * x)[rows][some] / 9)
    many = np.repeat(np.arange(len(rows)), 2)
    assert np.array_equal(found.matrix(many).toarray(), np.round(9 * x)[rows][many] / 9)
    comm.barrier()
    found.free()
