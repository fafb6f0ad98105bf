"""Where the coefficients of a kernel machine live: an entry for each sample and output in a PETSc vector."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import ONE_BY_ONE
from ddml.options import preset
from ddml.parallel import agreed, split
from ddml.summation import Tree, fix_order, leaves
from ddml.vectors import vector

from .cuts import Array
from .domain import SampleDomain

UNIT = 128  # samples that a rank has all or none of, at least where there are so many (our choice)


class SampleLayout:
    """The samples of a domain over the ranks of a communicator, core by core, and vectors with entries for each.

    The samples are cut into units, of which each rank has whole ones. Products are formed unit by unit, and sums over
    samples along a tree over the units (:class:`ddml.summation.Tree`), dot products of vectors over the units in their
    order; none of it depends on the number of ranks: the same bits on any. Collective on ``comm``.

    Parameters
    ----------
    domain
        What is laid out.
    comm
        Ranks that share it.
    shares
        How many of the samples each rank is to have, relative to the others, 0 or more: by its speed
        (:class:`~ddml.kernel_machines.speeds.Speeds`). Alike by default.

    Raises
    ------
    InputError
        If ranks have cut the samples differently, or shares are not one for each rank, or not finite.

    Attributes
    ----------
    edges : list of int
        Where the units begin, and n.
    ranges : list of int
        Where the ranks' samples begin, and n: P + 1 places.
    rows : ndarray
        The numbers of this rank's samples, in their order.
    places : ndarray
        (n,), the place of each sample in a vector of one column.
    owners : list of int
        The rank that each subdomain is on: the one with the middle of its core.
    mine : list of int
        The subdomains on this rank: consecutive ones.
    """

    def __init__(self, domain: SampleDomain, comm: MPI.Comm, shares: Sequence[float] | None = None) -> None:
        self.domain, self.comm, self.size = domain, comm, domain.size
        checksum = zlib.crc32(np.concatenate([domain.order, *domain.sets]).tobytes())
        if len(set(comm.allgather(checksum))) > 1:
            raise InputError("the ranks have cut the samples differently: cut on one of them and broadcast")
        _check_shares(comm, shares)
        count = leaves(self.size, UNIT)
        self.edges = split(self.size, count)
        self.tree = Tree(count, comm.size, shares)
        self.ranges = [self.edges[unit] for unit in self.tree.edges]
        self.begin, self.end = self.ranges[comm.rank : comm.rank + 2]
        self.rows = domain.order[self.begin : self.end]
        self.places = np.argsort(domain.order)
        edges = np.cumsum([0, *map(len, domain.cores)])
        middles = np.minimum((edges[:-1] + edges[1:]) // 2, self.size - 1)
        self.owners = [int(np.searchsorted(self.ranges, place, side="right")) - 1 for place in middles]
        self.mine = [i for i, owner in enumerate(self.owners) if owner == comm.rank]
        self.subdomains = Tree(len(domain), comm.size, np.bincount(self.owners, minlength=comm.size).tolist())

    @property
    def units(self) -> range:
        """This rank's units."""
        return range(*self.tree.edges[self.comm.rank : self.comm.rank + 2])

    def piece(self, unit: int) -> slice:
        """Where one of this rank's units is among its rows."""
        return slice(self.edges[unit] - self.begin, self.edges[unit + 1] - self.begin)

    def vector(self, columns: int = 1) -> PETSc.Vec:
        """A new zero vector of n x ``columns`` entries, sample by sample; the caller destroys it. Collective."""
        with preset(**ONE_BY_ONE):
            vec = vector(self.comm, (self.end - self.begin) * columns, self.size * columns)
        fix_order(vec, [edge * columns for edge in self.edges])
        vec.set(0.0)
        return vec

    def set(self, vec: PETSc.Vec, values: Array) -> None:
        """Write numbers (n, columns), by sample and the same on every rank, to a vector."""
        with vec as array:
            array[:] = values[self.rows].ravel()

    def matrix(self, vec: PETSc.Vec) -> Array:
        """This rank's entries of a vector as rows (n, columns), to be read."""
        return vec.array_r.reshape(self.end - self.begin, vec.getSize() // self.size)

    def get(self, vec: PETSc.Vec) -> Array:
        """The entries (n, columns) of a vector by sample, on every rank. Collective."""
        return self.everywhere(self.matrix(vec))[self.places]

    def everywhere(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The matrix (n, k), by place, of which each rank has its rows. Collective."""
        rows = np.ascontiguousarray(rows)  # what a product rounds depends on the order in memory
        if self.comm.size == 1:
            return rows
        whole = np.empty((self.size, rows.shape[1]), rows.dtype)
        self.comm.Allgatherv(rows, [whole, np.diff(self.ranges) * rows.shape[1]])
        return whole

    def inner(self, X: Array, Y: Array) -> Array:
        """X^T Y (k, m) of matrices (n, k) and (n, m), of which each rank has its rows, on every rank. Collective."""
        sums = [
            self.tree.add(node, lambda unit: X[self.piece(unit)].T @ Y[self.piece(unit)])
            for node in self.tree.nodes[self.comm.rank]
        ]
        return np.asarray(self.tree.total([total for here in self.comm.allgather(sums) for total in here]))

    def scattered(self, sums: Sequence[Array]) -> Array:
        """This rank's rows of the sum over all units of matrices (n, k), by place. Collective.

        Parameters
        ----------
        sums
            The sums over this rank's nodes of the tree.
        """
        if self.comm.size == 1:
            return sums[0]
        found = self.comm.alltoall([[part[a:b] for part in sums] for a, b in pairwise(self.ranges)])
        return np.asarray(self.tree.total([part for here in found for part in here]))

    def summed(self, term: Callable[[int], Array]) -> Array:
        """The sum over all subdomains of new arrays, which ``term`` gives for each number of ``mine``. Collective.

        It is the same on every rank.
        """
        sums = [self.subdomains.add(node, term) for node in self.subdomains.nodes[self.comm.rank]]
        return np.asarray(self.subdomains.total([total for here in self.comm.allgather(sums) for total in here]))

    def times(self, X: Array, weights: Array) -> Array:
        """This rank's rows of X W, of those of X (n, k) and W (k, m)."""
        parts = [X[self.piece(unit)] @ weights for unit in self.units]
        return np.concatenate([np.empty((0, weights.shape[1])), *parts])


def _check_shares(comm: MPI.Comm, shares: Sequence[float] | None) -> None:
    with agreed(comm):
        given = None if shares is None else [float(share) for share in shares]
        if given is not None and not (len(given) == comm.size and min(given) >= 0 and 0 < sum(given) < math.inf):
            raise InputError(f"{comm.size} ranks need a share of the samples each, 0 or more, not all 0; got {given}")
    if any(other != given for other in comm.allgather(given)):
        raise InputError("the ranks were given different shares of the samples: gather them on all of them")
