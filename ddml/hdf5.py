"""HDF5 files of others: the one place that opens them.

HDF5 crashes, hangs and takes all memory where bytes are damaged, follows links into other files, and reads values from
other files or by programs that a filter names; it has no switch against any of it (HDFGroup/hdf5, issue 6618). So no
rank calls it for reading. A process of its own (`ddml.hdf5_child`), with limits of time and memory, says what is in a
file that is open; numbers are then read from their places in it as from any other file (`ddml.blocks`), and by such a
process where they are stored in ways that only HDF5 knows. Refused are links but hard ones, objects that are there
twice, external and virtual storage, filters other than gzip, lzf, shuffle and fletcher32, references and other types
that are neither numbers nor texts, and what declares more bytes than are stored, alone or in sum.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .blocks import Blocks
from .errors import InputError
from .regular import FREE, RATIO

# Our choices: what the process may take, for any file and further for each of its bytes.
SECONDS, BYTES_A_SECOND = 2, 2 << 20
ROOM, ROOM_A_BYTE = 512 << 20, 4
WAITING = 10  # seconds for each of the processor's, on a machine that is busy
KEPT = 8  # outlines
PIECE = 1 << 20  # values that are unpacked at a time


@dataclass(frozen=True)
class Stored:
    """A dataset: numbers at a place of the file, or packed; or texts.

    Attributes
    ----------
    shape : tuple of int or None
        None: there is no value.
    dtype : numpy dtype
        As stored; object for texts.
    offset : int or None
        Where its values begin (bytes); None where there are none, or other bytes stand for them.
    packed : bool
        Whether other bytes stand for its values: compressed, in chunks, or in the head of the dataset.
    blocks : Blocks or None
        Where its values lie, as one block or in chunks; None where HDF5 has to read them.
    texts : str, list of str or None
        The texts, in a row; one where the shape is ().
    attributes : dict
        Numbers and texts, single or in lists.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype[Any]
    offset: int | None = None
    packed: bool = False
    blocks: Blocks | None = None
    texts: str | list[str] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many values it has."""
        return 0 if self.shape is None else math.prod(self.shape)

    def values(self, file: IO[bytes]) -> NDArray[Any]:
        """Its numbers, in the byte order of this machine.

        Raises
        ------
        InputError
            Where it has none in that file.
        """
        if self.shape is None or self.packed or self.texts is not None:
            raise InputError("it has no numbers of its own where numbers belong")
        found = np.empty(self.shape, self.dtype)
        if found.size:
            file.seek(self.offset or 0)
            if file.readinto(found.reshape(-1).view(np.uint8)) != found.nbytes:  # type: ignore[attr-defined]
                raise InputError("it became shorter while it was read")
        return found.astype(self.dtype.newbyteorder("="), copy=False)


@dataclass(frozen=True)
class Group:
    """A group: its members by name, in the order in which they were made where the file knows it; its attributes."""

    members: Mapping[str, Group | Stored]
    attributes: Mapping[str, Any]

    def stored(self, name: str) -> Stored:
        """A dataset of it; a KeyError where it is none, or not there."""
        found = self.members.get(name)
        if not isinstance(found, Stored):
            raise KeyError(f"dataset {name}")
        return found

    def group(self, name: str) -> Group:
        """A group in it; a KeyError where it is none, or not there."""
        found = self.members.get(name)
        if not isinstance(found, Group):
            raise KeyError(f"group {name}")
        return found


def outline(file: IO[bytes], names: Sequence[str], optional: Sequence[str] = ()) -> Group:
    """What the root of an open file has under these names, and its attributes. On one process, which starts another.

    Those that are ``optional`` may be missing.

    Raises
    ------
    InputError
        A file that is none of HDF5, is damaged, or holds what this module refuses; it does not name the file.
    """
    found = os.fstat(file.fileno())
    identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, (*names, "", *optional)
    if identity not in _outlines:
        with _asked(file, found.st_size, names=names, optional=optional) as (answer, refusal):
            content = answer.read()
            if not content:
                raise InputError(refusal())
        while len(_outlines) >= KEPT:
            del _outlines[next(iter(_outlines))]
        _outlines[identity] = json.loads(content)
    group = _found(_outlines[identity])
    assert isinstance(group, Group)
    return group


_outlines: dict[tuple[Any, ...], Any] = {}  # of files that were looked at, the oldest first


def _found(answer: dict[str, Any], name: str = "") -> Group | Stored:
    if "members" in answer:
        return Group({name: _found(child, name) for name, child in answer["members"].items()}, answer["attributes"])
    shape = None if answer["shape"] is None else tuple(answer["shape"])
    dtype = np.dtype(object if answer["type"] == "text" else answer["type"])
    kept = {name: answer[name] for name in ("offset", "packed", "texts", "attributes") if name in answer}
    blocks = None
    if shape and "chunks" in answer:
        plan = answer["chunks"]
        blocks = Blocks(name, shape, dtype, tuple(plan["shape"]), plan["places"], plan["sizes"], tuple(plan["filters"]))
    elif shape and answer.get("offset") is not None and not answer.get("packed"):
        blocks = Blocks(name, shape, dtype, shape, (answer["offset"],))
    return Stored(shape, dtype, blocks=blocks, **kept)


def fill(file: IO[bytes], name: str, stored: Stored, part: Sequence[slice], into: NDArray[Any]) -> None:
    """Fill an array with a part, a range along each axis, of a dataset of the root that has numbers.

    On one process, which starts another where the dataset has no :attr:`Stored.blocks`; then the array is contiguous.

    Raises
    ------
    InputError
        A file that has become shorter, or values that are damaged.
    """
    if stored.blocks is not None:
        stored.blocks.read(file, part, into)
        return
    ranges = [(s.start, s.stop) for s in part]
    with _asked(file, stored.count * stored.dtype.itemsize, names=(name,), part=ranges) as (answer, refusal):
        flat = into.reshape(-1)
        for begin in range(0, flat.size, PIECE):
            piece = np.empty(min(PIECE, flat.size - begin), stored.dtype)
            if answer.readinto(piece.view(np.uint8)) != piece.nbytes:  # type: ignore[attr-defined]
                raise InputError(f"{name} cannot be unpacked: {refusal()}")
            flat[begin : begin + piece.size] = piece


def command() -> list[str]:
    """What starts the process that answers, but for the question."""
    return [sys.executable, "-S", "-P", str(Path(__file__).with_name("hdf5_child.py"))]


@contextmanager
def _asked(file: IO[bytes], size: int, **question: Any) -> Iterator[tuple[IO[bytes], Callable[[], str]]]:
    """The answer about a file, and what says why there is none or no more of it. Behind the block nothing runs."""
    seconds, room = SECONDS + size // BYTES_A_SECOND, ROOM + ROOM_A_BYTE * size
    asked = {"descriptor": file.fileno(), **question, "seconds": seconds, "room": room}
    # what is found here is found there, without what a site adds at its start; no filter comes from elsewhere
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HDF5_PLUGIN_PRELOAD": "::"}
    process = subprocess.Popen(
        [*command(), json.dumps({**asked, "free": FREE, "ratio": RATIO})], env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[file.fileno()],
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    watch = threading.Timer(WAITING * seconds, process.kill)

    def refusal() -> str:
        code = process.wait()
        if code == -signal.SIGXCPU or not watch.is_alive():
            return f"HDF5 takes more than {seconds} s for it: it is damaged, or made to harm"
        if code < 0:
            return f"HDF5 crashes on it ({signal.Signals(-code).name}): it is damaged, or made to harm"
        said = process.stderr.read().decode(errors="replace") if process.stderr else ""
        return said.strip().rpartition("\n")[2] or f"HDF5 gives no answer (exit code {code})"

    with process:
        watch.start()
        try:
            yield process.stdout, refusal
        finally:
            watch.cancel()
            process.kill()
