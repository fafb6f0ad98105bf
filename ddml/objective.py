"""Objectives: losses of distributed parameter vectors, with their samples split over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from .compact import Compact
from .layout import Operator, ParameterLayout
from .linear import GatheredTerm, LinearTerm
from .loss import Loss
from .parallel import Interrupted, StopRequest, split
from .summation import Tree, leaves
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
        0: each rank sums over its samples. Otherwise the samples are cut into this many blocks, the leaves of a
        :class:`ddml.summation.Tree`, so that loss and gradient are the same to the last bit on any number of ranks;
        each rank sums up the entries that it owns, and is sent little more than one vector by all of the others.
    parts
        This rank's blocks of the loss, if it has been cut already.

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
    linear : tuple of LinearTerm
        What is added to the loss (:func:`ddml.composed.shifted`), in the value and in the gradient.
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
        self.linear: tuple[LinearTerm, ...] = ()
        self._followers: WeakSet[Objective] = WeakSet()
        self.blocks = blocks
        self.parts = list(self.split_over(self.comm) if parts is None else parts)
        self._spare: list[Tensor] = []
        self._events = {name: PETSc.Log.Event(f"ddml {name}") for name in ("loss", "gradient", "product")}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.loss.count} samples on {self.comm.size} ranks\n{self.layout!r}"

    def split_over(self, comm: MPI.Comm) -> list[Loss]:
        """This rank's blocks of the samples when the ranks of ``comm`` share them all."""
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
        self.lead()

    def derived(self, loss: Loss, parts: Sequence[Loss] | None = None) -> Objective:
        """An objective of another loss of the same parameters: with the same linear terms and the same counter of work.

        ``parts`` are this rank's share of the loss, if it has been cut already.
        """
        made = self._made(loss, parts)
        made.fraction, made.work, made.metric, made.linear = self.fraction, self.work, self.metric, self.linear
        return made

    def _made(self, loss: Loss, parts: Sequence[Loss] | None) -> Objective:
        return type(self)(loss, self.layout, self.stop, self.blocks_of(loss, parts), parts)

    def blocks_of(self, loss: Loss, parts: Sequence[Loss] | None) -> int:
        """How many blocks to cut another loss into: no more than this one's, and not wastefully many."""
        return self.blocks if parts is not None else min(self.blocks, leaves(loss.count, loss.enough))

    def cut_into(self, blocks: int) -> None:
        """Cut the samples into so many blocks from now on."""
        self.blocks = blocks
        self.parts = list(self.split_over(self.comm))

    def follow_with(self, other: Objective) -> None:
        """Let an objective of the same loss get whatever this one's is replaced by, from now on."""
        other.version, other.overlap = self.version, self.overlap
        self._followers.add(other)

    def lead(self) -> None:
        """Hand the loss, which is a new one, to those that follow."""
        for other in list(self._followers):
            other.loss, other.parts, other.fraction = self.loss, self.parts, self.fraction
            other.version, other.overlap = self.version, self.overlap
            other.lead()

    def linear_terms(self) -> list[GatheredTerm]:
        """The linear terms with their whole vectors, for objectives of some of the parameters. Collective."""
        return [term.gathered(self.layout) for term in self.linear]

    def parameters(self, x: PETSc.Vec) -> Tensor:
        """All parameters at x in the loss's precision, on its device; x's own memory where that is possible."""
        single = self.loss.dtype == torch.float32
        full = self.layout.gather(x, torch.float32 if single else torch.float64)
        return full.to(device=self.loss.device, dtype=self.loss.dtype)

    def value(self, x: PETSc.Vec) -> float:
        """The loss at x."""
        with self._events["loss"]:
            theta = self.parameters(x)
            self.work.add(self.fraction * self.loss.charge(gradient=False), losses=1)
            return self._tilted(self.sum_parts([part.value(theta) for part in self.parts]), x)

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """The loss at x; its gradient is written to g."""
        with self._events["gradient"]:
            values, sums = self._evaluated(self.parameters(x))
            self._reduce(sums, g, self.layout, self._numbers)
            self._keep(sums)
            for term in self.linear:
                g.axpy(1.0, term.dg)
            return self._tilted(self.sum_parts(values), x)

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """The loss at x and its gradient as it comes, in the precision of the loss; not with linear terms.

        ``ready`` is called as soon as the parameters have been read: x may be overwritten from then on.
        """
        assert not self.linear
        with self._events["gradient"]:
            theta = self.parameters(x)
            ready()
            values, sums = self._evaluated(theta)
            del theta
            if self.blocks:
                mine = self.layout.sum_nodes([s.cpu().numpy() for s in sums], self.tree, self._numbers)
            else:
                mine = self.layout.summed(sums[0].cpu().numpy())
            sums.clear()
            return self.sum_parts(values), Compact(mine)

    def _evaluated(self, theta: Tensor) -> tuple[list[float], list[Tensor]]:
        """The values of this rank's parts, and the gradients summed up over its nodes of the tree."""
        self.work.add(self.fraction * self.loss.charge(), gradients=1)
        values = [0.0] * len(self.parts)

        def evaluate(number: int, row: Tensor) -> None:
            values[number] = self.parts[number].value_gradient(theta, row)

        return values, self._rows(evaluate)

    def _tilted(self, value: float, x: PETSc.Vec) -> float:
        """The value with the linear terms at x."""
        return sum((term.value(x) for term in self.linear), value)

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
            self._sum_rows(lambda number, row: getattr(self.parts[number], method)(theta, v, row), product)

    def _sum_rows(self, evaluate: Callable[[int, Tensor], None], g: PETSc.Vec) -> None:
        """Sum over all parts what ``evaluate`` adds to a vector (n,) for one of this rank's, into g."""
        sums = self._rows(evaluate)
        self._reduce(sums, g, self.layout, self._numbers)
        self._keep(sums)

    def _rows(self, evaluate: Callable[[int, Tensor], None]) -> list[Tensor]:
        """What ``evaluate`` adds to a vector (n,) for each of this rank's parts, summed up over its nodes."""
        first, kept = self.tree.edges[self.comm.rank], self._spare

        def leaf(number: int) -> Tensor:
            row = kept.pop().zero_() if kept else self._row()
            evaluate(number - first, row)
            return row

        return [self.tree.add(node, leaf, kept.append) for node in self.tree.nodes[self.comm.rank]]

    def _keep(self, rows: list[Tensor]) -> None:
        """Keep vectors that are not needed any more for the next ones, unless they are large."""
        self._spare += rows
        if self.loss.large:
            self._spare.clear()

    def _row(self) -> Tensor:
        # large ones take no memory before they are written to
        dtype = torch.float32 if self.loss.dtype == torch.float32 else torch.float64
        return torch.zeros(self.loss.size, dtype=dtype, device=self.loss.device)

    @property
    def _numbers(self) -> Any:
        """The type of numbers that gradients are summed in."""
        return np.float32 if self.loss.dtype == torch.float32 else np.float64

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
            counts = np.diff(self.tree.edges) + 1  # the last number of each rank is its request
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

    def reduce_parts(self, rows: Sequence[Tensor], g: PETSc.Vec, layout: ParameterLayout | None = None) -> None:
        """Sum vectors (n,), one for each part of this rank, over all ranks into g, of any layout; in place."""
        rows = [row.to(dtype=torch.float64, device="cpu") for row in rows]
        self._reduce(self._nodes(rows), g, layout or self.layout, np.float64)

    def sum_matrices(self, product: Callable[[int], NDArray[np.float64]], width: int) -> NDArray[np.float64]:
        """Sum the matrices (n, width) that ``product`` gives for each part of this rank, over all ranks: its rows."""
        first, nodes = self.tree.edges[self.comm.rank], self.tree.nodes[self.comm.rank]
        sums = [self.tree.add(node, lambda i: product(i - first)) for node in nodes]
        return self.layout.sum_nodes(sums, self.tree, np.float64, (width,))

    def sum_everywhere(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum arrays (parts, ...), one for each part of this rank, over all ranks, on every rank. Collective."""
        sums = [node for nodes in self.comm.allgather(self._nodes(list(rows))) for node in nodes]
        return np.asarray(self.tree.total(sums))

    def _nodes(self, rows: list[Any]) -> list[Any]:
        """The sums over this rank's nodes of the tree of its parts' rows, which they are formed in."""
        first = self.tree.edges[self.comm.rank]
        return [self.tree.add(node, lambda i: rows[i - first]) for node in self.tree.nodes[self.comm.rank]]

    def _reduce(self, sums: list[Tensor], g: PETSc.Vec, layout: ParameterLayout, dtype: Any) -> None:
        """Write the sum over all ranks' nodes, of this type of numbers, to g."""
        if not self.blocks:
            layout.reduce(sums[0].cpu(), g)
            return
        with g as array:
            array[:] = layout.sum_nodes([s.cpu().numpy() for s in sums], self.tree, dtype)

    @property
    def tree(self) -> Tree:
        """Over the blocks, or over the ranks where these sum for themselves."""
        return _tree(self.blocks or self.comm.size, self.comm.size)

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
        return _Hessian(self).matrix()

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return self.layout.size


_tree = lru_cache(maxsize=16)(Tree)


class _Hessian(Operator):
    """Python context of the Hessian matrix at a point."""

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
