"""Objectives: losses of distributed parameter vectors, with their samples split over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from .layout import ParameterLayout
from .loss import Loss
from .parallel import Interrupted, StopRequest, split
from .work import DOUBLE, FRESH, PASSED, WorkCounter


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
        0: each rank sums over its samples. Otherwise the samples are cut into this many blocks
        and the blocks' gradients are summed in their order, so that loss and gradient are the
        same to the last bit on any number of ranks; costs blocks * n numbers of communication.
    parts
        This rank's share of the loss, if it has been cut already.

    Attributes
    ----------
    work : WorkCounter
    fraction : float
        Samples of this objective over those of the whole data set, in work units.
    version : int
        Grows when the loss is replaced: what solvers know of it is then out of date.
    overlap : ndarray of int64, or None
        After a replacement, numbers of the loss's samples that the loss before it had, too, if that is known:
        ``ddml.composed.sampled(objective, objective.overlap)`` is the loss on them.
    agreement : float
        After a replacement, which part of the decrease that a trust-region method promised itself of its steps on the
        loss before there has been on this one; NaN if that is not known.
    metric : KroneckerNorm or None
        What is known of the curvature, for solvers of objectives that are made of this one.
    """

    def __init__(
        self,
        loss: Loss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
    ) -> None:
        self.loss = loss
        self.layout = layout
        self.comm = layout.comm
        self.stop = stop
        self.work = WorkCounter()
        self.fraction = 1.0
        self.version = 0
        self.overlap: NDArray[np.int64] | None = None
        self.agreement = math.nan
        self.metric: Any = None
        self.blocks = blocks
        self.parts = list(self.split_over(self.comm) if parts is None else parts)
        rows, aligned = max(len(self.parts), 1), -(-loss.size // 8) * 8
        self._gradient = torch.zeros(rows, aligned, dtype=loss.dtype, device=loss.device)[:, : loss.size]
        self._events = {name: PETSc.Log.Event(f"ddml {name}") for name in ("loss", "gradient", "product")}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.loss.count} samples on {self.comm.size} ranks\n{self.layout!r}"

    def split_over(self, comm: MPI.Comm) -> list[Loss]:
        """This rank's share of the samples when the ranks of ``comm`` split them all."""
        edges = split(self.loss.count, self.blocks or comm.size)
        mine = split(len(edges) - 1, comm.size)
        return [self.loss.part(edges[i], edges[i + 1]) for i in range(mine[comm.rank], mine[comm.rank + 1])]

    def parts_for(self, comm: MPI.Comm) -> list[Loss]:
        """As :meth:`split_over`; where ``comm`` has as many ranks as the objective's, its own parts."""
        return list(self.parts) if comm.size == self.comm.size else self.split_over(comm)

    def replace(self, loss: Loss, fraction: float | None = None, overlap: NDArray[np.int64] | None = None) -> None:
        """Minimise another loss of the same parameters from now on, say with other samples. Collective.

        ``fraction`` and ``overlap`` are the attributes'; the fraction stays what it is unless it is given.
        """
        self.loss, self.overlap = loss, overlap
        self.fraction = self.fraction if fraction is None else fraction
        self.parts = list(self.split_over(self.comm))
        self.version += 1

    def parameters(self, x: PETSc.Vec) -> Tensor:
        """All parameters at x in the loss's precision, on its device; x's own memory where that is possible."""
        return self.layout.gather(x).to(device=self.loss.device, dtype=self.loss.dtype)

    def value(self, x: PETSc.Vec) -> float:
        """The loss at x."""
        with self._events["loss"]:
            theta = self.parameters(x)
            self.work.add(self.fraction * self.loss.charge(gradient=False), losses=1)
            return self.sum_parts([part.value(theta) for part in self.parts])

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """The loss at x; its gradient is written to g."""
        with self._events["gradient"]:
            theta = self.parameters(x)
            self.work.add(self.fraction * self.loss.charge(), gradients=1)
            self._gradient.zero_()
            values = [p.value_gradient(theta, row) for p, row in zip(self.parts, self._gradient, strict=False)]
            value = self.sum_parts(values)
            self.reduce_parts(self._gradient[: len(self.parts)], g)
            return value

    def gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> None:
        """The gradient at x, written to g."""
        self.value_gradient(x, g)

    def hessian_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """The Hessian at x times ``direction``, written to ``product``."""
        self._multiply("hessian_product", self.loss.hessian_charge(), x, direction, product)

    def gauss_newton_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """The Gauss-Newton matrix at x times ``direction``, written to ``product``.

        Raises
        ------
        InputError
            If the loss has none.
        """
        self._multiply("gauss_newton_product", self.loss.gauss_newton_charge(), x, direction, product)

    def compute(self, operations: float, numbers: float = 0.0, fresh: float = 0.0) -> None:
        """Charge linear algebra: multiply-adds in double precision, numbers that pass by, those of new large arrays.

        Parameters
        ----------
        operations, numbers, fresh
            Of all ranks together, and the same on any number of ranks, see :mod:`ddml.work`.
        """
        spent = DOUBLE * operations + PASSED * numbers + FRESH * fresh
        self.work.add(spent * self.fraction / (self.loss.count * self.loss.operations))

    def _multiply(self, method: str, units: float, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """A product that the losses have under that name and its work units on all samples."""
        with self._events["product"]:
            theta = self.parameters(x).clone()  # the second gather may use the same buffer
            v = self.parameters(direction)
            self.work.add(self.fraction * units, products=1)
            self._gradient.zero_()
            for part, row in zip(self.parts, self._gradient, strict=False):
                getattr(part, method)(theta, v, row)
            self.reduce_parts(self._gradient[: len(self.parts)], product)

    def initial(self, x: PETSc.Vec) -> None:
        """Write the initial parameters to x."""
        begin, end = self.layout.ranges[self.comm.rank], self.layout.ranges[self.comm.rank + 1]
        with x as array:
            array[:] = self.loss.initial()[begin:end].to(torch.float64).cpu().numpy()

    def sum_parts(self, values: list[float]) -> float:
        """The sum of one number for each part over all ranks; also where a request to stop is noticed."""
        stopped = self.stop is not None and self.stop.requested
        if self.comm.size == 1:
            if stopped:
                raise Interrupted
            return sum(values, 0.0)
        if self.blocks:
            counts = np.array(self._counts) + 1  # the last number of each rank is its request
            gathered = np.empty(counts.sum())
            self.comm.Allgatherv(np.array([*values, float(stopped)]), [gathered, counts])
            ends = np.cumsum(counts) - 1
            stopped = bool(gathered[ends].any())
            total = sum(np.delete(gathered, ends).tolist(), 0.0)
        else:
            pair = np.array([sum(values, 0.0), float(stopped)])
            self.comm.Allreduce(MPI.IN_PLACE, pair)
            total, stopped = float(pair[0]), pair[1] > 0
        if stopped:
            raise Interrupted
        return total

    def reduce_parts(self, rows: Tensor, g: PETSc.Vec, layout: ParameterLayout | None = None) -> None:
        """Sum vectors (parts, n), one for each part of this rank, over all ranks into g, of any layout."""
        rows, layout = rows.to(dtype=torch.float64, device="cpu"), layout or self.layout
        if not self.blocks:
            layout.reduce(rows[0], g)
            return
        layout.reduce_rows(rows.numpy(), self._counts, g)

    def sum_matrices(self, matrices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum matrices (parts, n, k), one for each part of this rank, over all ranks: this rank's rows (n_local, k)."""
        return self.layout.sum_rows(matrices, self._counts)

    @cached_property
    def _counts(self) -> list[int]:
        """The number of parts of each rank."""
        return [int(c) for c in np.diff(split(self.blocks or self.comm.size, self.comm.size))]

    def attach(self, tao: PETSc.TAO) -> None:
        """Give this objective to a TAO solver: value, gradient, Hessian products, and itself as context."""
        tao.setObjective(lambda _, x: self.value(x))
        tao.setGradient(lambda _, x, g: self.gradient(x, g), None)
        tao.setObjectiveGradient(lambda _, x, g: self.value_gradient(x, g), None)
        tao.setAppCtx(self)
        hessian = self.hessian()
        tao.setHessian(lambda _, x, H, P: H.getPythonContext().move(x), hessian)
        hessian.destroy()  # TAO keeps it

    def hessian(self) -> PETSc.Mat:
        """A matrix that multiplies by the Hessian at the point of its context; the caller destroys it."""
        local = int(self.layout.counts[self.comm.rank])
        mat = PETSc.Mat().createPython(((local, self.size), (local, self.size)), _Hessian(self), comm=self.comm)
        mat.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        mat.setUp()
        return mat

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return self.layout.size


class _Hessian:
    """Python context of the Hessian matrix at a point."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.point = objective.layout.vector()
        self.diagonal = 0.0

    def move(self, x: PETSc.Vec) -> None:
        """Make x the point."""
        x.copy(self.point)
        self.diagonal = 0.0

    def shift(self, mat: PETSc.Mat, amount: float) -> None:
        """Add a multiple of the identity, as PETSc's Newton methods do where the Hessian is indefinite."""
        self.diagonal += amount

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        self.objective.hessian_product(self.point, x, y)
        y.axpy(self.diagonal, x)

    def destroy(self, mat: PETSc.Mat) -> None:
        """Destroy the point."""
        self.point.destroy()
