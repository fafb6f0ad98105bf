"""Data sets for classification, and the HDF5 file that holds one.

A data file has these datasets and attributes:

- ``inputs`` (N, d), (N, C, H, W) or (N, C, D, H, W): training samples, uint8, float32 or float64; axis 1 is the
  channel;
- ``labels`` (N,): their classes, integers from 0;
- ``test_inputs``, ``test_labels``: the same for the samples that are never trained on;
- ``held_inputs``, ``held_labels``, if there are any: the same for samples that are held out of the training, for what
  is trained behind it;
- attributes ``format`` ("ddml data"), ``classes`` (their names), ``origin`` (where the samples come from) and
  ``maximum`` (the value that stands for 1: 255 for uint8 and 1 for floats unless it is given). Texts may have a fixed
  length, or not.

Where the samples lie
---------------------
Batches are drawn from the whole set, so that nothing depends on the number of ranks, and the rows that a rank works
on change with every batch: any rank may need any row. So every node holds the stored values (one byte each for
images) once, in memory that its ranks share; each rank reads an equal share of the rows into it. What a rank evaluates,
its own share of a batch and no more, becomes numbers of the network's precision when it is first asked for
(:class:`ddml.data.scaling.Samples`). On one rank the memory is ordinary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ddml.errors import InputError
from ddml.parallel import agreed, split

DTYPES = (np.uint8, np.float32, np.float64)
MOST_CLASSES = 1_000_000  # that are named by their numbers (our choice)
PIECE = 1 << 20  # bytes that are read or looked at in one go (our choice)
PARTS = ("", "test_", "held_")  # beginnings of the names of arrays

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
    windows
        Shared memory that the arrays lie in, if they do; it is the data set's from then on.
    held_inputs, held_labels
        (N_held, ...) and (N_held,), samples that are held out of the training, for what is trained behind it; None
        where there are none.

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
        windows: Sequence[MPI.Win] = (),
        held_inputs: Any = None,
        held_labels: Any = None,
    ) -> None:
        self.inputs, self.test_inputs = _in_a_row(inputs), _in_a_row(test_inputs)
        self.labels, self.test_labels = _in_a_row(labels), _in_a_row(test_labels)
        self.held_inputs, self.held_labels = (
            None if given is None else _in_a_row(given) for given in (held_inputs, held_labels)
        )
        check_shapes({name: (array.shape, array.dtype) for name, array in self.arrays().items()})
        for name, array in self.arrays().items():
            if name.endswith("labels"):
                setattr(self, name, array.astype(np.int64, copy=False))
        # the values of shared arrays come later, but then the classes are known
        self.classes = tuple(map(str, classes)) or self._numbered()
        self.origin = str(origin)
        self.maximum = maximum_of(maximum, self.inputs.dtype)
        self._windows = list(windows)

    def _numbered(self) -> tuple[str, ...]:
        largest = max(array.max() for name, array in self.arrays().items() if name.endswith("labels"))
        if largest >= MOST_CLASSES:
            raise InputError(f"a label is {largest}: of more than {MOST_CLASSES} classes give the names")
        return tuple(str(i) for i in range(largest + 1))

    def __repr__(self) -> str:
        return described(self.origin, self.arrays(), self.shape, len(self.classes))

    @property
    def count(self) -> int:
        """N, the number of training samples."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.inputs.shape[1:]

    def arrays(self) -> dict[str, Array]:
        """The arrays by their names in a data file: four, or six where samples are held out."""
        found = {name: getattr(self, name) for part in PARTS for name in (f"{part}inputs", f"{part}labels")}
        return {name: array for name, array in found.items() if array is not None}

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


def described(origin: str, labels: Mapping[str, Array], shape: Sequence[int], classes: int) -> str:
    """A data set in a line: where it comes from, and how many samples there are of which shape and how many classes.

    ``labels`` are arrays by their names in a data file, of which those of labels are counted.
    """
    counts = " + ".join(str(len(array)) for name, array in labels.items() if name.endswith("labels"))
    held = " held out" if "held_labels" in labels else ""
    return f"{origin or 'data'}: {counts}{held} samples {'x'.join(map(str, shape))}, {classes} classes"


