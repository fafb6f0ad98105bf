r"""Where Newton's method for a kernel machine of some loss is: coefficients, outputs, gradient, the step from there.

The functional is that of :mod:`solvers.kernel_machines.newton`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from petsc4py import PETSc

from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.losses import OutputLoss
from ddml.options import understood

from .curved import CurvedOperator, CurvedPivotsPC
from .fit import norm

# our choices: the residual of a Newton system over the gradient, at most, and over what the rule asks for, at least
LOOSE, ENOUGH = 0.1, 0.5
# and of a line search: lengths tried, the slope at its end over that at its beginning, parts of an interval
TRIALS, FLAT, SHORTEST, LONGEST = 30, 0.5, 0.1, 0.9


class Step(NamedTuple):
    """A step that was taken: the iterations of KSP, whether a digit was gained, and its length."""

    iterations: int
    gained: bool
    length: float


class LossPoint:
    r"""This rank's rows of alpha, of its outputs F = K alpha and of the gradient r; J and the norm of r. Collective.

    Parameters
    ----------
    curved
        The matrix of Newton systems.
    loss
        l.
    Y
        This rank's rows of what the loss takes.
    alpha
        Those of the coefficients.
    F
        Those of the outputs, where they are known.
    exact
        Whether outputs that are given were computed anew, and not added up.
    before
        The gradient's norm when they last were.

    Attributes
    ----------
    scale : float
        The norm of r at zero; 1 if that is 0.
    value, size : float
        J, and the norm of r.
    """

    def __init__(
        self,
        curved: CurvedOperator,
        loss: OutputLoss,
        Y: Array,
        alpha: Array,
        F: Array | None = None,
        exact: bool = True,
        before: float = math.inf,
    ) -> None:
        self.curved, self.loss, self.Y, self.layout = curved, loss, Y, curved.layout
        self.scale, self.before = norm(curved, loss.slopes(Y, np.zeros_like(Y))) or 1.0, before
        self._move(alpha, curved.exact(alpha) if F is None else F)
        self.exact = exact

    def refresh(self) -> None:
        """Compute K alpha anew. Collective."""
        self._move(self.alpha, self.curved.exact(self.alpha))
        self.exact = True

    def good(self, limit: float) -> bool:
        """Whether the gradient is within a limit, or no digit of it is gained any more: of outputs anew. Collective."""
        if self.size > limit:
            return False
        if not self.exact:
            self.refresh()
        if self.size <= limit or self.size > self.before / 2:
            return True
        self.before = self.size
        return False

    def advance(self, ksp: PETSc.KSP, context: CurvedPivotsPC | None, limit: float) -> Step | None:
        """Take a step of Newton's method, if there is one that decreases J. Collective."""
        curved, mu = self.curved, self.curved.shift
        curved.move(self.loss.curvature(self.Y, self.F))
        if context is not None:
            context.renew(curved.curvature)
        forcing = max(min(LOOSE, math.sqrt(self.size / self.scale)), ENOUGH * limit / self.size)
        atol = forcing * mu * self.size / math.sqrt(self.loss.largest)
        ksp.setTolerances(rtol=0.0, atol=atol, divtol=math.inf)
        x, y = ksp.getOperators()[0].createVecs()
        try:
            with x as array:
                array[:] = -curved.curvature.transposed(curved.image(self.r)).ravel()
            with understood():
                ksp.solve(x, y)
            direction = -(self.r + curved.curvature.factor(self.layout.matrix(y))) / mu
        finally:
            for vec in (x, y):
                vec.destroy()
        value, size, alpha = self.value, self.size, self.alpha
        if not self._search(direction, curved.image(direction)):
            return None
        gained = self.value < value or self.size <= size / 2
        return Step(ksp.getIterationNumber(), gained, norm(curved, self.alpha - alpha))

    def _move(self, alpha: Array, F: Array) -> None:
        self.alpha, self.F, self.exact = alpha, F, False
        self.slopes = self.loss.slopes(self.Y, F)
        self.r = self.slopes + self.curved.shift * alpha
        self.size, self.value = norm(self.curved, self.r), self._value(alpha, F)

    def _sum(self, rows: Array) -> float:
        """The sum over samples of rows (n,). Collective."""
        return float(self.curved.layout.inner(rows[:, None], np.ones((len(rows), 1)))[0, 0])

    def _value(self, alpha: Array, F: Array) -> float:
        return self._sum(self.loss.values(self.Y, F) + self.curved.shift / 2 * (alpha * F).sum(axis=1))

    def _slopes(self, direction: Array, image: Array, lengths: Array) -> Array:
        """The derivatives of J along a direction, column by column (k,). Collective."""
        there = self.loss.slopes(self.Y, self.F + lengths * image) + self.curved.shift * (
            self.alpha + lengths * direction
        )
        return np.asarray(self.curved.layout.inner(there * image, np.ones((len(image), 1)))[:, 0])

    def _search(self, direction: Array, image: Array) -> bool:
        """Go along a direction of descent, whose image under K is given, as far as is good; whether it is one.

        Where the loss does not couple columns each has its own length. J is convex along it, so that it has decreased
        where its slope is not above 0: a first length of 1 will then do. Else false position, which halves the slope of
        an end that stays (the Illinois method), finds where the slope is small; if it is above 0 there, J is looked at.
        Collective.
        """

        def slopes(lengths: Array) -> Array:
            found = self._slopes(direction, image, lengths)
            return np.full_like(found, found.sum()) if self.loss.coupled else found

        begin = slopes(np.zeros(image.shape[1]))
        if not (begin < 0).any():
            return False
        lengths = (begin < 0).astype(float)
        low, low_slope, high, high_slope = np.zeros_like(lengths), begin, lengths, np.zeros_like(begin)
        for _ in range(TRIALS):
            slope = slopes(lengths)
            above, good = slope > 0, np.abs(slope) <= -FLAT * begin
            good |= ~above & (lengths == 1) | (begin >= 0)
            if good.all():
                alpha, F = self.alpha + lengths * direction, self.F + lengths * image
                if not above.any() or self._value(alpha, F) <= self.value:
                    self._move(alpha, F)
                    return True
                good = ~above | (begin >= 0)
            low, low_slope = np.where(above, low, lengths), np.where(above, low_slope / 2, slope)
            high, high_slope = np.where(above, lengths, high), np.where(above, slope, high_slope / 2)
            share = low_slope / np.where(low_slope < 0, low_slope - high_slope, -1.0)
            lengths = np.where(good, lengths, low + np.clip(share, SHORTEST, LONGEST) * (high - low))
        if low.any():
            self._move(self.alpha + low * direction, self.F + low * image)
        return bool(low.any())
