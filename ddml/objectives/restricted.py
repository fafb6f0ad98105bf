"""Objectives of one subdomain's parameters, the rest frozen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.decomposition import Decomposition
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.outputs import Outputs
from ddml.losses.residual import RestrictedResidualLoss, restricted_loss
from ddml.losses.restricted import RestrictedLoss
from ddml.numbers import host
from ddml.parallel import StopRequest

from .linear import GatheredTerm, LinearTerm
from .objective import Objective
from .residual import ResidualObjective


class RestrictedObjective(Objective):
    """See :func:`restricted`; :meth:`freeze` it before use, collective on the subdomain's group.

    Work is counted by the operations that are left behind the kept prefix (:mod:`ddml.losses.work`), and the prefix
    when it is computed: with :meth:`freeze`, or of an objective made of this one when that is evaluated next.

    Parameters
    ----------
    loss, layout, stop, blocks, parts
        See :class:`ddml.objectives.objective.Objective`; the parts are frozen with the loss.
    """

    loss: RestrictedLoss

    def __init__(
        self,
        loss: RestrictedLoss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
    ) -> None:
        super().__init__(loss, layout, stop, blocks, parts)
        self._carried: tuple[LinearTerm, ...] = ()  # those of the whole objective, restricted
        self._whole_terms: Sequence[GatheredTerm] = ()
        # what is known is so for one freeze only: its number comes first
        self._known: tuple[int, NDArray[np.float64], float, NDArray[np.float64]] | None = None
        self._last: tuple[int, NDArray[np.float64], float] | None = None

    def _made(self, loss: Loss, blocks: int, parts: Sequence[Loss] | None) -> Objective:
        assert isinstance(loss, RestrictedLoss)
        kind = RestrictedResidualObjective if isinstance(self, ResidualObjective) else RestrictedObjective
        made = kind(loss, self.layout, self.stop, blocks, parts)
        made._carried, made._whole_terms = self._carried, self._whole_terms
        return made

    def inherit(self, objective: Objective) -> None:
        """Take over what the whole network's objective has besides a loss. Collective on the group."""
        self.fraction = objective.fraction
        self._carried = tuple(LinearTerm(self.layout.vector(), self.layout.vector()) for _ in objective.linear)
        self.linear = self._carried

    def follow(self, objective: Objective, parts: Sequence[Loss]) -> None:
        """Restrict what the whole network's objective is now, and its loss's parts on this rank, from now on."""
        ranges, frozen = self.loss.ranges, self.loss.frozen
        self.loss, self.fraction = restricted_loss(objective.loss, ranges, frozen), objective.fraction
        self.parts = self.parts.of(self.loss, [restricted_loss(part, ranges, frozen) for part in parts])
        self.version += 1
        self.release()
        self.lead()

    def _frozen(self) -> list[RestrictedLoss]:
        return [part for part in self.parts if isinstance(part, RestrictedLoss)]

    def freeze(self, theta: Tensor, terms: Sequence[GatheredTerm] = (), outputs: Outputs | None = None) -> None:
        """Freeze the other parameters at theta (n of the whole network,) and keep what enters the subdomain.

        ``terms`` are :meth:`Objective.linear_terms` of the whole network's objective, if it has any: as a function of
        the subdomain's parameters this objective is then exactly that one. ``outputs`` are its
        :meth:`.BranchedObjective.outputs_at`.

        Raises
        ------
        InputError
            If there are not as many terms as that objective has.
        """
        if len(terms) != len(self._carried):
            raise InputError(
                f"the objective that is restricted has {len(self._carried)} linear terms, and freeze() got "
                f"{len(terms)}: pass its linear_terms()"
            )
        self.loss.freeze(theta, outputs)
        point = theta.detach().double().cpu().numpy() if terms else np.empty(0)
        for term, whole in zip(self._carried, terms, strict=True):
            term.restrict(whole, point, self.loss.ranges)
        self._whole_terms = terms
        self.work.add(self.fraction * self.loss.owed())

    def parameters(self, x: PETSc.Vec) -> Tensor:
        """See :meth:`Objective.parameters`: every evaluation begins here, and may have to compute a prefix first."""
        self.work.add(self.fraction * self.loss.owed())
        return super().parameters(x)

    def release(self) -> None:
        """Free what :meth:`freeze` kept."""
        self.loss.frozen.release()

    def know(self, x: PETSc.Vec, value: float, g: PETSc.Vec) -> None:
        """Tell the loss and gradient at x, so that evaluating there costs nothing."""
        self._known = self.loss.frozen.number, x.array_r.copy(), value, g.array_r.copy()

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`Objective.value_gradient`; a point that is known is not evaluated again."""
        number = self.loss.frozen.number
        if self._known is not None and self._known[0] == number:
            _, point, value, gradient = self._known
            self._known = None
            if self.comm.allreduce(np.array_equal(point, x.array_r), MPI.LAND):
                g.array[:] = gradient
                return value
        value = super().value_gradient(x, g)
        self._last = (number, x.array_r.copy(), value) if self.loss.also else None
        return value

    def also(self, layers: frozenset[int]) -> None:
        """From now on compute the gradient of these layers, too, where it costs no second backward pass.

        That is so for layers that the adjoint passes through anyway.
        """
        wanted = layers if layers <= self.loss.loss.behind(self.loss.active) else frozenset()
        for loss in (self.loss, *self._frozen()):
            loss.also = wanted

    def also_gradient(self, x: PETSc.Vec, ranges: Sequence[slice]) -> tuple[float, NDArray[np.float64]] | None:
        """Loss and gradient by other entries, if the last evaluation was at x and had them (see :meth:`also`)."""
        number = self.loss.frozen.number
        here = self._last is not None and self._last[0] == number and np.array_equal(self._last[1], x.array_r)
        if not self.comm.allreduce(here, MPI.LAND) or self._last is None:
            return None
        taken = [part.take(part.beside, ranges) for part in self._frozen() if part.beside is not None]
        rows = np.zeros((len(self.parts), sum(r.stop - r.start for r in ranges)))
        for row, found in zip(rows, host(taken), strict=True):
            row[:] = found.numpy()
        gradient = self.parts.sum_everywhere(rows)
        for slope in self._slopes():
            gradient += np.concatenate([slope[r] for r in ranges])
        return self._last[2], gradient

    def _slopes(self) -> list[NDArray[np.float64]]:
        """The gradient (n of the whole network,) of each linear term. Collective on the group."""
        found = [term.dg for term in self._whole_terms]
        for term in self.linear[len(self._carried) :]:
            slope, inside = np.zeros(self.loss.loss.size), self.layout.gather(term.dg).numpy()
            for place, r in zip(self.loss.places, self.loss.ranges, strict=True):
                slope[r] = inside[place]
            found.append(slope)
        return found

    def destroy(self) -> None:
        """Destroy the vectors of the linear terms that it carries. Collective on the group."""
        for term in self._carried:
            term.destroy()


class RestrictedResidualObjective(RestrictedObjective, ResidualObjective):
    """A restricted objective of a loss that is a sum of squares of residuals; of these none is left out."""

    loss: RestrictedResidualLoss


def restricted(objective: Objective, decomposition: Decomposition) -> dict[int, RestrictedObjective]:
    """The objective as a function of each subdomain's parameters that this rank works on.

    The samples are split over the ranks of the subdomain's group. Each objective must be frozen
    with :meth:`RestrictedObjective.freeze` at a parameter vector before it is evaluated: what
    enters the subdomain is then computed once and kept, and backward passes stop there.
    The caller destroys them. Collective on the decomposition's communicator.
    """
    kind = RestrictedResidualObjective if isinstance(objective, ResidualObjective) else RestrictedObjective
    parts = objective.parts.split_for(decomposition.group)
    found = {}
    for s in decomposition.mine:
        loss, own = restricted_parts(objective, decomposition, s, parts)
        found[s] = kind(loss, decomposition.group_layout(s), objective.stop, objective.parts.blocks, own)
        found[s].inherit(objective)
    return found


def restricted_parts(
    objective: Objective, decomposition: Decomposition, s: int, parts: Sequence[Loss]
) -> tuple[RestrictedLoss, list[RestrictedLoss]]:
    """The restriction of the loss to a subdomain of this rank's, and of its parts on this rank."""
    ranges = decomposition.subdomains.ranges[s]
    loss = restricted_loss(objective.loss, ranges)
    return loss, [restricted_loss(part, ranges, loss.frozen) for part in parts]
