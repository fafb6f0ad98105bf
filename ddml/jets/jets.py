"""Derivatives of a network with respect to its inputs, and the gradient behind them.

A jet is the value of a function and some of its partial derivatives at a point. A derivative is
named by its sorted tuple of coordinates: ``()`` the value, ``(0,)`` u_x, ``(0, 0)`` u_xx,
``(0, 1)`` u_xy. Jets of N points are tensors (K, N, outputs), the K derivatives in the order of
:func:`closure`. All evaluators here have
the same methods, which is the seam where another evaluator plugs in; one evaluation is::

    evaluator.bind(theta, gradient, active)       # parameters (n,), and where their gradient goes
    for each chunk of points:
        jets = evaluator.forward(inputs, first)   # from the jets that enter stage ``first``
        evaluator.backward(adjoint)               # adds adjoint * d jets / d theta
    evaluator.finish()                            # now ``gradient`` is complete
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import combinations
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ddml.losses.modules import occurrences
from ddml.networks.tanh import Stage, TanhNetwork

Index = tuple[int, ...]


def closure(indices: Iterable[Index]) -> tuple[Index, ...]:
    """The derivatives that a jet must carry so that ``indices`` can be propagated, by order."""
    needed: set[Index] = {()}
    for index in indices:
        for order in range(len(index) + 1):
            needed.update(combinations(sorted(index), order))
    return tuple(sorted(needed, key=lambda i: (len(i), i)))


@lru_cache
def partitions(index: Index) -> Mapping[tuple[Index, ...], int]:
    """Terms of Faa di Bruno's formula for one derivative: {blocks: multiplicity}.

    ``d_index sigma(z) = sum of multiplicity * sigma^(number of blocks)(z) * prod d_block z``.
    """

    def split(items: Index) -> Iterator[list[Index]]:
        if not items:
            yield []
            return
        for size in range(len(items)):
            for rest in combinations(range(1, len(items)), size):
                left = tuple(items[i] for i in range(1, len(items)) if i not in rest)
                for blocks in split(left):
                    yield [(items[0], *(items[i] for i in rest)), *blocks]

    return Counter(tuple(sorted(blocks)) for blocks in split(index))


@lru_cache
def tanh_polynomial(order: int) -> tuple[float, ...]:
    """Coefficients, lowest first, of the polynomial in t = tanh z that is the derivative of tanh of that order."""
    p = np.polynomial.Polynomial([0.0, 1.0])
    for _ in range(order):
        p = p.deriv() * np.polynomial.Polynomial([1.0, 0.0, -1.0])
    return tuple(float(c) for c in p.coef)


def tanh_jets(z: Tensor, indices: Sequence[Index]) -> Tensor:
    """Jets (K, ...) of tanh(z) from the jets (K, ...) of z, of any order, by differentiable torch operations."""
    t = torch.tanh(z[0])
    orders = []
    for order in range(max(len(i) for i in indices) + 1):
        coefficients = tanh_polynomial(order)
        value = torch.full_like(t, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = value * t + c
        orders.append(value)
    position = {index: k for k, index in enumerate(indices)}
    result = [t]
    for index in indices[1:]:
        total: Tensor | None = None
        for blocks, multiplicity in partitions(index).items():
            term = multiplicity * orders[len(blocks)]
            for block in blocks:
                term = term * z[position[block]]
            total = term if total is None else total + term
        assert total is not None
        result.append(total)
    return torch.stack(result)


def nested_jets(function: Callable[[Tensor], Tensor], points: Tensor, indices: Sequence[Index]) -> Tensor:
    """Jets (K, N, outputs) of any torch function (N, d) -> (N, outputs), each row on its own, by nested autograd."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        value = function(points)
        columns = []
        for output in range(value.shape[1]):
            known: dict[Index, Tensor] = {(): value[:, output]}
            gradients: dict[Index, Tensor] = {}
            for index in indices[1:]:
                parent = index[:-1]
                if parent not in gradients:
                    lower = known[parent]
                    gradients[parent] = (
                        torch.autograd.grad(lower.sum(), points, create_graph=True, materialize_grads=True)[0]
                        if lower.requires_grad
                        else torch.zeros_like(points)
                    )
                known[index] = gradients[parent][:, index[-1]]
            columns.append(torch.stack([known[i] for i in indices]))
        return torch.stack(columns, dim=-1)


