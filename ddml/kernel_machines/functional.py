r"""The functional that a kernel machine minimises (Tikhonov regularisation in the kernel's native space)."""

from __future__ import annotations

import numpy as np

from .cuts import Array
from .operator import KernelOperator


def regularised(operator: KernelOperator, Y: Array, alpha: Array, residual: Array) -> float:
    r""":math:`\|Y - K \alpha\|^2 + \mu \langle \alpha, K \alpha \rangle` of all columns; at least
    :math:`\mu \langle Y, A^{-1} Y \rangle`. Collective.

    Parameters
    ----------
    operator
        A = K + mu I.
    Y, alpha, residual
        This rank's rows of Y, of the coefficients, and of Y - A alpha, (n, k).
    """
    image = Y - residual - operator.shift * alpha  # K alpha
    misfit = Y - image
    inner = operator.layout.inner
    return float(np.trace(inner(misfit, misfit)) + operator.shift * np.trace(inner(alpha, image)))


def descent(operator: KernelOperator, Y: Array, alpha: Array, residual: Array) -> float:
    r""":math:`J(\alpha) = \frac12 \langle \alpha, A \alpha \rangle - \langle \alpha, Y \rangle`. Collective.

    Of all columns. It has the same minimiser as :func:`regularised`, and its gradient is minus the residual.
    Parameters as there.
    """
    return float(-np.trace(operator.layout.inner(alpha, Y + residual)) / 2)
