"""Residuals of jets as torch differentiates them: their Jacobian, products with it, and what these cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ddml.jets.evaluator import Evaluator, Index
from ddml.losses.residual import ResidualLoss

from .points import TermPoints
from .statement import Statement


class ResidualGraph:
    """The residual at some points of a term, for torch to differentiate by the fields' jets and the coefficients.

    Parameters
    ----------
    statement
        Whose term it is.
    points
        N points, or pairs.
    fields
        Jets (K, N, G, F) of the fields there.
    position
        Of each derivative in the jets.
    coefficients
        Single numbers that require a gradient.

    Attributes
    ----------
    pieces : list of Tensor
        The residual, (N,) each.
    inputs : list of Tensor
        What it is made of: first the jets that it asks for, (N,) each, then the coefficients.
    """

    def __init__(
        self,
        statement: Statement,
        points: TermPoints,
        fields: Tensor,
        position: dict[Index, int],
        coefficients: Sequence[Tensor],
    ) -> None:
        self.points, self.fields = points, fields
        leaves: dict[tuple[int, int, int], Tensor] = {}  # by position of the derivative, side and field

        def get(index: Index, f: int, side: int) -> Tensor:
            key = position[index], side, f
            if key not in leaves:
                leaves[key] = fields[key[0], :, side, f].detach().requires_grad_()
            return leaves[key]

        self.pieces = statement.at(points, get, coefficients)
        self.places = list(leaves)
        self.inputs = [*leaves.values(), *coefficients]

    def adjoint(self, gradients: Iterable[Any]) -> Tensor:
        """The adjoint (K, N * G, F) of the network's jets, from those of the ``inputs``; None stands for zero."""
        adjoint = self.fields.new_zeros(self.fields.shape)  # contiguous, whatever the fields are
        for (k, side, f), g in zip(self.places, gradients, strict=False):
            if g is not None:
                adjoint[k, :, side, f] = g
        return self.points.adjoint(adjoint)

    def rows(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of a piece, point by point: adjoint (K, N * G, F) of the jets, and (c, N) by c coefficients."""
        count = len(self.inputs) - len(self.places)
        weights = torch.ones_like(piece, requires_grad=True)
        if not piece.requires_grad:
            piece = piece + 0 * weights
        by_coefficient = piece.new_zeros(count, len(piece))
        gradients = torch.autograd.grad(
            piece, self.inputs, weights, create_graph=count > 0, retain_graph=True, allow_unused=True
        )
        for row, g in zip(by_coefficient, gradients[len(self.places) :], strict=True):
            if g is not None and g.requires_grad:
                row += torch.autograd.grad(g, weights, retain_graph=True)[0]
        return self.adjoint(None if g is None else g.detach() for g in gradients), by_coefficient


class LinearisedResiduals(ResidualLoss):
    """Products with the Jacobian of residuals of jets, chunk by chunk of points.

    Attributes
    ----------
    statement : Statement
        The terms.
    evaluator : Evaluator
        Of the network's jets.
    position : mapping of derivatives to int
        Their places in the jets.
    chunks : list of TermPoints
        All points.
    inputs : list of Tensor
        What the network is given there, (K, N * G, width) each.
    tail : slice
        Of the coefficients in theta.
    """

    statement: Statement
    evaluator: Evaluator
    position: dict[Index, int]
    chunks: list[TermPoints]
    inputs: list[Tensor]
    tail: slice

    def graph(self, chunk: TermPoints, jets: Tensor, coefficients: Sequence[Tensor]) -> ResidualGraph:
        """The residual at a chunk's points from the network's jets (K, N * G, F) there."""
        return ResidualGraph(self.statement, chunk, chunk.fields(jets), self.position, coefficients)

    def leaves(self, theta: Tensor) -> list[Tensor]:
        """The coefficients in theta (n,), each to be differentiated by."""
        tail = self.tail
        return [c.detach().clone().requires_grad_() for c in theta[tail]] if tail.stop > tail.start else []

    def _linearised(self, theta: Tensor) -> Iterator[tuple[TermPoints, Tensor, Tensor, Tensor]]:
        """For each piece of r: chunk, network inputs, adjoint of the jets, derivatives (c, N) by the coefficients.

        The residual at a point depends on the fields at that point only; the evaluator is bound and
        has done its forward pass.
        """
        coefficients = self.leaves(theta)
        for chunk, inputs in zip(self.chunks, self.inputs, strict=True):
            graph = self.graph(chunk, self.evaluator.forward(inputs), coefficients)
            for piece in graph.pieces:
                adjoint, by_coefficient = graph.rows(piece)
                scale = chunk.scale**0.5
                yield chunk, inputs, scale * adjoint, scale * by_coefficient

    def jacobian_product(self, theta: Tensor, direction: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian_product`."""
        self.evaluator.bind(theta)
        pieces = []
        for chunk, inputs, adjoint, by_coefficient in self._linearised(theta):
            moved = (adjoint * self.evaluator.tangent(direction, inputs)).sum((0, 2))
            pieces.append(moved.view(len(chunk), -1).sum(1) + direction[self.tail] @ by_coefficient)
        return self._joined(pieces)

    def jacobian_transpose_product(self, theta: Tensor, weights: Tensor, product: Tensor) -> None:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian_transpose_product`."""
        self.evaluator.bind(theta, product)
        begin = 0
        for chunk, _, adjoint, by_coefficient in self._linearised(theta):
            w = weights[begin : begin + len(chunk)]
            begin += len(chunk)
            self.evaluator.backward(adjoint * w.repeat_interleave(chunk.inputs.shape[2])[None, :, None])
            product[self.tail] += by_coefficient @ w
        self.evaluator.finish()

    def jacobian(self, theta: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.jacobian`."""
        self.evaluator.bind(theta)
        pieces = []
        for chunk, _, adjoint, by_coefficient in self._linearised(theta):
            rows = self.evaluator.rows(adjoint)
            if chunk.inputs.shape[2] > 1:
                rows = rows.reshape(len(chunk), -1, rows.shape[1]).sum(1)
            rows[:, self.tail] = by_coefficient.T
            pieces.append(rows.T)
        if not pieces:
            return super().jacobian(theta)
        return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).T
