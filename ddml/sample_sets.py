"""What a loss over samples asks for: some of them, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class SampleSet(Protocol):
    """Samples that a loss is a sum over."""

    @property
    def inputs(self) -> Tensor:
        """(N, ...)."""

    @property
    def targets(self) -> Tensor:
        """(N, ...)."""

    def __len__(self) -> int: ...

    def part(self, begin: int, end: int) -> SampleSet:
        """Those from ``begin`` to ``end``."""

    def take(self, rows: Tensor) -> SampleSet:
        """Those of these numbers (int64)."""


@dataclass(frozen=True)
class TensorSamples:
    """Samples in two tensors."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, begin: int, end: int) -> TensorSamples:
        """Those from ``begin`` to ``end``, without a copy."""
        return TensorSamples(self.inputs[begin:end], self.targets[begin:end])

    def take(self, rows: Tensor) -> TensorSamples:
        """Those of these numbers."""
        return TensorSamples(self.inputs[rows], self.targets[rows])
