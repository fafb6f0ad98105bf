"""What a loss's evaluations are charged, in work units, by the formula of :mod:`ddml.losses.work`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .work import STORED, Besides, Passes, passes, prefix


class Charges:
    """Work units of evaluations on all samples.

    Parameters
    ----------
    costs, besides
        Of a loss's layers, see :class:`ddml.losses.loss.Loss`.
    keeps
        Whether what enters a layer can be kept.
    """

    def __init__(self, costs: Sequence[float], besides: Besides, keeps: Callable[[int], bool]) -> None:
        self.costs, self.besides, self.keeps = costs, besides, keeps

    def passes(self, first: int = 0, active: frozenset[int] | None = None) -> Passes:
        """Multiply-adds of an evaluation for a sample: from layer ``first`` on, by ``active`` layers (default: all)."""
        layers = frozenset(range(len(self.costs))) if active is None else active
        return passes(self.costs, self.besides, first, layers)

    @property
    def operations(self) -> float:
        """Multiply-adds of a loss and gradient of the whole network for a sample."""
        return self.besides.repeats * self.passes().gradient

    def evaluation(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """Of a loss, with its gradient or without, that starts at layer ``first``."""
        found = self.passes(first, active)
        return (found.gradient if gradient else found.forward) / self.passes().gradient

    def prefix(self, first: int) -> float:
        """Of computing and keeping what enters layer ``first``; 0 where that is not kept."""
        return prefix(self.costs, self.besides, first) / self.passes().gradient if self.keeps(first) else 0.0

    def restricted(self, active: frozenset[int]) -> float:
        """Of a loss with its gradient by some layers, behind what can be kept."""
        first = min(active)
        return self.evaluation(first if self.keeps(first) else 0, active)

    def hessian(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Of a Hessian product."""
        return self.passes(first, active).hessian / self.passes().gradient

    def gauss_newton(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Of a Gauss-Newton product."""
        return self.passes(first, active).gauss_newton / self.passes().gradient


class ResidualCharges(Charges):
    """Of a loss of residuals, with products that go through torch.

    Parameters
    ----------
    costs, besides, keeps
        See :class:`Charges`.
    count, size
        Numbers of samples and of parameters.
    """

    def __init__(
        self, costs: Sequence[float], besides: Besides, keeps: Callable[[int], bool], count: int, size: int
    ) -> None:
        super().__init__(costs, besides, keeps)
        self.count, self.size = count, size

    def jacobian(self) -> float:
        """Of a product J v: a forward pass and two backward ones."""
        whole = self.passes()
        return (whole.forward + 2 * (whole.adjoint + whole.weights)) / whole.gradient

    def transpose(self) -> float:
        """Of a product J^T w."""
        return 1.0

    def rows(self, count: int) -> float:
        """Of a Jacobian with that many rows in all: a backward pass for each, and what is stored."""
        whole = self.passes()
        return (whole.forward + (whole.adjoint + whole.weights) * count / self.count) / whole.gradient + self.stored(
            count
        )

    def stored(self, count: int) -> float:
        """Of writing a Jacobian with that many rows."""
        return STORED * count * self.size / (self.count * self.operations)

    def gauss_newton(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`Charges.gauss_newton`: 2 J^T J, of the whole network."""
        return self.jacobian() + self.transpose()


class RestrictedCharges(Charges):
    """Of a restricted loss, by what the loss that is restricted is charged.

    Parameters
    ----------
    whole
        Of that loss.
    begin
        Its layer where evaluations of the restricted one start.
    numbers
        Its layers, in their order, that are those of the restricted one.
    further
        Others of its layers whose gradient is computed, too.
    """

    def __init__(self, whole: Charges, begin: int, numbers: Sequence[int], further: frozenset[int]) -> None:
        Charges.__init__(self, *cut(whole.costs, whole.besides, numbers), whole.keeps)
        self.whole, self.begin, self.numbers, self.further = whole, begin, numbers, further

    def _first(self, first: int) -> int:
        return self.numbers[first] if first else self.begin

    def _active(self, active: frozenset[int] | None) -> frozenset[int]:
        if active is None:
            return frozenset(self.numbers) | self.further
        return frozenset(self.numbers[i] for i in active)

    def passes(self, first: int = 0, active: frozenset[int] | None = None) -> Passes:
        """See :meth:`Charges.passes`."""
        return self.whole.passes(self._first(first), self._active(active))

    @property
    def operations(self) -> float:
        """Those of the whole network: work units are its."""
        return self.whole.operations

    def evaluation(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """See :meth:`Charges.evaluation`: of what is left behind the kept prefix."""
        return self.whole.evaluation(self._first(first), self._active(active), gradient)

    def prefix(self, first: int) -> float:
        """See :meth:`Charges.prefix`: what enters the first layer is the prefix of the whole, charged as such."""
        return self.whole.prefix(self.numbers[first]) if first else 0.0

    def kept_prefix(self, first: int, known: bool) -> float:
        """Of what enters layer ``first`` of the whole; of networks side by side outputs may be ``known``."""
        return self.whole.prefix(first)

    def hessian(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`Charges.hessian`: torch differentiates by all layers from the first one on."""
        begin = self._first(first)
        return self.whole.hessian(begin, frozenset(range(begin, len(self.whole.costs))))

    def gauss_newton(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`Charges.gauss_newton`; the gradients of further layers have no part in it."""
        layers = frozenset(self.numbers) if active is None else self._active(active)
        return self.whole.gauss_newton(self._first(first), layers)


class RestrictedResidualCharges(RestrictedCharges, ResidualCharges):
    """Of a restricted loss of residuals: products with its Jacobian take what those of the whole network do."""

    whole: ResidualCharges

    def __init__(self, whole: ResidualCharges, begin: int, numbers: Sequence[int], further: frozenset[int]) -> None:
        RestrictedCharges.__init__(self, whole, begin, numbers, further)
        self.count, self.size = whole.count, whole.size

    def jacobian(self) -> float:
        """See :meth:`ResidualCharges.jacobian`."""
        return self.whole.jacobian()

    def transpose(self) -> float:
        """See :meth:`ResidualCharges.transpose`."""
        return self.whole.transpose()

    def rows(self, count: int) -> float:
        """See :meth:`ResidualCharges.rows`."""
        return self.whole.rows(count)


def cut(costs: Sequence[float], besides: Besides, numbers: Sequence[int]) -> tuple[tuple[float, ...], Besides]:
    """The costs of some layers, and what a sample takes besides in them and behind the last."""
    pointwise, kept = (tuple(v[i] for i in numbers) if v else () for v in (besides.pointwise, besides.kept))
    return tuple(costs[i] for i in numbers), Besides(pointwise, kept, besides.criterion, besides.repeats)
