"""Newton's method by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.errors import CollectiveError
from ddml.objectives.objective import Hessian
from ddml.options import Option, preset
from ddml.parallel import words_of
from solvers.base import Stepper
from solvers.line_search import SearchResult

TRIALS = 15  # of a line search (our choice)


class Newton(Stepper):
    r"""Newton's method with conjugate gradients that are cut short.

    .. math:: H p = -g, \quad \theta_+ = \theta + \alpha p

    PETSc's KSP under the prefix ``newton_`` solves, by default with ``stcg`` without a radius: conjugate gradients that
    end at the last iterate before a direction of negative curvature (Steihaug 1983), until \|r\| <= 1e-9, after at most
    10 iterations, and never more than n, which is PETSc's limit. Where that is no direction of descent, as where the
    first curvature is negative, p = -g (Nocedal, Wright 2006, algorithm 7.1).

    alpha is ``rate``, or with the line search the first of rate, rate/2, rate/4, ..., 15 of them, at which the loss
    is less than here: any decrease will do (our choice). Each trial takes a loss and gradient, as the first is
    nearly always accepted. Without the search every finite step is taken; on a subset of the samples, drawn anew for
    each step, that is the sub-sampled Newton method.

    It knows nothing from one iteration to the next.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rate", 1.0, "The step over Newton's, or the first one of the line search.", above=0.0),
        Option("line_search", True, "Halve the step, at most 14 times, until the loss decreases."),
    )

    work_vectors = ("p", "trial", "trial_g")

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the matrix and the KSP, which reads its options. Collective.

        Raises
        ------
        CollectiveError
            If the loss has no Hessian products.
        """
        super().prepare(tao)
        if not self.objective.loss.hessian:
            raise CollectiveError("solver newton needs Hessian products, which this loss has not")
        self.matrix = self.own(Hessian(self.objective).matrix())
        self.ksp = self.own(PETSc.KSP().create(self.objective.comm))
        prefix = f"{self.prefix}newton_"
        self.ksp.setOptionsPrefix(prefix)
        self.ksp.setOperators(self.matrix)
        chosen: dict[str, Any] = {
            "ksp_type": "stcg", "ksp_rtol": 0.0, "ksp_atol": 1e-9, "ksp_max_it": 10, "pc_type": "none",
        }  # fmt: skip
        with preset(**{prefix + name: value for name, value in chosen.items()}):
            self.ksp.setFromOptions()

    def _direction(self, x: PETSc.Vec, p: PETSc.Vec) -> None:
        """Write the direction from x to p."""
        rhs = self.vectors["trial"]
        self.matrix.getPythonContext().move(x)
        self.g.copy(rhs)
        rhs.scale(-1.0)
        try:
            self.ksp.solve(rhs, p)
        except PETSc.Error as error:
            if error.__cause__ is not None:
                raise
            reason = words_of(error)
            raise CollectiveError(f"PETSc cannot solve with these -{self.prefix}newton_ options: {reason}") from error
        if not self.g.dot(p) < 0:
            self.g.copy(p)
            p.scale(-1.0)

    @property
    def searches(self) -> bool:
        """See :attr:`solvers.base.Stepper.searches`."""
        return bool(self.settings.line_search)

    def step(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Stepper.step`."""
        self._direction(x, self.vectors["p"])
        x.axpy(self.settings.rate, self.vectors["p"])

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        p, trial, trial_g = (self.vectors[name] for name in ("p", "trial", "trial_g"))
        if not math.isfinite(self.g.norm()):  # as it may be at new points
            return SearchResult(self.f, 0.0, False)
        self._direction(x, p)
        step, searches = self.settings.rate, self.searches
        for _ in range(TRIALS if searches else 1):
            trial.waxpy(step, p, x)
            value = self.objective.value_gradient(trial, trial_g)
            if math.isfinite(value) and math.isfinite(trial_g.norm()) and (value < self.f or not searches):
                trial.copy(x)
                trial_g.copy(self.g)
                return SearchResult(value, step, True)
            step /= 2
        return SearchResult(self.f, 0.0, False)
