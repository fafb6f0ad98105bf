r"""What flows along the edges of a graph to even out loads (Hu and Blake 1999, the method of potentials).

With :math:`b` the load of each vertex above what it is to have and :math:`L` the Laplacian of the graph, the flow
:math:`d_i - d_j` along each edge, :math:`L d = b`, evens them out, and no other flow that does has a smaller Euclidean
norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from petsc4py import PETSc
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from ddml.errors import InputError
from ddml.options import preset

from .cuts import Array

Edge = tuple[int, int]
RTOL = 1e-14  # of the potentials' equations, and 1e6 times as much of what is left of them (our choices)


def potentials(surplus: Sequence[float] | Array, edges: Sequence[Edge]) -> Array:
    """The potentials (p,) of the flow of least norm, the least of them 0; edge (i, j) carries ``d[i] - d[j]``.

    Solved by PETSc's conjugate gradients on this process alone, where the constants are the null space; options under
    ``balance_``.

    Parameters
    ----------
    surplus
        (p,), of each vertex; the sum is 0 to rounding.
    edges
        Pairs of different vertices, each once.

    Raises
    ------
    InputError
        If the graph is not connected, edges are not such pairs, the surplus is not finite or does not sum to 0, or
        PETSc with the options given does not solve.
    """
    b = np.asarray(surplus, dtype=np.float64)
    p, scale = len(b), float(np.abs(b).max(initial=0.0))
    if not np.isfinite(b).all() or abs(b.sum()) > 1e-9 * p * scale:
        raise InputError("what loads are above their share must be finite and sum to 0")
    pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
    once = len({tuple(sorted(pair)) for pair in pairs.tolist()}) == len(pairs)
    if len(pairs) and not (once and 0 <= pairs.min() <= pairs.max() < p and (pairs[:, 0] != pairs[:, 1]).all()):
        raise InputError(f"edges of a graph are pairs of different numbers from 0 to {p - 1}, each once")
    i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
    adjacency = sparse.csr_array((np.ones(len(i)), (i, j)), shape=(p, p))
    if connected_components(adjacency, directed=False, return_labels=False) > 1:
        raise InputError("loads cannot flow everywhere: the graph of neighbours is not connected")
    if not scale:
        return np.zeros(p)
    laplacian = (sparse.diags_array(adjacency.sum(axis=1)) - adjacency).tocsr()
    found = _solved(laplacian, b - b.mean())
    left = np.abs(laplacian @ found - b).max()
    if not left <= 1e6 * RTOL * scale:
        raise InputError(f"the potentials of the flow were not found (residual {left / scale:.1e}): see -balance_ksp_*")
    return np.asarray(found - found.min())


def _solved(laplacian: sparse.csr_array, b: Array) -> Array:
    p = len(b)
    pointers, columns = (part.astype(PETSc.IntType) for part in (laplacian.indptr, laplacian.indices))
    matrix = PETSc.Mat().createAIJ((p, p), csr=(pointers, columns, laplacian.data), comm=PETSc.COMM_SELF)
    constants = PETSc.NullSpace().create(constant=True, comm=PETSc.COMM_SELF)
    matrix.setNullSpace(constants)
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOptionsPrefix("balance_")
    ksp.setOperators(matrix)
    ksp.setType("cg")
    ksp.getPC().setType("jacobi")
    with preset(balance_ksp_rtol=RTOL, balance_ksp_max_it=100 + 10 * p):
        ksp.setFromOptions()
    x, y = matrix.createVecs()
    y.array[:] = b
    ksp.solve(y, x)
    found = x.array_r.copy()
    for thing in (x, y, ksp, constants, matrix):
        thing.destroy()
    return found


def flows(d: Array, edges: Sequence[Edge]) -> Array:
    """What flows along each edge, from its first vertex to its second; below rounding nothing does."""
    found = np.array([d[i] - d[j] for i, j in edges])
    found[np.abs(found) < 1e-9 * np.abs(found).max(initial=0.0)] = 0.0
    return found


def apportioned(count: int, shares: Array) -> Array:
    """Whole numbers, 1 or more, that sum to ``count``, nearest to some shares; the largest rests are rounded up."""
    exact = count * (shares / shares.sum())
    found = np.floor(exact)
    rest = count - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:rest]] += 1
    while not found.all():
        found[found.argmax()] -= 1
        found[found.argmin()] += 1
    return found
