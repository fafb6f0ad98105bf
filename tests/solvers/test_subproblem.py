"""The exact trust-region subproblem against dense eigen-solves, and KSP's solvers against both."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc
from scipy import linalg, optimize

from ddml.layout import ParameterLayout
from ddml.parameters import parameter_table
from solvers.trust_region.secant_model import SecantModel
from solvers.trust_region.subproblem import Spectral, diagonal_step


def dense_minimum(B: np.ndarray, g: np.ndarray, radius: float) -> float:
    """The least value of the model, by an eigen-solve of B and bisection, in extended precision."""
    values, V = (a.astype(np.longdouble) for a in linalg.eigh(B))
    a = V.T @ g
    low = values[0]

    def model(p: np.ndarray) -> float:
        return float(a @ p + (values * p) @ p / 2)

    if low > 0 and np.sqrt(((a / values) ** 2).sum()) <= radius:
        return model(-a / values)
    omega, floor = values - low, max(low, np.longdouble(0))
    near = omega < 1e-13 * np.abs(values).max()
    if floor == 0 and np.abs(a[near]).max() < 1e-13 * np.abs(a).max():
        p = np.where(near, 0, -a / np.where(near, 1, omega))
        if (p @ p) <= radius**2:
            p[0] = np.sqrt(radius**2 - p @ p)
            return model(p)

    def size(mu: Any) -> Any:
        return np.sqrt(((a / (omega + mu)) ** 2).sum())

    top = np.longdouble(np.sqrt(a @ a)) / radius + floor
    bottom = floor
    for _ in range(300):
        middle = (top + bottom) / 2
        top, bottom = (middle, bottom) if size(middle) < radius else (top, middle)
    return model(-a / (omega + top))


def laid(size: int, comm: MPI.Comm) -> ParameterLayout:
    return ParameterLayout(parameter_table([("x", (size,))]), comm)


def distributed(values: np.ndarray, comm: MPI.Comm) -> PETSc.Vec:
    vec = laid(len(values), comm).vector()
    begin, end = vec.getOwnershipRange()
    vec.setArray(values[begin:end])
    return vec


def gathered(vec: PETSc.Vec, comm: MPI.Comm) -> np.ndarray:
    return np.concatenate(comm.allgather(vec.array_r.copy()))


def rows(table: np.ndarray, comm: MPI.Comm) -> np.ndarray:
    begin, end = laid(len(table), comm).ranges[comm.rank :][:2]
    return table[begin:end]


def solve(matrix: Spectral, g: np.ndarray, radius: float, comm: MPI.Comm) -> tuple[np.ndarray, float, float]:
    vec, p = distributed(g, comm), distributed(0 * g, comm)
    decrease, sigma = matrix.solve(vec, radius, p)
    step = gathered(p, comm)
    vec.destroy()
    p.destroy()
    return step, decrease, sigma


def check(B: np.ndarray, g: np.ndarray, radius: float, result: tuple[np.ndarray, float, float]) -> None:
    p, decrease, sigma = result
    expected = -dense_minimum(B, g, radius)
    scale = np.linalg.norm(g) * radius
    assert decrease == pytest.approx(expected, rel=1e-12, abs=1e-14 * scale)
    assert -(g @ p + p @ B @ p / 2) == pytest.approx(expected, rel=1e-12, abs=1e-13 * scale)
    assert np.linalg.norm(p) <= radius * (1 + 1e-14)
    norm = np.linalg.norm(B, 2)
    assert np.linalg.norm(B @ p + sigma * p + g) <= 1e-12 * (np.linalg.norm(g) + (norm + sigma) * radius)
    assert sigma >= 0
    assert sigma * (radius - np.linalg.norm(p)) <= 1e-12 * (norm + sigma) * radius
    assert linalg.eigvalsh(B)[0] + sigma >= -1e-12 * norm


@pytest.mark.parametrize("seed", range(40))
def test_random_matrices(seed: int, comm: MPI.Comm) -> None:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(3, 40)), int(rng.integers(1, 12))
    Psi, M = rng.standard_normal((n, k)), rng.standard_normal((k, k))
    M, gamma = M + M.T, float(rng.choice([1.0, -0.5, 0.0, 0.1, 300.0]))
    B, g = gamma * np.eye(n) + Psi @ M @ Psi.T, rng.standard_normal(n)
    matrix = Spectral.of(laid(n, comm), gamma, rows(Psi, comm), M)
    for radius in (1e-6, 1e-2, 1.0, 1e4):
        check(B, g, radius, solve(matrix, g, radius, comm))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("where", ["complement", "inside", "several"])
@pytest.mark.parametrize("near", [0.0, 1e-16, 1e-12, 1e-6])
def test_the_hard_case(seed: int, where: str, near: float, comm: MPI.Comm) -> None:
    """g has no part, or next to none, in the eigenspace of the smallest eigenvalue."""
    rng = np.random.default_rng(seed)
    n, k = 12, 4
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    P, gamma = Q[:, :k], -1.5 if where == "complement" else 1.0
    values = np.array([2.0, 3.0, 4.0, 0.5]) if where == "complement" else np.array([-2.0, 3.0, 4.0, 0.5])
    if where == "several":
        values[1] = values[0]
    g = P @ rng.standard_normal(k)
    lowest = Q[:, k:] if where == "complement" else P[:, : 2 if where == "several" else 1]
    g -= lowest @ (lowest.T @ g)
    g /= np.linalg.norm(g)
    g += near * lowest @ rng.standard_normal(lowest.shape[1])
    B = gamma * np.eye(n) + P @ np.diag(values - gamma) @ P.T
    B = (B + B.T) / 2
    matrix = Spectral.of(laid(n, comm), gamma, rows(P, comm), np.diag(values - gamma))
    for radius in (0.05, 10.0):
        step, decrease, sigma = solve(matrix, g, radius, comm)
        assert decrease == pytest.approx(-dense_minimum(B, g, radius), rel=1e-12)
        assert -(g @ step + step @ B @ step / 2) == pytest.approx(decrease, rel=1e-12)
        if radius > 1:
            assert np.linalg.norm(step) == pytest.approx(radius, rel=1e-13)
            assert sigma == pytest.approx(-min(values.min(), gamma), rel=1e-5)


def test_degenerate_problems(comm: MPI.Comm) -> None:
    v, sigma, decrease = diagonal_step(np.array([0.0, 0.0]), np.zeros(2), 1.0)
    assert (v == 0).all() and sigma == 0 and decrease == 0
    v, sigma, decrease = diagonal_step(np.array([0.0]), np.array([3.0]), 0.1)  # first order
    assert v == pytest.approx([-0.1]) and decrease == pytest.approx(0.3)
    v, _, decrease = diagonal_step(np.array([-1.0, 2.0]), np.zeros(2), 2.0)
    assert np.abs(v) == pytest.approx([2, 0]) and decrease == pytest.approx(2)
    same = np.ones((6, 3))  # Psi without full rank
    matrix = Spectral.of(laid(6, comm), 1.0, rows(same, comm), np.diag([1.0, 2.0, -4.0]))
    g = np.arange(6.0)
    check(np.eye(6) + same @ np.diag([1.0, 2.0, -4.0]) @ same.T, g, 0.7, solve(matrix, g, 0.7, comm))
    wide = np.random.default_rng(0).standard_normal((2, 5))  # more columns than rows
    matrix = Spectral.of(laid(2, comm), 0.5, rows(wide, comm), np.eye(5))
    check(0.5 * np.eye(2) + wide @ wide.T, g[1:3], 0.1, solve(matrix, g[1:3], 0.1, comm))


@pytest.mark.parametrize("tau", [2.5, 0.3])
def test_the_step_is_the_papers_formula_with_its_second_factor(tau: float, comm: MPI.Comm) -> None:
    """p = -g / tau + Psi (tau M^-1 + Psi^T Psi)^-1 Psi^T g / tau with tau = gamma + sigma."""
    rng = np.random.default_rng(3)
    n, k, gamma = 12, 3, 0.2
    Psi, g, Minv = rng.standard_normal((n, k)), rng.standard_normal(n), 2 * np.eye(k)
    p = -g / tau + Psi @ np.linalg.solve(tau * Minv + Psi.T @ Psi, Psi.T @ g) / tau
    matrix = Spectral.of(laid(n, comm), gamma, rows(Psi, comm), np.linalg.inv(Minv))
    step, _, sigma = solve(matrix, g, float(np.linalg.norm(p)), comm)
    assert sigma == pytest.approx(tau - gamma, rel=1e-12)
    assert np.abs(step - p).max() <= 1e-13


def dense_updates(kind: str, S: np.ndarray, Y: np.ndarray, gamma: float) -> np.ndarray:
    """The pairs in columns, one update after another."""
    B = gamma * np.eye(len(S))
    for s, y in zip(S.T, Y.T, strict=True):
        r = y - B @ s
        if kind == "sr1":
            if abs(r @ s) >= 1e-8 * np.linalg.norm(s) * np.linalg.norm(r) > 0:
                B = B + np.outer(r, r) / (r @ s)
        else:
            Bs = B @ s
            B = B - np.outer(Bs, Bs) / (s @ Bs) + np.outer(y, y) / (s @ y)
    return B


@pytest.mark.parametrize("kind", ["sr1", "lbfgs"])
@pytest.mark.parametrize("indefinite", [False, True])
def test_compact_matrices_are_the_updates_one_by_one(kind: str, indefinite: bool, comm: MPI.Comm) -> None:
    rng = np.random.default_rng(0)
    n, m = 15, 4
    H = rng.standard_normal((n, n))
    H = H + H.T if indefinite else H @ H.T + np.eye(n)
    pairs = [(s := rng.standard_normal(n) * 10.0 ** rng.integers(-6, 2), H @ s) for _ in range(7)]
    model, stored = SecantModel(m, kind, laid(n, comm)), []
    gamma = 0.0
    for s, y in pairs:
        vectors = distributed(s, comm), distributed(y, comm)
        if kind == "sr1" or s @ y > 1e-8 * np.linalg.norm(s) * np.linalg.norm(y):
            stored.append((s, y))
            gamma = y @ y / (s @ y) if s @ y > 1e-8 * np.linalg.norm(s) * np.linalg.norm(y) else gamma
        assert model.update(*vectors) == (bool(stored) and stored[-1][0] is s)
        for vec in vectors:
            vec.destroy()
    S, Y = (np.column_stack([pair[i] for pair in stored[-m:]]) for i in (0, 1))
    B = dense_updates(kind, S, Y, gamma)
    x, product = distributed(pairs[0][0], comm), distributed(pairs[0][0], comm)
    matrix = model.matrix()
    for e in np.eye(n):
        begin, end = x.getOwnershipRange()
        x.setArray(e[begin:end])
        matrix.multiply(x, product)
        assert np.abs(gathered(product, comm) - B @ e).max() <= 1e-9 * np.abs(B).max()
    model.clear()
    x.destroy()
    product.destroy()


@pytest.mark.parametrize("cosine", [1e-15, 1e-12, 1e-9, 1e-7, 1e-3])
@pytest.mark.parametrize("first", [False, True])
def test_sr1_meets_the_secant_equation_where_a_pair_has_hardly_any_curvature(
    cosine: float, first: bool, comm: MPI.Comm
) -> None:
    """B s = y for the newest pair that takes part; without one B is 0."""
    rng = np.random.default_rng(3)
    n = 12
    H = rng.standard_normal((n, n))
    s = rng.standard_normal((3, n))
    pairs = [] if first else [(d, (H @ H.T) @ d) for d in s[:2]]
    y = rng.standard_normal(n)
    y -= (y @ s[2]) / (s[2] @ s[2]) * s[2]
    y += cosine * np.linalg.norm(y) / np.linalg.norm(s[2]) * s[2]
    model = SecantModel(5, "sr1", laid(n, comm))
    for pair in [*pairs, (s[2], y)]:
        vectors = [distributed(v, comm) for v in pair]
        assert model.update(*vectors)
        for vec in vectors:
            vec.destroy()
    x, product = distributed(s[2], comm), distributed(y, comm)
    model.matrix().multiply(x, product)
    takes_part = not first or cosine > 1e-8
    found, expected = gathered(product, comm), y if takes_part else 0 * y
    assert np.linalg.norm(found - expected) <= 1e-7 * np.linalg.norm(y)
    model.clear()
    x.destroy()
    product.destroy()


class _Matrix:
    """Python context of a Spectral matrix."""

    def __init__(self, matrix: Spectral) -> None:
        self.matrix = matrix

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self.matrix.multiply(x, y)


@pytest.mark.parametrize("ksp_type", ["stcg", "nash", "gltr"])
@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("radius", [1e-2, 10.0])
def test_ksp_agrees_where_both_apply(ksp_type: str, definite: bool, radius: float, comm: MPI.Comm, prefix: str) -> None:
    """Inside the ball all find the minimiser; behind negative curvature gltr does.

    Where the boundary is met with positive curvature PETSc's solvers stop there: they are no better than the exact one.
    """
    rng = np.random.default_rng(1)
    n, k = 20, 5
    Psi, g = rng.standard_normal((n, k)), rng.standard_normal(n)
    M = np.diag([1.0, 2.0, 0.5, 3.0, 1.0 if definite else -0.7])
    spectral = Spectral.of(laid(n, comm), 1.0, rows(Psi, comm), M)
    exact, decrease, _ = solve(spectral, g, radius, comm)
    vec, p = distributed(-g, comm), distributed(g, comm)
    local = vec.getLocalSize()
    mat = PETSc.Mat().createPython(((local, n), (local, n)), _Matrix(spectral), comm=comm)
    mat.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    mat.setUp()
    ksp = PETSc.KSP().create(comm)
    ksp.setOptionsPrefix(prefix)
    ksp.setOperators(mat)
    ksp.getPC().setType("none")
    for name, value in {
        "type": ksp_type,
        "cg_radius": radius,
        "rtol": 1e-12,
        "cg_gltr_max_lanczos_its": 40,
        "cg_gltr_newton_tol": 1e-12,
    }.items():
        PETSc.Options().setValue(f"{prefix}ksp_{name}", value)
    ksp.setFromOptions()
    ksp.solve(vec, p)
    found = -ksp.getCGObjectiveValue()
    step = gathered(p, comm)
    inside = definite and radius > 1
    if inside or (ksp_type == "gltr" and not definite and radius > 1):
        assert found == pytest.approx(decrease, rel=1e-10)
        same = min(np.abs(step - exact).max(), np.abs(step + exact).max() if not inside else np.inf)
        assert same <= 1e-4 * np.linalg.norm(exact)
    else:
        assert 0 < found <= decrease * (1 + 1e-12)
    assert np.linalg.norm(step) <= radius * (1 + 1e-6)
    for thing in (ksp, mat, vec, p):
        thing.destroy()


def test_the_reference_is_right() -> None:
    """The dense oracle itself, against a general minimiser."""
    B, g = np.diag([1.0, -2.0, 3.0]), np.array([0.3, 0.5, -1.0])
    best = min(
        optimize.minimize(
            lambda u: g @ (p := u / np.linalg.norm(u)) + p @ B @ p / 2, np.random.default_rng(i).standard_normal(3)
        ).fun
        for i in range(5)
    )  # on the boundary of the unit ball, as B is indefinite
    assert dense_minimum(B, g, 1.0) == pytest.approx(best, rel=1e-8)
