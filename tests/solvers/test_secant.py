"""The compact inverse Hessian approximation against the textbook's dense recursion."""

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.options import preset
from ddml.parameters import parameter_table
from solvers.quasi_newton.secant import SecantMemory
from solvers.trust_region.secant_model import SecantModel


def vector(comm: MPI.Comm, values: np.ndarray) -> PETSc.Vec:
    vec = ParameterLayout(parameter_table([("x", (len(values),))]), comm).vector()
    begin, end = vec.getOwnershipRange()
    vec.setArray(values[begin:end])
    return vec


def everything(comm: MPI.Comm, vec: PETSc.Vec) -> np.ndarray:
    return np.concatenate(comm.allgather(vec.array_r.copy()))


def dense_bfgs(pairs: list[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    """H of the BFGS recursion H <- (I - s y^T / s.y) H (I - y s^T / s.y) + s s^T / s.y from gamma I."""
    if not pairs:
        return np.eye(n)
    s, y = pairs[-1]
    H = (s @ y) / (y @ y) * np.eye(n)
    for s, y in pairs:
        V = np.eye(n) - np.outer(y, s) / (s @ y)
        H = V.T @ H @ V + np.outer(s, s) / (s @ y)
    return H


def random_pairs(rng: np.random.Generator, n: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a random quadratic with eigenvalues 1 to 10, as on a path that changes it a little."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    A = Q @ np.diag(np.linspace(1, 10, n)) @ Q.T
    steps = rng.standard_normal((count, n))
    return [(s, A @ s + 0.1 * np.abs(s @ s) ** 0.5 * s) for s in steps]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("n", [1, 2, 13, 60])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 25])
def test_product_is_that_of_the_dense_recursion_over_the_newest_pairs(
    comm: MPI.Comm, size: int, n: int, count: int
) -> None:
    rng = np.random.default_rng([size, n, count])
    memory = SecantMemory(size, 1e-15)
    pairs = random_pairs(rng, n, count)
    product = vector(comm, np.zeros(n))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for s, y in pairs:
        assert memory.update(vector(comm, s), vector(comm, y))
        kept = [*kept, (s, y)][-size:]
        assert len(memory) == len(kept)
        if size > n and len(kept) > n:
            continue  # dependent pairs: the recursion itself loses digits
        _compare(comm, memory, kept, rng, n, product)
    if not pairs:
        _compare(comm, memory, kept, rng, n, product)


def _compare(
    comm: MPI.Comm, memory: SecantMemory, kept: list, rng: np.random.Generator, n: int, product: PETSc.Vec
) -> None:
    g = rng.standard_normal(n)
    memory.apply(vector(comm, g), product)
    expected = dense_bfgs(kept, n) @ g
    assert np.linalg.norm(everything(comm, product) - expected) <= 1e-12 * np.linalg.norm(expected)


def test_pairs_of_little_curvature_are_skipped(comm: MPI.Comm) -> None:
    memory = SecantMemory(3, 1e-3)
    s = np.arange(1.0, 6.0)
    unit = vector(comm, s / (s @ s))
    for curvature, stored in [(1.0, True), (-1.0, False), (0.9e-3, False), (1.1e-3, True), (np.nan, False)]:
        before = len(memory)
        assert memory.update(unit, vector(comm, curvature * s)) is stored
        assert len(memory) == before + stored


def test_a_memory_of_no_pairs_is_the_identity(comm: MPI.Comm) -> None:
    memory = SecantMemory(0, 1e-15)
    g = np.arange(1.0, 8.0)
    assert not memory.update(vector(comm, g), vector(comm, g))
    product = vector(comm, np.zeros(7))
    memory.apply(vector(comm, g), product)
    assert np.array_equal(everything(comm, product), g)


def test_clearing_forgets_all_pairs(comm: MPI.Comm) -> None:
    memory = SecantMemory(3, 1e-15)
    for s, y in random_pairs(np.random.default_rng(0), 9, 4):
        memory.update(vector(comm, s), vector(comm, y))
    memory.clear()
    g, product = np.arange(9.0), vector(comm, np.zeros(9))
    memory.apply(vector(comm, g), product)
    assert len(memory) == 0
    assert np.array_equal(everything(comm, product), g)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_a_restored_memory_goes_on_to_the_last_bit(comm: MPI.Comm, count: int) -> None:
    rng = np.random.default_rng(count)
    pairs = [(vector(comm, s), vector(comm, y)) for s, y in random_pairs(rng, 17, count + 4)]
    first, second = SecantMemory(3, 1e-15), SecantMemory(3, 1e-15)
    for s, y in pairs[:count]:
        first.update(s, y)
    state = first.state()
    second.restore({k: [vec.copy() for vec in v] if k in ("S", "Y") else v.copy() for k, v in state.items()})
    g = vector(comm, rng.standard_normal(17))
    for s, y in [*pairs[count:], pairs[0]]:
        products = []
        for memory in (first, second):
            products.append(vector(comm, np.zeros(17)))
            memory.apply(g, products[-1])
            memory.update(s, y)
        assert products[0].array_r.tobytes() == products[1].array_r.tobytes()


def test_it_is_the_matrix_of_petsc(comm: MPI.Comm) -> None:
    """PETSc's MATLMVMSR1, with gamma I as its J0 and the same differences of iterates, has the same products."""
    layout = ParameterLayout(parameter_table([("a", (7, 5)), ("b", (4,))]), comm)
    rng = np.random.default_rng(1)
    hessian = rng.standard_normal((39, 39))
    hessian += hessian.T
    begin, end = layout.ranges[comm.rank], layout.ranges[comm.rank + 1]
    x, f, s, y, product, expected = (layout.vector() for _ in range(6))
    model = SecantModel(6, "sr1", layout)
    pairs = []
    for _ in range(6):
        step = rng.standard_normal(39)
        pairs.append((step, hessian @ step))
        s.array[:], y.array[:] = (values[begin:end] for values in pairs[-1])
        assert model.update(s, y)
    found = PETSc.Mat().create(comm)
    found.setSizes(((end - begin, 39), (end - begin, 39)))
    found.setType(PETSc.Mat.Type.LMVMSR1)
    with preset(mat_lmvm_num_vecs=6, mat_lmvm_hist_size=6):
        found.setFromOptions()
    found.allocateLMVM(x, f)
    start = PETSc.Mat().createConstantDiagonal(((end - begin, 39), (end - begin, 39)), model.gamma, comm=comm)
    found.setLMVMJ0(start)
    found.updateLMVM(x, f)
    for step, change in pairs:
        x.array[:] += step[begin:end]
        f.array[:] += change[begin:end]
        found.updateLMVM(x, f)
    for _ in range(3):
        s.array[:] = rng.standard_normal(39)[begin:end]
        found.mult(s, expected)
        model.matrix().multiply(s, product)
        product.axpy(-1.0, expected)
        assert product.norm() <= 1e-10 * expected.norm()
    for thing in (x, f, s, y, product, expected, start, found, model):
        thing.destroy()
