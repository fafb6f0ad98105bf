"""Where tiles of the samples of a data set come from: a file, of which nothing else is read, or memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ddml.errors import InputError
from ddml.hdf5 import Stored, fill

from .data_set import Array, DataSet, check_rows, described
from .unpacking import readable


class Source(ABC):
    """A data set of which each rank takes the tiles that it works on; :func:`ddml.data.files.source` makes it.

    Attributes
    ----------
    shape : tuple of int
        Of a sample: an image (C, H, W) or a volume (C, D, H, W).
    labels, test_labels, held_labels : ndarray of int64, shapes (N,), (N_test,) and (N_held,)
        Of all samples; ``held_labels`` is None where none are held out.
    classes, origin, maximum
        As those of :class:`ddml.data.data_set.DataSet`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        labels: Mapping[str, Array],
        classes: tuple[str, ...],
        origin: str,
        maximum: float,
    ) -> None:
        self.shape, self.classes, self.origin, self.maximum = shape, classes, origin, maximum
        self._labels = dict(labels)
        self.labels, self.test_labels = labels["labels"], labels["test_labels"]
        self.held_labels = labels.get("held_labels")

    def __repr__(self) -> str:
        return described(self.origin, self._labels, self.shape, len(self.classes))

    @property
    def count(self) -> int:
        """N, the number of training samples."""
        return len(self.labels)

    def tile(self, ranges: Sequence[slice]) -> DataSet:
        """The pixels in these ranges, along the axes (H, W) or (D, H, W), of all samples, in memory of this process.

        Not collective. The labels are the arrays of this source.

        Raises
        ------
        InputError
            Ranges that do not fit; a file that has become shorter or is damaged; numbers in the tile that are not
            finite. What is outside of the tile is not looked at.
        """
        sides = self.shape[1:]
        if len(ranges) != len(sides) or not all(0 <= r.start < r.stop <= n for r, n in zip(ranges, sides, strict=True)):
            raise InputError(f"a tile of {_written(ranges)} is none of samples {self.shape}")
        arrays: dict[str, Any] = dict(self._labels)
        for labels, column in self._labels.items():
            name = labels.replace("labels", "inputs")
            arrays[name] = self._inputs(name, len(column), ranges)
            try:
                check_rows(name, arrays[name], 0, len(column), len(self.classes))
            except InputError as error:
                raise InputError(f"{self.origin or 'data'}, tile {_written(ranges)}: {error}") from error
        return DataSet(**arrays, classes=self.classes, origin=self.origin, maximum=self.maximum)

    @abstractmethod
    def _inputs(self, name: str, count: int, ranges: Sequence[slice]) -> Array:
        """A tile (count, C, ...) of the first samples of the array of this name."""

    @abstractmethod
    def free(self) -> None:
        """Give back what the samples are read from; tiles stay. Collective."""


class MemorySource(Source):
    """A data set that is in memory."""

    def __init__(self, dataset: DataSet) -> None:
        labels = {name: array.copy() for name, array in dataset.arrays().items() if name.endswith("labels")}
        super().__init__(dataset.shape, labels, dataset.classes, dataset.origin, dataset.maximum)
        self._dataset = dataset

    def _inputs(self, name: str, count: int, ranges: Sequence[slice]) -> Array:
        return np.array(self._dataset.arrays()[name][(slice(None), slice(None), *ranges)], order="C")

    def free(self) -> None:
        """Free the data set. Collective."""
        self._dataset.free()


@dataclass(frozen=True)
class Description:
    """What a data file says of itself.

    Attributes
    ----------
    stored : dict of str to Stored
        Its arrays.
    shapes : dict of str to tuple
        Shape and type of each, as it is to be read.
    classes, origin, maximum
        As those of a data set.
    """

    stored: dict[str, Stored]
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    classes: tuple[str, ...]
    origin: str
    maximum: float


class FileSource(Source):
    """A data file, which stays open.

    Parameters
    ----------
    path, file
        Of the file.
    about
        What it says of itself.
    labels
        Of its samples, as they are to be read.
    """

    def __init__(self, path: str, file: IO[bytes], about: Description, labels: Mapping[str, Array]) -> None:
        super().__init__(about.shapes["inputs"][0][1:], labels, about.classes, about.origin, about.maximum)
        self._path, self._file, self._stored = path, file, about.stored

    def _inputs(self, name: str, count: int, ranges: Sequence[slice]) -> Array:
        stored = self._stored[name]
        part = (slice(0, count), slice(0, self.shape[0]), *ranges)
        found = np.empty([s.stop - s.start for s in part], stored.dtype.newbyteorder("="))
        with readable(self._path, "data file "):
            fill(self._file, name, stored, part, found)
        return found

    def free(self) -> None:
        """Close the file."""
        self._file.close()


def _written(ranges: Sequence[slice]) -> str:
    return " x ".join(f"{r.start}:{r.stop}" for r in ranges)
