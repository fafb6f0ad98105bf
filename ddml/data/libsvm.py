"""LIBSVM (SVMlight) text files, plain or compressed (gzip, bzip2, xz), read by all ranks together.

A line is a sample, ``label index:value index:value ...  # comment``, with indices that increase. A ``qid:`` behind the
label is passed over, as are comments and empty lines. Lines may end as on Windows, and the last one not at all.

The ranks share the bytes of a file: each makes numbers of those lines that begin in its share. A compressed file is
unpacked by one rank of each node, into memory that the node shares, and is then parsed by shares as well. The rows lie
once in each node.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ddml import regular
from ddml.errors import InputError
from ddml.parallel import agreed, split

from .data_set import shared_arrays
from .rows import Entries, SparseRows, gathered
from .unpacking import opened, packer, readable

BASES = ("auto", "0", "1")
PIECE = 16 << 20  # bytes that are parsed in one go (our choice)
KIND = "data file "  # in messages
LARGEST = 2**53  # an index behind this is no whole number in double precision

Array = NDArray[Any]

_GAP, _LINE, _COLON, _DIGIT, _SIGN = 1, 2, 3, 4, 5
_KINDS = np.zeros(256, np.uint8)  # 0: no part of a number
for _characters, _kind in ((b" \t\r\v\f", _GAP), (b"\n", _LINE), (b":", _COLON), (b"0123456789", _DIGIT)):
    _KINDS[list(_characters)] = _kind
_KINDS[list(b"+-.eE")] = _SIGN
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_QUERY = re.compile(rb"(?m)^([ \t]*[^\s:#]+[ \t]+)qid:\S*")


def read(
    paths: Sequence[str],
    comm: MPI.Comm,
    base: str = "auto",
    features: int | None = None,
    node: MPI.Comm | None = None,
) -> list[SparseRows]:
    """Read files that belong together, the training file first. Collective on ``comm``.

    The arrays are those of scikit-learn's ``load_svmlight_files``, zeros that a file has included.

    Parameters
    ----------
    paths
        Of the files.
    base
        The index of the first feature: ``0``, ``1``, or ``auto``, which is 0 if an index 0 occurs in any of the files.
    features
        How many features there are (default: as many as the first file has).
    node
        Ranks that share memory (default: those that can).

    Raises
    ------
    InputError
        On all ranks: a file that is missing, empty, cut off or no such file, with its line where it is one; more
        features than there may be.
    """
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED) if node is None else node
    try:
        pieces = [_parsed(path, comm, shared, base) for path in paths]
        found = np.array([[piece.lowest, -piece.highest] for piece in pieces])
        comm.Allreduce(MPI.IN_PLACE, found, MPI.MIN)
        first = 0 if base == "0" or (base == "auto" and found[:, 0].min() == 0) else 1
        widths = [max(int(-highest) - first + 1, 0) for highest in found[:, 1]]
        wanted = features or widths[0]
        if not wanted:
            raise InputError(f"data file {paths[0]} has no features: no sample has a value")
        for path, width in zip(paths, widths, strict=True):
            if width > wanted:
                told = f"-features asks for {wanted}" if features else f"the training file {paths[0]} has {wanted}"
                raise InputError(f"{path} has {width} features, but {told}: give -features {max(widths)}")
        return [
            gathered(p, comm, shared, first, wanted, Path(path).name) for p, path in zip(pieces, paths, strict=True)
        ]
    finally:
        if node is None:
            shared.Free()


class _Text:
    """The bytes of a file; unpacked ones lie in memory of the node. Collective on ``comm`` and ``node``."""

    def __init__(self, path: str, comm: MPI.Comm, node: MPI.Comm) -> None:
        self.path, self.unpacked = path, np.empty(0, np.uint8)
        self._windows: list[MPI.Win] = []
        content = b""
        with agreed(comm):
            self.packed = packer(path, KIND) is not None
            self.size = Path(path).stat().st_size
            if self.packed and node.rank == 0:
                with opened(path, KIND) as file:
                    content = file.read()
        if self.packed:
            self.size = node.bcast(len(content))
            arrays, self._windows = shared_arrays({"text": ((self.size,), np.uint8)}, node)
            self.unpacked = arrays["text"]
            if node.rank == 0:
                self.unpacked[:] = np.frombuffer(content, np.uint8)
            for window in self._windows:
                window.Fence()

    def read(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end``."""
        if self.packed:
            return self.unpacked[begin:end].tobytes()
        with readable(self.path, KIND), regular.opened(self.path) as file:
            file.seek(begin)
            found = file.read(end - begin)
        if len(found) < min(end, self.size) - begin:
            raise InputError(f"data file {self.path} became shorter while it was read")
        return found

    def line_from(self, place: int) -> int:
        """Where the first line begins that does so at this place or behind it."""
        if place == 0:
            return 0
        for begin in range(place - 1, self.size, 1 << 16):
            found = self.read(begin, min(begin + (1 << 16), self.size)).find(b"\n")
            if found >= 0:
                return begin + found + 1
        return self.size

    def pieces(self, part: int, parts: int) -> Iterator[tuple[int, bytes]]:
        """Whole lines, with their places, of one of several shares."""
        edges = split(self.size, parts)
        place, end = self.line_from(edges[part]), self.line_from(edges[part + 1])
        while place < end:
            cut = min(self.line_from(min(place + PIECE, end)), end)
            yield place, self.read(place, cut)
            place = cut

    def free(self) -> None:
        """Give shared memory back. Collective on the node."""
        self.unpacked = np.empty(0, np.uint8)
        for window in self._windows:
            window.Free()


