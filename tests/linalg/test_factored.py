"""Factored matrices over the ranks against dense numpy."""

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml import kernels
from ddml.linalg.factored import FactorChange, FactoredMatrix

TOLERANCE = {"float64": 1e-13, "float32": 1e-5}


def changes(n: int, count: int) -> list[FactorChange]:
    """Changes with the sides of all rows."""
    rng = np.random.default_rng(n)
    return [FactorChange(rng.uniform(0.5, 1), *rng.standard_normal((4, n)) / np.sqrt(n)) for _ in range(count)]


def of_rank(change: FactorChange, matrix: FactoredMatrix) -> FactorChange:
    mine = slice(matrix.rows.start, matrix.rows.stop)
    return change._replace(alpha=change.alpha[mine], beta=change.beta[mine])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "units"), [(1, 4), (3, 3), (17, 5), (64, 4), (101, 12)])
def test_changes_and_products_are_those_of_a_dense_factor(
    comm: MPI.Comm, n: int, units: int, dtype: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
    matrix, dense = FactoredMatrix(comm, n, units, dtype), 2 * np.eye(n)
    matrix.identity(2.0)
    g = np.cos(np.arange(n))
    for change in [None, *changes(n, 5), None]:
        if change is not None:
            dense = change.keep * dense + np.outer(change.alpha, change.a) + np.outer(change.beta, change.b)
        product = comm.allreduce(matrix.multiply(g, change and of_rank(change, matrix)).sum(axis=0))
        image = np.concatenate(comm.allgather(matrix.image))
        assert np.abs(image - dense @ g).max() <= TOLERANCE[dtype] * np.abs(dense).max() * n
        assert np.abs(product - dense.T @ (dense @ g)).max() <= TOLERANCE[dtype] * np.abs(dense).max() ** 2 * n


@pytest.mark.ranks
def test_products_and_dots_do_not_depend_on_the_ranks(comm: MPI.Comm) -> None:
    n, g = 53, np.sin(np.arange(53))
    found = []
    for ranks in (comm, MPI.COMM_SELF):
        matrix = FactoredMatrix(ranks, n, 12)
        matrix.identity()
        for change in changes(n, 3):
            rows = matrix.multiply(g, of_rank(change, matrix))
        image = matrix.image
        found.append(np.concatenate(ranks.allgather(rows)).tobytes() + np.array(matrix.dots((image, image))).tobytes())
    assert found[0] == found[1]


@pytest.mark.ranks
def test_saved_factors_go_to_other_ranks_and_precisions(comm: MPI.Comm) -> None:
    n, g = 37, np.sin(np.arange(37))
    first = FactoredMatrix(comm, n, 12)
    first.identity()
    for change in changes(n, 3):
        first.multiply(g, of_rank(change, first))
    expected = comm.allreduce(first.multiply(g).sum(axis=0))
    vec = first.save()
    moved = PETSc.Vec().createMPI((vec.getSize() if comm.rank == comm.size - 1 else 0, vec.getSize()), comm=comm)
    everything = np.concatenate(comm.allgather(vec.array_r))
    moved.setArray(everything[slice(*moved.getOwnershipRange())])
    other = FactoredMatrix(comm, n, 7, "float32")
    other.double()
    other.load(moved)
    assert comm.allreduce(other.multiply(g).sum(axis=0)) == pytest.approx(expected, rel=1e-12)
    vec.destroy()
    moved.destroy()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_each_rank_holds_its_share(comm: MPI.Comm, dtype: str) -> None:
    """N^2 / P numbers, and nothing else of that order."""
    n, units = 600, 12 * -(-comm.size // 12)
    matrix = FactoredMatrix(comm, n, units, dtype)
    assert comm.allreduce(len(matrix.values)) == n**2
    assert abs(len(matrix.values) / (n**2 / comm.size) - 1) < 0.05
    assert matrix.values.itemsize == np.dtype(dtype).itemsize
    others = sum(v.nbytes for v in vars(matrix).values() if isinstance(v, np.ndarray)) - matrix.values.nbytes
    assert others <= 8 * n * (units + 1)
