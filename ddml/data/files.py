"""Data files and data sets by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from mpi4py import MPI

from ddml import plugins
from ddml.errors import InputError
from ddml.hdf5 import Stored, fill, outline
from ddml.parallel import agreed, check_memory, split
from ddml.regular import opened

from .data_set import Array, DataSet, allocated, check_rows, check_shapes, maximum_of, untrained
from .sources import Description, FileSource, MemorySource, Source
from .unpacking import readable

NAMES = ("inputs", "labels", "test_inputs", "test_labels")
HELD = ("held_inputs", "held_labels")
ENDINGS = (".h5", ".hdf5")  # of data files
LISTED = 5  # names of classes that are shown (our choice)


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
        about = comm.bcast(found)
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in about.shapes.values())
        check_memory(comm, needed if node.rank == 0 else 0, f"data file {path}", "is it whole?")
        dataset = allocated(about.shapes, node, about.classes, about.origin, about.maximum)
        try:
            with agreed(comm), readable(path, "data file "):
                for name, array in dataset.arrays().items():
                    _fill(array, file, name, about.stored[name], node)
            dataset.fence()
            dataset.check(comm)
        except InputError as error:
            dataset.free()
            raise InputError(f"data file {path}: {error}" if path not in str(error) else f"{error}") from error
        finally:
            node.Free()
    return dataset


def _fill(array: Array, file: IO[bytes], name: str, stored: Stored, node: MPI.Comm) -> None:
    """Read this rank's share of the rows of its node; what needs another process rank 0 of the node reads alone."""
    edges = split(len(array), node.size if stored.blocks is not None else 1)
    if node.rank < len(edges) - 1:
        begin, end = edges[node.rank : node.rank + 2]
        fill(file, name, stored, (slice(begin, end), *(slice(0, n) for n in array.shape[1:])), array[begin:end])


def _described(path: str, file: IO[bytes], samples: int | None) -> Description:
    """What a data file says of itself, of so many training samples."""
    try:
        with readable(path):
            root = outline(file, NAMES, HELD)
            stored = {name: root.stored(name) for name in (*NAMES, *HELD) if name in NAMES or name in root.members}
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
        return Description(stored, shapes, tuple(classes), str(origin), maximum_of(maximum, shapes["inputs"][1]))
    except InputError as error:
        raise InputError(f"data file {path}: {error}") from error


def source(reference: str, comm: MPI.Comm, samples: int | None = None) -> Source:
    """A data set by name, as for :func:`load`, of which each rank is to take tiles.

    Of a data file only what it says of itself and the labels are read; of other data sets all. Collective on ``comm``.

    Raises
    ------
    InputError
        On all ranks: what :func:`load` refuses, but for inputs of a data file that are not finite; samples that are
        neither images nor volumes; a class that no training sample is of.
    """
    with ExitStack() as stack:
        made: Source
        if not _in_file(reference):
            dataset = load(reference, comm, samples)
            stack.callback(dataset.free)
            made = MemorySource(dataset)
        else:
            found: Any = None
            with agreed(comm), readable(reference, "data file "):
                file = stack.enter_context(opened(reference))
                if comm.rank == 0:
                    found = _described(reference, file, samples)
                    found = found, _labels(file, found)
            about, labels = comm.bcast(found)
            made = FileSource(reference, file, about, labels)
        if len(made.shape) not in (3, 4):
            raise InputError(f"'{reference}' has samples {made.shape}: tiles are of images (C, H, W) and volumes")
        missing = untrained(made.labels, made.classes)
        if missing:
            names = ", ".join(missing[:LISTED]) + ", ..." * (len(missing) > LISTED)
            raise InputError(
                f"'{reference}' has no sample to train on of class {names}: leave out the class, or add some"
            )
        stack.pop_all()
    return made


def _labels(file: IO[bytes], about: Description) -> dict[str, Array]:
    """The labels of a data file, checked."""
    found = {}
    for name, ((count, *_), dtype) in about.shapes.items():
        if name.endswith("labels"):
            column = np.empty(count, dtype)
            fill(file, name, about.stored[name], (slice(0, count),), column)
            check_rows(name, column, 0, count, len(about.classes))
            found[name] = column.astype(np.int64)
    return found


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
    if _in_file(reference):
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
                    made.classes, made.origin, made.maximum, held_inputs=made.held_inputs, held_labels=made.held_labels,
                )  # fmt: skip
    made = _shared(made, node)
    node.Free()
    try:
        made.check(comm)
    except InputError as error:
        made.free()
        raise InputError(f"data set '{reference}': {error}") from error
    return made


def _in_file(reference: str) -> bool:
    return reference not in DATA and reference.endswith(ENDINGS)


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