def _parsed(path: str, comm: MPI.Comm, node: MPI.Comm, base: str) -> Entries:
    """This rank's share of a file. Collective."""
    text = _Text(path, comm, node)
    found: list[Entries] = []
    try:
        with agreed(comm):
            for place, lines in text.pieces(comm.rank, comm.size):
                piece = parse(lines, base)
                if piece is None:
                    raise InputError(_fault(text, place, lines, base))
                found.append(piece)
    finally:
        text.free()
    joined = Entries.joined(found)
    if not comm.allreduce(len(joined.labels)):
        raise InputError(f"data file {path} is empty: there is no sample in it")
    return joined


def parse(lines: bytes, base: str = "auto") -> Entries | None:
    """Whole lines as numbers; None if anything is wrong with them."""
    if b"#" in lines:
        lines = re.sub(rb"#[^\n]*", b"", lines)
    if b"qid:" in lines:
        lines = _QUERY.sub(rb"\1", lines)
    kinds = _KINDS[np.frombuffer(lines, np.uint8)]
    apart = np.concatenate(([True], (kinds == _GAP) | (kinds == _LINE), [True]))
    begins, ends = np.flatnonzero(apart[:-1] & ~apart[1:]), np.flatnonzero(~apart[:-1] & apart[1:])
    if not len(begins):
        return Entries.joined([])
    line = np.searchsorted(np.flatnonzero(kinds == _LINE), begins)  # of each word
    first = np.concatenate(([True], line[1:] != line[:-1]))
    pairs, labels = np.flatnonzero(~first), np.flatnonzero(first)
    colons, signs = np.flatnonzero(kinds == _COLON), np.flatnonzero(kinds == _SIGN)
    # one colon in every word but the first of each line, with something on both sides of it, and digits before it
    if not kinds.all() or len(colons) != len(pairs):
        return None
    if not ((begins[pairs] < colons) & (colons < ends[pairs] - 1)).all():
        return None
    behind = np.full(len(begins), -1)
    behind[pairs] = colons
    if not (signs > behind[np.searchsorted(begins, signs, "right") - 1]).all():
        return None
    numbers = _numbers(lines)
    if numbers is None or len(numbers) != len(begins) + len(pairs):
        return None
    place = np.arange(len(begins)) + np.cumsum(~first)  # of a word's last number
    values, places = numbers[place], numbers[place[pairs] - 1]
    if not np.isfinite(values).all() or (len(places) and not places.max() < LARGEST):
        return None
    indices = places.astype(np.int64)
    together = pairs[1:] == pairs[:-1] + 1
    if not (indices[1:] > indices[:-1])[together].all() or (base == "1" and len(indices) and indices.min() < 1):
        return None
    counts = np.diff(np.append(labels, len(begins))) - 1
    return Entries(values[labels], counts, indices, values[pairs])


def _numbers(lines: bytes) -> Array | None:
    """All numbers between spaces and colons; None where there is something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of older numpy, which otherwise gives what it could read
        try:
            return np.fromstring(lines.replace(b":", b" "), sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _fault(text: _Text, place: int, lines: bytes, base: str) -> str:
    """What is wrong with lines that begin at this place of a file, in words."""
    before = 0
    for begin in range(0, place, PIECE):
        before += text.read(begin, min(begin + PIECE, place)).count(b"\n")
    for number, line in enumerate(lines.split(b"\n"), before + 1):
        said = _complaint(line, base)
        if said:
            return f"data file {text.path}, line {number}: {said}"
    raise RuntimeError(f"data file {text.path}: the lines behind byte {place} are no numbers, but nothing is wrong")


def _complaint(line: bytes, base: str) -> str:
    """What is wrong with a line; nothing if nothing is."""
    words = line.partition(b"#")[0].split()
    if len(words) > 1 and words[1].startswith(b"qid:"):
        del words[1]
    last = -1
    for position, word in enumerate(words):
        shown = repr(word[:40])[1:]
        if position == 0:
            said = _no_number(word)
            if said:
                return f"the label {shown} {said}"
            continue
        index, colon, value = word.partition(b":")
        if not colon:
            return f"{shown} is no index:value"
        if not index.isdigit() or int(index) >= LARGEST:
            return f"the index of {shown} is no whole number" + " below 2^53" * index.isdigit()
        if not value:
            return f"{shown} has no value"
        said = _no_number(value)
        if said:
            return f"the value of {shown} {said}"
        if base == "1" and int(index) == 0:
            return f"{shown} has index 0, but -index_base 1 says that indices begin with 1"
        if int(index) == last:
            return f"index {last} stands there twice"
        if int(index) < last:
            return f"index {int(index)} stands behind index {last}: they must increase"
        last = int(index)
    return ""


def _no_number(word: bytes) -> str:
    """What keeps a word from being a number; nothing if it is one."""
    if _NUMBER.fullmatch(word):
        return "" if np.isfinite(float(word)) else "is too large"
    infinite = word.lower().lstrip(b"+-") in (b"nan", b"inf", b"infinity")
    return "must be finite" if infinite else "is no number"
