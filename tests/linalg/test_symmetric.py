"""Distributed symmetric matrices against dense numpy."""

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml import kernels
from ddml.linalg.symmetric import Change, SymmetricMatrix

TOLERANCE = {"float64": 1e-13, "float32": 1e-6}


def changes(n: int, count: int) -> list[Change]:
    rng, made = np.random.default_rng(n), []
    for _ in range(count):
        s, q = rng.standard_normal((2, n))
        ss, sq, qq = rng.standard_normal(3)
        made.append(Change(rng.uniform(0.5, 1), s, q, ss * s + sq * q, sq * s + qq * q))
    return made


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "units"), [(1, 4), (3, 3), (17, 5), (64, 4), (101, 12)])
def test_changes_and_products_are_those_of_a_dense_matrix(
    comm: MPI.Comm, n: int, units: int, dtype: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
    matrix, dense = SymmetricMatrix(comm, n, units, dtype), 2 * np.eye(n)
    matrix.identity(2.0)
    g = np.cos(np.arange(n))
    for change in [None, *changes(n, 5), None]:
        if change is not None:
            dense = change.keep * dense + np.outer(change.s, change.a) + np.outer(change.q, change.b)
        product = comm.allreduce(matrix.multiply(g, change).sum(axis=0))
        assert np.abs(product - dense @ g).max() <= TOLERANCE[dtype] * np.abs(dense).max() * n


def test_every_rank_holds_its_share(comm: MPI.Comm) -> None:
    n = 400
    matrix = SymmetricMatrix(comm, n, 12)
    sizes = comm.allgather(matrix.values.nbytes)
    assert sum(sizes) == 8 * n * (n + 1) // 2
    if 12 % comm.size == 0:
        assert max(sizes) <= 1.02 * 8 * n**2 / 2 / comm.size


@pytest.mark.ranks
def test_saved_matrices_go_to_other_ranks_and_precisions(comm: MPI.Comm) -> None:
    n, g = 37, np.sin(np.arange(37))
    first = SymmetricMatrix(comm, n, 12)
    first.identity()
    for change in changes(n, 3):
        first.multiply(g, change)
    expected = comm.allreduce(first.multiply(g).sum(axis=0))
    vec = first.save()
    moved = PETSc.Vec().createMPI((vec.getSize() if comm.rank == comm.size - 1 else 0, vec.getSize()), comm=comm)
    everything = np.concatenate(comm.allgather(vec.array_r))
    moved.setArray(everything[slice(*moved.getOwnershipRange())])
    for units in (comm.size, 7):
        other = SymmetricMatrix(comm, n, units, "float32")
        other.double()
        other.load(moved)
        assert comm.allreduce(other.multiply(g).sum(axis=0)) == pytest.approx(expected, rel=1e-12)
    vec.destroy()
    moved.destroy()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_each_rank_holds_its_share(comm: MPI.Comm, dtype: str) -> None:
    """N^2 / 2P numbers, and nothing else of that order."""
    n, units = 600, 12 * -(-comm.size // 12)
    matrix = SymmetricMatrix(comm, n, units, dtype)
    share = n * (n + 1) / 2 / comm.size
    assert comm.allreduce(len(matrix.values)) == n * (n + 1) // 2
    assert abs(len(matrix.values) / share - 1) < 0.05
    assert matrix.values.itemsize == np.dtype(dtype).itemsize
    others = sum(v.nbytes for v in vars(matrix).values() if isinstance(v, np.ndarray)) - matrix.values.nbytes
    assert others <= 8 * n * units
