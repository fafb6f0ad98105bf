"""Data files and data sets by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from mpi4py import MPI

from ddml import plugins
from ddml.errors import InputError
from ddml.hdf5 import Stored, outline, unpack
from ddml.parallel import agreed, check_memory, split
from ddml.regular import opened

from .data_set import Array, DataSet, allocated, check_rows, check_shapes, maximum_of, row_pieces
from .replacing import replacing
from .unpacking import readable

FORMAT = "ddml data"
NAMES = ("inputs", "labels", "test_inputs", "test_labels")


# Files --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
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
    def of(cls, inputs: Array, labels: Array) -> Source:
        """What is in memory already."""
        if len(inputs) != len(labels):
            raise InputError(f"there are {len(inputs)} samples, but {len(labels)} labels")
        return cls(len(inputs), inputs.shape[1:], inputs.dtype, lambda: iter([(inputs, labels)]))


def write(
    path: str | Path, train: Source, test: Source, classes: Sequence[str], origin: str, maximum: float | None = None
) -> None:
    """Write a data file, from one process; a file that is there is replaced when the new one is whole.

    Raises
    ------
    InputError
        Samples that make no data set, labels out of range, values that are not finite, or a file that cannot be
        written; what was there before is unchanged.
    """
    check_shapes(
        {f"{t}inputs": ((s.count, *s.shape), np.dtype(s.dtype)) for t, s in (("", train), ("test_", test))}
        | {f"{t}labels": ((s.count,), np.dtype(np.int64)) for t, s in (("", train), ("test_", test))}
    )
    maximum = maximum_of(maximum, train.dtype)
    try:
        # since HDF5 1.10 all but numbers and texts of variable length has check sums
        with replacing(path) as disk, h5py.File(disk, "w", libver="v110") as file:
            file.attrs.update(format=_text(FORMAT), origin=_text(origin), maximum=maximum)
            file.attrs["classes"] = _text(classes)
            for prefix, source in (("", train), ("test_", test)):
                inputs = file.create_dataset(f"{prefix}inputs", (source.count, *source.shape), source.dtype)
                labels = file.create_dataset(f"{prefix}labels", (source.count,), np.int64)
                end = 0
                for x, y in source.pieces():
                    begin, end = end, end + len(x)
                    check_rows(f"{prefix}inputs", x, 0, len(x), len(classes), begin)
                    check_rows(f"{prefix}labels", np.asarray(y, np.int64), 0, len(y), len(classes), begin)
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


def read(path: str, comm: MPI.Comm, samples: int | None = None) -> DataSet:
    """Read a data file, each rank of a node its share of the rows.

    Collective on ``comm``. ``samples`` leaves out training samples behind the first so many.

    Raises
    ------
    InputError
        On all ranks: a file that is missing or is no data file, shapes that do not fit together, labels out of range,
        inputs that are not finite, no samples, more samples asked for than there are.
    """
    found: Any = None
    with ExitStack() as stack:
        with agreed(comm):
            with readable(path, "data file "):
                file = stack.enter_context(opened(path))
            if comm.rank == 0:
                found = _described(path, file, samples)
        stored, shapes, classes, origin, maximum = comm.bcast(found)
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        check_memory(comm, needed if node.rank == 0 else 0, f"data file {path}", "is it whole?")
        dataset = allocated(shapes, node, classes, origin, maximum)
        try:
            with agreed(comm), readable(path, "data file "):
                for name, array in dataset.arrays().items():
                    _fill(array, file, name, stored[name], node)
            dataset.fence()
            dataset.check(comm)
        except InputError as error:
            dataset.free()
            raise InputError(f"data file {path}: {error}" if path not in str(error) else f"{error}") from error
        finally:
            node.Free()
    return dataset


def _fill(array: Array, file: IO[bytes], name: str, stored: Stored, node: MPI.Comm) -> None:
    """Read this rank's share of the rows of its node; what is packed rank 0 of the node reads alone."""
    if stored.packed and node.rank == 0:
        unpack(file, name, stored, array)
    elif not stored.packed:
        edges = split(len(array), node.size)
        for first, last in row_pieces(array, edges[node.rank], edges[node.rank + 1]):
            array[first:last] = stored.values(file, first, last)


