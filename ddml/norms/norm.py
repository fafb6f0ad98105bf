"""Norms of distributed parameter vectors, with their dual norms and steepest directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective

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
        self.mine = dealt(norm.costs, layout.comm)
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
        return max(self._collect(self.norm.norms(self.layout.gather(x), self.mine)), default=0.0)

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
        full = self.layout.gather(g)  # whose buffer serves for the result, too: n numbers less
        shares = self.norm.dualize_blocks(full, full, self.mine)
        for b in set(range(len(self.norm.blocks))).difference(self.mine):
            self.norm.blocks[b].clear(full)
        self.layout.reduce(full, direction)
        return math.fsum(self._collect(shares))

    def _collect(self, mine: list[float]) -> list[float]:
        """One number for each block of this rank, from all ranks."""
        return [value for values in self.layout.comm.allgather(mine) for value in values]


def dealt(costs: Sequence[float], comm: MPI.Comm) -> list[int]:
    """Numbers of the blocks that this rank works on: the dearest first, each to the rank with least to do."""
    load, mine = np.zeros(comm.size), list[int]()
    for b in sorted(range(len(costs)), key=lambda b: -costs[b]):
        rank = int(np.argmin(load))
        load[rank] += costs[b]
        if rank == comm.rank:
            mine.append(b)
    return mine
