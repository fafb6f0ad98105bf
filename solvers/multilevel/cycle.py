"""Cycles over a hierarchy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from petsc4py import PETSc

from ddml.hierarchy.hierarchy import Hierarchy
from solvers.owner import Owner

from .acceptance import Acceptance
from .levels import LevelSolver

# which cycles a level asks of the next coarser one, one after the other (Trottenberg, Oosterlee, Schueller 2001, 2.4)
KINDS = {"V": ("V",), "W": ("W", "W"), "F": ("F", "V")}


class Cycle(Owner):
    r"""A cycle: smooth, correct from the coarser level, smooth; the coarsest level takes more steps.

    With :math:`\theta` where level l + 1 stands and h_{l+1} its objective, level l begins at
    :math:`\theta_0 = P\theta` and minimises

    .. math:: h_l(\vartheta) = L_l(\vartheta) + \langle R \nabla h_{l+1}(\theta) - \nabla L_l(\theta_0),
        \vartheta - \theta_0 \rangle

    (Nash 2000; Gratton, Sartenaer, Toint 2008), so that :math:`\langle \nabla h_l(\theta_0), s\rangle =
    \langle \nabla h_{l+1}(\theta), I s\rangle` for every s. The correction I (theta_l^* - theta_0) is handed to the
    acceptance. All is collective.

    Parameters
    ----------
    hierarchy
        Levels and transfers.
    levels
        Their solvers, the coarsest first.
    acceptance
        Of corrections.
    norms
        Of each level.
    kind
        ``V``, ``W`` or ``F``.
    before, after
        Steps before and behind a correction on all levels but the coarsest.
    coarse
        Steps on the coarsest.
    descent
        kappa: a level is not corrected where the 2-norm of its restricted gradient is below this part of its own.

    Attributes
    ----------
    tried, refused : int
        Corrections of the finest level.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        levels: Sequence[LevelSolver],
        acceptance: Acceptance,
        norms: Sequence[Callable[[PETSc.Vec], float]],
        kind: str,
        before: int,
        after: int,
        coarse: int,
        descent: float = 0.0,
    ) -> None:
        self.hierarchy, self.levels, self.acceptance, self.norms = hierarchy, levels, acceptance, norms
        self.kind, self.before, self.after, self.coarse, self.descent = kind, before, after, coarse, descent
        self.tried = self.refused = 0

    def run(self) -> bool:
        """One cycle from where the finest level stands; False if nothing in it could go on. Collective."""
        return self._visit(len(self.levels) - 1, self.kind, math.inf)

    def _visit(self, number: int, kind: str, room: float) -> bool:
        level, norm = self.levels[number], self.norms[number]
        finest = number == len(self.levels) - 1
        blind = self.acceptance.blind and not finest
        if number == 0:
            return level.proceed(self.coarse, room, norm, blind)

        def left() -> float:
            return math.inf if finest or room == math.inf else room - level.travelled(norm)

        going = level.proceed(self.before, left(), norm)
        for place, inner in enumerate(KINDS[kind], 1):
            ends = blind and self.after == 0 and place == len(KINDS[kind])
            going = self.correct(number, inner, left(), ends) or going
        return level.proceed(self.after, left(), norm, blind) or going

    def correct(self, number: int, kind: str, left: float, ends: bool = False) -> bool:
        """Move level ``number``, which has ``left`` to go, by a correction from the next coarser one, or leave it.

        Where it ends with that, and nobody asks, loss and gradient stay unknown.
        """
        fine, coarse, transfer = self.levels[number], self.levels[number - 1], self.hierarchy.transfers[number - 1]
        gradient = coarse.trial_g
        transfer.restrict(fine.g, gradient)
        if gradient.norm() < self.descent * fine.g.norm():
            return False
        room = self.acceptance.room(number, left)
        if not room > 0:
            return False
        transfer.project(fine.x, coarse.x)
        finest = number == len(self.levels) - 1
        self.tried += finest
        if number == 1 and self.coarse == 1 and coarse.leaps and not self.acceptance.judges:
            coarse.enter_unseen(gradient)  # nobody asks for the coarse loss, and the gradient is known
            coarse.leap()
        else:
            coarse.enter(gradient)
            coarse.begin_like(fine)
            self.acceptance.confine(fine, coarse, transfer)
            self._visit(number - 1, kind, room / transfer.stretch)
        decrease = coarse.start_f - coarse.f
        part = 0.0
        if decrease > 0 or not self.acceptance.judges:
            coarse.step.waxpy(-1.0, coarse.start, coarse.x)
            transfer.prolong(coarse.step, fine.step)
            if ends:
                self.acceptance.move(fine, fine.step)
                return True
            part = self.acceptance.try_correction(number, fine, fine.step, decrease)
        self.refused += finest and not part > 0
        return part > 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the vectors are this object's. Collective."""
        return {"tried": self.tried, "refused": self.refused, "acceptance": self.acceptance.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`. Collective."""
        self.tried, self.refused = state["tried"], state["refused"]
        self.acceptance.restore(state["acceptance"])
