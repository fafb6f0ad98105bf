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

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.losses import OutputLoss, named_loss
from ddml.kernel_machines.operator import KernelOperator
from ddml.options import understood

from .curved import CurvedOperator, CurvedPivotsPC, CurvedSchwarzPC
from .fit import columns_of, krylov
from .point import LossPoint

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
    chosen, layout = checked(loss, operator), operator.layout
    targets = columns_of("Y", Y, layout.size)
    chosen.check(targets)
    if steps < 0:
        raise InputError(f"steps must be 0 or more, got {steps}")
    curved, columns = CurvedOperator(operator), targets.shape[1]
    context = curved_preconditioner(preconditioner, chosen, columns)
    begun, known = _begun(start, targets)
    mine, outputs = (values[layout.rows] for values in (begun.coefficients, begun.outputs))
    Y = targets[layout.rows]
    point = LossPoint(curved, chosen, Y, mine, outputs if known else None, begun.exact, begun.before)
    values, gradients, iterations = [point.value], [point.size], list[int]()

    def by_sample(rows: Array) -> Array:
        return layout.everywhere(rows)[layout.places]

    with krylov(curved, columns, context or "none", prefix, options) as ksp:
        with understood():
            ksp.setUp()
        limit = ksp.getTolerances()[0] * point.scale
        while len(iterations) < steps and not point.good(limit):
            step = point.advance(ksp, context, limit)
            if step is None:
                break  # to rounding
            iterations.append(step.iterations)
            values.append(point.value)
            gradients.append(point.size)
            if monitor is not None:
                found = by_sample(point.alpha), by_sample(point.F)
                if monitor(LossState(*found, point.exact, point.before, point.value, point.size / point.scale)):
                    break
            if not step.gained:
                break
    if not point.exact:
        point.refresh()
    values[-1], gradients[-1] = point.value, point.size
    products = curved.products - operator.products
    operator.products = curved.products
    return LossFit(
        by_sample(point.alpha),
        len(iterations),
        np.array(iterations, dtype=np.int64),
        products // columns,
        np.array(values),
        np.array(gradients) / point.scale,
        point.size / point.scale,
        point.size <= limit,
    )


def checked(loss: str, operator: KernelOperator) -> OutputLoss:
    """The loss of that name.

    Raises
    ------
    InputError
        If there is none, or mu is 0.
    """
    if not operator.shift > 0:
        raise InputError(f"loss {loss} needs a lambda above 0: without one there may be no minimiser")
    return named_loss(loss)


def preconditioner_of(name: str | None, loss: OutputLoss) -> str:
    """The preconditioner of that name, or the one by default, as of :func:`fit_kernel_loss`.

    Raises
    ------
    InputError
        If there is none of that name, or it is not for that loss.
    """
    if name not in (None, *PRECONDITIONERS, "none"):
        words = ", ".join(PRECONDITIONERS)
        raise InputError(f"unknown preconditioner '{name}' of losses; there are {words}, none")
    if loss.coupled and name == "schwarz":
        raise InputError(f"loss {loss.name} couples columns, which subdomains cannot be preconditioned for: use pivots")
    return name or ("schwarz" if loss.largest == 1 else "pivots")


def curved_preconditioner(name: str | None, loss: OutputLoss, columns: int) -> CurvedPivotsPC | None:
    """The preconditioner itself; nothing for ``none``. Errors as of :func:`preconditioner_of`."""
    chosen = preconditioner_of(name, loss)
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
