"""Logistic regression of two classes with an l2 penalty, and how well it does on samples that it never sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddml.data.rows import TwoClasses
from ddml.losses.charges import Charges
from ddml.losses.loss import Loss
from ddml.losses.work import Besides
from ddml.parameters import parameter_table

from .classification import TestSet

Array = NDArray[np.float64]

# multiply-adds, in sparse and in dense products, which take half the time: of a sample's loss, and as many of its
# derivative; of the second derivative in a product with the Hessian (measured on one core, see docs/logistic.md; our
# choice)
CRITERION, CURVATURE = (10.0, 20.0), (5.0, 8.0)


class LogisticCharges(Charges):
    """Products with the Hessian take X v and X^T w, as a gradient does, and no logarithm: the margins are kept.

    The first one at a point where there was no loss and no gradient takes X w besides, which is not charged.

    Parameters
    ----------
    costs, besides, keeps
        See :class:`ddml.losses.charges.Charges`.
    curvature
        Multiply-adds of a sample's second derivative.
    """

    def __init__(
        self, costs: Sequence[float], besides: Besides, keeps: Callable[[int], bool], curvature: float
    ) -> None:
        super().__init__(costs, besides, keeps)
        self.curvature = curvature

    def hessian(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`Charges.hessian`."""
        whole = self.passes()
        return (2 * sum(self.costs) + self.curvature) / whole.gradient

    def gauss_newton(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`Charges.gauss_newton`: the Hessian's, which it is."""
        return self.hessian(first, active)


class _Point:
    """What is kept of theta (n,): margins m = y (X w + b), e = exp(-abs(m)) and sigma(m) sigma(-m), all (B,)."""

    def __init__(self, theta: Array, margins: Array) -> None:
        self.theta, self.margins, self.powers = theta.copy(), margins, np.exp(-np.abs(margins))

    @cached_property
    def curvatures(self) -> Array:
        return self.powers / (1.0 + self.powers) ** 2


class LogisticLoss(Loss):
    r"""Mean logistic loss over samples with a penalty on the weights.

    .. math:: L(w, b) = \frac1N \sum_i \log(1 + \exp(-y_i (x_i \cdot w + b))) + \frac\lambda2 |w|^2

    with classes y = -1, +1. The intercept b, which is not penalised, is left out by default. The Gauss-Newton matrix is
    the Hessian, X^T D X / N + lambda I with D = sigma(m) sigma(-m) of the margins m.

    A part carries that share of the penalty which it has of the samples, so that the parts of a loss sum to it; a loss
    of some samples is normalised anew and has the whole penalty. Matrices are made of those samples only that a part
    has, when it is first evaluated. The margins at the last point are kept: a loss, a gradient and products with the
    Hessian at the same theta share one product X w.

    Parameters
    ----------
    samples
        Of the whole training set.
    penalty
        lambda, 0 or more.
    intercept
        Whether there is a b.
    """

    gauss_newton = True
    once = 2e5, 50.0

    def __init__(self, samples: TwoClasses, penalty: float = 0.0, intercept: bool = False) -> None:
        self.features, self.penalty, self.intercept = samples.features, penalty, intercept
        named: list[tuple[str, tuple[int, ...]]] = [("weights", (self.features,))]
        self.parameters = parameter_table([*named, ("intercept", (1,))] if intercept else named)
        self.layers = (tuple(range(len(self.parameters))),)
        self.costs = (samples.products,)
        self.besides = Besides(criterion=CRITERION[samples.dense])
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self._take(samples, None)

    def _take(self, samples: TwoClasses, weight: float | None) -> None:
        self.samples, self.count = samples, len(samples)
        self.weight = 1 / max(self.count, 1) if weight is None else weight
        self._point: _Point | None = None

    def on(self, samples: TwoClasses, weight: float | None = None) -> LogisticLoss:
        """The loss of other samples, each with that weight (default: their mean)."""
        other = copy.copy(self)
        other._take(samples, weight)
        return other

    def part(self, begin: int, end: int) -> LogisticLoss:
        """See :meth:`Loss.part`."""
        return self.on(self.samples.part(begin, end), self.weight)

    def sampled(self, rows: Tensor) -> LogisticLoss:
        """See :meth:`Loss.sampled`."""
        return self.on(self.samples.take(rows))

    def initial(self) -> Tensor:
        """Zeros (n,)."""
        return torch.zeros(self.size, dtype=torch.float64)

    @property
    def charges(self) -> LogisticCharges:
        """See :attr:`Loss.charges`."""
        return LogisticCharges(self.costs, self.besides, self.keeps, CURVATURE[self.samples.dense])

    @property
    def share(self) -> float:
        """The part of the penalty that these samples carry: as much as they have of the mean."""
        return self.weight * self.count

    def outputs(self, theta: Array) -> Array:
        """X w + b (B,) at theta (n,)."""
        found: Array = self.samples.matrix @ theta[: self.features]
        return found + theta[-1] if self.intercept else found

    def _at(self, theta: Array) -> _Point:
        known = self._point
        if known is None or not np.array_equal(known.theta, theta):
            known = self._point = _Point(theta, self.samples.signs * self.outputs(theta))
        return known

    def losses(self, theta: Array) -> Array:
        """log(1 + exp(-m)) of each sample (B,), without the penalty."""
        point = self._at(theta)
        found: Array = np.log1p(point.powers) + np.maximum(-point.margins, 0.0)
        return found

    def _value(self, theta: Array) -> float:
        w = theta[: self.features]
        penalty = self.share * self.penalty / 2 * float(w @ w) if self.penalty else 0.0
        return self.weight * float(self.losses(theta).sum()) + penalty

    def _add(self, weights: Array, penalised: Array, total: Array) -> None:
        """Add (X, 1)^T times weights (B,), and the penalty's part of the same kind of a vector (n,), to a sum (n,)."""
        total[: self.features] += self.samples.transposed @ weights
        if self.penalty:
            total[: self.features] += (self.share * self.penalty) * penalised[: self.features]
        if self.intercept:
            total[-1] += weights.sum()

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """See :meth:`Loss.value`."""
        return self._value(theta.detach().numpy())

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """See :meth:`Loss.value_gradient`."""
        at = theta.detach().numpy()
        point = self._at(at)
        slopes = np.where(point.margins >= 0, point.powers, 1.0) / (1.0 + point.powers)  # sigma(-m)
        self._add(-self.weight * self.samples.signs * slopes, at, gradient.numpy())
        return self._value(at)

    def hessian_product(self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None) -> None:
        """See :meth:`Loss.hessian_product`."""
        curvatures, v = self._at(theta.detach().numpy()).curvatures, direction.numpy()
        self._add(self.weight * curvatures * self.outputs(v), v, product.numpy())

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`Loss.gauss_newton_product`: the Hessian's."""
        self.hessian_product(theta, direction, product)

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        w = theta[: self.features]
        outputs = _Product.apply(self.samples.matrix, self.samples.transposed, w)
        outputs = outputs + theta[-1] if self.intercept else outputs
        losses = -torch.nn.functional.logsigmoid(torch.from_numpy(self.samples.signs) * outputs)
        yield self.weight * losses.sum() + self.share * self.penalty / 2 * (w @ w)


class _Product(torch.autograd.Function):
    """A v of a scipy or numpy matrix, given with its transpose, differentiable by v as often as one likes."""

    @staticmethod
    def forward(ctx: Any, matrix: Any, transposed: Any, v: Tensor) -> Tensor:
        ctx.pair = transposed, matrix
        return torch.from_numpy(np.asarray(matrix @ v.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, _Product.apply(*ctx.pair, gradients[0])


class TwoClassTest(TestSet):
    """Accuracy and loss, the mean without penalty, of a :class:`LogisticLoss` on some :class:`.TwoClasses`.

    An output of 0 stands for the first class; one that is not finite counts as wrong.
    """

    def found(self, part: LogisticLoss, theta: Tensor) -> list[float]:
        """See :meth:`.TestSet.found`."""
        at = theta.numpy()
        outputs, first = part.outputs(at), part.samples.signs < 0
        right = np.isfinite(outputs) & ((outputs <= 0) == first)
        return [float(part.losses(at).sum()) / self.count, int(right.sum())]


class LogisticModel(nn.Module):
    """A fitted model as a network of two classes, whose outputs are 0 and x.w + b.

    Parameters
    ----------
    features
        Of a sample.
    intercept
        Whether there is a b.
    """

    intercept: nn.Parameter | None

    def __init__(self, features: int, intercept: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.intercept = nn.Parameter(torch.zeros(1, dtype=torch.float64)) if intercept else None

    def forward(self, samples: Tensor) -> Tensor:
        """The outputs (B, 2) for samples (B, ...)."""
        found = samples.flatten(1) @ self.weights
        found = found if self.intercept is None else found + self.intercept
        return torch.stack([torch.zeros_like(found), found], dim=1)
