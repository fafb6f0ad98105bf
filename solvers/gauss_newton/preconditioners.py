"""Preconditioners of Gauss-Newton systems, for PETSc's KSP: ``-gn_pc_type python -gn_pc_python_type solvers.<name>``.

They are built from the matrix's :class:`NormalEquations`, are symmetric positive definite, and can be
kept while the point and the damping move.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import Operator, ParameterLayout
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.options import Option, read
from solvers.owner import Owner

Array = NDArray[np.float64]


class NormalEquations(Operator):
    """Python context of the matrix J^T J + lambda I (n, n) of a residual objective; PETSc calls what is collective."""

    def __init__(self, objective: ResidualObjective) -> None:
        super().__init__(objective.layout)
        self.objective = objective
        self.damping = 0.0
        self.moves = 0  # number of points so far
        self._at: Linearisation | None = None

    def move(self, at: Linearisation | None) -> None:
        """Make it the matrix at another point, or at none for now."""
        self._at = at
        self.moves += at is not None

    @property
    def at(self) -> Linearisation:
        """The linearisation at the point."""
        assert self._at is not None
        return self._at

    def matrix(self) -> PETSc.Mat:
        """See :meth:`ddml.layout.Operator.matrix`."""
        mat = super().matrix()
        mat.setOption(PETSc.Mat.Option.SPD, True)
        return mat

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        v = self.objective.layout.gather(x, device=self.at.device)
        self.at.transpose_product(self.at.product(v), y)
        y.axpy(self.damping, x)

    def getDiagonal(self, mat: PETSc.Mat, diagonal: PETSc.Vec) -> None:
        """The diagonal, for PETSc's own preconditioners."""
        self.at.diagonal(diagonal)
        diagonal.shift(self.damping)


class Preconditioner(Owner, ABC):
    """Python context of a PC. ``setUp`` builds it anew unless it has just been restored; :meth:`damp` moves lambda."""

    options: ClassVar[Sequence[Option]] = ()
    keeps: ClassVar[bool] = True  # whether it stays positive definite when the matrix moves on

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.prefix, self.restored, self.damping = "", False, 0.0
        self.built = 0  # for which of the matrix's points

    def setFromOptions(self, pc: PETSc.PC) -> None:
        """Read the options under the prefix of the KSP. Collective."""
        self.prefix = pc.getOptionsPrefix() or ""
        self.settings = read(self.options, self.prefix)

    def setUp(self, pc: PETSc.PC) -> None:
        """Build it for the matrix as it is. Collective."""
        system = self.system = self.equations(pc)
        self.objective = system.objective
        self.prepare()
        if not self.restored and self.built != system.moves:
            self.build(system.at)
            self.built = system.moves
        self.restored = False
        self.damp(system.damping)

    def equations(self, pc: PETSc.PC) -> NormalEquations:
        """What the matrix is made of.

        Raises
        ------
        InputError
            If it is none of ours.
        """
        mat = pc.getOperators()[1]
        context = mat.getPythonContext() if mat.getType() == "python" else None
        if not isinstance(context, NormalEquations):
            raise InputError(f"{type(self).__name__} preconditions Gauss-Newton systems only")
        return context

    def prepare(self) -> None:
        """Make what does not depend on the point. Collective."""
        return

    @abstractmethod
    def build(self, at: Linearisation) -> None:
        """Build it for J^T J at a point. Collective."""

    def damp(self, damping: float) -> None:
        """Make it one for J^T J + damping I. Collective."""
        self.damping = damping

    @abstractmethod
    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write M^-1 x to y. Collective."""

    def kind(self) -> str:
        """What a :meth:`state` is of: one of another kind cannot be restored."""
        return type(self).__name__

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on without :meth:`build`. Collective."""

    @abstractmethod
    def restore(self, objective: Objective, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`, of any number of ranks, before ``setUp``. Collective."""


def owned(objective: Objective) -> slice:
    """The parameters that this rank owns."""
    ranges, rank = objective.layout.ranges, objective.comm.rank
    return slice(ranges[rank], ranges[rank + 1])


class Tall:
    """A matrix (n, k) of which each rank has the rows of its parameters; products are rounded alike on any ranks.

    Parameters
    ----------
    layout
        Of the parameters.
    columns
        Those that are not zero in each piece of the layout, of all pieces.
    blocks
        These columns of the rows (entries of a piece, columns) of each piece that this rank owns.
    width
        k.
    """

    def __init__(self, layout: ParameterLayout, columns: Sequence[slice], blocks: Sequence[Any], width: int) -> None:
        self.layout, self.columns, self.blocks, self.width = layout, columns, blocks, width
        first = [bisect_left(layout.edges, edge) for edge in layout.ranges]
        self.counts = [sum(c.stop - c.start for c in columns[a:b]) for a, b in pairwise(first)]
        self.mine = columns[first[layout.comm.rank] :][: len(blocks)]

    @classmethod
    def dense(cls, layout: ParameterLayout, rows: Array) -> Tall:
        """From this rank's rows (n_local, k)."""
        width = rows.shape[1]
        blocks = [np.ascontiguousarray(rows[piece]) for piece in layout.pieces]
        return cls(layout, [slice(0, width)] * (len(layout.edges) - 1), blocks, width)

    def transpose_times(self, X: Array) -> Array:
        """The product (k, ...) of its transpose with this rank's rows of X (n, ...), on every rank. Collective."""
        shape = X.shape[1:]
        parts = [block.T @ X[piece] for block, piece in zip(self.blocks, self.layout.pieces, strict=True)]
        flat = np.concatenate([np.empty(0), *(part.ravel() for part in parts)])
        if self.layout.comm.size > 1:
            counts = np.array(self.counts) * math.prod(shape)
            mine, flat = flat, np.empty(counts.sum())
            self.layout.comm.Allgatherv(mine, [flat, counts])
        product, begin = np.zeros((self.width, *shape)), 0
        for columns in self.columns:
            end = begin + (columns.stop - columns.start) * math.prod(shape)
            product[columns] += flat[begin:end].reshape(-1, *shape)
            begin = end
        return product

    def times(self, weights: Array) -> Array:
        """This rank's entries of the product with weights (k,)."""
        parts = [block @ weights[columns] for block, columns in zip(self.blocks, self.mine, strict=True)]
        return np.concatenate([np.empty(0), *parts])


def everywhere(objective: Objective, rows: Array) -> Array:
    """A matrix (n, k) on every rank, of which each had the rows of its parameters. Collective."""
    layout, columns = objective.layout, rows.shape[1]
    whole = np.empty((layout.size, columns))
    counts, places = layout.counts * columns, np.array(layout.ranges[:-1]) * columns
    objective.comm.Allgatherv(np.ascontiguousarray(rows), [whole, counts, places, MPI.DOUBLE])
    return whole


def distributed(objective: Objective, values: Array) -> PETSc.Vec:
    """Numbers of which each rank has some, in the order of the ranks, as a vector; the caller destroys it."""
    return PETSc.Vec().createWithArray(values, (len(values), PETSc.DETERMINE), comm=objective.comm)
