"""Data files are written: whole, checked, and so that tiles of their samples can be read cheaply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ddml.errors import InputError

from .data_set import PARTS, Array, check_rows, check_shapes, maximum_of
from .replacing import replacing

FORMAT = "ddml data"

# Our choices. A page of a disk is read in any case, so smaller samples are stored one behind the other.
PAGE = 4096
SHARES = 4  # chunks along each axis of an image or volume
CHUNK = 256 << 10  # bytes of a chunk, or more where there would be more chunks than MOST: HDF5 is slow at finding them
MOST = 512
CACHE = 32 << 20  # bytes of chunks that are not yet whole
LARGEST = 1 << 30  # bytes of a chunk; HDF5 has up to 4 GB


@dataclass(frozen=True)
class Stream:
    """Samples that are to be written, in pieces, so that they need not fit into memory.

    Attributes
    ----------
    count : int
        How many there are.
    shape : tuple of int
        Of one sample.
    dtype : numpy dtype
        uint8, float32 or float64.
    pieces : callable
        Gives the samples in order as pairs of inputs (B, ...) and labels (B,).
    """

    count: int
    shape: tuple[int, ...]
    dtype: Any
    pieces: Callable[[], Iterator[tuple[Array, Array]]]

    @classmethod
    def of(cls, inputs: Array, labels: Array) -> Stream:
        """What is in memory already."""
        if len(inputs) != len(labels):
            raise InputError(f"there are {len(inputs)} samples, but {len(labels)} labels")
        return cls(len(inputs), inputs.shape[1:], inputs.dtype, lambda: iter([(inputs, labels)]))


def chunk(count: int, shape: Sequence[int], itemsize: int) -> tuple[int, ...] | None:
    """Shape of the chunks in which so many samples are stored: all channels of a part of the image; or None, in a row.

    Images (C, H, W) and volumes (C, D, H, W) of a page or more are cut in four along each axis.
    """
    if len(shape) not in (3, 4) or math.prod(shape) * itemsize < PAGE:
        return None
    sides = [-(-n // SHARES) for n in shape[1:]]
    across = math.prod(-(-n // side) for n, side in zip(shape[1:], sides, strict=True))
    size = shape[0] * math.prod(sides) * itemsize
    rows = max(min(max(CHUNK // size, -(-count * across // MOST)), LARGEST // size, count), 1)
    rows = -(-count // -(-count // rows))  # as even as can be: the last chunk is stored whole
    return rows, shape[0], *sides


def write(
    path: str | Path,
    train: Stream,
    test: Stream,
    classes: Sequence[str],
    origin: str,
    maximum: float | None = None,
    held: Stream | None = None,
) -> None:
    """Write a data file, from one process; a file that is there is replaced when the new one is whole.

    Raises
    ------
    InputError
        Samples that make no data set, labels out of range, values that are not finite, or a file that cannot be
        written; what was there before is unchanged.
    """
    streams = {part: stream for part, stream in zip(PARTS, (train, test, held), strict=True) if stream is not None}
    check_shapes(
        {f"{part}inputs": ((s.count, *s.shape), np.dtype(s.dtype)) for part, s in streams.items()}
        | {f"{part}labels": ((s.count,), np.dtype(np.int64)) for part, s in streams.items()}
    )
    maximum = maximum_of(maximum, train.dtype)
    try:
        # since HDF5 1.10 all but numbers and texts of variable length has check sums
        with replacing(path) as disk, h5py.File(disk, "w", libver="v110", rdcc_nbytes=CACHE) as file:
            file.attrs.update(format=_text(FORMAT), origin=_text(origin), maximum=maximum)
            file.attrs["classes"] = _text(classes)
            for part, source in streams.items():
                shape, dtype = (source.count, *source.shape), np.dtype(source.dtype)
                chunks = chunk(source.count, source.shape, dtype.itemsize)
                inputs = file.create_dataset(f"{part}inputs", shape, dtype, chunks=chunks)
                labels = file.create_dataset(f"{part}labels", (source.count,), np.int64)
                end = 0
                for x, y in source.pieces():
                    begin, end = end, end + len(x)
                    check_rows(f"{part}inputs", x, 0, len(x), len(classes), begin)
                    check_rows(f"{part}labels", np.asarray(y, np.int64), 0, len(y), len(classes), begin)
                    inputs[begin:end], labels[begin:end] = x, y
                    disk.check()
                if end != source.count:
                    raise InputError(f"{source.count} samples were announced, {end} came")
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # HDF5 has all of them
        said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"cannot write {path}: {said}") from error


def _text(given: str | Sequence[str]) -> Array:
    """One or more texts of a fixed length; bytes that are no UTF-8, as in names of files, are shown as such."""
    texts = [given] if isinstance(given, str) else given
    found = [t.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode() for t in texts]
    array = np.array(found, h5py.string_dtype("utf-8", max(1, *map(len, found))))
    return array.reshape(()) if isinstance(given, str) else array
