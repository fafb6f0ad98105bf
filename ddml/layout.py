"""Where parameters live: names, shapes and offsets in one global PETSc vector, and who owns which range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from .errors import InputError
from .loss import Parameter
from .options import preset
from .parallel import split

# PETSc computes several dot products as one matrix product if the vectors happen to lie evenly spaced in memory: then
# the last bits of a run would depend on the allocator. Vectors take this over when they are made.
ONE_BY_ONE = {"vec_mdot_use_gemv": False, "vec_maxpy_use_gemv": False}


class ParameterLayout:
    """The global vector of some parameters and its distribution over the ranks of a communicator.

    Immutable. A vector made by :meth:`vector` has n entries, parameter tensors one behind the
    other, row-major; rank p owns entries ``ranges[p]`` to ``ranges[p + 1]``.

    Parameters
    ----------
    parameters
        The table of a :class:`ddml.loss.Loss`.
    comm
        Ranks that share the vector.
    ranges
        P + 1 boundaries; default: equal shares. Pass
        :meth:`ddml.decomposition.Subdomains.ownership` to make subdomains local to their ranks.
    """

    def __init__(self, parameters: Sequence[Parameter], comm: MPI.Comm, ranges: Sequence[int] | None = None) -> None:
        self.parameters = tuple(parameters)
        self.comm = comm
        self.size = self.parameters[-1].range.stop
        self.ranges = tuple(split(self.size, comm.size) if ranges is None else ranges)
        if len(self.ranges) != comm.size + 1 or self.ranges[0] != 0 or self.ranges[-1] != self.size:
            raise InputError(
                f"{comm.size} ranks need {comm.size + 1} boundaries from 0 to {self.size}, got {self.ranges}"
            )
        self.counts = np.diff(self.ranges)
        if (self.counts < 0).any():
            raise InputError(f"ownership ranges must not overlap, got {self.ranges}")
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
            vec = PETSc.Vec().createMPI((local, self.size), comm=self.comm)
        vec.set(0.0)
        return vec

    def gather(self, x: PETSc.Vec) -> Tensor:
        """All n entries of x on every rank, float64. Collective.

        On one rank this is x's own memory, on several a buffer that the next call uses again:
        read it, and do not keep it.
        """
        local = owned(x)
        if self.comm.size == 1:
            return local
        full = self._buffer(torch.float64)
        self.comm.Allgatherv(local.numpy(), [full.numpy(), self.counts, self.ranges[:-1], MPI.DOUBLE])
        return full

    def reduce(self, contributions: Tensor, g: PETSc.Vec) -> None:
        """Sum the ranks' vectors (n,) into the distributed vector g. Collective."""
        with g as array:
            if self.comm.size == 1:
                array[:] = contributions.numpy()
            else:
                mine = contributions.to(torch.float64).numpy()
                self.comm.Reduce_scatter(mine, [array, MPI.DOUBLE], list(self.counts), MPI.SUM)

    def reduce_rows(self, rows: NDArray[np.float64], counts: Sequence[int], g: PETSc.Vec) -> None:
        """Sum vectors (rows, n), ``counts`` of them on each rank, into the distributed vector g (:meth:`sum_rows`)."""
        with g as array:
            array[:] = self.sum_rows(rows, counts)

    def sum_rows(self, rows: NDArray[np.float64], counts: Sequence[int]) -> NDArray[np.float64]:
        """Sum vectors or matrices (rows, n, ...), ``counts`` of them on each rank: this rank's share of n. Collective.

        They are summed in their order over all ranks, so that the sum does not depend on who has them.
        """
        if self.comm.size == 1:
            return np.asarray(rows.sum(axis=0))
        # every rank sends every other the entries that it owns, and gets its own of all rows
        shape = int(self.counts[self.comm.rank]), *rows.shape[2:]
        each = self.counts * math.prod(rows.shape[2:])
        entries = np.concatenate([c.ravel() for c in np.split(rows, self.ranges[1:-1], axis=1)])
        received = np.empty((sum(counts), *shape))
        self.comm.Alltoallv(
            [entries, len(rows) * each, MPI.DOUBLE], [received, math.prod(shape) * np.array(counts), MPI.DOUBLE]
        )
        return np.asarray(received.sum(axis=0))

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._full:
            self._full[dtype] = torch.empty(self.size, dtype=dtype)
        return self._full[dtype]


def owned(x: PETSc.Vec) -> Tensor:
    """The entries of x that this rank owns, in x's memory; to be read only."""
    return torch.utils.dlpack.from_dlpack(x.toDLPack("r"))
