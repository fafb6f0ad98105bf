"""Norms of distributed parameter vectors, with their dual norms and steepest directions."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.vectors import owned

from .modular import ModularNorm

# multiply-adds: of a symmetric eigenproblem over the cube of its size; in double precision, of an exact polar factor
# beside that, and of a near one, over those of a product with the transpose (the latter by its time)
EIGENVALUES, EXACT_FACTOR, NEAR_FACTOR = 9, 5, 3.3


class Norm(ABC):
    """A norm of vectors (n,) in a layout; everything is collective on the layout's communicator.

    Attributes
    ----------
    is_maximum : bool
        Whether the norm of vectors with disjoint layers is the largest of theirs.
    """

    is_maximum = True

    def refresh(self, x: PETSc.Vec) -> None:
        """Fit the norm to the loss around x, if it depends on it."""
        return

    def aged(self, x: PETSc.Vec) -> None:
        """A step has been tried, x is where it led to."""
        return

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        return

    @abstractmethod
    def __call__(self, x: PETSc.Vec) -> float:
        """The norm of x."""

    @abstractmethod
    def steepest(self, g: PETSc.Vec, direction: PETSc.Vec) -> float:
        """Write a t of norm 1 (0 where g is 0) with the largest <g, t> to ``direction``; <g, t>, the dual norm of g.

        ``direction`` may be g itself.
        """


def apart(x: PETSc.Vec, other: PETSc.Vec) -> PETSc.Vec:
    """x, or a copy of it if ``other`` is the same vector; the caller destroys the copy."""
    return x.copy() if x.handle == other.handle else x


class TwoNorm(Norm):
    """|x|_2, its own dual."""

    is_maximum = False

    def __call__(self, x: PETSc.Vec) -> float:
        """See :class:`Norm`."""
        return float(x.norm())

    def steepest(self, g: PETSc.Vec, direction: PETSc.Vec) -> float:
        """See :class:`Norm`: g / |g|_2."""
        size = float(g.norm())
        g.copy(direction)
        direction.scale(1 / size if size > 0 else 0.0)
        return size


class InfinityNorm(Norm):
    """max |x_i|, with dual |g|_1."""

    def __call__(self, x: PETSc.Vec) -> float:
        """See :class:`Norm`."""
        return float(x.norm(PETSc.NormType.NORM_INFINITY))

    def steepest(self, g: PETSc.Vec, direction: PETSc.Vec) -> float:
        """See :class:`Norm`: the signs of g."""
        given = apart(g, direction)
        with given as values, direction as signs:
            np.sign(values, out=signs)
        dual = float(given.dot(direction))
        if given is not g:
            given.destroy()
        return dual


class DistributedModularNorm(Norm):
    """The modular norm: the blocks are dealt over the ranks, so that the same bits come out on any number of them.

    The norm of vectors with large matrices is an upper bound, and steepest directions have at most norm 1 and, of the
    dual norm, all but a tolerance (:mod:`ddml.norms.modular`); what :meth:`steepest` returns is the true inner product.

    Parameters
    ----------
    norm
        Of the gathered vector.
    layout
        Of the distributed ones.
    objective
        Is charged what the norm computes.

    Raises
    ------
    InputError
        If the norm says nothing of some entries.
    """

    def __init__(self, norm: ModularNorm, layout: ParameterLayout, objective: Objective | None = None) -> None:
        self.norm, self.layout, self.objective = norm, layout, objective
        self.share = _Share(norm, layout)
        known = sum(math.prod(block.shape) for block in norm.blocks)
        if known != layout.size:
            raise InputError(f"a modular norm must be of all {layout.size} parameters, this one is of {known}")

    def _charge(self, factors: bool, copies: int) -> None:
        if self.objective is None:
            return
        operations = 0.0
        for block in self.norm.blocks:
            m, n = sorted(block.shape)
            if block.by_rows:
                operations += m * n
            elif self.norm.large(block):
                operations += (NEAR_FACTOR if factors else 1) * m**2 * n
            else:
                operations += (EXACT_FACTOR if factors else 1) * m**2 * n + EIGENVALUES * m**3
        self.objective.compute(operations, fresh=copies * self.norm.size)

    def __call__(self, x: PETSc.Vec) -> float:
        """See :class:`Norm`."""
        self._charge(False, 2)
        return max(self._collect(self.share.norm.norms(self.share.fetch(x))), default=0.0)

    def steepest(self, g: PETSc.Vec, direction: PETSc.Vec) -> float:
        """See :class:`Norm`: the duality map."""
        self._charge(True, 10)
        if self.layout.comm.size == 1:
            if g.handle != direction.handle:
                g.copy(direction)
            with direction as array:
                full = torch.from_numpy(array)
                shares = self.norm.dualize_blocks(full, full)
                full += 0.0  # -0 becomes 0, as it does where other ranks' zeros are added
            return math.fsum(shares)
        mine = self.share.fetch(g)
        image = torch.zeros_like(mine) if self.share.mixed else mine
        shares = self.share.norm.dualize_blocks(mine, image)
        self.share.deliver(image, direction)
        return math.fsum(self._collect(shares))

    def _collect(self, mine: list[float]) -> list[float]:
        """One number for each block of this rank, from all ranks."""
        return [value for values in self.layout.comm.allgather(mine) for value in values]


class _Share:
    """The blocks of a norm that this rank works on, in a vector of their entries only; all is collective.

    Attributes
    ----------
    norm : ModularNorm
        Of that vector (k,).
    mixed : bool
        Whether there are entries of other blocks among them, as slices of a convolution lie between each other.
    """

    def __init__(self, norm: ModularNorm, layout: ParameterLayout) -> None:
        self.layout = layout
        mine = dealt(norm.costs, layout.comm)
        ranges = _joined([span for b in mine for span in norm.blocks[b].spans])
        starts = [0, *itertools.accumulate(end - begin for begin, end in ranges)]

        def place(offset: int) -> int:
            k = bisect_right(ranges, offset, key=lambda r: r[0]) - 1
            return starts[k] + offset - ranges[k][0]

        self.size = starts[-1]
        self.norm = norm.among(mine, place, self.size)
        self.mixed = sum(math.prod(block.shape) for block in self.norm.blocks) < self.size
        # what each rank needs of this one's entries, and what this one needs of theirs, in increasing order
        here, edges = layout.comm.rank, layout.ranges
        wanted = layout.comm.allgather(ranges)
        self._given = [_inside(there, edges[here], edges[here + 1]) for there in wanted]
        self._taken = [sum(b - a for a, b in _inside(ranges, *edge)) for edge in itertools.pairwise(edges)]

    @property
    def _counts(self) -> list[int]:
        return [sum(b - a for a, b in there) for there in self._given]

    def fetch(self, x: PETSc.Vec) -> Tensor:
        """The entries of x that this rank works on (k,): a copy, on one rank x's own memory where all are."""
        local = owned(x)
        if self.layout.comm.size == 1 and self.size == len(local):
            return local
        given = [local[a:b] for there in self._given for a, b in there]
        sent, received = torch.cat([local[:0], *given]), local.new_empty(self.size)
        self.layout.comm.Alltoallv([sent.numpy(), self._counts], [received.numpy(), self._taken])
        return received

    def deliver(self, image: Tensor, x: PETSc.Vec) -> None:
        """Write to x what all ranks have found of it, each (k,); entries of others' blocks must be 0 there."""
        received = np.empty(sum(self._counts))
        self.layout.comm.Alltoallv([image.numpy(), self._taken], [received, self._counts])
        with x as array:
            array[:] = 0.0
            end = 0
            for there in self._given:
                for a, b in there:
                    begin, end = end, end + b - a
                    array[a:b] += received[begin:end]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that cover all of these, in increasing order and apart."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _inside(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """What of some ranges lies between two places, counted from the first."""
    cut = [(max(a, begin) - begin, min(b, end) - begin) for a, b in ranges]
    return [(a, b) for a, b in cut if a < b]


def dealt(costs: Sequence[float], comm: MPI.Comm) -> list[int]:
    """Numbers of the blocks that this rank works on: the dearest first, each to the rank with least to do."""
    load, mine = np.zeros(comm.size), list[int]()
    for b in sorted(range(len(costs)), key=lambda b: -costs[b]):
        rank = int(np.argmin(load))
        load[rank] += costs[b]
        if rank == comm.rank:
            mine.append(b)
    return mine
