"""AdaGrad as a trust-region method without loss values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from petsc4py import PETSc

from ddml.options import Option
from solvers.base import Solver
from solvers.line_search import SearchResult


class AdaGrad(Solver):
    r"""First-order trust regions whose radii, one a parameter, come from gradients alone (arXiv 2302.07049).

    .. math:: w_i^2 = \sigma + \sum_k g_{k,i}^2, \quad \theta_i \leftarrow \theta_i - a\, g_i / w_i

    (Duchi, Hazan, Singer 2011): the step is the minimiser of :math:`\langle g, s\rangle` with
    :math:`|s_i| \le a |g_i| / w_i`. No loss decides anything, so that noise in it does no harm; a run ends where one is
    not finite. a = 0.1 and sigma = 1e-4 are our choice.

    The method depends on the units of its parameters; where these have units u of their own, as a coarse level's have,
    it is that of :math:`\theta_i / u_i`.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rate", 0.1, "a, the step over |g_i| / w_i.", above=0.0),
        Option("sigma", 1e-4, "What the sum of squared gradients begins with.", above=0.0),
    )
    work_vectors = ("squares", "s", "start", "start_g", "start_squares")
    paced = True
    saved = ("squares",)
    failure = PETSc.TAO.ConvergedReason.DIVERGED_NAN

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the vectors. Collective."""
        super().prepare(tao)
        self.box: tuple[PETSc.Vec, PETSc.Vec] | None = None
        self.units: PETSc.Vec | None = None

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.vectors["squares"].set(self.settings.sigma)

    def confine(self, centre: PETSc.Vec, bounds: PETSc.Vec) -> None:
        r"""Keep the next steps within :math:`centre \pm bounds`, two vectors that stay the caller's."""
        self.box = centre, bounds

    def measure(self, units: PETSc.Vec) -> None:
        """Give the parameters units, a vector above 0 that stays the caller's."""
        self.units = units

    def bounds(self, g: PETSc.Vec, result: PETSc.Vec) -> None:
        """Write a |g_i| / w_i to ``result``, in units of the parameter, w as the next step has it. Collective."""
        self._steps(g, result, self.vectors["squares"])
        result.abs()

    def _steps(self, g: PETSc.Vec, result: PETSc.Vec, squares: PETSc.Vec) -> None:
        """Write a g_i / sqrt(squares_i + g_i^2) to ``result``."""
        self._square(g, result)
        result.axpy(1.0, squares)
        result.sqrtabs()
        result.pointwiseDivide(g, result)
        for _ in range(2 if self.units is not None else 0):
            result.pointwiseMult(self.units, result)
        result.scale(self.settings.rate)

    def _square(self, g: PETSc.Vec, result: PETSc.Vec) -> None:
        """Write the squared derivatives by the parameters in their units to ``result``."""
        result.pointwiseMult(g, g)
        for _ in range(2 if self.units is not None else 0):
            result.pointwiseMult(self.units, result)

    def step(self, x: PETSc.Vec) -> None:
        """Move x by a step; the gradient there is not computed. Collective."""
        squares, s, g = self.vectors["squares"], self.vectors["s"], self.g
        self._steps(g, s, squares)
        x.axpy(-1.0, s)
        if self.box is not None:
            clip(x, *self.box, s)
        self._square(g, s)
        squares.axpy(1.0, s)

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        moved = (x, "start"), (self.g, "start_g"), (self.vectors["squares"], "start_squares")
        for vec, start in moved:
            vec.copy(self.vectors[start])
        value = self.advance(x)
        if math.isfinite(value) and math.isfinite(self.g.norm()):
            return SearchResult(value, self.settings.rate, True)
        for vec, start in moved:
            self.vectors[start].copy(vec)
        return SearchResult(self.f, 0.0, False)

    def advance(self, x: PETSc.Vec) -> float:
        """Move x by an iteration; the loss there, whose gradient is then ``g``. Collective."""
        self.step(x)
        return self.objective.value_gradient(x, self.g)


def clip(x: PETSc.Vec, centre: PETSc.Vec, bounds: PETSc.Vec, work: PETSc.Vec) -> None:
    r"""Bring x into :math:`centre \pm bounds`; ``work`` is overwritten. Collective."""
    work.waxpy(1.0, bounds, centre)
    x.pointwiseMin(x, work)
    work.waxpy(-1.0, bounds, centre)
    x.pointwiseMax(x, work)
