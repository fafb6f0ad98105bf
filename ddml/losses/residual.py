"""Losses that are sums of squares of residuals: what Gauss-Newton methods need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .branched import BranchedLoss, RestrictedBranchedLoss
from .charges import ResidualCharges, RestrictedResidualCharges
from .loss import Loss
from .restricted import Frozen, RestrictedLoss


class ResidualLoss(Loss):
    """A loss |r(theta)|^2 with r in R^m; weights are part of r."""

    gauss_newton = True

    @abstractmethod
    def residuals(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """Pieces of r, one-dimensional and differentiable by theta, one per chunk of samples."""

    @abstractmethod
    def residual_count(self) -> int:
        """m, the length of r."""

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`ddml.losses.loss.Loss.terms`."""
        return ((r * r).sum() for r in self.residuals(theta, kept))

    @torch.no_grad()
    def residual(self, theta: Tensor) -> Tensor:
        """R (m,)."""
        return self._joined([r.detach() for r in self.residuals(theta)])

    def jacobian_product(self, theta: Tensor, direction: Tensor) -> Tensor:
        """J v (m,) for a direction v (n,), by differentiating J^T w by w."""
        leaf = theta.detach().requires_grad_()
        pieces = []
        for r in self.residuals(leaf):
            w = torch.zeros_like(r, requires_grad=True)
            transposed = torch.autograd.grad(r, leaf, w, create_graph=True)[0]
            pieces.append(torch.autograd.grad(transposed, w, direction)[0])
        return self._joined(pieces)

    def jacobian_transpose_product(self, theta: Tensor, weights: Tensor, product: Tensor) -> None:
        """Add J^T w for w (m,) to ``product`` (n,)."""
        leaf = theta.detach().requires_grad_()
        begin = 0
        for r in self.residuals(leaf):
            product += torch.autograd.grad(r, leaf, weights[begin : begin + len(r)], retain_graph=True)[0]
            begin += len(r)

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`ddml.losses.loss.Loss.gauss_newton_product`: 2 J^T J times the direction, of the whole network."""
        self.jacobian_transpose_product(theta, 2 * self.jacobian_product(theta, direction), product)

    def jacobian(self, theta: Tensor) -> Tensor:
        """The Jacobian (m, n) of r."""
        leaf = theta.detach().requires_grad_()
        rows = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for r in self.residuals(leaf) for x in r]
        return torch.stack(rows) if rows else theta.new_zeros(0, self.size)

    @property
    def charges(self) -> ResidualCharges:
        """See :attr:`ddml.losses.loss.Loss.charges`."""
        return ResidualCharges(self.costs, self.besides, self.keeps, self.count, self.size)

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=self.dtype, device=self.device)


class RestrictedResidualLoss(RestrictedLoss, ResidualLoss):
    """A restricted loss of residuals: they are all there, as functions of the subdomain's parameters."""

    loss: ResidualLoss

    @property
    def charges(self) -> RestrictedResidualCharges:
        """See :attr:`ddml.losses.loss.Loss.charges`."""
        return RestrictedResidualCharges(self.loss.charges, self.begin, self.numbers, self.also)

    def residuals(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`ResidualLoss.residuals`."""
        return self.loss.residuals(self.joined(theta), self.kept if kept is None else kept)

    def residual_count(self) -> int:
        """See :meth:`ResidualLoss.residual_count`."""
        return self.loss.residual_count()

    def residual(self, theta: Tensor) -> Tensor:
        """See :meth:`ResidualLoss.residual`; takes as long as that of the whole network."""
        return self.loss.residual(self.insert(theta))

    def jacobian_product(self, theta: Tensor, direction: Tensor) -> Tensor:
        """See :meth:`ResidualLoss.jacobian_product`; takes as long as that of the whole network."""
        change = torch.zeros_like(self.frozen.full)
        return self.loss.jacobian_product(self.insert(theta), self.insert(direction.to(change), change))

    def jacobian_transpose_product(self, theta: Tensor, weights: Tensor, product: Tensor) -> None:
        """See :meth:`ResidualLoss.jacobian_transpose_product`; takes as long as that of the whole network."""
        image = torch.zeros_like(self.frozen.full)
        self.loss.jacobian_transpose_product(self.insert(theta), weights, image)
        product += self.take(image)

    def jacobian(self, theta: Tensor) -> Tensor:
        """See :meth:`ResidualLoss.jacobian`."""
        rows = self.loss.jacobian(self.insert(theta))
        return torch.cat([rows[:, r] for r in self.ranges], dim=1)


def restricted_loss(loss: Loss, ranges: Sequence[slice], frozen: Frozen | None = None) -> RestrictedLoss:
    """A restricted loss, with residuals or networks side by side if the loss has them."""
    if isinstance(loss, BranchedLoss):
        return RestrictedBranchedLoss(loss, ranges, frozen)
    kind = RestrictedResidualLoss if isinstance(loss, ResidualLoss) else RestrictedLoss
    return kind(loss, ranges, frozen)
