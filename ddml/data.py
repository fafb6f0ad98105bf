"""Data sets for classification, and the HDF5 file that holds one.

A data file has these datasets and attributes:

- ``inputs`` (N, d) or (N, C, H, W): training samples, uint8, float32 or float64; axis 1 is the channel;
- ``labels`` (N,): their classes, integers from 0;
- ``test_inputs``, ``test_labels``: the same for the samples that are never trained on;
- attributes ``format`` ("ddml data"), ``classes`` (their names), ``origin`` (where the samples come from) and
  ``maximum`` (the value that stands for 1: 255 for uint8 and 1 for floats unless it is given).

Where the samples lie
---------------------
Batches are drawn from the whole set, so that nothing depends on the number of ranks, and the rows that a rank works
on change with every batch: any rank may need any row. So every node holds the stored values (one byte each for
images) once, in memory that its ranks share; each rank reads an equal share of the rows into it. What a rank evaluates,
its own share of a batch and no more, becomes numbers of the network's precision when it is first asked for
(:class:`Samples`). On one rank the memory is ordinary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from . import plugins
from .errors import InputError
from .parallel import agreed, split
from .sealed import agreed_file

FORMAT = "ddml data"
DTYPES = (np.uint8, np.float32, np.float64)
_PIECE = 64 << 20  # bytes that are read or looked at in one go

Array = NDArray[Any]


class DataSet:
    """Samples of some classes, to train on and to test with; every rank sees all of them.

    Parameters
    ----------
    inputs, test_inputs
        (N, ...) and (N_test, ...), samples in the first dimension, channels or features in the second, of the same
        shape otherwise; uint8, float32 or float64.
    labels, test_labels
        (N,) and (N_test,), integers from 0 to the number of classes - 1.
    classes
        Names of the classes (default: their numbers, up to the largest label there is).
    origin
        Where the samples come from, in words.
    maximum
        The value that stands for 1; 255 for uint8 and 1 for floats by default.

    Raises
    ------
    InputError
        Shapes or types that do not fit together. Values are looked at by :meth:`check`.
    """

    def __init__(
        self,
        inputs: Any,
        labels: Any,
        test_inputs: Any,
        test_labels: Any,
        classes: Sequence[str] = (),
        origin: str = "",
        maximum: float | None = None,
    ) -> None:
        self.inputs, self.test_inputs = np.ascontiguousarray(inputs), np.ascontiguousarray(test_inputs)
        self.labels, self.test_labels = np.ascontiguousarray(labels), np.ascontiguousarray(test_labels)
        check_shapes({name: (array.shape, array.dtype) for name, array in self.arrays().items()})
        self.labels, self.test_labels = self.labels.astype(np.int64), self.test_labels.astype(np.int64)
        largest = max(self.labels.max(), self.test_labels.max())
        self.classes = tuple(map(str, classes)) or tuple(str(i) for i in range(largest + 1))
        self.origin = str(origin)
        self.maximum = _maximum(maximum, self.inputs.dtype)
        self._windows: list[MPI.Win] = []

    def __repr__(self) -> str:
        shape, classes = "x".join(map(str, self.shape)), len(self.classes)
        return f"{self.origin or 'data'}: {self.count} + {len(self.test_labels)} samples {shape}, {classes} classes"

    @property
    def count(self) -> int:
        """N, the number of training samples."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.inputs.shape[1:]

    def arrays(self) -> dict[str, Array]:
        """The four arrays by their names in a data file."""
        return {name: getattr(self, name) for name in ("inputs", "labels", "test_inputs", "test_labels")}

    def check(self, comm: MPI.Comm) -> None:
        """Look at the values, each rank at its share of the rows. Collective.

        Raises
        ------
        InputError
            On all ranks: labels out of range, inputs that are not finite.
        """
        with agreed(comm):
            for name, array in self.arrays().items():
                edges = split(len(array), comm.size)
                check_rows(name, array, edges[comm.rank], edges[comm.rank + 1], len(self.classes))

    def fence(self) -> None:
        """Make what any rank of the node has written seen by all of them. Collective."""
        for window in self._windows:
            window.Fence()

    def free(self) -> None:
        """Give the shared memory back; samples that were made before must not be used any more. Collective.

        Not needed at the end of a program, and not to be done where one rank alone fails.
        """
        for name, array in self.arrays().items():
            setattr(self, name, np.empty((0, *array.shape[1:]), array.dtype))
        for window in self._windows:
            window.Free()
        self._windows = []


