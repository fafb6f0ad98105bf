"""The points of one term of a problem, and what the network and its jets meet there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.jets.evaluator import Index
from ddml.jets.nested import nested_jets

from . import calling
from .pde import PDE
from .scales import Scales


@dataclass(frozen=True)
class TermPoints:
    """Some points of one term and what does not change at them."""

    term: int
    scale: float  # of the squared residual
    inputs: Tensor  # (K, N, G, embedded) jets of what the network is given
    coordinates: Tensor  # (d, N)
    data: dict[str, Tensor]  # (N,) each
    lift: Tensor | None  # (K, N, G, F)
    mix: Tensor | None  # (K, K, N, G, F): jets of factor * network from jets of the network
    share: float = 1.0  # of the weight of the term that these points have each

    def __len__(self) -> int:
        return self.inputs.shape[1]

    def rows(self, index: slice | Tensor) -> TermPoints:
        """Some of these points, as contiguous arrays."""
        return replace(
            self,
            inputs=self.inputs[:, index].contiguous(),
            coordinates=self.coordinates[:, index].contiguous(),
            data={name: values[index].contiguous() for name, values in self.data.items()},
            lift=None if self.lift is None else self.lift[:, index].contiguous(),
            mix=None if self.mix is None else self.mix[:, :, index].contiguous(),
        )

    def chunks(self, size: int) -> list[TermPoints]:
        """These points in pieces of nearly equal length of at most ``size`` network evaluations."""
        pieces = max(-(-len(self) * self.inputs.shape[2] // size), 1)
        edges = [len(self) * i // pieces for i in range(pieces + 1)]
        return [self.rows(slice(a, b)) for a, b in pairwise(edges) if b > a]

    def check_finite(self, problem: PDE) -> None:
        """Refuse an embedding, a lift or a factor that is not finite at one of these points.

        Raises
        ------
        InputError
            With the name of the function and the point.
        """
        parts = {
            "embed": self.inputs[0],
            "lift": None if self.lift is None else self.lift[0],
            "factor": None if self.mix is None else self.mix[0, 0],
        }
        for name, values in parts.items():
            if values is None:
                continue
            finite = torch.isfinite(values.flatten(1)).all(1)
            if not finite.all():
                where = self.place(problem, int(finite.int().argmin()))
                raise InputError(f"{type(problem).__name__}.{name} is not finite at {where}")

    def place(self, problem: PDE, row: int) -> str:
        """One of these points in words."""
        return ", ".join(f"{c} = {float(v[row]):.6g}" for c, v in zip(problem.domain, self.coordinates, strict=True))

    @property
    def periodic(self) -> bool:
        """Whether these are pairs of points, G = 2."""
        return self.inputs.shape[2] == 2

    def fields(self, jets: Tensor) -> Tensor:
        """Jets (K, N, G, F) of the fields, lift + factor * network, from those of the network (K, N * G, F)."""
        jets = jets.view(*self.inputs.shape[:3], -1)
        if self.mix is not None:
            jets = (self.mix * jets).sum(1)
        return jets if self.lift is None else jets + self.lift

    def adjoint(self, fields: Tensor) -> Tensor:
        """The adjoint (K, N * G, F) of the network's jets from that of the fields' (K, N, G, F)."""
        if self.mix is not None:
            fields = (self.mix * fields.unsqueeze(1)).sum(0)
        return fields.flatten(1, 2)


def term_points(
    problem: PDE,
    indices: Sequence[Index],
    term: int,
    scale: float,
    x: Tensor,
    data: dict[str, Tensor],
    scales: Scales | None = None,
) -> TermPoints:
    """The points x (N, G, d) of a term, with the jets of the problem's embedding, lift and factor there, scaled."""
    count, sides, dimension = x.shape
    points = x.reshape(-1, dimension)

    scales = scales or Scales()

    def jets(function: Callable[[PDE, Tensor], Tensor]) -> Tensor:
        found = nested_jets(lambda p: function(problem, p.T), points, indices)
        return found.detach().reshape(len(indices), count, sides, -1)

    plain = type(problem).factor is PDE.factor and not scales.fields
    lift = None if type(problem).lift is PDE.lift else jets(calling.lift)
    mix = None if plain else _leibniz(indices, jets(scales.factor))
    return TermPoints(term, scale, jets(scales.embed), x[:, 0].T.contiguous(), data, lift, mix)


def _leibniz(indices: Sequence[Index], factor: Tensor) -> Tensor:
    """The product rule: d_i (l N) = sum over parts j of i of d_(i without j) l d_j N."""
    position = {index: k for k, index in enumerate(indices)}
    mix = factor.new_zeros((len(indices), *factor.shape))
    for k, index in enumerate(indices):
        places = range(len(index))
        for order in range(len(index) + 1):
            for chosen in combinations(places, order):
                inner = tuple(index[i] for i in chosen)
                outer = tuple(index[i] for i in places if i not in chosen)
                mix[k, position[inner]] += factor[position[outer]]
    return mix


def product_rule(indices: Sequence[Index], fields: int) -> list[tuple[int, int, int]]:
    """Entries (k, j, f) of the product rule that are not zero everywhere: index j is a part of index k."""
    return [
        (k, j, f)
        for k, index in enumerate(indices)
        for j, inner in enumerate(indices)
        if not Counter(inner) - Counter(index)
        for f in range(fields)
    ]
