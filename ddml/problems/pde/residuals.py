"""The residuals of a PDE problem and a network, and which points they are of."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.jets.build import build_evaluator
from ddml.jets.evaluator import Index, closure
from ddml.losses.loss import Loss
from ddml.losses.modules import trained
from ddml.parameters import parameter_table

from . import calling
from .layers import network_layers
from .linearisation import LinearisedResiduals
from .pde import PDE, Array
from .points import TermPoints, product_rule
from .scales import Scales
from .spikes import Tier, whole
from .statement import Positions, Statement

# network evaluations at a time on another device than the CPU, which wants one pass over all points as long as it has
# the memory, about 4 GB for a network 50x6 in float64 (not measured, our choice)
CHUNK = 1 << 17


Places = list[tuple[Tensor, Tensor, Tensor]]
"""What networks are given at points, the lift and the factor there: of some at a time."""


class PDEResiduals(LinearisedResiduals):
    """A loss of residuals that torch evaluates; see :class:`ddml.problems.pde.loss.PDELoss` for the parameters.

    Attributes
    ----------
    problem, network, dtype, device, chunk
        As given.
    problem_terms : list of Term
        What the loss is the sum of.
    coefficients : tuple of str
        Names of the problem's trainable numbers.
    indices : tuple of derivatives
        That are propagated through the network.
    derivatives : list of tuples of int and derivative
        Fields and their derivatives that residuals ask for.
    sets : list of TermPoints
        The points of each term.
    notes : list of str
        What the user should know of the problem, a sentence each: may not be meant, or is not as hoped.
    """

    network: nn.Module

    def __init__(
        self,
        problem: PDE,
        network: nn.Module,
        points: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        chunk: int = 0,
        compiled: bool = True,
        scales: Scales | None = None,
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.statement = Statement(problem, dtype, self.device, scales)
        if points < 1:
            raise InputError(f"the number of points must be 1 or more, got {points}")
        self.problem, self.network = problem, network.to(dtype=dtype, device=device)
        self.problem_terms, self.coefficients = self.statement.terms, self.statement.coefficients
        self.notes = self.statement.notes
        self._name()
        sets = [problem.points(term, points) for term in self.problem_terms]
        asked = set[tuple[int, Index]]().union(*(self.statement.derivatives(i, *s) for i, s in enumerate(sets)))
        self.derivatives = sorted(asked)
        self.indices = closure(index for _, index in asked)
        self.position = Positions(self.indices, list(problem.domain))
        self.rule = product_rule(self.indices, len(problem.fields))
        self.given_chunk, self.compiled = chunk, compiled
        made = [
            self.statement.points(self.indices, i, term.weight / len(x), x, data)
            for i, (term, (x, data)) in enumerate(zip(self.problem_terms, sets, strict=True))
        ]
        for points_of_term in made:
            points_of_term.check_finite(problem)
        if made:
            calling.check_network(self.network, made[0].inputs[0, :3, 0], len(problem.fields))
        self._evaluate()
        self._take(made)

    def _name(self) -> None:
        """Make the table of parameters from those of the network and of the problem."""
        chosen = trained(self.network)
        self.trained = [p for _, p in chosen]
        named = [(name, p.shape) for name, p in chosen]
        table = parameter_table([*named, *((f"coefficients.{name}", ()) for name in self.coefficients)])
        self.parameters = table
        self.offsets = {p.name: (p.offset, torch.Size(p.shape)) for p in table[: len(named)]}
        self.tail = slice(table[len(named)].offset if self.coefficients else table[-1].range.stop, table[-1].range.stop)

    def _evaluate(self) -> None:
        """Make what evaluates the network, and say what its layers are and cost."""
        self.layers, self.layer_stages, self.costs, self.besides = network_layers(
            self.network, self.offsets, self.parameters, len(self.indices), len(self.problem.fields)
        )
        self.evaluator = build_evaluator(self.network, self.offsets, self.indices, self.compiled)
        self.plain = build_evaluator(self.network, self.offsets, ((),), self.compiled)
        self.chunk = self.given_chunk or (self.evaluator.chunk if self.device.type == "cpu" else CHUNK)

    def of_module(self, module: nn.Module) -> Self:
        """See :meth:`ddml.losses.loss.Loss.of_module`: with coefficients of its own."""
        other = copy.copy(self)
        other.network = module.to(dtype=self.dtype, device=self.device)
        other._name()
        calling.check_network(other.network, self.sets[0].inputs[0, :3, 0], len(self.problem.fields))
        other._evaluate()
        other._take(self.sets)
        return other

    def on_samples_of(self, other: Loss) -> Self:
        """See :meth:`ddml.losses.loss.Loss.on_samples_of`."""
        if not isinstance(other, PDEResiduals) or other.problem is not self.problem:
            raise InputError(f"a {type(self).__name__} takes points of a loss of the same problem only")
        return self.with_sets(other.sets)

    def _take(self, sets: list[TermPoints]) -> None:
        self.sets = sets
        self.count = sum(len(s) for s in sets)
        self.chunks = [c for s in sets for c in s.chunks(self.chunk)]
        self.inputs = [c.inputs.flatten(1, 2) for c in self.chunks]

    def with_sets(self, sets: list[TermPoints]) -> Self:
        """The same loss on other points of some terms; the evaluator serves both, its buffers one after the other."""
        other = copy.copy(self)
        other._take(sets)
        return other

    def part(self, begin: int, end: int) -> Self:
        """See :meth:`ddml.losses.loss.Loss.part`."""
        sets, start = [], 0
        for s in self.sets:
            a, b = max(begin - start, 0), min(end - start, len(s))
            if b > a:
                sets.append(s.rows(slice(a, b)))
            start += len(s)
        return self.with_sets(sets)

    def sampled(self, rows: Tensor) -> Self:
        """See :meth:`ddml.losses.loss.Loss.sampled`; each term is the mean over its own chosen points."""
        chosen, start, counts = [], 0, Counter[int]()
        for s in self.sets:
            own = rows[(rows >= start) & (rows < start + len(s))] - start
            chosen.append(own)
            counts[s.term] += len(own)
            start += len(s)
        return self.with_sets([
            replace(s.rows(own), scale=self.problem_terms[s.term].weight * s.share / counts[s.term])
            for s, own in zip(self.sets, chosen, strict=True) if len(own)
        ])  # fmt: skip

    def with_points(self, points: Mapping[int, Array], tiers: Mapping[int, Sequence[Tier]] | None = None) -> Self:
        """The same loss with other points (N, d), and what they weigh, for some of its terms by their numbers."""
        sets = [s for s in self.sets if s.term not in points]
        for term, x in points.items():
            scale, begin = self.problem_terms[term].weight / len(x), 0
            made = self.statement.points(self.indices, term, scale, x[:, None], {})
            for number, weight in (tiers or {}).get(term) or whole(len(x)):
                rows = made.rows(slice(begin, begin + number))
                sets.append(replace(rows, scale=scale * weight, share=weight))
                begin += number
        return self.with_sets(sorted(sets, key=lambda s: s.term))

    def initial(self) -> Tensor:
        """The network's parameters and the coefficients' initial values."""
        return torch.cat([*(p.detach().reshape(-1) for p in self.trained), self.statement.initial()])

    def keeps(self, first: int) -> bool:
        """See :meth:`ddml.losses.loss.Loss.keeps`."""
        return bool(self.layer_stages) and self.layer_stages[first][0] > 0

    def prefix(self, theta: Tensor, first: int) -> Any:
        """The stage where a layer begins, and the jets that enter it, per chunk; None where nothing is known of it."""
        if not self.keeps(first):
            return None
        stage = self.layer_stages[first][0]
        self.evaluator.bind(theta)
        return stage, [self.evaluator.prefix(inputs, stage) for inputs in self.inputs]

    def residual_count(self) -> int:
        """m, the length of r."""
        return sum(len(r) for r in self.residuals(self.initial()))

    def residuals(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`ddml.losses.residual.ResidualLoss.residuals`."""
        coefficients = list(theta[self.tail].clone())
        first, entering = kept or (0, self.inputs)
        for chunk, inputs in zip(self.chunks, entering, strict=True):
            for r in self.chunk_residual(chunk, self.evaluator.jets(theta, inputs, first), coefficients):
                yield chunk.scale**0.5 * r

    def chunk_residual(self, chunk: TermPoints, jets: Tensor, coefficients: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of the residual at a chunk's points, not weighted, from the network's jets (K, N * G, F) there."""
        fields = chunk.fields(jets)

        def get(index: Index, f: int, side: int) -> Tensor:
            return fields[self.position[index], :, side, f]

        return self.statement.at(chunk, get, coefficients)

    def pieces(self, theta: Tensor) -> Iterator[list[Tensor]]:
        """The residual's pieces chunk by chunk, not weighted and not differentiable."""
        self.evaluator.bind(theta)
        for chunk, inputs in zip(self.chunks, self.inputs, strict=True):
            yield self.chunk_residual(chunk, self.evaluator.forward(inputs), list(theta[self.tail].clone()))

    @torch.no_grad()
    def residual(self, theta: Tensor) -> Tensor:
        """See :meth:`ddml.losses.residual.ResidualLoss.residual`."""
        weighted = zip(self.chunks, self.pieces(theta), strict=True)
        return self._joined([chunk.scale**0.5 * r for chunk, pieces in weighted for r in pieces])

    @torch.no_grad()
    def explain(self, theta: Tensor) -> str:
        """See :meth:`ddml.losses.loss.Loss.explain`: the first term and point."""
        for chunk, pieces in zip(self.chunks, self.pieces(theta), strict=True):
            for r in pieces:
                bad = torch.nonzero(~torch.isfinite(r))
                if len(bad):
                    row, label = int(bad[0, 0]), self.problem_terms[chunk.term].label
                    return f"term {label} gives {float(r[row])} at {chunk.place(self.problem, row)}"
        return super().explain(theta)

    @torch.no_grad()
    def fields(self, theta: Tensor, points: Array | Places) -> Array:
        """The fields (N, F) at points (N, d), or at such as are :func:`placed`."""
        self.plain.bind(theta)
        places = points if isinstance(points, list) else placed(self, points)
        found = [lift + self.plain.forward(inputs[None])[0] * factor for inputs, lift, factor in places]
        return np.asarray(torch.cat(found).to(torch.float64).cpu().numpy())


def placed(loss: PDEResiduals, points: Array) -> Places:
    """Points (N, d) for the loss's ``fields``, to be given to it more than once."""
    x = torch.as_tensor(np.asarray(points), dtype=loss.dtype, device=loss.device)
    problem, scales = loss.problem, loss.statement.scales
    pieces = (piece.T for piece in x.split(4 * loss.chunk))
    return [(scales.embed(problem, p), calling.lift(problem, p), scales.factor(problem, p)) for p in pieces]
