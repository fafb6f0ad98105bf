"""Whether a coarse correction is taken, and how far the next one may go: the globalisation of a cycle."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.hierarchy.hierarchy import Transfer
from solvers.trust_region.adagrad import AdaGrad, clip
from solvers.trust_region.radius import SMALLEST, TrustRadius

from .levels import LevelSolver

# our choices: the first radius of corrections over that of steps, the part of its radius from which on a correction
# was limited by it, and the part of a budget that is worth a phase
WIDER, LIMITED, LITTLE = 4.0, 0.5, 1e-3


class Acceptance(ABC):
    """Everything is collective on the ranks of the level.

    Attributes
    ----------
    judges : bool
        Whether a correction must have decreased the coarse objective to be tried.
    blind : bool
        Whether nobody asks for loss and gradient where a coarse level ends: they are not evaluated there.
    """

    judges = True
    blind = False

    @abstractmethod
    def room(self, number: int, left: float) -> float:
        """How far a correction of level ``number`` may go, which itself has ``left`` to go; 0 where that is nothing."""

    def confine(self, fine: LevelSolver, coarse: LevelSolver, transfer: Transfer) -> None:
        """Bound the coarse level's phase, which is about to begin, beside its room."""
        return

    @abstractmethod
    def try_correction(self, number: int, level: LevelSolver, s: PETSc.Vec, decrease: float) -> float:
        """Move the level by a part of s, or leave it: that part, and 0 of a correction that is refused.

        ``decrease`` is that of the coarse objective.
        """

    def move(self, level: LevelSolver, s: PETSc.Vec) -> None:
        """Move the level by s, of which nothing is to be known any more than where it leads."""
        level.x.axpy(1.0, s)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        return


class Search(Acceptance):
    r"""Backtracking along the correction (MG/OPT, Nash 2000): the largest of 1, 1/2, 1/4, ... that decreases the loss.

    Parameters
    ----------
    trials
        At most so many; the correction is refused behind them.
    armijo
        c in :math:`h(\theta + a s) \le h(\theta) + c\, a \langle g, s\rangle`; 0: any decrease.
    eps
        Of the precision that losses are computed in.
    """

    def __init__(self, trials: int, armijo: float, eps: float) -> None:
        self.trials, self.armijo, self.eps = trials, armijo, eps

    def room(self, number: int, left: float) -> float:
        """See :meth:`Acceptance.room`: as far as the level."""
        return left

    def try_correction(self, number: int, level: LevelSolver, s: PETSc.Vec, decrease: float) -> float:
        """See :meth:`Acceptance.try_correction`."""
        slope = float(level.g.dot(s))
        if not slope < 0:
            return 0.0
        length, noise = 1.0, 10 * self.eps * max(1.0, abs(level.f))
        for _ in range(self.trials):
            level.trial.waxpy(length, s, level.x)
            value = level.objective.value_gradient(level.trial, level.trial_g)
            wanted = level.f + self.armijo * length * slope
            # where the decrease that is promised is lost in rounding the gradient decides
            hidden = decrease <= noise and abs(value - level.f) <= noise
            if math.isfinite(value) and (value < wanted or (hidden and level.trial_g.norm() < level.g.norm())):
                level.move(value)
                return length
            length *= 0.5
        return 0.0


