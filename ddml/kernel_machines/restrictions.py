"""Restriction to and extension from subdomains of the samples: PETSc matrices, and all of them in one message."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from .cuts import Array, Numbers
from .layout import SampleLayout

NONE: Numbers = np.empty(0, np.int64)


def index_set(layout: SampleLayout, i: int) -> PETSc.IS:
    """The places of subdomain i's samples, on the rank that it is on; the caller destroys it. Collective."""
    return PETSc.IS().createGeneral(_places(layout, i).astype(PETSc.IntType), comm=layout.comm)


def restriction(layout: SampleLayout, i: int) -> PETSc.Mat:
    """The matrix R_i (n_i, n), its rows on the rank that subdomain i is on; the caller destroys it. Collective."""
    places = _places(layout, i)
    return _matrix(layout, (len(places), len(layout.domain.sets[i])), (layout.end - layout.begin, layout.size), places)


def extension(layout: SampleLayout, i: int) -> PETSc.Mat:
    """The matrix E_i (n, n_i), its columns on the rank that subdomain i is on; the caller destroys it. Collective."""
    matrix = restriction(layout, i)
    found = matrix.transpose(PETSc.Mat())
    weights = found.createVecRight()
    weights.array[:] = layout.domain.weights(i) if i in layout.mine else []
    found.diagonalScale(R=weights)
    weights.destroy()
    matrix.destroy()
    return found


def _places(layout: SampleLayout, i: int) -> Numbers:
    return layout.places[layout.domain.sets[i]] if i in layout.mine else NONE


def _matrix(layout: SampleLayout, rows: tuple[int, int], columns: tuple[int, int], places: Numbers) -> PETSc.Mat:
    matrix = PETSc.Mat().createAIJ((rows, columns), nnz=(1, 1), comm=layout.comm)
    pointers = np.arange(len(places) + 1, dtype=PETSc.IntType)
    matrix.setValuesCSR(pointers, places.astype(PETSc.IntType), np.ones(len(places)))
    matrix.assemble()
    return matrix


class Rows:
    """Copies rows of a matrix that are wanted here from the ranks that have them. Collective.

    Parameters
    ----------
    comm
        The ranks.
    ranges
        P + 1 places: where the rows of each rank begin, and their number.
    wanted
        The rows that this rank wants, in any order.
    """

    def __init__(self, comm: MPI.Comm, ranges: Sequence[int], wanted: Numbers) -> None:
        self.comm = comm
        owners = np.searchsorted(ranges, wanted, side="right") - 1
        self.order = np.argsort(owners, kind="stable")
        self.received = np.bincount(owners, minlength=comm.size)
        asked = comm.alltoall(np.split(wanted[self.order], np.cumsum(self.received)[:-1]))
        self.sent = np.array([len(rows) for rows in asked])
        self.given = np.concatenate(asked) - ranges[comm.rank]

    def get(self, rows: Array) -> Array:
        """The wanted rows (m, k), of which each rank has its own. Collective."""
        columns = rows.shape[1]
        here = rows[self.given]
        found = np.empty((len(self.order), columns), rows.dtype)
        arrived = np.empty_like(found)
        self.comm.Alltoallv([here, self.sent * columns], [arrived, self.received * columns])
        found[self.order] = arrived
        return found


class Exchange:
    """All restrictions, and the transposes of all, of matrices with a row for each sample. Collective.

    What several subdomains put to one sample is added in their order: the same bits on any number of ranks.
    """

    def __init__(self, layout: SampleLayout) -> None:
        domain = layout.domain
        self.sizes = [len(domain.sets[i]) for i in layout.mine]
        places = [layout.places[wide] for wide in domain.sets]
        self._restricted = Rows(layout.comm, layout.ranges, np.concatenate([NONE, *(places[i] for i in layout.mine)]))
        # the entries of all subdomains one behind the other, those of a rank's subdomains on that rank
        starts = np.cumsum([0, *map(len, places)])
        ranges = [int(starts[sum(owner < rank for owner in layout.owners)]) for rank in range(layout.comm.size + 1)]
        entries = np.concatenate(places)
        mine = np.flatnonzero((entries >= layout.begin) & (entries < layout.end))
        mine = mine[np.argsort(entries[mine], kind="stable")]
        self._extended = Rows(layout.comm, ranges, mine)
        self._starts = np.searchsorted(entries[mine], np.arange(layout.begin, layout.end))

    def restrict(self, rows: Array) -> list[Array]:
        """R_i X of this rank's subdomains, of X (n, k), of which each rank has its rows. Collective."""
        found = self._restricted.get(rows)
        return np.split(found, np.cumsum(self.sizes)[:-1]) if self.sizes else []

    def extend(self, parts: Sequence[Array], columns: int) -> Array:
        """This rank's rows of the sum of R_i^T Z_i, of Z_i (n_i, columns) of each rank's subdomains. Collective."""
        found = self._extended.get(np.concatenate([np.empty((0, columns)), *parts]))
        return np.add.reduceat(found, self._starts, axis=0) if len(found) else found
