r"""Kernel machines of other losses than the squared one, by Newton's method on the same matrix.

.. math:: J(\alpha) = \sum_i \ell(y_i, (K \alpha)_i) + \frac\mu2 \langle \alpha, K \alpha \rangle

is convex. Its gradient in the kernel's own metric is :math:`r = \ell' + \mu \alpha`, that by alpha K r: the rule is the
norm of r, which is that of the residual where the loss is the squared one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.losses import Curvature, OutputLoss, named_loss
from ddml.kernel_machines.operator import KernelOperator
from ddml.options import understood

from .curved import CurvedOperator, CurvedPivotsPC, CurvedSchwarzPC
from .fit import columns_of, krylov, norm

# our choices: the residual of a Newton system over the gradient, at most, and over what the rule asks for, at least
LOOSE, ENOUGH = 0.1, 0.5
# and of a line search: lengths tried, the slope at its end over that at its beginning, parts of an interval
TRIALS, FLAT, SHORTEST, LONGEST = 30, 0.5, 0.1, 0.9
PRECONDITIONERS = {"pivots": CurvedPivotsPC, "schwarz": CurvedSchwarzPC}


@dataclass(frozen=True)
class LossFit:
    """The coefficients of a kernel machine of some loss, and how they were found.

    Attributes
    ----------
    coefficients : ndarray
        alpha (n, k), by sample, on every rank.
    steps : int
        Of Newton's method.
    iterations : ndarray
        (steps,), of KSP for each of them.
    products : int
        With K, of all columns together.
    values : ndarray
        (steps + 1,), J before the first and after each step.
    gradients : ndarray
        (steps + 1,), the norms of r over that at zero.
    gradient : float
        The last of them, from K alpha anew in float64.
    converged : bool
        Whether it is within the tolerance.
    """

    coefficients: Array
    steps: int
    iterations: Array
    products: int
    values: Array
    gradients: Array
    gradient: float
    converged: bool


@dataclass(frozen=True)
class LossState:
    """Where Newton's method is: it goes on from here to the last bit, on any number of ranks.

    Attributes
    ----------
    coefficients, outputs : ndarray
        alpha and K alpha (n, k), by sample, on every rank.
    exact : bool
        Whether the outputs have been computed anew, and not added up.
    before : float
        The gradient's norm when they last were.
    value, gradient : float
        J, and the norm of r over that at zero.
    """

    coefficients: Array
    outputs: Array
    exact: bool
    before: float
    value: float
    gradient: float


def fit_kernel_loss(
    operator: KernelOperator,
    Y: Any,
    loss: str = "logistic",
    preconditioner: str | None = None,
    prefix: str = "",
    steps: int = 100,
    start: Array | LossState | None = None,
    monitor: Callable[[LossState], Any] | None = None,
    **options: Any,
) -> LossFit:
    """Minimise the loss with its regularisation, whose mu is the operator's, by Newton's method. Collective.

    The same bits on any number of ranks. Newton systems of all columns together are solved by conjugate gradients to a
    tenth of the gradient or less, the better the smaller that is; the outputs of a step are linear in its length, which
    a line search finds without products. J never increases but for the rounding of K.

    Parameters
    ----------
    operator
        K + mu I, mu above 0.
    Y
        (n, k) or (n,), what the loss takes (:mod:`ddml.kernel_machines.losses`), the same on all ranks.
    loss
        One of :data:`ddml.kernel_machines.losses.LOSSES`.
    preconditioner
        ``pivots`` (:class:`~solvers.kernel_machines.curved.CurvedPivotsPC`), ``schwarz``
        (:class:`~solvers.kernel_machines.curved.CurvedSchwarzPC`) or ``none``. By default ``pivots``, but ``schwarz``
        for losses that may be as curved as the squared one (our choice): of the others a system is as one with a larger
        lambda.
    prefix
        Of PETSc's options, and those of the preconditioner.
    steps
        At most.
    start
        First guess (n, k) of alpha, or a state to go on from; zero by default.
    monitor
        Called on all ranks after each step; True ends.
    **options
        Options under the prefix where they are not given on the command line; ``ksp_rtol``, 1e-6 by default, is for the
        norm of the gradient over that at zero.

    Raises
    ------
    InputError
        On all ranks: Y that the loss does not take, Y or ``start`` of another shape or not finite; mu of 0; options
        that there are not.
    NonFiniteError
        If a gradient is not finite.
    """
    chosen, layout = named_loss(loss), operator.layout
    targets = columns_of("Y", Y, layout.size)
    chosen.check(targets)
    if not operator.shift > 0:
        raise InputError(f"loss {loss} needs a lambda above 0: without one there may be no minimiser")
    if steps < 0:
        raise InputError(f"steps must be 0 or more, got {steps}")
    curved, columns = CurvedOperator(operator), targets.shape[1]
    context = _preconditioner(preconditioner, chosen, columns)
    point = _Point(curved, chosen, targets[layout.rows], *_begun(start, targets))
    values, gradients, iterations = [point.value], [point.size], list[int]()
    with krylov(curved, columns, context or "none", prefix, options) as ksp:
        with understood():
            ksp.setUp()
        limit = ksp.getTolerances()[0] * point.scale
        while len(iterations) < steps and not point.good(limit):
            curvature = point.curve()
            if context is not None:
                context.renew(curvature)
            value, size = point.value, point.size
            descends, count = point.newton(ksp, limit)
            if not descends:
                break  # to rounding
            iterations.append(count)
            values.append(point.value)
            gradients.append(point.size)
            if monitor is not None and monitor(point.state()):
                break
            if point.value >= value and point.size > size / 2:
                break  # no digit is gained any more
    if not point.exact:
        point.refresh()
    values[-1], gradients[-1] = point.value, point.size
    products = curved.products - operator.products
    operator.products = curved.products
    return LossFit(
        point.by_sample(point.alpha),
        len(iterations),
        np.array(iterations, dtype=np.int64),
        products // columns,
        np.array(values),
        np.array(gradients) / point.scale,
        point.size / point.scale,
        point.size <= limit,
    )


def _preconditioner(name: str | None, loss: OutputLoss, columns: int) -> CurvedPivotsPC | None:
    if name not in (None, *PRECONDITIONERS, "none"):
        words = ", ".join(PRECONDITIONERS)
        raise InputError(f"unknown preconditioner '{name}' of losses; there are {words}, none")
    if loss.coupled and name == "schwarz":
        raise InputError(f"loss {loss.name} couples columns, which subdomains cannot be preconditioned for: use pivots")
    chosen = name or ("schwarz" if loss.largest == 1 else "pivots")
    return None if chosen == "none" else PRECONDITIONERS[chosen](columns, loss.coupled)


def _begun(start: Array | LossState | None, targets: Array) -> tuple[LossState, bool]:
    """Where to begin, by sample, and whether its outputs are known."""
    state = start if isinstance(start, LossState) else None
    given = np.zeros_like(targets) if start is None else state.coefficients if state else start
    alpha = columns_of("start", given, len(targets))
    outputs = columns_of("start", state.outputs, len(targets)) if state else np.zeros_like(alpha)
    for found in (alpha, outputs):
        if found.shape != targets.shape:
            raise InputError(f"start must be {targets.shape} as Y, got {found.shape}")
    before, exact = (state.before, state.exact) if state else (math.inf, True)
    return LossState(alpha, outputs, exact, before, 0.0, 0.0), state is not None or start is None


class _Point:
    """This rank's rows of alpha, of its outputs F = K alpha and of the gradient r; J and the gradient's norm."""

    def __init__(self, curved: CurvedOperator, loss: OutputLoss, Y: Array, begun: LossState, known: bool) -> None:
        self.curved, self.loss, self.Y, self.layout = curved, loss, Y, curved.layout
        zero = norm(curved, loss.slopes(Y, np.zeros_like(Y)))
        self.scale, self.before = zero or 1.0, begun.before
        alpha = begun.coefficients[self.layout.rows]
        self._move(alpha, begun.outputs[self.layout.rows] if known else curved.exact(alpha))
        self.exact = begun.exact

    def by_sample(self, rows: Array) -> Array:
        """Rows (n, k) by sample. Collective."""
        return self.layout.everywhere(rows)[self.layout.places]

    def state(self) -> LossState:
        """All of it. Collective."""
        found = (self.by_sample(self.alpha), self.by_sample(self.F))
        return LossState(*found, self.exact, self.before, self.value, self.size / self.scale)

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

    def curve(self) -> Curvature:
        """The curvature here, which the matrix takes over."""
        self.curved.move(self.loss.curvature(self.Y, self.F))
        return self.curved.curvature

    def newton(self, ksp: PETSc.KSP, limit: float) -> tuple[bool, int]:
        """Take a step; whether there is one that decreases J, and the iterations of KSP. Collective."""
        curved, mu = self.curved, self.curved.shift
        forcing = max(min(LOOSE, math.sqrt(self.size / self.scale)), ENOUGH * limit / self.size)
        atol = forcing * mu * self.size / math.sqrt(self.loss.largest)
        ksp.setTolerances(rtol=0.0, atol=atol, divtol=math.inf)
        x, y = ksp.getOperators()[0].createVecs()
        with x as array:
            array[:] = -curved.curvature.transposed(curved.image(self.r)).ravel()
        with understood():
            ksp.solve(x, y)
        direction = -(self.r + curved.curvature.factor(self.layout.matrix(y))) / mu
        for vec in (x, y):
            vec.destroy()
        return self._search(direction, curved.image(direction)), ksp.getIterationNumber()

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
