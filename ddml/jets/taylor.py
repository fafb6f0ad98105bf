"""Jets of tanh networks in Taylor mode: the chain rule stage by stage, of any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ddml.networks.tanh import Stage, TanhNetwork

from .evaluator import ByAutograd, Index


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


class TaylorJets(ByAutograd):
    """Taylor-mode jets of a :class:`TanhNetwork` of any order; gradients by torch autograd.

    Parameters
    ----------
    network
        Only its structure is used; parameters come with every evaluation.
    offsets
        Begin and shape of each parameter in the vector theta.
    indices
        Derivatives, closed as by :func:`ddml.jets.evaluator.closure`.
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
        """See :class:`ddml.jets.evaluator.Evaluator`."""
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
