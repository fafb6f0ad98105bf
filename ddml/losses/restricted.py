"""Losses as functions of some of their parameters, the rest frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddml.numbers import Number
from ddml.parameters import Parameter, parameter_table

from .charges import RestrictedCharges, cut
from .loss import Loss
from .outputs import Outputs


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
    outputs : Outputs or None
        Of the networks of the whole loss at these parameters, if it has some side by side and they are known.
    kept : WeakKeyDictionary
        What enters the subdomain, of each loss that has been evaluated since, behind the freezes that it depends on.
    """

    def __init__(self, loss: Loss) -> None:
        self.theta = torch.zeros(loss.size, dtype=loss.dtype, device=loss.device)
        self.full = torch.zeros_like(self.theta)
        self.gradient = torch.zeros_like(self.theta)
        self.number = 0
        self.outputs: Outputs | None = None
        self.kept: WeakKeyDictionary[RestrictedLoss, tuple[tuple[int, ...], Any]] = WeakKeyDictionary()

    def freeze(self, theta: Tensor, outputs: Outputs | None = None) -> None:
        """Freeze at theta, in any precision, where the networks' outputs may be known."""
        self.theta.copy_(theta)
        self.outputs = outputs
        self.full.copy_(self.theta)
        self.release()

    def once(self, loss: RestrictedLoss, freezes: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """What is kept of a loss, made if there is none behind the freezes that it depends on."""
        made = self.kept.get(loss)
        if made is None or made[0] != freezes:
            made = self.kept[loss] = freezes, make()
        return made[1]

    def release(self) -> None:
        """Free what is kept, but for the networks' outputs."""
        self.kept.clear()
        self.number += 1


class RestrictedLoss(Loss):
    """A loss as a function of some ranges of theta, the rest frozen.

    See :func:`ddml.objectives.restricted.restricted`.

    What enters the first active layer is computed once behind each :meth:`freeze`, at the first evaluation, and kept;
    backward passes stop there. The layers are the active ones, cut to the ranges, so that a restricted loss can itself
    be decomposed by layers.

    Parameters
    ----------
    loss
        Of all of theta; it may be a restricted one itself.
    ranges
        Sorted and disjoint.
    frozen
        That of other losses which are to be frozen together with this one (default: a new one).

    Attributes
    ----------
    numbers : tuple of int
        The active layers: those of the whole loss that the layers of this one are of.
    begin : int
        The layer of the whole loss where evaluations start.
    places : tuple of slice
        Where each range is in the parameters of this loss.
    also : frozenset of int
        Further layers of the whole loss, whose gradient :meth:`value_gradient` leaves in ``beside``.
    beside : Tensor, or None
        That gradient (n of the whole loss,).
    """

    def __init__(self, loss: Loss, ranges: Sequence[slice], frozen: Frozen | None = None) -> None:
        self.loss = loss
        self.frozen = Frozen(loss) if frozen is None else frozen
        self.gauss_newton, self.hessian, self.divisible = loss.gauss_newton, loss.hessian, loss.divisible
        self.ranges = tuple(ranges)
        ends = list(accumulate((r.stop - r.start for r in ranges), initial=0))
        self.places = tuple(slice(a, b) for a, b in pairwise(ends))
        pieces = [(k, *piece) for k, p in enumerate(loss.parameters) for piece in _pieces(p, ranges)]
        self.parameters = parameter_table([(name, shape) for _, name, shape in pieces])
        held = {k: [i for i, (source, *_) in enumerate(pieces) if source == k] for k, *_ in pieces}
        self.active = frozenset(i for i, layer in enumerate(loss.layers) if any(k in held for k in layer))
        self.numbers = tuple(sorted(self.active))
        self.layers = tuple(tuple(i for k in loss.layers[n] for i in held.get(k, ())) for n in self.numbers)
        self.costs, self.besides = cut(loss.costs, loss.besides, self.numbers)
        self.count, self.dtype, self.device = loss.count, loss.dtype, loss.device
        self.first = self.numbers[0]
        self.begin = self.first if loss.keeps(self.first) else 0
        self.beside: Tensor | None = None
        self.also: frozenset[int] = frozenset()
        self._charged: tuple[int, ...] = ()

    def freeze(self, theta: Tensor, outputs: Outputs | None = None) -> None:
        """Freeze all parameters at theta (n of the whole loss,), here and in all losses of the same :class:`Frozen`."""
        self.frozen.freeze(theta, outputs)

    @property
    def kept(self) -> Any:
        """What enters the subdomain (:meth:`Loss.prefix`); None where the whole loss keeps nothing there."""
        return self.frozen.once(self, self.freezes, lambda: self.loss.prefix(self.frozen.theta, self.first))

    @property
    def freezes(self) -> tuple[int, ...]:
        """Numbers of the freezes that what enters the subdomain depends on."""
        return (self.frozen.number, *(self.loss.freezes if isinstance(self.loss, RestrictedLoss) else ()))

    def owed(self) -> float:
        """Work units of what the next evaluation has to compute anew before it is behind the prefix; asked for once."""
        behind = self  # whose prefix evaluations start from: one that keeps nothing itself begins where its loss does
        while isinstance(behind.loss, RestrictedLoss) and not behind.loss.keeps(behind.first):
            behind = behind.loss
        freezes, before = behind.freezes, self._charged
        self._charged = freezes
        return 0.0 if freezes == before else behind.charges.kept_prefix(behind.first, behind.frozen.outputs is not None)

    def keeps(self, first: int) -> bool:
        """See :meth:`Loss.keeps`: what enters the first layer is kept by this loss itself."""
        return first > 0 and self.loss.keeps(self.numbers[first])

    def prefix(self, theta: Tensor, first: int) -> Any:
        """See :meth:`Loss.prefix`; computed from the inputs on."""
        return self.loss.prefix(self.insert(theta), self.numbers[first]) if self.keeps(first) else None

    def take(self, theta: Tensor, ranges: Sequence[slice] | None = None) -> Tensor:
        """The entries of a full vector that lie in ``ranges`` (default: the subdomain's), as a copy."""
        return torch.cat([theta[r] for r in (self.ranges if ranges is None else ranges)])

    def insert(self, part: Tensor, full: Tensor | None = None) -> Tensor:
        """Write the subdomain's entries (n_s,) to a full vector, default: that of the parameters."""
        full = self.frozen.full if full is None else full
        for place, r in zip(self.places, self.ranges, strict=True):
            full[r].copy_(part[place])
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
        for place, r in zip(self.places, self.ranges, strict=True):
            pieces += [full[end : r.start], theta[place]]
            end = r.stop
        return torch.cat([*pieces, full[end:]])

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        return self.loss.terms(self.joined(theta), self.kept if kept is None else kept)

    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """The loss with these parameters (n_s,) in the subdomain."""
        return self.loss.value(self.insert(theta), self.kept if kept is None else kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """The loss; its gradient by the subdomain's parameters is added to ``gradient`` (n_s,).

        Without ``active`` layers, which limit it to some of the subdomain's, the gradient of those in ``also`` is
        computed, too.
        """
        full, further = self.frozen.gradient.zero_(), self.also if active is None else frozenset()
        kept = self.kept if kept is None else kept
        value = self.loss.value_gradient(self.insert(theta), full, kept, self._whole(active) | further)
        for place, r in zip(self.places, self.ranges, strict=True):
            gradient[place].add_(full[r])
        if active is None:
            self.beside = full.clone() if further else None
        return value

    def _whole(self, active: frozenset[int] | None) -> frozenset[int]:
        """The numbers that some of the layers (default: all) have in the whole loss."""
        return self.active if active is None else frozenset(self.numbers[i] for i in active)

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`Loss.gauss_newton_product`: behind the kept prefix, linearised in the active layers."""
        change, image = torch.zeros_like(self.frozen.full), torch.zeros_like(self.frozen.full)
        self.loss.gauss_newton_product(
            self.insert(theta), self.insert(direction.to(change), change), image,
            self.kept if kept is None else kept, self._whole(active),
        )  # fmt: skip
        product += self.take(image)

    @property
    def enough(self) -> float:
        """See :attr:`Loss.enough`: as many as of the whole network."""
        return self.loss.enough

    @property
    def charges(self) -> RestrictedCharges:
        """See :attr:`Loss.charges`: those of the whole loss behind the kept prefix, in its work units."""
        return RestrictedCharges(self.loss.charges, self.begin, self.numbers, self.also)


def _pieces(parameter: Parameter, ranges: Sequence[slice]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of what each range has of a parameter, cut ones flat."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for r in ranges:
        begin, end = max(r.start, parameter.offset), min(r.stop, parameter.range.stop)
        if begin < end and end - begin == parameter.size:
            found.append((parameter.name, parameter.shape))
        elif begin < end:
            found.append((f"{parameter.name}[{begin - parameter.offset}:{end - parameter.offset}]", (end - begin,)))
    return found
