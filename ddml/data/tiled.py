"""Samples in tiles, of which a process may have some only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddml.errors import InputError

from .sample_sets import SampleSet


class TiledSamples:
    """Samples of which there are the tiles that this process works on, and all targets.

    Parameters
    ----------
    tiles
        The same samples, as a network of each tile takes them, by the numbers of the tiles.
    targets
        (N, ...).
    numbers
        Of the samples in the set that they are of, int64 on the host (N,); by default they are that set.

    Raises
    ------
    InputError
        A tile of another number of samples.
    """

    def __init__(self, tiles: Mapping[int, SampleSet], targets: Tensor, numbers: Tensor | None = None) -> None:
        self.tiles, self.targets = dict(tiles), targets
        self.numbers = torch.arange(len(targets)) if numbers is None else numbers
        for tile, samples in self.tiles.items():
            if len(samples) != len(targets):
                raise InputError(f"tile {tile} has {len(samples)} samples, where there are {len(targets)} targets")

    @property
    def inputs(self) -> Tensor:
        """Samples in tiles have none that are whole."""
        raise InputError("samples in tiles are not put together: ask for those of a tile")

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, begin: int, end: int) -> TiledSamples:
        """Those from ``begin`` to ``end``."""
        tiles = {i: samples.part(begin, end) for i, samples in self.tiles.items()}
        return TiledSamples(tiles, self.targets[begin:end], self.numbers[begin:end])

    def take(self, rows: Tensor) -> TiledSamples:
        """Those of these numbers (int64), counted among these samples."""
        rows = rows.cpu()
        tiles = {i: samples.take(rows) for i, samples in self.tiles.items()}
        return TiledSamples(tiles, self.targets[rows.to(self.targets.device)], self.numbers[rows])