class Evaluator(Protocol):
    """What turns parameters into jets and adjoints of jets into gradients (see the module's text).

    Attributes
    ----------
    chunk : int
        Points that go through it at a time at best.
    """

    chunk: int

    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """Start an evaluation at theta (n,); gradients of the active stages (default all) are added to ``gradient``."""

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """Jets (K, N, outputs) from the jets (K, N, width) that enter stage ``first``; good until the next call."""

    def backward(self, adjoint: Tensor) -> None:
        """Add the derivative of <adjoint, jets of the last forward> by theta to the gradient."""

    def finish(self) -> None:
        """Complete the gradient."""

    def rows(self, adjoint: Tensor) -> Tensor:
        """The derivative (N, n) of <adjoint, jets of the last forward> by theta, point by point."""

    def tangent(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """The derivative (K, N, outputs) of the jets at the bound parameters in a direction (n,)."""

    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """The same jets by differentiable torch operations."""

    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """The jets (K, N, width) that enter stage ``first``, at the bound parameters."""


class _ByAutograd(ABC):
    """The evaluation of :class:`Evaluator` where torch differentiates ``jets``."""

    chunk = 1024

    def __repr__(self) -> str:
        return type(self).__name__

    leaf: Tensor
    gradient: Tensor | None
    last: tuple[Tensor, int]  # inputs and first stage of the last forward pass

    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """See :class:`Evaluator`; the gradient of all stages is computed."""
        self.leaf = theta.detach().requires_grad_(gradient is not None)
        self.gradient = gradient

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`Evaluator`."""
        self.last = inputs, first
        with torch.enable_grad():
            self.output = self.jets(self.leaf, inputs, first)
        return self.output.detach()

    def backward(self, adjoint: Tensor) -> None:
        """See :class:`Evaluator`."""
        assert self.gradient is not None
        self.gradient += torch.autograd.grad(self.output, self.leaf, adjoint)[0]

    def rows(self, adjoint: Tensor) -> Tensor:
        """See :class:`Evaluator`; one backward pass per point."""
        leaf = self.leaf.detach().requires_grad_()
        with torch.enable_grad():
            products = (adjoint * self.jets(leaf, *self.last)).sum((0, 2))
            return torch.stack([torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in products])

    def tangent(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """See :class:`Evaluator`, by differentiating the transposed product."""
        leaf = self.leaf.detach().requires_grad_()
        with torch.enable_grad():
            jets = self.jets(leaf, inputs)
            w = torch.zeros_like(jets, requires_grad=True)
            transposed = torch.autograd.grad(jets, leaf, w, create_graph=True)[0]
            return torch.autograd.grad(transposed, w, direction)[0]

    def finish(self) -> None:
        """See :class:`Evaluator`: nothing is left to do."""
        return

    @abstractmethod
    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`Evaluator`."""


class TaylorJets(_ByAutograd):
    """Taylor-mode jets of a :class:`TanhNetwork` of any order; gradients by torch autograd.

    Parameters
    ----------
    network
        Only its structure is used; parameters come with every evaluation.
    offsets
        Begin and shape of each parameter in the vector theta.
    indices
        Derivatives, closed as by :func:`closure`.
    """

    def __init__(
        self, network: TanhNetwork, offsets: Mapping[str, tuple[int, torch.Size]], indices: Sequence[Index]
    ) -> None:
        self.stages = network.stages
        self.offsets = offsets
        self.indices = tuple(indices)

    def view(self, theta: Tensor, name: str) -> Tensor:
        """The parameter ``name`` in theta, sharing its memory."""
        begin, shape = self.offsets[name]
        return theta[begin : begin + shape.numel()].view(shape)

    def affine(self, theta: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Weight and bias of a stage, multiplied by 10 a where it has a slope a."""
        weight, bias = self.view(theta, stage.weight), self.view(theta, stage.bias)
        if stage.slope is None:
            return weight, bias
        scale = 10 * self.view(theta, stage.slope)
        return scale * weight, scale * bias

    @torch.no_grad()
    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """See :class:`Evaluator`."""
        return self._propagate(self.leaf, inputs, self.stages[:first])

    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """Jets (K, N, outputs), differentiable by theta, from the jets that enter stage ``first``."""
        return self._propagate(theta, inputs, self.stages[first:])

    def _propagate(self, theta: Tensor, h: Tensor, stages: Sequence[Stage]) -> Tensor:
        for stage in stages:
            weight, bias = self.affine(theta, stage)
            z = h @ weight.T
            z = torch.cat((z[:1] + bias, z[1:]))
            if stage.activation:
                z = tanh_jets(z, self.indices)
            h = h + z if stage.residual else z
        return h


class NestedJets(_ByAutograd):
    """Jets of any torch module by nested reverse-mode autograd: for networks that the others do not know.

    Parameters
    ----------
    module
        Maps (N, inputs) to (N, outputs), each row on its own.
    offsets
        Begin and shape of each parameter in the vector theta.
    indices
        Derivatives, closed as by :func:`closure`.
    """

    def __init__(
        self, module: nn.Module, offsets: Mapping[str, tuple[int, torch.Size]], indices: Sequence[Index]
    ) -> None:
        self.module = module
        self.offsets = offsets
        known = {id(p): offsets[name] for name, p in module.named_parameters() if name in offsets}
        self.places = occurrences(module, known)
        self.indices = tuple(indices)

    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """The inputs themselves: nothing is known of the inside of the module."""
        return inputs

    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """Jets (K, N, outputs), differentiable by theta; ``inputs`` (K, N, d) must be plain coordinates."""
        parameters = {n: theta[b : b + s.numel()].view(s) for n, (b, s) in self.places.items()}
        function = partial(torch.func.functional_call, self.module, parameters, tie_weights=False)
        return nested_jets(lambda x: function((x,)), inputs[0], self.indices)
