"""L-BFGS with momentum: the baseline of the SPQN paper, and the frame of its preconditioned methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.options import Option, number_or_word
from solvers.base import Solver
from solvers.line_search import SearchResult

from .secant import SecantMemory


class LBFGS(Solver):
    r"""L-BFGS with momentum and a strong-Wolfe search, the baseline of Kopanicakova et al. 2024.

    With g the gradient at theta and H the inverse Hessian approximation,

    .. math:: p = -H g, \quad v \leftarrow (1 - \mu) v + \mu p, \quad \theta \leftarrow \theta + \alpha v,

    then s = alpha v and y, the change of the gradient, are stored if s.y > 1e-15. The first step is
    along steepest descent: H = I, v = 0. The search uses the slope g.v (the published code passes
    g.p). Where v is no descent direction, p takes its place, and where no step along it decreases
    the loss, the memory and v are cleared and the step is tried once more (both our choice).
    """

    options: ClassVar[Sequence[Option]] = (
        Option("memory", 3, "Secant pairs m.", minimum=0),
        Option("momentum", 0.9, "mu in v = (1 - mu) v + mu p; 1 is no momentum.", above=0.0),
        Option("first_step", "1", "First trial step along steepest descent: a number, or 'scaled', min(1, 1 / |g|_1)."),
        Option("curvature_skip", 1e-15, "A secant pair is stored only if s.y is above this."),
        Option("secant", "step", "y over the global step (paper), or between half-steps (published code).",
               choices=("step", "half")),
    )  # fmt: skip

    local_defaults: ClassVar[Mapping[str, Any]] = {"momentum": 1.0, "first_step": "scaled"}
    work_vectors = ("direction", "start_g", "work", "v", "half_g", "last_s")
    saved = ("v", "half_g", "last_s")

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        super().setFromOptions(tao)
        self.first_step = number_or_word(self.prefix, "first_step", self.settings.first_step, "scaled")

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the memory and the work vectors. Collective."""
        super().prepare(tao)
        self.pairs = self.own(SecantMemory(self.settings.memory, self.settings.curvature_skip))
        self.pair_pending = False  # half-step rule: the last step's pair still waits for its y

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.pairs.clear()
        self.vectors["v"].set(0.0)
        self.pair_pending = False

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {"pair_pending": self.pair_pending, "pairs": self.pairs.state()}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        self.pair_pending = state["pair_pending"]
        self.pairs.restore(state["pairs"])

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; a pair that waits for a gradient of the old objective is dropped."""
        super().renew(x)
        self.pair_pending = False

    def resume(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.resume`: a pair that waits for a gradient is dropped."""
        self.pair_pending = False

    def precondition(self, x: PETSc.Vec) -> float:
        """Improve x and ``self.g`` in place before the quasi-Newton step; the loss there. Here: nothing."""
        return self.f

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        f = self.precondition(x)
        work, last_s, half = self.vectors["work"], self.vectors["last_s"], self.settings.secant == "half"
        if half and self.pair_pending:
            work.waxpy(-1.0, self.vectors["half_g"], self.g)
            self.pairs.update(last_s, work)
            self.pair_pending = False
        result = self._quasi_newton_step(x, f)
        if not result.success:
            self.pairs.clear()
            self.vectors["v"].set(0.0)
            result = self._quasi_newton_step(x, f)
        if not result.success and f < self.f:
            result = SearchResult(f, 0.0, True)  # the preconditioner made progress
        elif result.success:
            direction, start_g = self.vectors["direction"], self.vectors["start_g"]
            direction.copy(self.vectors["v"])
            direction.copy(last_s)
            last_s.scale(result.step)
            if half:
                start_g.copy(self.vectors["half_g"])
                self.pair_pending = True
            else:
                work.waxpy(-1.0, start_g, self.g)
                self.pairs.update(last_s, work)
        return result

    def _quasi_newton_step(self, x: PETSc.Vec, f: float) -> SearchResult:
        g, direction, work = self.g, self.vectors["direction"], self.vectors["work"]
        self.pairs.apply(g, work)
        self.vectors["v"].copy(direction)
        direction.axpby(-self.settings.momentum, 1 - self.settings.momentum, work)
        if not g.dot(direction) < 0:  # also where it is not a number
            work.copy(direction)
            direction.scale(-1.0)
        first = 1.0
        if len(self.pairs) == 0:
            size = g.norm(PETSc.NormType.NORM_1)
            first = self.first_step if self.first_step is not None else min(1.0, 1 / max(size, 1.0))
        return self.search(x, f, g, direction, first, (work, self.vectors["start_g"]))
