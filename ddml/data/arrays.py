"""Arrays that numpy has stored, as samples and classes: numbers of any type, labels as people number them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError
from ddml.hdf5 import Stored, fill, outline

from .data_set import Array, row_pieces
from .unpacking import Unpacked, check_unpacked, opened, readable
from .writing import Stream

MAGIC = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")  # first bytes of .npy and .npz, with arrays and without
HDF5 = b"\x89HDF\r\n\x1a\n"  # as well
SHOWN = 8  # labels that are listed (our choice)


def load(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of these names that an .npz or HDF5 file has, or the one of an .npy file under the name ``""``.

    What it is, and whether it is compressed, is known by its bytes. The array of an .npy file that is not compressed
    stays in the file until its rows are asked for. In an HDF5 file ``images`` may stand for ``inputs``.

    Raises
    ------
    InputError
        A file that is none of these, is damaged, or holds Python objects.
    """
    with opened(path) as file:
        head = file.read(6)
        file.seek(0)
        plain = not isinstance(file.raw, Unpacked)  # type: ignore[attr-defined]
        if head.startswith(HDF5[:6]) and plain:
            return _datasets(path, file, names)
        if not head.startswith(MAGIC):
            raise InputError(f"cannot read {path}: it is no .npz or .npy file of numpy, nor one of HDF5")
        if not head.startswith(MAGIC[0]):
            return _members(path, file, names)
        source: Any = path if plain else io.BytesIO(file.read())
        return {"": _unpickled(path, partial(np.load, source, "r" if plain else None))}


def _datasets(path: Path, file: IO[bytes], names: Sequence[str]) -> dict[str, Array]:
    """The arrays of an HDF5 file."""
    aliases = {name: name.replace("inputs", "images") for name in names}
    found: dict[str, Array] = {}
    root = outline(file, (), tuple(dict.fromkeys((*names, *aliases.values()))))
    for name, alias in aliases.items():
        stored = root.members.get(name, root.members.get(alias))
        if stored is None:
            continue
        if not isinstance(stored, Stored) or not stored.shape or stored.texts is not None:
            raise InputError(f"{name} of {path} must be an array of numbers")
        array = np.empty(stored.shape, stored.dtype.newbyteorder("="))
        fill(file, name if name in root.members else alias, stored, [slice(0, n) for n in stored.shape], array)
        found[name] = array
    if not found:
        raise InputError(f"{path} must hold arrays of the names {', '.join(names)}")
    return found


def _members(path: Path, file: IO[bytes], names: Sequence[str]) -> dict[str, Array]:
    """The arrays of an .npz file, each no larger than what it has stored, and all than what the file justifies."""
    size = file.seek(0, io.SEEK_END)
    found = {}
    with zipfile.ZipFile(file) as archive:
        held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        chosen = {name: held[name] for name in names if name in held}
        if not chosen:
            listed = ", ".join(list(held)[:SHOWN]) + ", ..." * (len(held) > SHOWN)
            raise InputError(f"{path} must hold arrays of the names {', '.join(names)}; it has {listed or 'none'}")
        check_unpacked(sum(info.file_size for info in chosen.values()), size)
        for name, info in chosen.items():
            with readable(path, f"{name} of "):
                with archive.open(info) as member:
                    _check_declared(member, info.file_size)
                with archive.open(info) as member:
                    read = partial(np.lib.format.read_array, member, allow_pickle=False)
                    found[name] = _unpickled(f"{name} of {path}", read)
    return found


def _check_declared(member: IO[bytes], size: int) -> None:
    """Refuse an array whose shape asks for other bytes than its member of an archive has, objects apart."""
    form: Any = np.lib.format
    if member.read(6) != MAGIC[0]:
        raise InputError("it is no array of numpy")
    version = tuple(member.read(2))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise InputError(f"it is an array of version {version}")
    # version 3 differs from 2 in the coding of names
    shape, _, dtype = form.read_array_header_1_0(member) if version == (1, 0) else form.read_array_header_2_0(member)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size - member.tell():
        raise InputError(f"it is to hold {dtype} {shape}, and has {size - member.tell()} bytes")


