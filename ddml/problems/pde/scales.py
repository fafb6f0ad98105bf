"""Units of a problem: what its coordinates, fields and terms are divided by, so that a network sees numbers of order 1.

Derivatives stay those of the user's coordinates: the network is given ``(c - middle) / half`` in the place of a
coordinate c, whose derivatives are carried along by the jets, and ``factor`` is multiplied with the size of a field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddml.errors import InputError

from . import calling
from .pde import PDE

# of order 1 are coordinates whose middle is at most so far from 0, and that go between so far to both sides of it (our
# choices): networks begin with biases of zero, and their neurons bend where what they get is about 1
MIDDLE, HALF = 1.0, (0.25, 4.0)


@dataclass(frozen=True)
class Scales:
    """What a problem is scaled by; nothing that is not named here.

    Attributes
    ----------
    inputs : mapping of coordinates to (low, high)
        That the network is given as numbers from -1 to 1.
    fields : mapping of fields to float
        What the network's output is multiplied with, besides the factor of the problem.
    terms : mapping of numbers of terms to float
        What their weights are multiplied with.
    """

    inputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fields: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[int, float] = field(default_factory=dict)

    def embed(self, problem: PDE, coordinates: Tensor) -> Tensor:
        """What the network is given (N, K) at N points, from their coordinates (d, N)."""
        given = calling.embed(problem, coordinates)
        if not self.inputs:
            return given
        ends = [self.inputs.get(letter, (-1.0, 1.0)) for letter in problem.domain]
        low, high = torch.tensor(ends, dtype=given.dtype, device=given.device).T
        return (given - (low + high) / 2) / ((high - low) / 2)

    def factor(self, problem: PDE, coordinates: Tensor) -> Tensor:
        """What the network is multiplied with (N, F) at N points, from their coordinates (d, N)."""
        given = calling.factor(problem, coordinates)
        if not self.fields:
            return given
        sizes = [self.fields.get(name, 1.0) for name in problem.fields]
        return given * torch.tensor(sizes, dtype=given.dtype, device=given.device)

    def said(self, problem: PDE, labels: Sequence[str]) -> str:
        """A header's line: the range of each coordinate, and what is scaled."""
        ranges = [
            f"{letter} from {low:.6g} to {high:.6g}{' (as -1 to 1)' * (letter in self.inputs)}"
            for letter, (low, high) in problem.domain.items()
        ]
        times = [f"the network's {name} by {size:.3g}" for name, size in self.fields.items()]
        times += [f"term {labels[i]} by {size:.3g}" for i, size in self.terms.items()]
        return f"coordinates {', '.join(ranges)}{'; multiplied: ' * bool(times)}{', '.join(times)}"

    def __str__(self) -> str:
        """A text without blanks that :func:`parsed` reads, to the last bit."""
        parts: dict[str, Any] = {name: dict(part) for name, part in vars(self).items() if part}
        return json.dumps(parts, separators=(",", ":")) if parts else "none"


def parsed(text: str, problem: PDE) -> Scales:
    """The scales that a text stands for.

    Raises
    ------
    InputError
        If it stands for none of this problem.
    """
    what = f"option -scales must be none, or what another run has found; got '{text:.60}'"
    try:
        found = {} if text == "none" else json.loads(text)
        inputs = {str(k): (float(low), float(high)) for k, (low, high) in found.pop("inputs", {}).items()}
        fields = {str(k): float(v) for k, v in found.pop("fields", {}).items()}
        weights = {int(k): float(v) for k, v in found.pop("terms", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(what) from error
    known = set(inputs) <= set(problem.domain) and set(fields) <= set(problem.fields)
    sizes = [*fields.values(), *weights.values(), *(high - low for low, high in inputs.values())]
    if found or not known or not all(0 < v < torch.inf for v in sizes):
        raise InputError(f"{what}, which does not fit the problem")
    return Scales(inputs, fields, weights)


def of_order_one(low: float, high: float) -> bool:
    """Whether a coordinate from ``low`` to ``high`` can be given to a network as it is."""
    middle, half = (low + high) / 2, (high - low) / 2
    return abs(middle) <= MIDDLE and HALF[0] <= half <= HALF[1]


def mapped_inputs(problem: PDE, how: str) -> dict[str, tuple[float, float]]:
    """The coordinates that are mapped to [-1, 1]: those not of order 1 (``auto``), all (``always``), none (``never``).

    A problem with an ``embed`` of its own says itself what the network is given.

    Raises
    ------
    InputError
        If it does, and all are to be mapped.
    """
    own = type(problem).embed is not PDE.embed
    if own and how == "always":
        raise InputError(f"option -map_inputs always: {type(problem).__name__}.embed says what the network is given")
    if own or how == "never":
        return {}
    ends = {letter: (float(low), float(high)) for letter, (low, high) in problem.domain.items()}
    return {letter: e for letter, e in ends.items() if how == "always" or not of_order_one(*e)}


def power_of_ten(value: float) -> float:
    """The power of ten next to a positive value: the same wherever it is computed, up to rounding of the last bits."""
    return float(f"1e{round(torch.tensor(value, dtype=torch.float64).log10().item())}")


def spread_of(values: Sequence[float]) -> float:
    """The largest over the smallest of positive values."""
    return max(values) / min(values)
