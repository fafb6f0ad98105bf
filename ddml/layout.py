"""Where parameters live: names, shapes and offsets in one global PETSc vector, and who owns which range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from .errors import InputError
from .options import preset
from .parallel import split
from .parameters import Parameter
from .summation import Tree, fix_order, pieces, snapped
from .vectors import CPU, entries, vector, write

# PETSc computes several dot products as one matrix product if the vectors happen to lie evenly spaced in memory: then
# the last bits of a run would depend on the allocator. Vectors take this over when they are made.
ONE_BY_ONE = {"vec_mdot_use_gemv": False, "vec_maxpy_use_gemv": False}


Array = NDArray[Any]


class ParameterLayout:
    """The global vector of some parameters and its distribution over the ranks of a communicator.

    Immutable. A vector made by :meth:`vector` has n entries, parameter tensors one behind the
    other, row-major; rank p owns entries ``ranges[p]`` to ``ranges[p + 1]``, which are whole pieces
    (:func:`ddml.summation.pieces`). Dot products and norms of these vectors and of their duplicates, whoever asks for
    them, are sums over the pieces in their order: the same bits on any number of ranks.

    Parameters
    ----------
    parameters
        The table of a :class:`ddml.losses.loss.Loss`.
    comm
        Ranks that share the vector.
    ranges
        P + 1 boundaries, each of which is moved to the next edge of a piece; default: equal shares. Pass
        :meth:`ddml.decomposition.subdomains.Subdomains.ownership` to make subdomains local to their ranks.
    device
        Where the vectors are (:mod:`ddml.vectors`). On a card PETSc sums as it does by itself.

    Attributes
    ----------
    edges : list of int
        Where the pieces begin, and n.
    ranges : tuple of int
        The P + 1 boundaries.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        comm: MPI.Comm,
        ranges: Sequence[int] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.parameters = tuple(parameters)
        self.comm = comm
        self.device = device
        self.size = self.parameters[-1].range.stop
        wanted = tuple(split(self.size, comm.size) if ranges is None else ranges)
        if len(wanted) != comm.size + 1 or wanted[0] != 0 or wanted[-1] != self.size:
            raise InputError(f"{comm.size} ranks need {comm.size + 1} boundaries from 0 to {self.size}, got {wanted}")
        if (np.diff(wanted) < 0).any():
            raise InputError(f"ownership ranges must not overlap, got {wanted}")
        self.edges = pieces([p.size for p in self.parameters])
        self.ranges = tuple(snapped(self.edges, wanted))
        self.counts = np.diff(self.ranges)
        self._full: dict[torch.dtype, Tensor] = {}

    def __repr__(self) -> str:
        lines = [f"ParameterLayout of {self.size} parameters on {self.comm.size} ranks"]
        for rank, (begin, end) in enumerate(zip(self.ranges, self.ranges[1:], strict=False)):
            names = [p.name for p in self.parameters if p.offset < end and begin < p.range.stop]
            inside = f"{names[0]} to {names[-1]}" if names else "nothing"
            lines.append(f"  rank {rank}: {begin} to {end}, {inside}")
        return "\n".join(lines)

    def vector(self) -> PETSc.Vec:
        """A new zero vector in this layout; the caller destroys it. Collective."""
        local = int(self.counts[self.comm.rank])
        with preset(**ONE_BY_ONE):
            vec = vector(self.comm, local, self.size, self.device)
        if self.device.type == "cpu":
            fix_order(vec, self.edges)
        vec.set(0.0)
        return vec

    def gather(self, x: PETSc.Vec, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
        """All n entries of x on every rank, in float64 or float32, on a device. Collective.

        In float64 this is x's own memory on one rank, if x is on that device; on several ranks all goes over the host,
        and it is a buffer that the next call uses again: read it, and do not keep it.
        """
        local = entries(x).to(dtype)
        if self.comm.size == 1:
            return local.to(device)
        double = dtype == torch.float64
        full = self._buffer(dtype) if double else torch.empty(self.size, dtype=dtype)
        kind = MPI.DOUBLE if double else MPI.FLOAT
        self.comm.Allgatherv(local.cpu().numpy(), [full.numpy(), self.counts, self.ranges[:-1], kind])
        return full.to(device)

    def reduce(self, contributions: Tensor, g: PETSc.Vec) -> None:
        """Sum the ranks' vectors (n,) into the distributed vector g. Collective.

        On one rank they stay on their device if g is there, too; on several all goes over the host.
        """
        if self.comm.size == 1:
            write(g, contributions)
            return
        given = contributions.cpu().numpy()
        with g as array:
            mine = self.summed(given, array if given.dtype == array.dtype else None)
            if mine is not array:
                array[:] = mine

    def summed(self, given: Array, out: Array | None = None) -> Array:
        """The entries that this rank owns of the sum of the ranks' vectors (n,), in their precision. Collective.

        On one rank the vector itself; else written to ``out`` if that is given.
        """
        if self.comm.size == 1:
            return given
        mine = np.empty(self.counts[self.comm.rank], given.dtype) if out is None else out
        self.comm.Reduce_scatter(given, mine, list(self.counts), MPI.SUM)
        return mine

    def sum_nodes(self, sums: Sequence[Array], tree: Tree, dtype: Any, rest: tuple[int, ...] = ()) -> Array:
        r"""Sum vectors or matrices (n, \*rest), one for each node of this rank, over all ranks: its rows. Collective.

        They are added as the tree says, in their own precision, so that the sum does not depend on who has them.
        """
        if self.comm.size == 1:
            return sums[0]
        # every rank sends every other the entries that it owns, and gets its own of all nodes
        mine, each = int(self.counts[self.comm.rank]), math.prod(rest)
        entries = [s[a:b].ravel() for a, b in pairwise(self.ranges) for s in sums]
        given = np.concatenate(entries) if entries else np.empty(0, dtype)
        received = np.empty((sum(map(len, tree.nodes)), mine, *rest), dtype)
        counts = np.array([len(nodes) for nodes in tree.nodes]) * mine * each
        self.comm.Alltoallv([given, len(sums) * self.counts * each], [received, counts])
        return np.asarray(tree.total(list(received)))

    @cached_property
    def pieces(self) -> list[slice]:
        """The pieces that this rank owns, in its local array."""
        begin, end = self.ranges[self.comm.rank], self.ranges[self.comm.rank + 1]
        return [slice(a - begin, b - begin) for a, b in pairwise(self.edges) if begin <= a and b <= end]

    def inner(self, X: Array, Y: Array) -> Array:
        """X^T Y (k, m) of matrices (n, k) and (n, m), of which this rank has its rows, piece by piece. Collective."""
        shares = np.array([X[piece].T @ Y[piece] for piece in self.pieces])
        shares = shares.reshape(len(self.pieces), X.shape[1], Y.shape[1])
        return np.asarray(sum(np.concatenate(self.comm.allgather(shares))))

    def times(self, X: Array, weights: Array) -> Array:
        """X W for the rows of X (n, k) that this rank has and W (k, ...), rounded alike however many they are."""
        parts = [X[piece] @ weights for piece in self.pieces]
        return np.concatenate([np.empty((0, *weights.shape[1:])), *parts])

    def orthonormal(self, X: Array) -> tuple[Array, Array]:
        """This rank's rows of Q, and R, with Q R = X (n, k), of which it has its rows. Collective."""
        factors = [np.linalg.qr(X[piece]) for piece in self.pieces]
        triangles = [R for here in self.comm.allgather([R for _, R in factors]) for R in here]
        second, R = np.linalg.qr(np.concatenate(triangles))
        numbers = range(len(self.edges) - 1)
        first = next((k for k in numbers if self.edges[k] >= self.ranges[self.comm.rank]), 0)
        starts = np.cumsum([0, *map(len, triangles)])
        parts = [Q @ second[starts[first + k] : starts[first + k + 1]] for k, (Q, _) in enumerate(factors)]
        return np.concatenate([np.empty((0, len(R))), *parts]), R

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._full:
            self._full[dtype] = torch.empty(self.size, dtype=dtype)
        return self._full[dtype]


class Operator:
    """Python context of a square symmetric matrix (n, n), whose vectors PETSc gets from a layout."""

    def __init__(self, layout: ParameterLayout) -> None:
        self.layout = layout

    def createVecs(self, mat: PETSc.Mat) -> tuple[PETSc.Vec, PETSc.Vec]:
        """What PETSc multiplies, and where it writes the product."""
        return self.layout.vector(), self.layout.vector()

    def matrix(self) -> PETSc.Mat:
        """The matrix; the caller destroys it. Collective."""
        local, n = int(self.layout.counts[self.layout.comm.rank]), self.layout.size
        mat = PETSc.Mat().createPython(((local, n), (local, n)), self, comm=self.layout.comm)
        mat.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        mat.setUp()
        return mat