def untrained(labels: Any, classes: Sequence[str]) -> list[str]:
    """The classes that none of the labels (N,) is of."""
    counts = np.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if not count]


def _in_a_row(given: Any) -> Array:
    """An array whose entries follow each other, with the strides that say so.

    Axes of one entry may have any in NumPy, and torch rounds convolutions by them.
    """
    array = np.ascontiguousarray(given)
    return array.reshape(-1).reshape(array.shape)


def maximum_of(given: float | None, dtype: Any) -> float:
    """The value that stands for 1, as given or by the type of the numbers."""
    try:
        maximum = (255.0 if np.dtype(dtype) == np.uint8 else 1.0) if given is None else float(given)
    except (TypeError, ValueError):
        maximum = np.nan
    if not 0 < maximum < np.inf:
        raise InputError(f"the maximum of a data set must be a number above 0, got {given}")
    return maximum


def row_pieces(array: Any, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that take some megabytes each."""
    rows = max(PIECE // max(int(np.prod(array.shape[1:], dtype=int)) * array.dtype.itemsize, 1), 1)
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
    shape, dtype = arrays["inputs"]
    for part in PARTS:
        here = [name for name in (f"{part}inputs", f"{part}labels") if name in arrays]
        if part == "held_" and not here:
            continue
        if len(here) == 1:
            raise InputError(f"{part}inputs and {part}labels must be there both, or neither")
        (found, kind), (labels_shape, _) = (arrays[name] for name in here)
        if found[0] != labels_shape[0]:
            raise InputError(f"{part}inputs has {found[0]} samples, but {part}labels {labels_shape[0]}")
        if found[1:] != shape[1:] or kind != dtype:
            raise InputError(
                f"{part}inputs must have samples as inputs has, {dtype} {shape[1:]}; got {kind} {found[1:]}"
            )


def check_rows(name: str, array: Array, begin: int, end: int, classes: int, before: int = 0) -> None:
    """Raise an InputError for a label that is out of range, or inputs that are not finite, in these rows.

    ``before`` samples stand in front of those of the array.
    """
    for first, last in row_pieces(array, begin, end):
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
            raise InputError(f"{name} {what}; sample {before + first + row} has {value}")


def allocated(
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    node: MPI.Comm,
    classes: Sequence[str],
    origin: str,
    maximum: float,
) -> DataSet:
    """A data set of uninitialised arrays, in memory that the ranks of a node share. Collective."""
    types = {
        name: (shape, np.int64 if name.endswith("labels") else np.dtype(dtype))
        for name, (shape, dtype) in shapes.items()
    }
    arrays, windows = shared_arrays(types, node)
    return DataSet(**arrays, classes=classes, origin=origin, maximum=maximum, windows=windows)


def shared_arrays(
    shapes: Mapping[str, tuple[tuple[int, ...], Any]], node: MPI.Comm
) -> tuple[dict[str, Array], list[MPI.Win]]:
    """Uninitialised arrays of these shapes and types, by name, in memory that the ranks of a node share. Collective.

    With them the windows of that memory, which are fenced once already; there are none on one rank.
    """
    arrays: dict[str, Array] = {}
    windows: list[MPI.Win] = []
    for name, (shape, dtype) in shapes.items():
        dtype = np.dtype(dtype)
        if node.size == 1:
            arrays[name] = np.empty(shape, dtype)
            continue
        size = max(int(np.prod(shape, dtype=int)), 1) * dtype.itemsize if node.rank == 0 else 0
        window = MPI.Win.Allocate_shared(size, dtype.itemsize, comm=cast(MPI.Intracomm, node))
        window.Fence()
        windows.append(window)
        arrays[name] = np.ndarray(shape, dtype, buffer=cast(Any, window.Shared_query(0)[0]))
    return arrays, windows
