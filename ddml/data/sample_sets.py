"""What a loss over samples asks for: some of them, in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddml.errors import InputError


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
    """Samples in two tensors.

    Raises
    ------
    InputError
        If they are no tensors, or not of the same number of samples.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name, found in (("inputs", self.inputs), ("targets", self.targets)):
            if not isinstance(found, Tensor):
                raise InputError(f"{name} must be a torch tensor, got a {type(found).__name__}")
        if self.inputs.shape[:1] != self.targets.shape[:1]:
            raise InputError(
                "inputs and targets must have as many samples, in their first dimension; "
                f"got {tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, begin: int, end: int) -> TensorSamples:
        """Those from ``begin`` to ``end``, without a copy."""
        return TensorSamples(self.inputs[begin:end], self.targets[begin:end])

    def take(self, rows: Tensor) -> TensorSamples:
        """Those of these numbers."""
        return TensorSamples(self.inputs[rows], self.targets[rows])


class MappedSamples:
    """Samples whose inputs are made of those of others when they are first asked for.

    Parameters
    ----------
    samples
        The others.
    make
        From their inputs (B, ...) to these.
    """

    def __init__(self, samples: SampleSet, make: Callable[[Tensor], Tensor]) -> None:
        self.samples, self.make = samples, make

    @cached_property
    def inputs(self) -> Tensor:
        """(N, ...)."""
        return self.make(self.samples.part(0, len(self)).inputs)  # of a part: the others are not kept

    @property
    def targets(self) -> Tensor:
        """(N, ...)."""
        return self.samples.targets

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, begin: int, end: int) -> MappedSamples:
        """Those from ``begin`` to ``end``."""
        return MappedSamples(self.samples.part(begin, end), self.make)

    def take(self, rows: Tensor) -> MappedSamples:
        """Those of these numbers (int64)."""
        return MappedSamples(self.samples.take(rows), self.make)


def mapped(samples: SampleSet, make: Callable[[Tensor], Tensor] | None) -> SampleSet:
    """The samples that others were made of, or are, with inputs made like this, or as they are."""
    original = samples.samples if isinstance(samples, MappedSamples) else samples
    return original if make is None else MappedSamples(original, make)


def spread_rows(count: int, fraction: float, number: int) -> NDArray[np.int64]:
    """About this fraction of ``count`` sample numbers, at equal distances behind a beginning that ``number`` picks."""
    wanted = min(max(round(fraction * count), 1), count)
    offset = np.random.default_rng([2, number]).random()
    return np.floor((np.arange(wanted) + offset) * count / wanted).astype(np.int64)