def _maximum(given: float | None, dtype: Any) -> float:
    maximum = (255.0 if np.dtype(dtype) == np.uint8 else 1.0) if given is None else float(given)
    if not 0 < maximum < np.inf:
        raise InputError(f"the maximum of a data set must be a number above 0, got {maximum}")
    return maximum


def _pieces(array: Any, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that take some megabytes each."""
    rows = max(_PIECE // max(int(np.prod(array.shape[1:], dtype=int)) * array.dtype.itemsize, 1), 1)
    return ((first, min(first + rows, end)) for first in range(begin, end, rows))


def check_shapes(arrays: dict[str, tuple[tuple[int, ...], Any]]) -> None:
    """Raise an InputError unless arrays of these shapes and types make a data set."""
    for name, (shape, dtype) in arrays.items():
        labels = name.endswith("labels")
        if labels and (len(shape) != 1 or np.dtype(dtype).kind not in "iu"):
            raise InputError(f"{name} must be integers (N,), got {np.dtype(dtype)} {shape}")
        if not labels and (len(shape) < 2 or np.dtype(dtype) not in DTYPES):
            raise InputError(f"{name} must be uint8, float32 or float64 (N, ...), got {np.dtype(dtype)} {shape}")
        if 0 in shape:
            raise InputError(f"{name} is empty: {shape}")
    for test in ("", "test_"):
        (shape, _), (labels_shape, _) = arrays[f"{test}inputs"], arrays[f"{test}labels"]
        if shape[0] != labels_shape[0]:
            raise InputError(f"{test}inputs has {shape[0]} samples, but {test}labels {labels_shape[0]}")
    first, second = (arrays[name] for name in ("inputs", "test_inputs"))
    if first[0][1:] != second[0][1:] or first[1] != second[1]:
        raise InputError(
            f"test_inputs must have samples as inputs has, {first[1]} {first[0][1:]}; got {second[1]} {second[0][1:]}"
        )


def check_rows(name: str, array: Array, begin: int, end: int, classes: int) -> None:
    """Raise an InputError for a label that is out of range, or inputs that are not finite, in these rows."""
    for first, last in _pieces(array, begin, end):
        rows = array[first:last]
        wrong: Any
        if name.endswith("labels"):
            wrong = np.logical_or(rows < 0, rows >= classes)
            what = f"must be from 0 to {classes - 1}, for {classes} classes"
        elif rows.dtype.kind == "f":
            wrong = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
            what = "must be finite"
        else:
            return
        if np.any(wrong):
            row = int(np.flatnonzero(wrong)[0])
            value = f"{rows[row]}" if name.endswith("labels") else "NaN or infinity"
            raise InputError(f"{name} {what}; sample {first + row} has {value}")


def _allocated(
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    node: MPI.Comm,
    classes: Sequence[str],
    origin: str,
    maximum: float,
) -> DataSet:
    """A data set of uninitialised arrays, in memory that the ranks of a node share. Collective."""
    made, arrays = object.__new__(DataSet), {}
    made._windows = []
    for name, (shape, dtype) in shapes.items():
        dtype = np.dtype(np.int64 if name.endswith("labels") else dtype)
        if node.size == 1:
            arrays[name] = np.empty(shape, dtype)
            continue
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize if node.rank == 0 else 0
        window = MPI.Win.Allocate_shared(size, dtype.itemsize, comm=cast(MPI.Intracomm, node))
        window.Fence()
        made._windows.append(window)
        arrays[name] = np.ndarray(shape, dtype, buffer=cast(Any, window.Shared_query(0)[0]))
    made.__dict__.update(arrays, classes=tuple(classes), origin=origin, maximum=maximum)
    return made


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
    new = Path(f"{path}.new")
    try:
        with h5py.File(new, "w", locking=False) as file:
            file.attrs.update(format=FORMAT, origin=origin, maximum=_maximum(maximum, train.dtype))
            file.attrs.create("classes", list(classes), dtype=h5py.string_dtype())
            for prefix, source in (("", train), ("test_", test)):
                inputs = file.create_dataset(f"{prefix}inputs", (source.count, *source.shape), source.dtype)
                labels = file.create_dataset(f"{prefix}labels", (source.count,), np.int64)
                end = 0
                for x, y in source.pieces():
                    check_rows(f"{prefix}inputs", x, 0, len(x), len(classes))
                    check_rows(f"{prefix}labels", np.asarray(y, np.int64), 0, len(y), len(classes))
                    begin, end = end, end + len(x)
                    inputs[begin:end], labels[begin:end] = x, y
                if end != source.count:
                    raise InputError(f"{source.count} samples were announced, {end} came")
        with open(new, "rb") as flushed:
            os.fsync(flushed.fileno())
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)


def read(path: str, comm: MPI.Comm, samples: int | None = None) -> DataSet:
    """Read a data file, each rank of a node its share of the rows; through MPI where HDF5 is built for it.

    Collective on ``comm``. ``samples`` leaves out training samples behind the first so many.

    Raises
    ------
    InputError
        On all ranks: a file that is missing or is no data file, shapes that do not fit together, labels out of range,
        inputs that are not finite, no samples, more samples asked for than there are.
    """
    found: Any = None
    with agreed(comm):
        if not Path(path).is_file() or not os.access(path, os.R_OK):
            raise InputError(
                f"cannot read data file {path}: there is no such file, or rank {comm.rank} may not read it"
            )
    with agreed(comm):
        if comm.rank == 0:
            found = _described(path, samples)
    shapes, classes, origin, maximum = comm.bcast(found)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    dataset = _allocated(shapes, node, classes, origin, maximum)
    parallel = {"driver": "mpio", "comm": comm} if h5py.get_config().mpi and comm.size > 1 else {"locking": False}
    try:
        problem = (f"cannot read data file {path}", "make it anew with data/prepare.py")
        with agreed_file(comm, *problem), h5py.File(path, "r", **parallel) as file:
            for name, array in dataset.arrays().items():
                edges = split(len(array), node.size)
                for first, last in _pieces(array, edges[node.rank], edges[node.rank + 1]):
                    file[name].read_direct(array, np.s_[first:last], np.s_[first:last])
        dataset.fence()
        dataset.check(comm)
    except InputError as error:
        dataset.free()
        raise InputError(f"data file {path}: {error}" if path not in str(error) else f"{error}") from error
    finally:
        node.Free()
    return dataset


def _described(path: str, samples: int | None) -> tuple[dict[str, tuple[tuple[int, ...], Any]], list[str], str, float]:
    """Shapes and types of the arrays, class names, origin and maximum of a data file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            shapes = {
                name: (file[name].shape, file[name].dtype)
                for name in ("inputs", "labels", "test_inputs", "test_labels")
            }
            classes = [str(c) for c in file.attrs["classes"]]
            origin, maximum = str(file.attrs.get("origin", "")), file.attrs.get("maximum")
    except (OSError, KeyError, AttributeError, TypeError) as error:
        text = str(error).splitlines()[0].strip('"')
        raise InputError(f"{path} is no data file, as data/prepare.py writes them: {text}") from error
    try:
        if samples is not None:
            if samples > shapes["inputs"][0][0]:
                raise InputError(f"{samples} training samples were asked for, there are {shapes['inputs'][0][0]}")
            for name in ("inputs", "labels"):
                shapes[name] = (min(samples, shapes[name][0][0]), *shapes[name][0][1:]), shapes[name][1]
        check_shapes(shapes)
        return shapes, classes, origin, _maximum(maximum, shapes["inputs"][1])
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
                raise InputError(f"data set '{reference}' is no ddml.data.DataSet but a {type(made).__name__}")
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
    shared = _allocated(shapes, node, classes, origin, maximum)
    if made is not None:
        for name, array in made.arrays().items():
            shared.arrays()[name][...] = array
    shared.fence()
    return shared
