"""Losses on one process: torch code from a parameter vector to a number and its derivatives.

A loss knows nothing of MPI or PETSc. :class:`ddml.objectives.objective.Objective` splits it over ranks with
:meth:`Loss.part` and hands it parameter vectors as torch tensors that share PETSc's memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.numbers import Number, as_number
from ddml.parameters import Parameter

from .charges import Charges
from .work import Besides

LARGE = 1_000_000  # parameters from which memory is worth some time (our choice)


class Loss(ABC):
    """A sum over samples of a function of a parameter vector theta (n,).

    Attributes
    ----------
    parameters : tuple of Parameter
        What theta is made of.
    layers : tuple of tuples of int
        Parameter numbers of each layer, in the order in which data pass through them: the atoms
        of a decomposition.
    blocks : tuple of tuples of int
        Layer numbers of the parts that the network consists of, if it is no chain of layers: networks side by side,
        and the one behind them.
    costs : tuple of float
        Multiply-adds of a sample's product with the weights of each layer, see :mod:`ddml.losses.work`.
    besides : Besides
        What a sample takes besides, see there.
    count : int
        Number of samples.
    module : Module, or None
        The torch module whose parameters theta is made of, by their names, where the loss is of the outputs of one.
    network : Module, or None
        The torch module whose parameters stand in front in theta; there may be others behind them.
    gauss_newton : bool
        Whether there is a :meth:`gauss_newton_product`.
    hessian : bool
        Whether there is a :meth:`hessian_product`.
    divisible : bool
        Whether any process can have any of the samples; else each has its own, and all work together always.
    large_from : int
        Parameters from which memory is worth some time.
    once : tuple of float
        Multiply-adds, and multiply-adds a parameter, that samples must cost for what is done once in each evaluation
        to take a tenth of the time (measured on one core, our choice).
    """

    parameters: tuple[Parameter, ...]
    layers: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...] = ()
    costs: tuple[float, ...]
    besides = Besides()
    count: int
    module: nn.Module | None = None
    network: nn.Module | None = None
    dtype: torch.dtype
    device: torch.device
    gauss_newton: bool = False
    hessian: bool = True
    divisible: bool = True
    large_from: ClassVar[int] = LARGE
    once: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> int:
        """n, the length of theta."""
        return self.parameters[-1].range.stop

    @property
    def large(self) -> bool:
        """Whether memory is worth some time; numbers do not depend on it."""
        return self.size >= self.large_from

    @abstractmethod
    def part(self, begin: int, end: int) -> Loss:
        """The terms of samples begin to end, as they stand: the parts of a loss sum to it."""

    @abstractmethod
    def sampled(self, rows: Tensor) -> Loss:
        """The loss of a data set of these samples only (numbers, int64, on the host), normalised anew."""

    def of_module(self, module: nn.Module) -> Self:
        """The loss of another module on the same samples, each with the same weight.

        Raises
        ------
        InputError
            If this loss is of none, or the module does not make such a loss.
        """
        raise InputError(f"a {type(self).__name__} is of no torch module: there is none in its place")

    def on_samples_of(self, other: Loss) -> Self:
        """This loss on the samples of another one of its kind, with the weights that they have there.

        Raises
        ------
        InputError
            If that one is of another kind.
        """
        raise InputError(f"a {type(self).__name__} takes no samples of a {type(other).__name__}")

    @abstractmethod
    def initial(self) -> Tensor:
        """Initial parameters (n,)."""

    def drop_initial(self) -> None:
        """Free the memory of the initial parameters, if they take any: they are not asked for any more."""
        return

    @abstractmethod
    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """Scalars that sum to the loss, differentiable by theta, one per chunk of samples."""

    def prefix(self, theta: Tensor, first: int) -> Any:
        """What enters layer ``first`` for all samples; None where :meth:`keeps` says no."""
        return None

    def explain(self, theta: Tensor) -> str:
        """Where the loss is not finite, in words."""
        return "some samples give NaN or infinity"

    def keeps(self, first: int) -> bool:
        """Whether what enters layer ``first`` can be kept by :meth:`prefix`."""
        return False

    def behind(self, active: frozenset[int]) -> frozenset[int]:
        """The layers that an adjoint passes on its way to the active ones, and these."""
        return frozenset(range(min(active), len(self.layers)))

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """The loss at theta; ``kept`` from :meth:`prefix` with the same parameters before its layer.

        A float on the CPU; on another device it may stay there, see :mod:`ddml.numbers`.
        """
        return sum((as_number(term) for term in self.terms(theta, kept)), 0.0)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """The loss at theta, as :meth:`value` gives it; its gradient is added to ``gradient`` (n,).

        ``active`` limits the gradient to some layers: what is added elsewhere is undefined.
        """
        leaf = theta.detach().requires_grad_()
        value: Number = 0.0
        for term in self.terms(leaf, kept):
            if term.requires_grad:
                gradient += torch.autograd.grad(term, leaf, retain_graph=True)[0]  # terms may share a graph
            value += as_number(term)
        return value

    def hessian_product(self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None) -> None:
        """Add the Hessian at theta times ``direction`` (n,) to ``product`` (n,)."""
        leaf = theta.detach().requires_grad_()
        for term in self.terms(leaf, kept):
            if not term.requires_grad:  # nothing of theta enters it
                continue
            first = torch.autograd.grad(term, leaf, create_graph=True)[0]
            if first.requires_grad:
                product += torch.autograd.grad(first, leaf, direction, retain_graph=True)[0]

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """Add the Gauss-Newton matrix at theta times ``direction`` (n,) to ``product`` (n,).

        ``kept`` and ``active`` as for :meth:`value_gradient`; the direction is 0 outside of the active layers.

        Raises
        ------
        InputError
            If the loss has none.
        """
        raise InputError(f"a {type(self).__name__} has no Gauss-Newton matrix")

    def layer_numbers(self, ranges: Sequence[slice]) -> frozenset[int]:
        """The layers that have a parameter in one of these ranges of theta."""
        touched = [any(r.start < p.range.stop and p.range.start < r.stop for r in ranges) for p in self.parameters]
        return frozenset(i for i, layer in enumerate(self.layers) if any(touched[k] for k in layer))

    @property
    def charges(self) -> Charges:
        """What evaluations are charged."""
        return Charges(self.costs, self.besides, self.keeps)

    @property
    def enough(self) -> float:
        """Samples that it takes for an evaluation to be nearly as efficient as one of all."""
        return max((self.once[0] + self.once[1] * self.size) / self.charges.operations, 1.0)
