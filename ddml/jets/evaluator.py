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
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

Index = tuple[int, ...]


def closure(indices: Iterable[Index]) -> tuple[Index, ...]:
    """The derivatives that a jet must carry so that ``indices`` can be propagated, by order."""
    needed: set[Index] = {()}
    for index in indices:
        for order in range(len(index) + 1):
            needed.update(combinations(sorted(index), order))
    return tuple(sorted(needed, key=lambda i: (len(i), i)))


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
        """Add the derivative of <adjoint, jets of the last forward> by theta to the gradient; as often as is wanted."""

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


class ByAutograd(ABC):
    """The evaluation of :class:`Evaluator` where torch differentiates ``jets``."""

    chunk = 1024

    def __repr__(self) -> str:
        return type(self).__name__

    leaf: Tensor
    gradient: Tensor | None
    output: Tensor | None = None
    last: tuple[Tensor, int]  # inputs and first stage of the last forward pass

    def bind(self, theta: Tensor, gradient: Tensor | None = None, active: Sequence[int] | None = None) -> None:
        """See :class:`Evaluator`; the gradient of all stages is computed."""
        self.leaf = theta.detach().requires_grad_(gradient is not None)
        self.gradient = gradient

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`Evaluator`."""
        self.last = inputs, first
        self.output = None  # whose graph would take its memory beside the next one
        with torch.enable_grad():
            self.output = self.jets(self.leaf, inputs, first)
        return self.output.detach()

    def backward(self, adjoint: Tensor) -> None:
        """See :class:`Evaluator`."""
        assert self.gradient is not None and self.output is not None
        self.gradient += torch.autograd.grad(self.output, self.leaf, adjoint, retain_graph=True)[0]

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
        """See :class:`Evaluator`: only the graph is left."""
        self.output = None

    @abstractmethod
    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """See :class:`Evaluator`."""
