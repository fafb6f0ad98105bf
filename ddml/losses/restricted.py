"""Losses as functions of some of their parameters, the rest frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddml.norms.modular import EXACT, TOLERANCE, ModularNorm
from ddml.parameters import parameter_table

from .loss import Loss


class Frozen:
    """Where the restrictions of a loss to the same ranges of theta, and of its parts, are frozen together.

    Attributes
    ----------
    theta : Tensor
        The parameters (n of the whole loss,).
    full : Tensor
        The same with those of the subdomain where the last evaluation was.
    gradient : Tensor
        Room for a gradient (n of the whole loss,).
    number : int
        Grows when what is kept is out of date.
    kept : WeakKeyDictionary
        What enters the subdomain, of each loss that has been evaluated since.
    """

    def __init__(self, loss: Loss) -> None:
        self.theta = torch.zeros(loss.size, dtype=loss.dtype, device=loss.device)
        self.full = torch.zeros_like(self.theta)
        self.gradient = torch.zeros_like(self.theta)
        self.number = 0
        self.kept: WeakKeyDictionary[RestrictedLoss, Any] = WeakKeyDictionary()

    def freeze(self, theta: Tensor) -> None:
        """Freeze at theta, in any precision."""
        self.theta.copy_(theta)
        self.full.copy_(self.theta)
        self.release()

    def release(self) -> None:
        """Free what is kept."""
        self.kept.clear()
        self.number += 1


class RestrictedLoss(Loss):
    """A loss as a function of some ranges of theta, the rest frozen.

    See :func:`ddml.objectives.restricted.restricted`.

    What enters the first active layer is computed once behind each :meth:`freeze`, at the first evaluation, and kept;
    backward passes stop there.

    Parameters
    ----------
    loss
        Of all of theta; it may be a restricted one itself.
    ranges
        Sorted and disjoint.
    frozen
        That of other losses which are to be frozen together with this one (default: a new one).
    """

    def __init__(self, loss: Loss, ranges: Sequence[slice], frozen: Frozen | None = None) -> None:
        self.loss = loss
        self.frozen = Frozen(loss) if frozen is None else frozen
        self.gauss_newton = loss.gauss_newton
        self.ranges = tuple(ranges)
        self.parameters = parameter_table([(f"{r.start}:{r.stop}", (r.stop - r.start,)) for r in ranges])
        self.layers = (tuple(range(len(ranges))),)
        self.costs = (1.0,)
        self.count, self.dtype, self.device = loss.count, loss.dtype, loss.device
        self.active = loss.layer_numbers(ranges)
        self.first = min(self.active)
        self.beside: Tensor | None = None
        self.also: frozenset[int] = frozenset()
        self._charged = tuple(-1 for _ in self._numbers)

    def freeze(self, theta: Tensor) -> None:
        """Freeze all parameters at theta (n of the whole loss,), here and in all losses of the same :class:`Frozen`."""
        self.frozen.freeze(theta)

    @property
    def kept(self) -> Any:
        """What enters the subdomain (:meth:`Loss.prefix`)."""
        kept = self.frozen.kept
        if self not in kept:
            kept[self] = self.loss.prefix(self.frozen.theta, self.first)
        return kept[self]

    @property
    def _numbers(self) -> tuple[int, ...]:
        inner = self.loss._numbers if isinstance(self.loss, RestrictedLoss) else ()
        return (self.frozen.number, *inner)

    @property
    def _prefix_charges(self) -> tuple[float, ...]:
        inner = self.loss._prefix_charges if isinstance(self.loss, RestrictedLoss) else ()
        return (self.prefix_charge(), *inner)

    def owed(self) -> float:
        """Work units of what the next evaluation has to compute anew before it is behind the prefix; asked for once."""
        numbers, before = self._numbers, self._charged
        self._charged = numbers
        if numbers == before:
            return 0.0
        return sum(c for c, now, then in zip(self._prefix_charges, numbers, before, strict=True) if now != then)

    def take(self, theta: Tensor, ranges: Sequence[slice] | None = None) -> Tensor:
        """The entries of a full vector that lie in ``ranges`` (default: the subdomain's), as a copy."""
        return torch.cat([theta[r] for r in (self.ranges if ranges is None else ranges)])

    def insert(self, part: Tensor, full: Tensor | None = None) -> Tensor:
        """Write the subdomain's entries (n_s,) to a full vector, default: that of the parameters."""
        full = self.frozen.full if full is None else full
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            full[r] = part[parameter.range]
        return full

    def part(self, begin: int, end: int) -> RestrictedLoss:
        """See :meth:`Loss.part`; frozen together with this loss."""
        return type(self)(self.loss.part(begin, end), self.ranges, self.frozen)

    def sampled(self, rows: Tensor) -> RestrictedLoss:
        """See :meth:`Loss.sampled`; frozen together with this loss."""
        return type(self)(self.loss.sampled(rows), self.ranges, self.frozen)

    def initial(self) -> Tensor:
        """The subdomain's parameters where the loss is frozen."""
        return self.take(self.frozen.theta)

    def joined(self, theta: Tensor) -> Tensor:
        """All parameters (n of the whole loss,), differentiable by those of the subdomain (n_s,)."""
        full, end = self.frozen.theta, 0
        pieces = []
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            pieces += [full[end : r.start], theta[parameter.range]]
            end = r.stop
        return torch.cat([*pieces, full[end:]])

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        return self.loss.terms(self.joined(theta), self.kept)

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """The loss with these parameters (n_s,) in the subdomain."""
        return self.loss.value(self.insert(theta), self.kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """The loss; its gradient by the subdomain's parameters is added to ``gradient`` (n_s,).

        ``also`` names further layers whose gradient is left in ``beside`` (n of the whole loss,).
        """
        full = self.frozen.gradient.zero_()
        value = self.loss.value_gradient(self.insert(theta), full, self.kept, self.active | self.also)
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            gradient[parameter.range] += full[r]
        self.beside = full.clone() if self.also else None
        return value

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`Loss.gauss_newton_product`: behind the kept prefix, linearised in the active layers."""
        change, image = torch.zeros_like(self.frozen.full), torch.zeros_like(self.frozen.full)
        self.loss.gauss_newton_product(
            self.insert(theta), self.insert(direction.to(change), change), image, self.kept, self.active
        )
        product += self.take(image)

    def modular_norm(
        self,
        masses: Sequence[float] | None = None,
        convolution: str = "unfolded",
        tolerance: float = TOLERANCE,
        exact: int = EXACT,
    ) -> ModularNorm:
        """The norm of a vector that is zero outside the subdomain; masses are those of the whole network."""
        return self.loss.modular_norm(masses, convolution, tolerance, exact).restricted(self.ranges)

    @property
    def enough(self) -> float:
        """See :attr:`Loss.enough`: as many as of the whole network."""
        return self.loss.enough

    @property
    def _begin(self) -> int:
        """The layer where evaluations start."""
        return self.first if self.loss.keeps(self.first) else 0

    @property
    def operations(self) -> float:
        """Those of the whole network: work units are its."""
        return self.loss.operations

    def charge(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """Work units of one evaluation behind the kept prefix."""
        return self.loss.charge(self._begin, self.active | self.also, gradient)

    def prefix_charge(self, first: int = 0) -> float:
        """Work units of :meth:`freeze`."""
        return self.loss.prefix_charge(self.first)

    def hessian_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of a Hessian product: torch differentiates by all layers from the first active one on."""
        begin = self._begin
        return self.loss.hessian_charge(begin, frozenset(range(begin, len(self.loss.layers))))

    def gauss_newton_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of a Gauss-Newton product behind the kept prefix."""
        return self.loss.gauss_newton_charge(self._begin, self.active)
