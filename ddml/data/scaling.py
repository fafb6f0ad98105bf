"""Rows of a data set as numbers that a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from .data_set import DataSet

SCALINGS = ("unit", "standard", "none")
_ROWS = 4096  # that are summed in one go, the same on any number of ranks
_CACHED = 1 << 17  # numbers that are scaled in one go


class Scaling:
    """How stored values become inputs: (value - shift) / scale, channel by channel.

    ``unit``: divided by the data set's maximum, so that images lie in [0, 1]. ``standard``: with mean 0 and
    standard deviation 1 in each channel (axis 1 of the inputs) over the training samples; a channel that is constant
    is only centred. ``none``: the values as they are. The test samples are treated as the training samples.

    Collective on ``comm``: the statistics are rank 0's, so that all ranks, however many, have the same.

    Attributes
    ----------
    shift, scale : ndarray, shape (C,), or float
    """

    def __init__(self, dataset: DataSet, kind: str, comm: MPI.Comm) -> None:
        self.kind = kind
        self.shift: NDArray[np.float64] | float = 0.0
        self.scale: NDArray[np.float64] | float = dataset.maximum if kind == "unit" else 1.0
        if kind == "standard":
            self.shift, self.scale = comm.bcast(_moments(dataset.inputs) if comm.rank == 0 else None)

    def apply(self, values: Tensor) -> Tensor:
        """Scale floating-point values (B, C, ...) in place."""
        return self._fill(values, values)

    def scaled(self, stored: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Stored values (B, C, ...) scaled, as new ones in this precision."""
        return self._fill(torch.empty(stored.shape, dtype=dtype, device=device), stored)

    def _fill(self, values: Tensor, stored: Tensor) -> Tensor:
        """Write stored values, scaled, to others (B, C, ...); on the CPU in pieces that stay in a cache."""
        shape = (1, -1, *[1] * (values.ndim - 2))
        shift, scale = (torch.as_tensor(number).to(values).view(shape) for number in (self.shift, self.scale))
        each = max(_CACHED // max(values[:1].numel(), 1), 1) if values.device.type == "cpu" else max(len(values), 1)
        for piece, given in zip(values.split(each), stored.split(each), strict=True):
            if values is not stored:
                piece.copy_(given)
            if self.kind == "standard":
                piece.sub_(shift)
            if self.kind != "none":
                piece.div_(scale)
        return values


def _moments(inputs: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (C,) of each channel of (N, C, ...), 1 where it is constant."""
    rest = tuple(i for i in range(inputs.ndim) if i != 1)
    count = inputs.size // inputs.shape[1]
    pieces = range(0, len(inputs), _ROWS)
    mean = sum(inputs[i : i + _ROWS].sum(axis=rest, dtype=np.float64) for i in pieces) / count
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    squares = sum(((inputs[i : i + _ROWS] - mean.reshape(shape)) ** 2).sum(axis=rest) for i in pieces)
    deviation = np.sqrt(squares / count)
    return mean, np.where(deviation > 0, deviation, 1.0)


class Samples:
    """Some samples; they are scaled and converted when :attr:`inputs` or :attr:`targets` is first asked for.

    Parameters
    ----------
    inputs, labels
        Stored values (N, ...) and classes (N,) of a whole set.
    scaling
        Of the values.
    dtype, device
        Of the inputs.
    rows
        Numbers of the samples, by default all.
    """

    def __init__(
        self,
        inputs: NDArray[Any],
        labels: NDArray[np.int64],
        scaling: Scaling,
        dtype: torch.dtype,
        device: torch.device,
        rows: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        self._inputs, self._labels, self.scaling = inputs, labels, scaling
        self.dtype, self.device = dtype, device
        self.rows = range(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def _of(self, rows: Any) -> Samples:
        return Samples(self._inputs, self._labels, self.scaling, self.dtype, self.device, rows)

    def part(self, begin: int, end: int) -> Samples:
        """Those from ``begin`` to ``end``."""
        return self._of(self.rows[begin:end])

    def take(self, rows: Tensor) -> Samples:
        """Those of these numbers (int64), counted among these samples."""
        mine = self.rows
        mine = np.arange(mine.start, mine.stop) if isinstance(mine, range) else np.asarray(mine, dtype=np.int64)
        return self._of(mine[rows.cpu().numpy()])

    @property
    def _index(self) -> Any:
        rows = self.rows
        return slice(rows.start, rows.stop) if isinstance(rows, range) else rows

    @cached_property
    def inputs(self) -> Tensor:
        """The scaled inputs (B, ...)."""
        stored = torch.from_numpy(self._inputs[self._index])
        return self.scaling.scaled(stored, self.dtype, self.device)

    @cached_property
    def targets(self) -> Tensor:
        """The classes (B,), int64."""
        return torch.from_numpy(self._labels[self._index]).to(self.device)
