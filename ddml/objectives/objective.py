"""Objectives: losses of distributed parameter vectors, with their samples split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.layout import Operator, ParameterLayout
from ddml.linalg.compact import Compact
from ddml.losses.loss import Loss
from ddml.losses.recorded import Recorder
from ddml.losses.work import DOUBLE, FRESH, PASSED, WorkCounter
from ddml.numbers import Number
from ddml.parallel import StopRequest
from ddml.vectors import write

from .linear import GatheredTerm, LinearTerm, tilted
from .parts import Parts


@dataclass(frozen=True)
class Replacement:
    """What comes with a loss that replaces another one.

    Attributes
    ----------
    overlap : ndarray of int64, or None
        Numbers of the loss's samples that the loss before it had, too, if that is known:
        ``ddml.objectives.composed.sampled(objective, overlap)`` is the loss on them.
    report : callable, or None
        Wants to be told which part of the decrease that a method promised itself of its steps on the loss before there
        has been on this one; NaN if that is not known.
    """

    overlap: NDArray[np.int64] | None = None
    report: Callable[[float], None] | None = None


class Objective:
    """A loss as a function of a distributed parameter vector; everything here is collective on ``comm``.

    The same numbers come out on any number of ranks, to rounding; non-finite ones are returned.

    Parameters
    ----------
    loss
        The whole loss; every rank passes the same and works on its share of the samples.
    layout
        Distribution of the parameters; its communicator is the objective's.
    stop
        Asked at every evaluation on several ranks: all of them raise
        :class:`ddml.parallel.Interrupted` together once one got a signal.
    blocks
        See :class:`ddml.objectives.parts.Parts`.
    parts
        This rank's blocks of the loss, if it has been cut already.
    record
        See :class:`ddml.objectives.parts.Parts`; objectives that are made of this one record nothing.

    Attributes
    ----------
    parts : Parts
    work : WorkCounter
    fraction : float
        Samples of this objective over those of the whole data set, in work units.
    version : int
        Grows when the loss is replaced: what solvers know of it is then out of date.
    replacement : Replacement
        What came with the loss, when it was last replaced.
    linear : tuple of LinearTerm
        What is added to the loss (:func:`ddml.objectives.composed.shifted`), in the value and in the gradient.
    """

    cut: ClassVar[type[Parts]] = Parts

    def __init__(
        self,
        loss: Loss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.loss = loss
        self.layout = layout
        self.comm = layout.comm
        self.stop = stop
        self.work = WorkCounter()
        self.fraction = 1.0
        self.version = 0
        self.replacement = Replacement()
        self.linear: tuple[LinearTerm, ...] = ()
        self.parts = self.cut(loss, layout, blocks, parts, record)
        self._followers: WeakSet[Objective] = WeakSet()
        self._events = {name: PETSc.Log.Event(f"ddml {name}") for name in ("loss", "gradient", "product")}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.loss.count} samples on {self.comm.size} ranks\n{self.layout!r}"

    def replace(
        self,
        loss: Loss,
        fraction: float | None = None,
        overlap: NDArray[np.int64] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """Minimise another loss of the same parameters from now on, say with other samples. Collective.

        ``overlap`` and ``report`` are those of a :class:`Replacement`; the fraction stays what it is unless it is
        given.
        """
        self.loss, self.parts, self.replacement = loss, self.parts.of(loss), Replacement(overlap, report)
        self.fraction = self.fraction if fraction is None else fraction
        self.version += 1
        self.lead()

    def derived(
        self,
        loss: Loss,
        parts: Sequence[Loss] | None = None,
        fraction: float | None = None,
        terms: Sequence[LinearTerm] = (),
    ) -> Objective:
        """An objective of another loss of the same parameters: with the same linear terms and the same counter of work.

        Parameters
        ----------
        loss
            The other loss.
        parts
            This rank's share of it, if it has been cut already.
        fraction
            Of the samples (default: this objective's).
        terms
            More linear terms.
        """
        made = self._made(loss, self.parts.blocks_of(loss) if parts is None else self.parts.blocks, parts)
        made.fraction = self.fraction if fraction is None else fraction
        made.work, made.linear = self.work, (*self.linear, *terms)
        return made

    def _made(self, loss: Loss, blocks: int, parts: Sequence[Loss] | None) -> Objective:
        return type(self)(loss, self.layout, self.stop, blocks, parts)

    def follow_with(self, other: Objective) -> None:
        """Let an objective of the same loss get whatever this one's is replaced by, from now on."""
        other.version, other.replacement = self.version, self.replacement
        self._followers.add(other)

    def lead(self) -> None:
        """Hand the loss, which is a new one, to those that follow."""
        for other in list(self._followers):
            other.loss, other.parts, other.fraction = self.loss, self.parts, self.fraction
            other.version, other.replacement = self.version, self.replacement
            other.lead()

    def uninterrupted(self) -> AbstractContextManager[None]:
        """A block in which no evaluation, of whatever is made of this objective either, notices a request to stop."""
        return nullcontext() if self.stop is None else self.stop.deferred()

    def linear_terms(self) -> list[GatheredTerm]:
        """The linear terms with their whole vectors, for objectives of some of the parameters. Collective."""
        return [term.gathered(self.layout) for term in self.linear]

    def parameters(self, x: PETSc.Vec) -> Tensor:
        """All parameters at x in the loss's precision, on its device; x's own memory where that is possible."""
        single = self.loss.dtype == torch.float32
        full = self.layout.gather(x, torch.float32 if single else torch.float64, self.loss.device)
        return full.to(self.loss.dtype)

    def value(self, x: PETSc.Vec) -> float:
        """The loss at x."""
        with self._events["loss"]:
            theta = self.parameters(x)
            self.work.add(self.fraction * self.loss.charges.evaluation(gradient=False), losses=1)
            return tilted(self.linear, self.sum_parts([part.value(theta) for part in self.parts]), x)

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """The loss at x; its gradient is written to g."""
        with self._events["gradient"]:
            values, rows = _evaluated(self, self.parameters(x))
            self.parts.write_rows(rows, g)
            for term in self.linear:
                g.axpy(1.0, term.dg)
            return tilted(self.linear, self.sum_parts(values), x)

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """The loss at x and its gradient as it comes, in the precision of the loss; not with linear terms.

        ``ready`` is called as soon as the parameters have been read: x may be overwritten from then on.
        """
        assert not self.linear
        with self._events["gradient"]:
            theta = self.parameters(x)
            ready()
            values, rows = _evaluated(self, theta)
            del theta
            mine = self.parts.owned_rows(rows)
            return self.sum_parts(values), Compact(mine)

    def hessian_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """The Hessian at x times ``direction``, written to ``product``."""

        def multiply(part: Loss, theta: Tensor, v: Tensor, row: Tensor) -> None:
            part.hessian_product(theta, v, row)

        self._multiply(multiply, self.loss.charges.hessian(), x, direction, product)

    def gauss_newton_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """The Gauss-Newton matrix at x times ``direction``, written to ``product``.

        Raises
        ------
        InputError
            If the loss has none.
        """

        def multiply(part: Loss, theta: Tensor, v: Tensor, row: Tensor) -> None:
            part.gauss_newton_product(theta, v, row)

        self._multiply(multiply, self.loss.charges.gauss_newton(), x, direction, product)

    def compute(self, operations: float, numbers: float = 0.0, fresh: float = 0.0) -> None:
        """Charge linear algebra: multiply-adds in double precision, numbers that pass by, those of new large arrays.

        Parameters
        ----------
        operations, numbers, fresh
            Of all ranks together, and the same on any number of ranks, see :mod:`ddml.losses.work`.
        """
        spent = DOUBLE * operations + PASSED * numbers + FRESH * fresh
        self.work.add(spent * self.fraction / (self.loss.count * self.loss.charges.operations))

    def _multiply(
        self,
        multiply: Callable[[Loss, Tensor, Tensor, Tensor], None],
        units: float,
        x: PETSc.Vec,
        direction: PETSc.Vec,
        product: PETSc.Vec,
    ) -> None:
        """A product that takes so many work units on all samples, and is added to a row for each part."""
        with self._events["product"]:
            theta = self.parameters(x).clone()  # the second gather may use the same buffer
            v = self.parameters(direction)
            self.work.add(self.fraction * units, products=1)
            self.parts.sum_rows(lambda number, row: multiply(self.parts[number], theta, v, row), product)

    def initial(self, x: PETSc.Vec) -> None:
        """Write the initial parameters to x."""
        begin, end = self.layout.ranges[self.comm.rank], self.layout.ranges[self.comm.rank + 1]
        write(x, self.loss.initial()[begin:end])

    def sum_parts(self, values: Sequence[Number]) -> float:
        """The sum of one number for each part over all ranks; also where a request to stop is noticed."""
        return self.parts.sum(values, self.stop is not None and self.stop.due)

    def attach(self, tao: PETSc.TAO) -> None:
        """Give this objective to a TAO solver: value, gradient, Hessian products, and itself as context."""

        def gradient(_: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> None:
            self.value_gradient(x, g)

        tao.setObjective(lambda _, x: self.value(x))
        tao.setGradient(gradient, None)
        tao.setObjectiveGradient(lambda _, x, g: self.value_gradient(x, g), None)
        tao.setAppCtx(self)
        hessian = Hessian(self).matrix()
        tao.setHessian(lambda _, x, H, P: H.getPythonContext().move(x), hessian)
        hessian.destroy()  # TAO keeps it


def _evaluated(objective: Objective, theta: Tensor) -> tuple[list[Number], list[Tensor]]:
    """The values of this rank's parts at theta, and the :meth:`ddml.objectives.parts.Parts.rows` of their gradients."""
    objective.work.add(objective.fraction * objective.loss.charges.evaluation(), gradients=1)
    values: list[Number] = [0.0] * len(objective.parts)

    def evaluate(number: int, row: Tensor) -> None:
        values[number] = objective.parts.value_gradient(number, theta, row)

    return values, objective.parts.rows(evaluate)


class Hessian(Operator):
    """Python context of the Hessian matrix at a point, which :meth:`move` sets."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.layout)
        self.objective = objective
        self.point: PETSc.Vec | None = None  # made when it is needed: most solvers never do
        self.diagonal = 0.0

    def move(self, x: PETSc.Vec) -> None:
        """Make x the point."""
        if self.point is None:
            self.point = self.objective.layout.vector()
        x.copy(self.point)
        self.diagonal = 0.0

    def shift(self, mat: PETSc.Mat, amount: float) -> None:
        """Add a multiple of the identity, as PETSc's Newton methods do where the Hessian is indefinite."""
        self.diagonal += amount

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        if self.point is None:
            raise RuntimeError("a Hessian matrix multiplies after move() only")
        self.objective.hessian_product(self.point, x, y)
        y.axpy(self.diagonal, x)

    def destroy(self, mat: PETSc.Mat) -> None:
        """Destroy the point."""
        if self.point is not None:
            self.point.destroy()
