"""The mean of a criterion over samples with weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.numbers import Number, as_number

from .module import ModuleLoss


class DecayedLoss(ModuleLoss):
    r"""Mean of a criterion over samples, and a penalty on the weights.

    .. math:: L(\theta) = \frac1N \sum_i c(y(x_i), t_i) + \frac\lambda2 |W|^2

    W are the parameter tensors of two axes or more: biases are not penalised. So of a linear layer and cross entropy it
    is multinomial logistic regression, scikit-learn's with C = 1 / (lambda N). A part carries that share of the penalty
    which it has of the samples, so that the parts of a loss sum to it; a loss of some samples is normalised anew and
    has the whole penalty. The penalty is not charged: it takes what a vector operation of a solver does.

    Parameters
    ----------
    module, criterion, inputs, targets, batch
        See :class:`ddml.losses.module.ModuleLoss`.
    decay
        lambda, 0 or more.

    Raises
    ------
    InputError
        A decay that is negative or not finite, or see :class:`ddml.losses.module.ModuleLoss`.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        decay: float,
        batch: int = 4096,
    ) -> None:
        if not 0 <= decay < math.inf:
            raise InputError(f"a weight decay must be 0 or more, got {decay}")
        super().__init__(module, criterion, inputs, targets, batch)
        self.decay = decay

    @property
    def _weights(self) -> list[slice]:
        """Where in theta what is penalised is."""
        return [parameter.range for parameter in self.parameters if len(parameter.shape) > 1]

    @property
    def _factor(self) -> float:
        return self.weight * self.count * self.decay

    def _penalty(self, theta: Tensor) -> Tensor:
        squares = [theta[r].square().sum() for r in self._weights]
        return self._factor / 2 * torch.stack(squares).sum() if squares else theta.new_zeros(())

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`: the last one is the penalty."""
        yield from super().terms(theta, kept)
        yield self._penalty(theta)

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`.Loss.value`."""
        return super().value(theta, kept) + as_number(self._penalty(theta))

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`.Loss.value_gradient`."""
        value = super().value_gradient(theta, gradient, kept, active)
        with torch.no_grad():
            self._add(theta, gradient)
            return value + as_number(self._penalty(theta))

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`.Loss.gauss_newton_product`: with the penalty's Hessian."""
        super().gauss_newton_product(theta, direction, product, kept, active)
        self._add(direction, product)

    def _add(self, vector: Tensor, total: Tensor) -> None:
        """Add the penalty's Hessian times a vector (n,) to a sum (n,)."""
        for r in self._weights:
            total[r].add_(vector[r], alpha=self._factor)
