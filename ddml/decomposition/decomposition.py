"""Restriction and extension between the parameters and their subdomains, as PETSc matrices."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.parallel import split
from ddml.parameters import parameter_table
from ddml.summation import pieces, snapped

from .subdomains import Subdomains, length


class Decomposition:
    """Subdomains with their matrices, and who works on what.

    Subdomain vectors live on the ranks that work on the subdomain: with ``parallel`` the ranks of
    its group (P >= S: the communicator splits into S groups; P < S: each rank has several
    subdomains and treats them one after another), without it all ranks, equal shares.

    Parameters
    ----------
    subdomains
        What to decompose into.
    layout
        Of the global vectors.
    parallel
        Whether subdomains are treated side by side.
    gathered
        Whether the first rank of a group owns its subdomain vectors whole, as dense factors need it.

    Attributes
    ----------
    group : MPI.Comm
        The ranks that this one shares its subdomains with.
    mine : list of int
        Subdomains that this rank works on.
    R, E : list of PETSc.Mat
        Restrictions (n_s, n) and extensions (n, n_s), on the layout's communicator.
    """

    def __init__(self, subdomains: Subdomains, layout: ParameterLayout, parallel: bool, gathered: bool = False) -> None:
        comm = layout.comm
        self.subdomains, self.layout, self.gathered = subdomains, layout, gathered
        assigned = subdomains.assignment(comm.size) if parallel else [list(range(len(subdomains)))] * comm.size
        self.mine = assigned[comm.rank]
        self.group = comm.Split(color=assigned.index(self.mine), key=comm.rank)
        self.R: list[PETSc.Mat] = []
        self.E: list[PETSc.Mat] = []
        self.workers = [[rank for rank in range(comm.size) if s in assigned[rank]] for s in range(len(subdomains))]
        for s, ranges in enumerate(subdomains.ranges):
            entries = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
            rows = self.local_range(s)
            self.R.append(self._restriction(entries, rows))
            self.E.append(self._extension(entries, rows))

    def local_range(self, s: int) -> slice:
        """The entries of subdomain vector s that this rank owns."""
        workers = self.workers[s]
        edges = self._edges(s, len(workers))
        where = int(np.searchsorted(workers, self.layout.comm.rank))  # ranks before the group own nothing
        if self.layout.comm.rank in workers:
            return slice(edges[where], edges[where + 1])
        return slice(edges[where], edges[where])

    def _edges(self, s: int, ranks: int) -> list[int]:
        sizes = [r.stop - r.start for r in self.subdomains.ranges[s]]
        return [0] + [sum(sizes)] * ranks if self.gathered else snapped(pieces(sizes), split(sum(sizes), ranks))

    def _restriction(self, entries: NDArray[np.int64], rows: slice) -> PETSc.Mat:
        local, n = int(self.layout.counts[self.layout.comm.rank]), self.layout.size
        size = rows.stop - rows.start
        mat = PETSc.Mat().createAIJ(((size, len(entries)), (local, n)), nnz=(1, 1), comm=self.layout.comm)
        pointers = np.arange(size + 1, dtype=PETSc.IntType)
        mat.setValuesCSR(pointers, entries[rows].astype(PETSc.IntType), np.ones(size))
        mat.assemble()
        return mat

    def _extension(self, entries: NDArray[np.int64], rows: slice) -> PETSc.Mat:
        rank = self.layout.comm.rank
        begin, end = self.layout.ranges[rank], self.layout.ranges[rank + 1]
        mat = PETSc.Mat().createAIJ(
            ((end - begin, self.layout.size), (rows.stop - rows.start, len(entries))), nnz=(1, 1), comm=self.layout.comm
        )
        inside = np.flatnonzero((entries >= begin) & (entries < end))
        held = np.zeros(end - begin, dtype=np.int64)
        held[entries[inside] - begin] = 1
        pointers = np.concatenate(([0], np.cumsum(held))).astype(PETSc.IntType)
        mat.setValuesCSR(pointers, inside.astype(PETSc.IntType), self.subdomains.weights[entries[inside]])
        mat.assemble()
        return mat

    def vector(self, s: int) -> PETSc.Vec:
        """A new zero vector of subdomain s on the layout's communicator; the caller destroys it. Collective."""
        rows = self.local_range(s)
        vec = PETSc.Vec().createMPI((rows.stop - rows.start, length(self.subdomains.ranges[s])), comm=self.layout.comm)
        vec.set(0.0)
        return vec

    def group_layout(self, s: int) -> ParameterLayout:
        """The layout of subdomain s (one of ``mine``) on its group, range by range."""
        table = parameter_table([(f"{r.start}:{r.stop}", (r.stop - r.start,)) for r in self.subdomains.ranges[s]])
        return ParameterLayout(table, self.group, self._edges(s, self.group.size))

    def destroy(self) -> None:
        """Destroy the matrices and the communicator. Collective."""
        for mat in (*self.R, *self.E):
            mat.destroy()
        if self.group != MPI.COMM_NULL:
            self.group.Free()
