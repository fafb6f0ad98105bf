r"""Losses of the outputs f(x_i) of a kernel machine, which is regularised as that of the squared loss is.

.. math:: J(\alpha) = \sum_i \ell(y_i, f_i) + \frac\mu2 \langle \alpha, K \alpha \rangle, \quad f = K \alpha

- ``squared``: :math:`\frac12 |y - f|^2`: its minimiser is the solution of :math:`(K + \mu I) \alpha = Y`, so that mu is
  that system's lambda; the others take the same one;
- ``logistic``: :math:`\log(1 + e^{-y f})` of each column, y = -1 or 1: two classes in one column, or several, each
  against the rest;
- ``softmax``: :math:`\log \sum_j e^{f_j} - \langle y, f \rangle`, y a row of zeros and a one: several classes together;
- ``squared_hinge``: :math:`\frac12 \max(0, 1 - y f)^2` of each column, y as of ``logistic``.

Everything is by sample: a rank gives its own rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from ddml.errors import InputError

from .cuts import Array


class Curvature(ABC):
    """Second derivatives by outputs: a matrix (k, k) for each sample, H = G G^T."""

    @abstractmethod
    def factor(self, V: Array) -> Array:
        """G V, of rows (n, k)."""

    @abstractmethod
    def transposed(self, V: Array) -> Array:
        """G^T V, of rows (n, k)."""

    @abstractmethod
    def entry(self, a: int, b: int) -> Array:
        """The entries (n,) of H at a and b."""


class Diagonal(Curvature):
    """Weights (n, k), 0 or more."""

    def __init__(self, weights: Array) -> None:
        self.weights, self.roots = weights, np.sqrt(weights)

    def factor(self, V: Array) -> Array:
        """See :meth:`Curvature.factor`."""
        return self.roots * V

    def transposed(self, V: Array) -> Array:
        """See :meth:`Curvature.transposed`."""
        return self.roots * V

    def entry(self, a: int, b: int) -> Array:
        """See :meth:`Curvature.entry`."""
        return self.weights[:, a] if a == b else np.zeros(len(self.weights))


class Multinomial(Curvature):
    r""":math:`H = \mathrm{diag}(p) - p p^T` of probabilities (n, k), :math:`G = (I - p 1^T) \mathrm{diag}(p)^{1/2}`."""

    def __init__(self, probabilities: Array) -> None:
        self.p, self.roots = probabilities, np.sqrt(probabilities)

    def factor(self, V: Array) -> Array:
        """See :meth:`Curvature.factor`."""
        scaled = self.roots * V
        return scaled - self.p * scaled.sum(axis=1, keepdims=True)

    def transposed(self, V: Array) -> Array:
        """See :meth:`Curvature.transposed`."""
        return self.roots * (V - (self.p * V).sum(axis=1, keepdims=True))

    def entry(self, a: int, b: int) -> Array:
        """See :meth:`Curvature.entry`."""
        return self.p[:, a] * ((a == b) - self.p[:, b])


class OutputLoss(ABC):
    """A convex function of the outputs (n, k) and what they should be, Y (n, k), added up over samples."""

    name: ClassVar[str]
    largest: ClassVar[float]
    """No eigenvalue of the curvature is above this."""
    coupled: ClassVar[bool] = False
    """Whether the curvature is more than a diagonal."""

    def check(self, Y: Array) -> None:
        """Look at Y.

        Raises
        ------
        InputError
            If it is none that this loss is of.
        """
        return

    @abstractmethod
    def values(self, Y: Array, F: Array) -> Array:
        """The loss (n,) of each sample."""

    @abstractmethod
    def slopes(self, Y: Array, F: Array) -> Array:
        """The first derivatives (n, k)."""

    @abstractmethod
    def curvature(self, Y: Array, F: Array) -> Curvature:
        """The second derivatives; where there are none, those of one side."""


class Squared(OutputLoss):
    """Half the square of the difference."""

    name, largest = "squared", 1.0

    def values(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.values`."""
        return np.asarray(np.square(F - Y).sum(axis=1) / 2)

    def slopes(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.slopes`."""
        return F - Y

    def curvature(self, Y: Array, F: Array) -> Curvature:
        """See :meth:`OutputLoss.curvature`."""
        return Diagonal(np.ones_like(F))


class _Signs(OutputLoss):
    """Of classes -1 and 1 in each column."""

    def check(self, Y: Array) -> None:
        """See :meth:`OutputLoss.check`."""
        wrong = np.abs(Y) != 1
        if wrong.any():
            sample, column = np.argwhere(wrong)[0]
            raise InputError(
                f"loss {self.name} is of classes, -1 or 1 in each column of Y; sample {sample} has "
                f"{Y[sample, column]:.15g}: for numbers use the squared loss"
            )


class Logistic(_Signs):
    """The logarithm of the probability, two classes a column."""

    name, largest = "logistic", 0.25

    def values(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.values`."""
        margins = Y * F
        return np.asarray((np.log1p(np.exp(-np.abs(margins))) + np.maximum(-margins, 0.0)).sum(axis=1))

    def slopes(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.slopes`."""
        margins = Y * F
        powers = np.exp(-np.abs(margins))
        return np.asarray(-Y * np.where(margins >= 0, powers, 1.0) / (1.0 + powers))

    def curvature(self, Y: Array, F: Array) -> Curvature:
        """See :meth:`OutputLoss.curvature`."""
        powers = np.exp(-np.abs(F))
        return Diagonal(powers / (1.0 + powers) ** 2)


class SquaredHinge(_Signs):
    """The squared loss of those samples whose margin y f is below 1."""

    name, largest = "squared_hinge", 1.0

    def values(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.values`."""
        return np.asarray(np.square(np.maximum(1 - Y * F, 0.0)).sum(axis=1) / 2)

    def slopes(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.slopes`."""
        return np.asarray(-Y * np.maximum(1 - Y * F, 0.0))

    def curvature(self, Y: Array, F: Array) -> Curvature:
        """See :meth:`OutputLoss.curvature`."""
        return Diagonal((Y * F < 1).astype(float))


class Softmax(OutputLoss):
    """The logarithm of the probability, all classes together."""

    name, largest, coupled = "softmax", 0.5, True

    def check(self, Y: Array) -> None:
        """See :meth:`OutputLoss.check`."""
        if Y.shape[1] < 2:
            raise InputError("loss softmax is of two columns of Y or more, one a class; for one column use logistic")
        wrong = ~(np.isin(Y, (0, 1)).all(axis=1) & (Y.sum(axis=1) == 1))
        if wrong.any():
            sample = int(wrong.argmax())
            raise InputError(
                f"loss softmax is of classes, in each row of Y a 1 and else 0; sample {sample} has "
                f"{np.array2string(Y[sample], threshold=4, edgeitems=2, precision=4)}: for numbers use the squared loss"
            )

    def values(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.values`."""
        below = F - F.max(axis=1, keepdims=True)
        return np.asarray(np.log(np.exp(below).sum(axis=1)) - (Y * below).sum(axis=1))

    def slopes(self, Y: Array, F: Array) -> Array:
        """See :meth:`OutputLoss.slopes`."""
        return _probabilities(F) - Y

    def curvature(self, Y: Array, F: Array) -> Curvature:
        """See :meth:`OutputLoss.curvature`."""
        return Multinomial(_probabilities(F))


def _probabilities(F: Array) -> Array:
    powers = np.exp(F - F.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


LOSSES: dict[str, OutputLoss] = {loss.name: loss for loss in (Squared(), Logistic(), Softmax(), SquaredHinge())}


def named_loss(name: str) -> OutputLoss:
    """The loss of that name.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in LOSSES:
        raise InputError(f"unknown loss '{name}'; there are {', '.join(LOSSES)}")
    return LOSSES[name]


def class_targets(loss: str, labels: Any, classes: int) -> Array:
    """What a loss takes for Y (n, k), of the classes (n,) of samples, integers from 0 to ``classes`` - 1.

    ``softmax``: zeros and a one, a column for each class; ``squared`` with more than two classes: the same, less one
    over their number; else -1 and 1, of two classes in one column.

    Raises
    ------
    InputError
        If there is no such loss, or labels are others.
    """
    named_loss(loss)
    found = np.asarray(labels)
    inside = np.issubdtype(found.dtype, np.integer) and found.ndim == 1 and len(found) and classes >= 2
    if not inside or found.min() < 0 or found.max() >= classes:
        raise InputError(
            f"the class of each sample must be an integer from 0 to {classes - 1}: an array of one dimension"
        )
    ones = (found[:, None] == np.arange(classes)).astype(float)
    if loss == "softmax":
        return ones
    if classes == 2:
        return 2 * ones[:, 1:] - 1
    return ones - 1 / classes if loss == "squared" else 2 * ones - 1


def classes_of(outputs: Array) -> Array:
    """The class (m,) that outputs (m, k) of :func:`class_targets` stand for: the largest, or the sign of one column."""
    return np.asarray((outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1))
