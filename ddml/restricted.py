"""Objectives of one subdomain's parameters, the rest frozen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from .decomposition import Decomposition
from .loss import Loss, RestrictedLoss
from .objective import Objective


class RestrictedObjective(Objective):
    """See :func:`restricted`; :meth:`freeze` it before use, collective on the subdomain's group.

    Work is counted by the operations that are left behind the kept prefix (:mod:`ddml.work`).
    """

    loss: RestrictedLoss

    def __init__(self, objective: Objective, decomposition: Decomposition, s: int, parts: Sequence[Loss]) -> None:
        ranges = decomposition.subdomains.ranges[s]
        loss = RestrictedLoss(objective.loss, ranges)
        super().__init__(
            loss,
            decomposition.group_layout(loss, s),
            objective.stop,
            objective.blocks,
            [RestrictedLoss(part, ranges) for part in parts],
        )
        self.fraction, self.metric = objective.fraction, objective.metric
        self._known: tuple[NDArray[np.float64], float, NDArray[np.float64]] | None = None
        self._last: tuple[NDArray[np.float64], float] | None = None

    def follow(self, objective: Objective, parts: Sequence[Loss]) -> None:
        """Restrict what the whole network's objective is now, and its loss's parts on this rank, from now on."""
        self.loss, self.fraction = RestrictedLoss(objective.loss, self.loss.ranges), objective.fraction
        self.parts = [RestrictedLoss(part, self.loss.ranges) for part in parts]
        self._known = self._last = None

    def _frozen(self) -> list[RestrictedLoss]:
        return [part for part in self.parts if isinstance(part, RestrictedLoss)]

    def freeze(self, theta: Tensor) -> None:
        """Freeze the other parameters at theta (n of the whole network,) and keep what enters the subdomain."""
        theta = theta.to(device=self.loss.device, dtype=self.loss.dtype)
        self.loss.full.copy_(theta)
        for part in self._frozen():
            part.freeze(theta)
        self.work.add(self.fraction * self.loss.prefix_charge())
        self._known = self._last = None

    def release(self) -> None:
        """Free what :meth:`freeze` kept."""
        for part in self._frozen():
            part.kept = None

    def know(self, x: PETSc.Vec, value: float, g: PETSc.Vec) -> None:
        """Tell the loss and gradient at x, so that evaluating there costs nothing."""
        self._known = x.array_r.copy(), value, g.array_r.copy()

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`Objective.value_gradient`; a point that is known is not evaluated again."""
        if self._known is not None:
            point, value, gradient = self._known
            self._known = None
            if self.comm.allreduce(np.array_equal(point, x.array_r), MPI.LAND):
                g.array[:] = gradient
                return value
        value = super().value_gradient(x, g)
        self._last = (x.array_r.copy(), value) if self.loss.also else None
        return value

    def also(self, layers: frozenset[int]) -> None:
        """From now on compute the gradient of these layers, too, where it costs no second backward pass.

        That is so for layers behind the subdomain's first: the adjoint passes through them anyway.
        """
        wanted = layers if not layers or min(layers) >= self.loss.first else frozenset()
        for loss in (self.loss, *self._frozen()):
            loss.also = wanted

    def also_gradient(self, x: PETSc.Vec, ranges: Sequence[slice]) -> tuple[float, NDArray[np.float64]] | None:
        """Loss and gradient by other entries, if the last evaluation was at x and had them (see :meth:`also`)."""
        here = self._last is not None and np.array_equal(self._last[0], x.array_r)
        if not self.comm.allreduce(here, MPI.LAND) or self._last is None:
            return None
        rows = np.stack([part.take(part.full_gradient, ranges).double().cpu().numpy() for part in self._frozen()])
        if self.blocks:
            return self._last[1], np.concatenate(self.comm.allgather(rows)).sum(axis=0)
        gradient = rows[0]
        self.comm.Allreduce(MPI.IN_PLACE, gradient)
        return self._last[1], gradient


def restricted(objective: Objective, decomposition: Decomposition) -> dict[int, RestrictedObjective]:
    """The objective as a function of each subdomain's parameters that this rank works on.

    The samples are split over the ranks of the subdomain's group. Each objective must be frozen
    with :meth:`RestrictedObjective.freeze` at a parameter vector before it is evaluated: what
    enters the subdomain is then computed once and kept, and backward passes stop there.
    Collective on the decomposition's communicator.
    """
    parts = objective.parts_for(decomposition.group)
    return {s: RestrictedObjective(objective, decomposition, s, parts) for s in decomposition.mine}
