"""Folds: every local network is trained again without a part of the samples, which its outputs are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddml.data.parting import Rows, folds
from ddml.networks.coarse import coarse_seed
from ddml.options import Option

FOLDS = "folds"  # a value of -coarse_data, and the split of these outputs
# Our choice (docs/images.md)
OPTIONS = (
    Option("folds", 3, "With -coarse_data folds: parts of the training samples, stratified by class, without one of "
           "which each network of a tile is trained again; 2 or more.", minimum=2),
)  # fmt: skip


class Job(NamedTuple):
    """A network that is to be trained: that of a tile, on all samples or without fold 1, ..., ``folds``.

    Both have the same seed, so that they know the same of samples that neither has seen (our choice).
    """

    tile: int
    fold: int = 0
    folds: int = 0

    @property
    def file(self) -> str:
        """The name of its run file."""
        return f"{self.tile:02d}.{self.fold}of{self.folds}.h5" if self.fold else f"{self.tile:02d}.h5"

    @property
    def without(self) -> str:
        """What it is trained without, in words behind others."""
        return f" without fold {self.fold} of {self.folds}" if self.fold else ""

    def __str__(self) -> str:
        return f"tile {self.tile}{self.without}"


PATTERN = "*.*of*.h5"  # of the run files of folds


@dataclass(frozen=True)
class Folds:
    """Which training samples are left out when.

    Attributes
    ----------
    number : int
        Of folds; 0: there are none.
    left_out : ndarray of int64
        By sample the fold without which it is left, from 1 on (B,).
    """

    number: int = 0
    left_out: Rows = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def drawn(cls, number: int, labels: Rows, classes: Sequence[str], seed: int) -> Folds:
        """So many folds, from the global seed; the same on every rank.

        Raises
        ------
        InputError
            See :func:`ddml.data.parting.folds`.
        """
        return cls(number, 1 + folds(labels, number, classes, coarse_seed(seed)))

    def jobs(self, tiles: int) -> list[Job]:
        """The networks of so many tiles that are to be trained, those on all samples first."""
        own = [Job(tile) for tile in range(tiles)]
        return own + [Job(tile, fold, self.number) for fold in range(1, self.number + 1) for tile in range(tiles)]

    def joined(self, logits: Mapping[Job, NDArray[Any]], tiles: int) -> NDArray[Any]:
        """Outputs (N, B, K) of each sample, by the networks that were trained without it.

        ``logits`` has those of the jobs of all folds, (left out, K).
        """
        first = logits[Job(0, 1, self.number)]
        found = np.empty((tiles, len(self.left_out), first.shape[1]), first.dtype)
        for job, said in logits.items():
            found[job.tile, self.left_out == job.fold] = said
        return found


NONE = Folds()
