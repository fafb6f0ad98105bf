"""PETSc's line search, from a point whose loss and gradient are known, past points where the loss is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

from petsc4py import PETSc

from ddml.objectives.objective import Objective
from ddml.options import preset

from .owner import Owner

# A first trial where the loss is not finite or has grown beyond all use for interpolation is given
# up for a tenth of it (our choices). A cubic through values of 1 and 1e13 has its minimiser within
# rounding of one end, and rounding then decides the step.
GROWTH = 1e4
BACKTRACK = 0.1
RETRIES = 16
EVALUATIONS = 25
OUT_OF_RANGE = 63  # PETSC_ERR_ARG_OUTOFRANGE: how the search ends where rounding has turned its interval round


def at_rounding(error: PETSc.Error) -> bool:
    """Whether PETSc raised this because rounding has turned the interval of a line search round."""
    return bool(error.ierr == OUT_OF_RANGE and error.__cause__ is None)


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search: on failure the point, loss and gradient are those it started from."""

    value: float
    step: float
    success: bool


class LineSearch(Owner):
    """Strong-Wolfe search by cubic interpolation (More and Thuente 1994, PETSc's ``more-thuente``).

    Constants c1 = 1e-4, c2 = 0.9 and at most 25 evaluations (torch's routine of that kind; the
    paper's own are not known); all of PETSc's ``-tao_ls_...`` options apply. A trial that is not
    finite, or 1e4 times the loss, is never accepted: the search begins again with a tenth of the
    first step.

    Parameters
    ----------
    objective
        What is minimised.
    prefix
        Of the options.
    """

    def __init__(self, objective: Objective, prefix: str) -> None:
        self.objective, self.prefix = objective, prefix
        self._create()
        self._start: tuple[float, PETSc.Vec] | None = None
        self._limit = math.inf
        self._beyond = False
        self._trials = 0  # since it began
        self._last: tuple[float, PETSc.Vec] | None = None  # of them

    def _create(self) -> None:
        self.search = self.own(PETSc.TAOLineSearch().create(self.objective.comm))
        self.search.setOptionsPrefix(self.prefix)
        self.search.setType("more-thuente")
        self.search.setObjectiveGradient(self._evaluate)
        constants = {"ftol": 1e-4, "gtol": 0.9, "max_funcs": EVALUATIONS}
        self._most = PETSc.Options(self.prefix).getInt("tao_ls_max_funcs", EVALUATIONS)
        with preset(**{f"{self.prefix}tao_ls_{name}": value for name, value in constants.items()}):
            self.search.setFromOptions()

    def _evaluate(self, search: PETSc.TAOLineSearch, x: PETSc.Vec, g: PETSc.Vec) -> float:
        if self._start is not None:  # PETSc asks for the point where the search starts, too
            value, gradient = self._start
            self._start = None
            gradient.copy(g)
            return value
        value = self.objective.value_gradient(x, g)
        if not (math.isfinite(value) and value <= self._limit and math.isfinite(g.norm())):
            self._beyond, value = True, math.inf
        self._trials, self._last = self._trials + 1, (value, x)
        return value

    def __call__(
        self,
        x: PETSc.Vec,
        f: float,
        g: PETSc.Vec,
        direction: PETSc.Vec,
        first: float = 1.0,
        room: tuple[PETSc.Vec, PETSc.Vec] | None = None,
    ) -> SearchResult:
        """Search from x along ``direction``; x and g are overwritten with the accepted point. Collective.

        What they were is kept meanwhile, and left, in the two vectors ``room`` if these are given.
        """
        x0, g0 = (x.duplicate(), g.duplicate()) if room is None else room
        x.copy(x0)
        g.copy(g0)
        self._limit = f + GROWTH * abs(f)
        try:
            for _ in range(RETRIES):
                self._start, self._beyond, self._trials = (f, g0), False, 0
                self.search.setInitialStepLength(first)
                try:
                    value, step, reason = self.search.apply(x, g, direction)
                except PETSc.Error as error:
                    if not at_rounding(error):
                        raise
                    value, step, reason = math.inf, 0.0, None
                    if self._trials >= self._most and self._last is not None:
                        # all steps were too short, and PETSc has gone back to the best of them
                        value, best = self._last
                        best.copy(x)
                        step = _distance(x, x0) / direction.norm()
                    self.release(self.search)  # PETSc leaves it with the limits and the flag of what broke off
                    self._create()
                # without a Wolfe point (say, at the limit of evaluations) a decrease is still progress
                if math.isfinite(value) and (reason == PETSc.TAOLineSearch.ConvergedReason.SUCCESS or value < f):
                    return SearchResult(value, step, True)
                x0.copy(x)
                g0.copy(g)
                if not self._beyond:
                    break
                first *= BACKTRACK
            return SearchResult(f, 0.0, False)
        finally:
            self._start = self._last = None
            if room is None:
                x0.destroy()
                g0.destroy()


def _distance(x: PETSc.Vec, y: PETSc.Vec) -> float:
    difference = x.copy()
    difference.axpy(-1.0, y)
    found = float(difference.norm())
    difference.destroy()
    return found
