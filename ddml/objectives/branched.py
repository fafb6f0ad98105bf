"""Objectives of networks side by side, dealt over the ranks: each evaluates its networks on its tiles (model parallel).

An evaluation takes one gather, of the networks' outputs and the coarse net's parameters, and the broadcast of one
number. Every rank then evaluates the coarse net on all samples, and takes the gradient by its own networks' outputs
back through them; what it finds are the entries that it owns. So no rank has a whole sample, nor the parameters of
another rank's network, and the same bits come out on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.linalg.compact import Compact
from ddml.losses.branch import Adding
from ddml.losses.branched import BranchedLoss
from ddml.losses.loss import Loss
from ddml.losses.outputs import Outputs
from ddml.losses.recorded import Recorder
from ddml.numbers import Number, read
from ddml.parallel import Interrupted, StopRequest, agreed, split
from ddml.vectors import CPU, entries

from .linear import tilted
from .objective import Objective
from .parts import Parts

REMEMBERED = 2  # points whose outputs are remembered: one that was refused is followed by the one before (our choice)


def tiles_of_ranks(loss: BranchedLoss, ranks: int) -> list[list[int]]:
    """The networks that each of some ranks needs the tiles of; the first rank that has one evaluates it.

    They are dealt as the subdomains of :meth:`ddml.decomposition.subdomains.Subdomains.by_blocks` are, so that a rank
    treats those whose tiles it has; frozen ones evenly.
    """
    trained = [i for i, net in enumerate(loss.branches.nets) if net]
    frozen = [i for i, net in enumerate(loss.branches.nets) if not net]
    mine = Subdomains.by_blocks(loss).assignment(ranks)
    edges = split(len(frozen), ranks)
    return [
        sorted([trained[s] for s in numbers if s < len(trained)] + frozen[a:b])
        for numbers, (a, b) in zip(mine, pairwise(edges), strict=True)
    ]


def branched_layout(loss: BranchedLoss, comm: MPI.Comm, device: torch.device = CPU) -> ParameterLayout:
    """The layout in which a rank owns the parameters of the networks that it evaluates. Collective."""
    blocks = Subdomains.by_blocks(loss)
    ends = [core[-1].stop for core in blocks.cores]
    edges = [0]
    for numbers in blocks.assignment(comm.size):
        edges.append(max(edges[-1], ends[numbers[-1]]))  # the other ranks of a group own nothing
    return ParameterLayout(loss.parameters, comm, edges, device)


class BranchedParts(Parts):
    """All blocks of the samples, on every rank: it has those of its tiles."""

    def split_over(self, comm: MPI.Comm) -> list[Loss]:
        """See :meth:`.Parts.split_over`; of all ranks each has all."""
        if comm is not self.comm:
            return super().split_over(comm)
        return [self.loss.part(a, b) for a, b in pairwise(split(self.loss.count, self.blocks or 1))]

    def split_for(self, group: MPI.Comm) -> list[Loss]:
        """See :meth:`.Parts.split_for`."""
        if group.size > 1 and not self.blocks:
            return self.split_over(group)
        edges = split(len(self.own), group.size)
        return self.own[edges[group.rank] : edges[group.rank + 1]]


class BranchedObjective(Objective):
    """A loss of networks side by side as a function of a distributed parameter vector. Collective.

    There are no Hessian or Gauss-Newton products. Of more ranks than subdomains some own nothing, and only help in
    local phases.

    Parameters
    ----------
    loss
        Each rank's has at least the tiles of :func:`tiles_of_ranks`.
    layout
        Of :func:`branched_layout`.
    stop, blocks, parts
        See :class:`ddml.objectives.objective.Objective`; sums are the same on any number of ranks with any blocks.

    Attributes
    ----------
    mine : list of int
        The networks that this rank evaluates.

    Raises
    ------
    InputError
        Another layout, or tiles that this rank does not have.
    """

    loss: BranchedLoss
    cut = BranchedParts

    def __init__(
        self,
        loss: BranchedLoss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
        record: Recorder | None = None,
    ) -> None:
        if record is not None:
            raise InputError("evaluations of networks that are dealt over the ranks cannot be recorded")
        super().__init__(loss, layout, stop, blocks, parts)
        self.held = tiles_of_ranks(loss, self.comm.size)
        taken = set[int]()
        self.owned: list[list[int]] = []
        for nets in self.held:
            self.owned.append([i for i in nets if i not in taken])
            taken |= set(nets)
        self.mine = self.owned[self.comm.rank]
        for nets, (begin, end) in zip(self.owned, pairwise(layout.ranges), strict=True):
            places = [loss.nets[i].place for i in nets if loss.branches.nets[i]]
            if any(p.start < begin or end < p.stop for p in places):
                raise InputError("each rank must own the parameters of its networks: the layout is branched_layout's")
        with agreed(self.comm):
            loss.check_tiles(self.mine)
        self._known: list[tuple[BranchedLoss, NDArray[np.float64], Tensor]] = []
        self._still: tuple[BranchedLoss, Tensor] | None = None  # outputs of networks that are frozen

    # Evaluations -----------------------------------------------------------------------------------------------------

    def value(self, x: PETSc.Vec) -> float:
        """See :meth:`.Objective.value`."""
        with self._events["loss"]:
            self._charge(gradient=False)
            theta, logits = self._gathered(x, self._outputs)
            self.settle(x, theta, logits)
            values = [part.value_behind(theta, at) for part, at in self._by_parts(logits)]
            return tilted(self.linear, self._agreed(values), x)

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`.Objective.value_gradient`."""
        with self._events["gradient"]:
            value, gradient = self._evaluate(x)
            with g as array:
                array[:] = gradient
            for term in self.linear:
                g.axpy(1.0, term.dg)
            return tilted(self.linear, value, x)

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """See :meth:`.Objective.value_compact`."""
        assert not self.linear
        with self._events["gradient"]:
            value, gradient = self._evaluate(x)
            ready()
            return value, Compact(gradient)

    def _evaluate(self, x: PETSc.Vec) -> tuple[float, NDArray[Any]]:
        """The loss at x, and what this rank owns of its gradient, in the loss's precision."""
        self._charge(gradient=True)
        back: dict[int, list[Adding]] = {}

        def outputs(net: int, theta: Tensor) -> Tensor:
            found = [part.linearised(net, theta) for part in self._parts]
            back[net] = [add for _, add in found]
            return torch.cat([o for o, _ in found])

        theta, logits = self._gathered(x, outputs)
        self.settle(x, theta, logits)
        gradient, values = torch.zeros_like(theta), list[Number]()
        for number, (part, at) in enumerate(self._by_parts(logits)):
            value, adjoints = part.gradient_behind(theta, at, gradient)
            values.append(value)
            for net, adding in back.items():
                adding[number](adjoints[net], gradient)
        owned = slice(*self.layout.ranges[self.comm.rank : self.comm.rank + 2])
        return self._agreed(values), gradient[owned].cpu().numpy()

    def _multiply(self, *_: Any) -> None:
        raise InputError(
            "networks of tiles that are dealt over the ranks have no Hessian or Gauss-Newton products: choose a solver "
            "that needs none"
        )

    def settle(self, x: PETSc.Vec, theta: Tensor, logits: Tensor) -> None:
        """What is done at x between the networks, which give these (N, S, K), and the coarse net. Collective.

        ``theta`` (n,) has the parameters of this rank's networks and of the coarse net.
        """
        return

    def _charge(self, gradient: bool) -> None:
        """Charge an evaluation: on the critical path the network that takes longest, and the coarse net."""
        charges, kind = self.loss.charges, {"gradients": 1} if gradient else {"losses": 1}
        critical = self.fraction * charges.critical(gradient)
        self.work.add(critical, **kind)
        self.work.total += self.fraction * charges.evaluation(gradient=gradient) - critical

    @property
    def _parts(self) -> list[BranchedLoss]:
        return [part for part in self.parts if isinstance(part, BranchedLoss)]

    def _outputs(self, net: int, theta: Tensor) -> Tensor:
        return torch.cat([part.outputs_of(net, theta) for part in self._parts])

    def _by_parts(self, logits: Tensor) -> list[tuple[BranchedLoss, dict[int, Tensor]]]:
        """The parts, with the networks' outputs for their samples."""
        ends = np.cumsum([0, *(part.count for part in self._parts)])
        return [
            (part, dict(enumerate(logits[:, a:b]))) for part, (a, b) in zip(self._parts, pairwise(ends), strict=True)
        ]

    # What the ranks tell each other ----------------------------------------------------------------------------------

    def _gathered(self, x: PETSc.Vec, outputs: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Parameters (n,), those of this rank's networks and of the coarse net at x and 0 else; all outputs (N, S, K).

        Raises
        ------
        Interrupted
            On all ranks, if one was asked to stop.
        """
        loss, ranges = self.loss, self.layout.ranges
        begin, end = ranges[self.comm.rank], ranges[self.comm.rank + 1]
        theta = torch.zeros(loss.size, dtype=loss.dtype, device=loss.device)
        theta[begin:end] = entries(x).to(theta)
        still = None if self._still is None or self._still[0] is not loss else self._still[1]
        told = [[i for i in nets if still is None or loss.branches.nets[i]] for nets in self.owned]
        found = [outputs(i, theta) for i in told[self.comm.rank]]
        size, place = loss.count * loss.classes, loss.coarse.place
        shares = [slice(a, b) for a, b in pairwise(np.clip(ranges, place.start, place.stop).tolist())]
        stopped = theta.new_tensor([float(self.stop is not None and self.stop.due)])
        given = torch.cat([stopped, *(o.reshape(-1) for o in found), theta[shares[self.comm.rank]]]).cpu().numpy()
        counts = [1 + len(nets) * size + s.stop - s.start for nets, s in zip(told, shares, strict=True)]
        received = np.empty(sum(counts), given.dtype)
        kind = MPI.FLOAT if given.dtype == np.float32 else MPI.DOUBLE
        self.comm.Allgatherv([given, kind], [received, counts, np.cumsum([0, *counts[:-1]]), kind])
        shape = len(loss.nets), loss.count, loss.classes
        logits = torch.empty(shape, dtype=loss.dtype) if still is None else still.cpu().clone()
        requests = []
        for nets, share, piece in zip(told, shares, np.split(received, np.cumsum(counts)[:-1]), strict=True):
            numbers = torch.from_numpy(piece)
            requests.append(float(numbers[0]))
            for k, net in enumerate(nets):
                logits[net] = numbers[1 + k * size : 1 + (k + 1) * size].view(loss.count, loss.classes)
            theta[share] = numbers[1 + len(nets) * size :].to(theta.device)
        if any(requests):
            raise Interrupted
        logits = logits.to(loss.device)
        self._still = loss, logits
        self._known = [(loss, x.array_r.copy(), logits), *self._known][:REMEMBERED]
        return theta, logits

    def _agreed(self, values: Sequence[Number]) -> float:
        """The sum of numbers that every rank has, as the first one has rounded it."""
        total = np.array([sum(read(values), 0.0)])
        self.comm.Bcast(total)
        return float(total[0])

    def outputs_at(self, x: PETSc.Vec, moved: frozenset[int] = frozenset()) -> Outputs:
        """What all networks give at x, on every rank; networks are charged if layers of theirs have ``moved``.

        They are remembered of the last points that were evaluated; what a restart computes anew has been paid before.
        """
        known = [loss is self.loss and np.array_equal(at, x.array_r) for loss, at, _ in self._known]
        alike = self.comm.allreduce(sum(1 << k for k, here in enumerate(known) if here), MPI.BAND)
        if alike:
            logits = self._known[(alike & -alike).bit_length() - 1][2]
        else:
            _, logits = self._gathered(x, self._outputs)
        units = [self.fraction * self.loss.charges.outputs([i]) for i in self.loss.branches.touched(moved)]
        self.work.add(max(units, default=0.0))
        self.work.total += sum(units) - max(units, default=0.0)
        return Outputs(logits, self.loss.samples.numbers)