def _described(
    path: str, file: IO[bytes], samples: int | None
) -> tuple[dict[str, Stored], dict[str, tuple[tuple[int, ...], Any]], list[str], str, float]:
    """Arrays in the file, shapes and types as they are to be read, class names, origin and maximum of a data file."""
    try:
        with readable(path):
            root = outline(file, NAMES)
            stored = {name: root.stored(name) for name in NAMES}
            shapes = {name: (found.shape or (), found.dtype.newbyteorder("=")) for name, found in stored.items()}
            origin, classes = root.attributes.get("origin", ""), root.attributes["classes"]
            maximum = root.attributes.get("maximum")
            if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
                raise ValueError("its classes are no names")
    except InputError as error:
        said = str(error).removeprefix(f"cannot read {path}: ")
        raise InputError(f"{path} is no data file, as data/prepare.py writes them: {said}") from error
    try:
        if samples is not None:
            if samples > shapes["inputs"][0][0]:
                raise InputError(f"{samples} training samples were asked for, there are {shapes['inputs'][0][0]}")
            for name in ("inputs", "labels"):
                shapes[name] = (min(samples, shapes[name][0][0]), *shapes[name][0][1:]), shapes[name][1]
        check_shapes(shapes)
        return stored, shapes, classes, str(origin), maximum_of(maximum, shapes["inputs"][1])
    except InputError as error:
        raise InputError(f"data file {path}: {error}") from error


def digits() -> DataSet:
    """The 1,797 handwritten digits (1, 8, 8) that scikit-learn has, the last 360 of them to test with.

    From E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
    CC BY 4.0. The cut is our choice: the samples are in the order of their writers, so others wrote the test set.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"][:, None], file["labels"]
    return DataSet(images[:-360], labels[:-360], images[-360:], labels[-360:], origin="digits", maximum=16)


DATA: dict[str, Callable[[], DataSet]] = {"digits": digits}


def load(reference: str, comm: MPI.Comm, samples: int | None = None) -> DataSet:
    """A data set by name: one of :data:`DATA`, a data file (``.h5`` or ``.hdf5``), or ``path/to/file.py:Name``.

    ``Name`` is called without arguments, by one rank of each node, and gives a :class:`DataSet`, or the arguments of
    one as a dictionary; or it is one already. Collective on ``comm``; ``samples`` as for :func:`read`.

    Raises
    ------
    InputError
        On all ranks, if there is no such data set or it cannot be used.
    """
    if reference not in DATA and reference.endswith((".h5", ".hdf5")):
        return read(reference, comm, samples)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    made: Any = None
    with agreed(comm), plugins.blamed(reference, DATA, "data set"):
        if node.rank == 0:
            made = plugins.load(reference, DATA, "data set")
            made = made() if callable(made) else made
            made = DataSet(**made) if isinstance(made, dict) else made
            if not isinstance(made, DataSet):
                raise InputError(f"data set '{reference}' is no ddml.data.data_set.DataSet but a {type(made).__name__}")
            if samples is not None:
                if samples > made.count:
                    raise InputError(f"{samples} training samples were asked for, '{reference}' has {made.count}")
                made = DataSet(
                    made.inputs[:samples], made.labels[:samples], made.test_inputs, made.test_labels,
                    made.classes, made.origin, made.maximum,
                )  # fmt: skip
    made = _shared(made, node)
    node.Free()
    try:
        made.check(comm)
    except InputError as error:
        made.free()
        raise InputError(f"data set '{reference}': {error}") from error
    return made


def _shared(made: DataSet | None, node: MPI.Comm) -> DataSet:
    """The data set that rank 0 of a node has made, in memory that its ranks share. Collective."""
    if made is not None and node.size == 1:
        return made
    outline: Any = None
    if made is not None:
        shapes = {name: (array.shape, array.dtype) for name, array in made.arrays().items()}
        outline = shapes, made.classes, made.origin, made.maximum
    shapes, classes, origin, maximum = node.bcast(outline)
    shared = allocated(shapes, node, classes, origin, maximum)
    if made is not None:
        for name, array in made.arrays().items():
            shared.arrays()[name][...] = array
    shared.fence()
    return shared
