"""Arrays that lie in a file, in one piece or in chunks: parts of them are read, and not the rest."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

# our choices
SPARE = 1.08  # bytes that may be read for each that is asked for, where that saves calls
PIECE = 128 << 10  # bytes that are read before they are put where they belong


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where the blocks of an array lie: one, or a grid of chunks of one shape, which may reach beyond its ends.

    Attributes
    ----------
    name : str
        Of the array, for messages.
    shape : tuple of int
        Of the array, which has an axis at least.
    dtype : numpy dtype
        As stored.
    block : tuple of int
        Shape of a block.
    places : sequence of int
        Where the blocks begin (bytes), in the order of their first entries.
    sizes : sequence of int
        Bytes that are stored of each, where filters are.
    filters : tuple of str
        Names in :data:`FILTERS`, in the order in which they were applied when the blocks were stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block: tuple[int, ...]
    places: Sequence[int]
    sizes: Sequence[int] = ()
    filters: tuple[str, ...] = ()

    def read(self, file: IO[bytes], part: Sequence[slice], into: NDArray[Any]) -> None:
        """Fill an array with a part of this one, given as a range along each axis.

        Blocks with filters are read whole, if any of their entries is asked for. Of others no more than :data:`SPARE`
        times what is asked for is read. The position of the file is not used.

        Raises
        ------
        InputError
            If the file has become shorter, or a block cannot be unpacked.
        """
        counts = [-(-n // b) for n, b in zip(self.shape, self.block, strict=True)]
        touched = [range(s.start // b, -(-s.stop // b)) for s, b in zip(part, self.block, strict=True)]
        for index in itertools.product(*touched) if into.size else ():
            first = [i * b for i, b in zip(index, self.block, strict=True)]
            here = [slice(max(s.start, f), min(s.stop, f + b)) for s, f, b in zip(part, first, self.block, strict=True)]
            inside = tuple(slice(s.start - f, s.stop - f) for s, f in zip(here, first, strict=True))
            target = into[tuple(slice(h.start - s.start, h.stop - s.start) for h, s in zip(here, part, strict=True))]
            number = int(np.ravel_multi_index(index, counts))
            if self.filters:
                target[...] = self._unpacked(file, number)[inside]
            else:
                self._copy(file, self.places[number], inside, target)

    def _copy(self, file: IO[bytes], place: int, inside: tuple[slice, ...], target: NDArray[Any]) -> None:
        """Read a part of a block that lies in the file as it is, some rows at a time."""
        rows, *rest = inside
        wide = self._widened(rest)
        sizes = [s.stop - s.start for s in wide]
        cut = (slice(None), *(slice(s.start - w.start, s.stop - w.start) for s, w in zip(rest, wide, strict=True)))
        step = max(PIECE // max(math.prod(sizes) * self.dtype.itemsize, 1), 1)
        for begin in range(rows.start, rows.stop, step):
            end = min(begin + step, rows.stop)
            piece = np.empty((end - begin, *sizes), self.dtype)
            view = piece.data.cast("B")
            length, offsets = self._runs((slice(begin, end), *wide))
            for number, offset in enumerate(offsets):
                _fill(file, view[number * length : (number + 1) * length], place + offset)
            target[begin - rows.start : end - rows.start] = piece[cut]

    def _widened(self, part: Sequence[slice]) -> list[slice]:
        """Whole axes in the place of ranges, from the last one on, as far as they have few entries more."""
        found, more = list(part), 1.0
        for axis in reversed(range(len(part))):
            whole, s = self.block[axis + 1], part[axis]
            more *= whole / (s.stop - s.start)
            if more > SPARE:
                break
            found[axis] = slice(0, whole)
        return found

    def _runs(self, part: Sequence[slice]) -> tuple[int, list[int]]:
        """The bytes of a part of a block that stand in a row, and where each such row begins in the block."""
        strides = [self.dtype.itemsize * math.prod(self.block[axis + 1 :]) for axis in range(len(self.block))]
        axis = len(part) - 1
        while axis and part[axis] == slice(0, self.block[axis]):
            axis -= 1
        offsets = np.array([part[axis].start * strides[axis]])
        for s, stride in reversed(list(zip(part[:axis], strides, strict=False))):
            offsets = np.add.outer(np.arange(s.start, s.stop) * stride, offsets).ravel()
        return (part[axis].stop - part[axis].start) * strides[axis], offsets.tolist()

    def _unpacked(self, file: IO[bytes], number: int) -> NDArray[Any]:
        """A block, whole."""
        stored = bytearray(self.sizes[number])
        _fill(file, memoryview(stored), self.places[number])
        content = bytes(stored)
        size = math.prod(self.block) * self.dtype.itemsize
        for name in reversed(self.filters):
            try:
                content = FILTERS[name](content, size, self.dtype.itemsize)
            except (zlib.error, ValueError) as error:
                raise InputError(f"{self.name} cannot be unpacked: {error}") from error
        return np.frombuffer(content, self.dtype).reshape(self.block)


def _fill(file: IO[bytes], view: memoryview, place: int) -> None:
    """Fill a buffer with the bytes of a file from a place on."""
    while view:
        count = os.preadv(file.fileno(), (view,), place)
        if not count:
            raise InputError("it became shorter while it was read")
        view, place = view[count:], place + count


def _unzipped(content: bytes, size: int, itemsize: int) -> bytes:
    stream = zlib.decompressobj()
    found = stream.decompress(content, size + 1)
    if len(found) != size or not stream.eof:
        raise ValueError(f"a part of it has other than {size} bytes")
    return found


def _unshuffled(content: bytes, size: int, itemsize: int) -> bytes:
    whole = len(content) - len(content) % itemsize  # what is left stays behind it
    return np.frombuffer(content, np.uint8, whole).reshape(itemsize, -1).T.tobytes() + content[whole:]


# what undoes each, given the bytes, and how many a block and a number have
FILTERS: Mapping[str, Callable[[bytes, int, int], bytes]] = {"gzip": _unzipped, "shuffle": _unshuffled}
