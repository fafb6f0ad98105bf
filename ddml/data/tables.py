"""Columns of numbers at points: read from .csv, .npy and .npz files, written as .csv, .npz and for ParaView."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddml import regular
from ddml.errors import InputError

from . import arrays, vtk
from .data_set import Array
from .replacing import Disk, replacing
from .unpacking import opened

Floats = NDArray[np.float64]
ROWS = 10_000  # that are made text of at a time (our choice)


@dataclass(frozen=True)
class Table:
    """Columns at points, which may be those of a grid.

    Attributes
    ----------
    coordinates : mapping of names to arrays (N,)
    columns : mapping of names to arrays (N,)
        What there is at the points: numbers or words.
    axes : sequence of arrays, or None
        Of a grid, one for each coordinate, of which the last one runs fastest in the points.
    """

    coordinates: Mapping[str, Floats]
    columns: Mapping[str, Array]
    axes: Sequence[Floats] | None = None


# Reading ------------------------------------------------------------------------------------------------------------


def points(path: str | Path, names: Sequence[str]) -> Floats:
    """The columns of these names (N, d), of a .csv file with a line of names, or of the arrays (N,) of an .npz file.

    Other columns are left alone.

    Raises
    ------
    InputError
        A file that cannot be read; columns that are missing, or of unequal length; what is no finite number, with its
        place; no points.
    """
    if Path(path).suffix == ".npz":
        found = arrays.load(Path(path), names)
        missing = [name for name in names if name not in found]
        columns = [np.ravel(found[name]) for name in names if name in found]
        if not missing and len({len(c) for c in columns}) > 1:
            raise InputError(f"{path}: the arrays {', '.join(names)} are of unequal length")
        if any(c.dtype.kind not in "biuf" for c in columns):
            raise InputError(f"{path}: the arrays {', '.join(names)} must be of real numbers")
        given = list(found)
    else:
        with opened(path) as file:
            given = [name.strip() for name in next(csv.reader([_head(file.readline())]), [])]
            missing = [name for name in names if name not in given]
            text = file.read() if not missing else b""
            places = [given.index(name) for name in names if name in given]
            columns = list(_numbers(text, places).T)
    if missing:
        raise InputError(f"{path} has no columns {', '.join(missing)}; it has {', '.join(given)[:200] or 'none'}")
    return finite(path, np.stack(columns, axis=1).astype(float), names)


def samples(path: str | Path, shape: tuple[int, ...]) -> Array:
    """Samples (N, ...): lines of a .csv file with a line of names, an .npy file, or ``inputs`` of an .npz file.

    Raises
    ------
    InputError
        A file that cannot be read, samples of another shape, what is no finite number.
    """
    size = int(np.prod(shape))
    if Path(path).suffix in (".npz", ".npy"):
        found = next(iter(arrays.load(Path(path), ["inputs"]).values()))
    else:
        with opened(path) as file:
            width = len(next(csv.reader([_head(file.readline())]), []))
            found = _numbers(file.read(), range(width))
    if found.ndim < 2 or found.shape[1:] not in (tuple(shape), (size,)) or found.dtype.kind not in "biuf":
        raise InputError(
            f"{path} must hold numbers (N, {', '.join(map(str, shape))}) or (N, {size}), got {found.shape}"
        )
    finite(path, found.reshape(-1, size), [str(i) for i in range(size)])
    return found.reshape(-1, *shape)


def _head(line: bytes) -> str:
    return line.decode("utf-8-sig").strip()


def _numbers(text: bytes, places: Sequence[int]) -> Floats:
    """Some columns (N, k) of lines of numbers."""
    if not text.strip() or not places:
        return np.empty((0, len(places)))
    return np.loadtxt(io.StringIO(text.decode()), delimiter=",", usecols=places, ndmin=2, quotechar='"')


def finite(path: str | Path, values: Array, names: Sequence[str]) -> Array:
    """The same values (N, d); an InputError if there are none, or with the place of one that is NaN or infinite."""
    if not len(values):
        raise InputError(f"{path} has no points")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(f"{path}: {names[column]} is {values[row, column]} at point {row + 1}")
    return values


# Writing ------------------------------------------------------------------------------------------------------------


def check_target(path: str | Path, suffixes: Sequence[str], sources: Sequence[str | Path] = ()) -> str:
    """The suffix of a file that can be written.

    Raises
    ------
    InputError
        Another suffix; a folder that there is not; what is there and no file, or one of the sources.
    """
    target = Path(path)
    if target.suffix not in suffixes:
        raise InputError(f"option -o must be a file {', '.join(suffixes)}; got '{path}'")
    if not target.resolve().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {target.parent}")
    regular.check_target(target)
    for source in sources:
        with suppress(OSError):  # of which whoever reads or writes there will hear
            if target.samefile(source):
                raise InputError(f"cannot write {path}: it is read")
    return target.suffix


@contextmanager
def written(path: str | Path) -> Iterator[Disk]:
    """A file to write in the place of another one, when it is whole.

    Raises
    ------
    InputError
        If it cannot be written; what was there is unchanged.
    """
    try:
        with replacing(path) as disk:
            yield disk
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def write(path: str | Path, table: Table) -> None:
    """Write a table as its suffix says, one of :data:`WRITERS`.

    Raises
    ------
    InputError
        What the format cannot hold; a file that cannot be written.
    """
    with written(path) as disk:
        WRITERS[Path(path).suffix](disk, table)


def _csv(disk: Disk, table: Table) -> None:
    columns = {**table.coordinates, **table.columns}
    count = len(next(iter(columns.values())))
    for begin in range(0, count, ROWS):
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if begin == 0:
            rows.writerow(columns)
        rows.writerows(zip(*(c[begin : begin + ROWS].tolist() for c in columns.values()), strict=True))
        disk.write(text.getvalue().encode())
        disk.check()


def _npz(disk: Disk, table: Table) -> None:
    """Arrays by name: columns (N,), or in the shape of a grid, whose coordinates are the axes."""
    shape = [len(axis) for axis in table.axes] if table.axes else [-1]
    named = dict(zip(table.coordinates, table.axes, strict=True)) if table.axes else dict(table.coordinates)
    named |= {name: column.reshape(shape) for name, column in table.columns.items()}
    with zipfile.ZipFile(disk, "w") as archive:  # np.savez has no array of the name file
        for name, array in named.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)  # type: ignore[no-untyped-call]


def _grid(kind: Callable[[Sequence[Floats], Mapping[str, Floats]], Iterator[bytes]]) -> Callable[[Disk, Table], None]:
    def write(disk: Disk, table: Table) -> None:
        if table.axes is None:
            raise InputError(".vti and .vtr hold grids: give -grid, or write .vtu")
        for piece in kind(table.axes, table.columns):
            disk.write(piece)

    return write


def _vtu(disk: Disk, table: Table) -> None:
    for piece in vtk.unstructured(list(table.coordinates.values()), table.columns):
        disk.write(piece)


WRITERS: dict[str, Callable[[Disk, Table], None]] = {
    ".csv": _csv,
    ".npz": _npz,
    ".vti": _grid(vtk.image),
    ".vtr": _grid(vtk.rectilinear),
    ".vtu": _vtu,
}
