r"""Networks side by side and one behind them: their layers, and what evaluations are charged.

As in :mod:`ddml.losses.work`, but layers are not one chain: an adjoint ends in each network at its lowest active layer,
not at the lowest of all, and does not pass networks that have none. With the other networks' outputs kept an
evaluation passes only those networks that have active layers, and what is behind them; of the products of the first
layer there it takes only the columns of these networks, if that layer is not active itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .charges import Charges, RestrictedCharges
from .work import KEPT, Besides, Passes


@dataclass(frozen=True)
class Branches:
    """Which layers are where.

    Attributes
    ----------
    nets : tuple of range
        Layers of each of the networks side by side; none of one that is frozen.
    head : range
        Those behind.
    entrance : int or None
        The first one behind, if it is linear: of a product of its inputs with a weight each network has columns.
    """

    nets: tuple[range, ...]
    head: range
    entrance: int | None

    def touched(self, layers: Collection[int]) -> tuple[int, ...]:
        """The networks that have some of these layers."""
        return tuple(i for i, net in enumerate(self.nets) if any(n in net for n in layers))

    def lowest(self, active: Collection[int]) -> frozenset[int]:
        """Where adjoints end: active layers before which there is none."""
        found = {min(n for n in active if n in self.nets[i]) for i in self.touched(active)}
        return frozenset(found or ({min(active)} if active else ()))

    def behind(self, active: Collection[int]) -> frozenset[int]:
        """The active layers, and those that data pass behind one of them."""
        lowest = self.lowest(active)
        within = {n for low in lowest for net in (*self.nets, self.head) if low in net for n in net if n >= low}
        return frozenset(within | set(self.head if self.touched(active) else ()))


class BranchedCharges(Charges):
    """Of networks side by side and one behind them.

    Parameters
    ----------
    costs, besides
        See :class:`ddml.losses.charges.Charges`.
    branches
        What is where.
    entering, hidden
        Numbers that enter the first layer behind, and that leave it.
    """

    def __init__(
        self, costs: Sequence[float], besides: Besides, branches: Branches, entering: float, hidden: float
    ) -> None:
        super().__init__(costs, besides, lambda _: False)
        self.branches, self.entering, self.hidden = branches, entering, hidden

    def passes(self, first: int = 0, active: frozenset[int] | None = None) -> Passes:
        """See :meth:`.Charges.passes`; ``first`` is 0."""
        layers = range(len(self.costs))
        return self.behind(layers, frozenset(layers) if active is None else active)

    def behind(self, passed: Collection[int], active: Collection[int], share: float = 1.0, kept: float = 0.0) -> Passes:
        """Multiply-adds of an evaluation that passes some layers, by active ones.

        ``share`` is that of its columns which the first layer behind is multiplied with, and ``kept`` what it takes to
        read what is kept.
        """
        costs = [c * share if n == self.branches.entrance else c for n, c in enumerate(self.costs)]
        pointwise, criterion = self.besides.pointwise or (0.0,) * len(costs), self.besides.criterion
        lowest, above = self.branches.lowest(active), self.branches.behind(active)
        return Passes(
            kept + sum(costs[n] + pointwise[n] for n in passed) + criterion,
            sum(costs[n] for n in above - lowest) + sum(pointwise[n] for n in above) + criterion,
            sum(costs[n] for n in active),
            sum(costs[n] for n in active if n not in lowest),
        )

    def keeping(self, layers: Collection[int]) -> tuple[frozenset[int], float, float]:
        """Layers that are passed by what has some active ones, the share of columns, and numbers that are kept."""
        nets = self.branches.touched(layers)
        passed = frozenset(n for i in nets for n in self.branches.nets[i]) | frozenset(self.branches.head)
        if len(nets) == len(self.branches.nets):
            return passed, 1.0, 0.0
        if nets and self.branches.entrance is not None and self.branches.entrance not in layers:
            return passed, len(nets) / len(self.branches.nets), self.hidden
        return passed, 1.0, self.entering

    def restricted(self, active: frozenset[int]) -> float:
        """See :meth:`.Charges.restricted`."""
        return RestrictedBranchedCharges(self, sorted(active), frozenset()).evaluation()

    def outputs(self, nets: Collection[int] | None = None) -> float:
        """Of the outputs of some of the networks (default: all)."""
        chosen = [net for i, net in enumerate(self.branches.nets) if nets is None or i in nets]
        pointwise = self.besides.pointwise or (0.0,) * len(self.costs)
        return sum(self.costs[n] + pointwise[n] for net in chosen for n in net) / self.operations

    def critical(self, gradient: bool = True) -> float:
        """Of the longest way through the whole: the network that takes longest, and what is behind all of them."""

        def units(layers: Collection[int], passed: Collection[int]) -> float:
            found = self.behind(passed, layers)
            return found.gradient if gradient else found.forward

        head = self.branches.head
        ways = [units((*net, *head), (*net, *head)) for net in self.branches.nets]
        return max(ways, default=0.0) / self.operations


class RestrictedBranchedCharges(RestrictedCharges):
    """Of a restricted loss of networks side by side, behind the kept outputs of those that have no active layers."""

    whole: BranchedCharges

    def __init__(self, whole: BranchedCharges, numbers: Sequence[int], further: frozenset[int]) -> None:
        super().__init__(whole, 0, numbers, further)
        self.passed, self.share, self.kept = whole.keeping(numbers)

    def passes(self, first: int = 0, active: frozenset[int] | None = None) -> Passes:
        """See :meth:`.Charges.passes`; ``first`` is 0."""
        return self.whole.behind(self.passed, self._active(active), self.share, KEPT * self.kept)

    def evaluation(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """See :meth:`.Charges.evaluation`."""
        found = self.passes(first, active)
        return (found.gradient if gradient else found.forward) / self.operations

    def kept_prefix(self, first: int, known: bool) -> float:
        """See :meth:`.RestrictedCharges.kept_prefix`: of what the other networks bring."""
        others = set(range(len(self.whole.branches.nets))) - set(self.whole.branches.touched(self.numbers))
        entrance = self.whole.branches.entrance
        columns = 0.0 if entrance is None else self.whole.costs[entrance] * (1 - self.share)
        return (columns + KEPT * self.kept) / self.operations + (0.0 if known else self.whole.outputs(others))