def _unpickled(what: str | Path, read: Callable[[], Any]) -> Any:
    """What numpy reads, unless that are Python objects, which are not read: they could be programs."""
    try:
        return read()
    except ValueError as error:
        if "pickle" in str(error) or "Python objects" in str(error):  # of a file, and of one that is mapped
            text = f"cannot read {what}: it holds Python objects; store numbers or words, as by .astype(int)"
            raise InputError(text) from error
        raise


def stored_type(what: str, *arrays: Array) -> np.dtype[Any]:
    """The type in which numbers of arrays are stored in a data file: bytes as they are, all others as floats.

    Integers of up to 16 bits and bool become float32 as float16 does, longer ones float64.

    Raises
    ------
    InputError
        What is no number: text, complex numbers, objects, tables with named columns; bytes beside others, since what
        stands for 1 is another number then.
    """
    types = set()
    for array in arrays:
        kind, size = array.dtype.kind, array.dtype.itemsize
        if kind not in "biuf":
            raise InputError(f"{what} must be real numbers, got {array.dtype}")
        single = size <= (4 if kind == "f" else 2)
        types.add(np.dtype(np.uint8 if array.dtype == np.uint8 else np.float32 if single else np.float64))
    if np.dtype(np.uint8) in types and len(types) > 1:
        raise InputError(
            f"{what} must be bytes (uint8) all of them or none, got {', '.join(str(a.dtype) for a in arrays)}"
        )
    return np.result_type(*types)


def source(inputs: Array, labels: NDArray[np.int64], rows: NDArray[np.int64], dtype: Any, what: str) -> Stream:
    """Some rows as what is to be written; a value that is not finite is refused with its place in ``what``."""

    def pieces() -> Iterator[tuple[Array, Array]]:
        for begin, end in row_pieces(inputs, 0, len(rows)):
            chosen = rows[begin:end]
            with np.errstate(over="ignore"):  # which the next lines find
                x = np.asarray(inputs[chosen]).astype(dtype)
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                first, *others = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
                place = ", ".join(map(str, (chosen[first], *others)))
                raise InputError(f"{what} must be finite: [{place}] is {x[first, *others]}")
            yield x, labels[chosen]

    return Stream(len(rows), inputs.shape[1:], np.dtype(dtype), pieces)


def classes_of(*labels: tuple[str, Array]) -> tuple[list[NDArray[np.int64]], list[str], list[str]]:
    """Labels of the samples to train on, and to test with, as numbers of classes from 0; the names, and notes.

    Integers, integers that are stored as floats, and words. Classes are the labels that occur, in their order, and have
    them for names; a note says so where the labels are not 0, 1, 2, ... already.

    Parameters
    ----------
    labels
        Pairs of a name for messages and an array (N,) or (N, 1).

    Raises
    ------
    InputError
        Labels of another kind or shape.
    """
    columns = [_labels(what, array) for what, array in labels]
    if len({column.dtype.kind == "U" for column in columns}) > 1:
        raise InputError(f"{' and '.join(what for what, _ in labels)} must be both numbers or both words")
    known = np.unique(np.concatenate(columns))
    names = [str(v) if known.dtype.kind == "U" else str(int(v)) for v in known]
    notes = []
    if names != [str(i) for i in range(len(names))]:
        shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
        notes.append(f"labels {shown} became classes 0 to {len(names) - 1}, which have the labels for names")
    elif any(array.dtype.kind == "f" for _, array in labels):
        notes.append("labels are floats, and were taken as the integers that they are")
    numbers = [np.searchsorted(known, column) for column in columns]
    return numbers, names, notes


def _labels(what: str, array: Array) -> Array:
    """Labels (N,) of one kind: integers, floats that are integers, or words."""
    kind = array.dtype.kind
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not len(array) or kind not in "biufUS":
        raise InputError(
            f"{what} must be integers (N,), one for each sample, or words; got {array.dtype} {array.shape}"
            + ("; of columns for the classes take the largest, .argmax(axis=1)" if array.ndim == 2 else "")
        )
    if kind == "f":
        wrong = np.flatnonzero(~np.isfinite(array) | (array != np.round(array)))
        if len(wrong):
            raise InputError(f"{what} must be integers: [{wrong[0]}] is {array[wrong[0]]}")
    if kind == "S":
        return np.char.decode(array, "utf-8", "replace")
    return array.astype(int) if kind == "b" else array
