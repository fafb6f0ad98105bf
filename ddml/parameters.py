"""What a vector of parameters is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Parameter:
    """A parameter tensor and where it begins in the global vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def size(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @cached_property
    def range(self) -> slice:
        """The entries of the global vector."""
        return slice(self.offset, self.offset + self.size)


def parameter_table(named: Sequence[tuple[str, Sequence[int]]]) -> tuple[Parameter, ...]:
    """Parameters one behind the other, from names and shapes."""
    table: list[Parameter] = []
    for name, shape in named:
        table.append(Parameter(name, tuple(shape), table[-1].range.stop if table else 0))
    return tuple(table)
