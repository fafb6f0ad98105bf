"""Losses of the samples of a set, which can be others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from ddml.data.sample_sets import SampleSet, mapped
from ddml.errors import InputError

from .loss import Loss


class SampledLoss(Loss):
    """A sum over the samples of a set, each with the same weight.

    Attributes
    ----------
    samples : SampleSet
    weight : float
        Of each sample.
    coarse_inputs : callable or None
        What it makes of the inputs of a finer network's samples, see :mod:`ddml.networks.depth`.
    """

    samples: SampleSet
    weight: float
    coarse_inputs: Callable[[Tensor], Tensor] | None = None

    @property
    def inputs(self) -> Tensor:
        """The inputs (N, ...)."""
        return self.samples.inputs

    @property
    def targets(self) -> Tensor:
        """The targets (N, ...)."""
        return self.samples.targets

    def on(self, samples: SampleSet, weight: float | None = None) -> Self:
        """The loss of other samples, each with that weight (default: their mean)."""
        other = copy.copy(self)
        other.samples, other.count = samples, len(samples)
        other.weight = 1 / max(len(samples), 1) if weight is None else weight
        return other

    def on_samples_of(self, other: Loss) -> Self:
        """See :meth:`.Loss.on_samples_of`."""
        if not isinstance(other, SampledLoss):
            raise InputError(f"a {type(self).__name__} takes no samples of a {type(other).__name__}")
        return self.on(mapped(other.samples, self.coarse_inputs), other.weight)

    def part(self, begin: int, end: int) -> Self:
        """See :meth:`.Loss.part`."""
        return self.on(self.samples.part(begin, end), self.weight)

    def sampled(self, rows: torch.Tensor) -> Self:
        """See :meth:`.Loss.sampled`."""
        return self.on(self.samples.take(rows))
