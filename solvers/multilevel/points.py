"""Where a level stands, and what its objective is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

from petsc4py import PETSc

from ddml.objectives.composed import shifted
from ddml.objectives.objective import Objective
from solvers.owner import Owner


class LevelPoint(Owner):
    """A point of a level; its vectors are made when they are needed first, collectively.

    Attributes
    ----------
    loss : Objective
        Of the level.
    objective : Objective
        What the level minimises: that with a linear term, if it has one.
    linear : bool
        Whether it does.
    x, g : PETSc.Vec
        Where the level stands, and the gradient there.
    f, start_f : float
        The objective there, and where the phase began.
    moved : bool
        Whether somebody else than the level's solver has moved it since.
    """

    def stand(self, objective: Objective, point: PETSc.Vec | None, linear: bool) -> None:
        """Make the vectors. Collective.

        Parameters
        ----------
        objective
            Of the level.
        point
            Where it stands, if there is a vector already; such a level has no linear term.
        linear
            Whether phases have linear terms.
        """
        self.loss = self.objective = objective
        self.f = self.start_f = math.nan
        self.moved = False
        self.x = self._vector() if point is None else point
        self.g = self._vector()
        self.linear = linear and point is None
        if self.linear:
            self.objective = shifted(objective, self.slope, self.start)

    def _vector(self) -> PETSc.Vec:
        made: PETSc.Vec = self.own(self.loss.layout.vector())
        return made

    @cached_property
    def slope(self) -> PETSc.Vec:
        """The vector of the linear term."""
        return self._vector()

    @cached_property
    def start(self) -> PETSc.Vec:
        """Where the phase began that :meth:`enter` began."""
        return self._vector()

    @cached_property
    def step(self) -> PETSc.Vec:
        """A displacement."""
        return self._vector()

    @cached_property
    def trial(self) -> PETSc.Vec:
        """A point that is tried."""
        return self._vector()

    @cached_property
    def trial_g(self) -> PETSc.Vec:
        """The gradient there."""
        return self._vector()

    def evaluate(self) -> None:
        """Loss and gradient where the level stands. Collective."""
        self.f = self.objective.value_gradient(self.x, self.g)

    def enter(self, gradient: PETSc.Vec | None) -> None:
        """Begin a phase where the level stands: from now on its objective has this gradient there. Collective.

        It takes an evaluation of the level's loss. None: the objective is the loss itself.
        """
        if self.linear:
            self.slope.set(0.0)
            self.x.copy(self.start)
        self.evaluate()
        if gradient is not None:
            self.slope.waxpy(-1.0, self.g, gradient)
            gradient.copy(self.g)
        self.start_f, self.moved = self.f, True

    def enter_unseen(self, gradient: PETSc.Vec) -> None:
        """Begin a phase of one step that asks for no loss, as :meth:`enter` but without an evaluation. Collective."""
        self.x.copy(self.start)
        gradient.copy(self.g)
        self.f = self.start_f = math.nan

    def travelled(self, norm: Callable[[PETSc.Vec], float]) -> float:
        """How far the level has moved in this phase; the displacement is written to ``step``. Collective."""
        self.step.waxpy(-1.0, self.start, self.x)
        return norm(self.step)

    def move(self, f: float) -> None:
        """Go to the trial point, whose loss and gradient are known."""
        self.trial.copy(self.x)
        self.trial_g.copy(self.g)
        self.f, self.moved = f, True
