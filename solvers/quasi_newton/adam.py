"""Adam: steps along averages of gradients, over the root of averages of their squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.options import Option
from solvers.base import Solver
from solvers.line_search import SearchResult


class Adam(Solver):
    r"""Adam with bias correction (Kingma, Ba 2015, Algorithm 1), beta and eps as there.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \alpha_t \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    No loss decides anything; a run ends where one, or its gradient, is not finite. The rate 3e-3 is our choice, found
    for narrow networks. With ``rate_schedule`` cosine step t of T has :math:`\alpha_t = \alpha (1 + \cos(\pi (t - 1) /
    T)) / 2`, and none comes behind T.

    An iteration evaluates once. On all samples that is where it ends. On batches, from the second on, it is where it
    begins: the loss and the gradient that it reports are those of which the step was made, as is usual there.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rate", 3e-3, "The step of a parameter whose derivatives are all alike.", above=0.0),
        Option("beta1", 0.9, "What an average of gradients keeps of the one before.", minimum=0.0),
        Option("beta2", 0.999, "The same of their squares.", minimum=0.0),
        Option("eps", 1e-8, "Added to the root of the squares.", above=0.0),
        Option("rate_schedule", "constant", "Whether the rate goes down to 0 along half a cosine.",
               choices=("constant", "cosine")),
        Option("rate_iterations", None, "Iterations in which it does (default: as many as the run may have in all).",
               kind=int, minimum=1),
    )  # fmt: skip
    work_vectors = ("first", "second", "trial", "trial_g", "trial_first", "trial_second")
    saved = ("first", "second")
    failure = PETSc.TAO.ConvergedReason.DIVERGED_NAN

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        super().setFromOptions(tao)
        for name in ("beta1", "beta2"):
            if not getattr(self.settings, name) < 1:
                raise InputError(f"option -{self.prefix}{name} must be below 1, got {getattr(self.settings, name)}")
        self.paced = self.settings.rate_schedule == "constant"

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the vectors. Collective."""
        super().prepare(tao)
        self.count = self.planned = 0  # steps so far, and in the schedule
        self.behind = self.lags = False  # whether g is not that at x; whether it is evaluated where an iteration begins

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise. Collective.

        Raises
        ------
        InputError
            If the schedule is to end with this solve, but was for another one.
        """
        planned = self.settings.rate_iterations or tao.getMaximumIterations()
        if not self.paced and self.count and (self.remembers or self.planned not in (0, planned)):
            raise InputError(
                f"option -{self.prefix}rate_schedule cosine over several solves needs -{self.prefix}rate_iterations"
            )
        self.planned = planned
        super().solve(tao)

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.count, self.behind, self.lags = 0, False, False
        for name in self.saved:
            self.vectors[name].set(0.0)

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; between batches the next iteration evaluates."""
        self.lags = self.behind = self.iteration > 0 and self.objective.fraction < 1
        if not self.behind:
            super().renew(x)

    def resume(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.resume`."""
        self.behind = False

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {"count": self.count, "behind": self.behind, "lags": self.lags}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        self.count, self.behind, self.lags = state["count"], state["behind"], state["lags"]

    @property
    def rate(self) -> float:
        """That of the next step."""
        if self.paced:
            return float(self.settings.rate)
        return float(self.settings.rate) * (1 + math.cos(math.pi * min(self.count / self.planned, 1.0))) / 2

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        trial, trial_g, rate = self.vectors["trial"], self.vectors["trial_g"], self.rate
        self.g.copy(trial_g)
        value = self.objective.value_gradient(x, trial_g) if self.behind else self.f
        finite = math.isfinite(value) and math.isfinite(trial_g.norm())
        if finite:
            self._step(x, trial_g, rate, trial)
        if finite and not self.lags:
            value = self.objective.value_gradient(trial, trial_g)
            finite = math.isfinite(value) and math.isfinite(trial_g.norm())
        if not finite:
            return SearchResult(self.f, 0.0, False)
        for name in self.saved:
            self.vectors[f"trial_{name}"].copy(self.vectors[name])
        trial.copy(x)
        trial_g.copy(self.g)
        self.count, self.behind = self.count + 1, self.lags
        return SearchResult(value, rate, True)

    def _step(self, x: PETSc.Vec, g: PETSc.Vec, rate: float, result: PETSc.Vec) -> None:
        """Write where a step from x leads to ``result``, and the averages there to their trial vectors. Collective."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        m, v = self.vectors["trial_first"], self.vectors["trial_second"]
        self.vectors["first"].copy(m)
        m.axpby(1 - beta1, beta1, g)
        result.pointwiseMult(g, g)
        self.vectors["second"].copy(v)
        v.axpby(1 - beta2, beta2, result)
        v.copy(result)
        result.sqrtabs()
        result.scale(1 / math.sqrt(1 - beta2 ** (self.count + 1)))
        result.shift(self.settings.eps)
        result.pointwiseDivide(m, result)
        result.aypx(-rate / (1 - beta1 ** (self.count + 1)), x)