class Region(Acceptance):
    r"""The ratio of the decrease of the level to that of the coarse one, as a trust region (RMTR, Gratton et al. 2008).

    ``own`` (our choice, the default): each level has a radius for corrections beside that of its steps, four times as
    large at the first correction, which the ratio sets from then on. ``shared`` (as published): the radius of the
    level's steps is that of its corrections.

    Parameters
    ----------
    levels
        The coarsest first.
    norms
        Of each level; that of a step is that of its prolongation.
    settings, eps, name
        See :class:`solvers.trust_region.radius.TrustRadius`.
    shared
        See above; levels without a trust region have one of their own.
    """

    def __init__(
        self,
        levels: Sequence[LevelSolver],
        norms: Sequence[Callable[[PETSc.Vec], float]],
        settings: Any,
        name: str,
        eps: float,
        shared: bool,
    ) -> None:
        self.norms, self.radii, self.levels = norms, list[TrustRadius](), levels
        self.begun = [False] * len(levels)
        self.shared = [shared and level.trust_region is not None for level in levels]
        for level, together in zip(levels, self.shared, strict=True):
            inside = level.trust_region
            if together and inside is not None:
                self.radii.append(inside.radius)
                continue
            radius = TrustRadius(settings, name, eps)
            radius.value = min(WIDER * radius.first, radius.largest)
            self.radii.append(radius)

    def room(self, number: int, left: float) -> float:
        """See :meth:`Acceptance.room`."""
        reach = self.levels[number].radius
        if not self.begun[number] and not self.shared[number] and reach is not None:
            self.radii[number].value = min(WIDER * reach, self.radii[number].largest)
        self.begun[number] = True
        radius = self.radii[number].value
        found = min(radius, left)
        return found if found > LITTLE * radius and found >= SMALLEST else 0.0

    def try_correction(self, number: int, level: LevelSolver, s: PETSc.Vec, decrease: float) -> float:
        """See :meth:`Acceptance.try_correction`."""
        radius, size = self.radii[number], self.norms[number](s)
        level.trial.waxpy(1.0, level.x, s)
        value = level.objective.value_gradient(level.trial, level.trial_g)
        finite = math.isfinite(value) and math.isfinite(level.trial_g.norm())
        if not self.shared[number]:
            radius.recent = [level.f]
        limited = size >= (0.9 if self.shared[number] else LIMITED) * radius.value
        if not radius.judge(value if finite else math.inf, decrease, limited, size=size):
            return 0.0
        level.move(value)
        return 1.0

    def state(self) -> dict[str, Any]:
        """See :meth:`Acceptance.state`."""
        return {"radii": [float(radius.value) for radius in self.radii], "begun": [bool(begun) for begun in self.begun]}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Acceptance.restore`."""
        self.begun = list(state["begun"])
        for radius, value, together in zip(self.radii, state["radii"], self.shared, strict=True):
            if not together:
                radius.value = value


class Always(Acceptance):
    """Every correction with a finite loss, as it is: methods with a fixed step, whose bounds are elsewhere."""

    judges = False

    def room(self, number: int, left: float) -> float:
        """See :meth:`Acceptance.room`: as far as the level."""
        return left

    def try_correction(self, number: int, level: LevelSolver, s: PETSc.Vec, decrease: float) -> float:
        """See :meth:`Acceptance.try_correction`."""
        level.trial.waxpy(1.0, level.x, s)
        value = level.objective.value_gradient(level.trial, level.trial_g)
        if not (math.isfinite(value) and math.isfinite(level.trial_g.norm())):
            return 0.0
        level.move(value)
        return 1.0


class Bounds(Always):
    r"""Every correction, within bounds that come from gradients alone (Gratton, Kopanicakova, Toint, arXiv 2302.07049).

    An entry of the coarse parameters stays within ``steps`` times the largest bound a |g_i| / w_i of its copies, as the
    prolonged step of that entry has it (our choice, as is the largest); below the finest level also what is corrected
    stays within the bounds that it has itself. Levels are solved by :class:`solvers.trust_region.adagrad.AdaGrad`, in
    units in which a coarse entry moves by as much as its copies do.

    Parameters
    ----------
    levels, transfers
        The coarsest first.
    steps
        Of the bound of one step, that a correction may take.

    Raises
    ------
    InputError
        If a level has another solver.
    """

    blind = True

    def __init__(self, levels: Sequence[LevelSolver], transfers: Sequence[Transfer], steps: float) -> None:
        for number, level in enumerate(levels):
            if not isinstance(level.context, AdaGrad):
                raise InputError(f"level {number} must be solved by adagrad, not {level.name}: bounds come from it")
        self.steps = steps
        self.limits = {id(level): level.x.duplicate() for level in levels}
        self.units = [level.x.duplicate() for level in levels]
        self.units[-1].set(1.0)
        for number in reversed(range(len(transfers))):
            transfers[number].bound(self.units[number + 1], self.units[number])
            context = levels[number].context
            assert isinstance(context, AdaGrad)
            context.measure(self.units[number])

    def confine(self, fine: LevelSolver, coarse: LevelSolver, transfer: Transfer) -> None:
        """See :meth:`Acceptance.confine`."""
        limit = self.limits[id(coarse)]
        assert isinstance(fine.context, AdaGrad) and isinstance(coarse.context, AdaGrad)
        if not fine.begun:
            fine.context.begin()
        fine.context.bounds(fine.g, fine.step)
        transfer.bound(fine.step, limit)
        limit.scale(self.steps)
        coarse.context.confine(coarse.start, limit)

    def try_correction(self, number: int, level: LevelSolver, s: PETSc.Vec, decrease: float) -> float:
        """See :meth:`Acceptance.try_correction`."""
        self.move(level, s)
        level.evaluate()
        level.moved = True
        return 1.0

    def move(self, level: LevelSolver, s: PETSc.Vec) -> None:
        """See :meth:`Acceptance.move`: within the level's own bounds."""
        super().move(level, s)
        assert isinstance(level.context, AdaGrad)
        if level.context.box is not None:
            clip(level.x, *level.context.box, level.trial)

    def destroy(self) -> None:
        """Destroy the vectors. Collective."""
        for vec in (*self.limits.values(), *self.units):
            vec.destroy()
