"""Gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.options import Option
from solvers.base import Stepper
from solvers.line_search import SearchResult

ARMIJO, TRIALS = 1e-4, 30  # the constant of the authors' configuration file for MLVR; the trials are our choice


class GradientDescent(Stepper):
    r"""theta - alpha g.

    alpha is ``rate``; with ``line_search`` twice the last one is tried first, from ``rate`` on, and halved until the
    decrease is at least 1e-4 alpha \|g\|^2 (Armijo). It keeps alpha from one iteration to the next.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rate", 1.0, "The step over the gradient, or the first one of the search.", above=0.0),
        Option("line_search", True, "Search the step; else every finite one is taken."),
    )
    work_vectors = ("trial", "trial_g")

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        super().setFromOptions(tao)
        self.paced = not self.searches

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.length = self.settings.rate / (2 if self.settings.line_search else 1)

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {"step": float(self.length)}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        self.length = state["step"]

    @property
    def searches(self) -> bool:
        """See :attr:`solvers.base.Stepper.searches`."""
        return bool(self.settings.line_search)

    def step(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Stepper.step`."""
        x.axpy(-(self.length if self.searches else self.settings.rate), self.g)

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        trial, trial_g = self.vectors["trial"], self.vectors["trial_g"]
        searches, square = self.searches, float(self.g.dot(self.g))
        step = 2 * self.length if searches else self.settings.rate
        for _ in range(TRIALS if searches else 1):
            trial.waxpy(-step, self.g, x)
            value = self.objective.value_gradient(trial, trial_g)
            finite = math.isfinite(value) and math.isfinite(trial_g.norm())
            if finite and (not searches or value < self.f - ARMIJO * step * square):
                self.length = step
                trial.copy(x)
                trial_g.copy(self.g)
                return SearchResult(value, step, True)
            step /= 2
        return SearchResult(self.f, 0.0, False)
