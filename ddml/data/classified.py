"""Classified samples as tables of numbers, with what is to be tested: of data sets, data files and LIBSVM files."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from ddml.errors import InputError
from ddml.parallel import agreed, check_memory

from . import files, libsvm
from .inputs import Inputs
from .scaling import Scaling

Floats = NDArray[np.float64]
MOST_CLASSES = 1000  # that a LIBSVM file may have (our choice)


@dataclass(frozen=True)
class Classified:
    """Samples, the same on all ranks.

    Attributes
    ----------
    samples : ndarray
        (n, d), scaled.
    labels : ndarray of int64
        (n,), numbers of classes.
    test_samples, test_labels : ndarray or None
        To test with, if there are some.
    inputs : Inputs
        What a sample is, as it is stored, and how it is scaled.
    origin : str
        In words.
    """

    samples: Floats
    labels: NDArray[np.int64]
    test_samples: Floats | None
    test_labels: NDArray[np.int64] | None
    inputs: Inputs
    origin: str

    def first(self, count: int) -> Classified:
        """Only the first so many training samples."""
        return replace(self, samples=self.samples[:count], labels=self.labels[:count])

    @property
    def problem(self) -> str:
        """Number and size of the training samples, and the CRC-32 of them and their classes."""
        sum_ = zlib.crc32(self.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.samples).tobytes()))
        return f"{len(self.samples)} samples x {self.samples.shape[1]}, check sum {sum_:08x}"


def stored(name: str) -> bool:
    """Whether a name is not that of a LIBSVM file."""
    return name in files.DATA or name.endswith(files.ENDINGS) or ".py:" in name


def load(
    name: str,
    comm: MPI.Comm,
    count: int | None = None,
    scaling: str = "unit",
    test: str | None = None,
    base: str = "auto",
) -> Classified:
    """Samples by the name of their data. Collective on ``comm``.

    Parameters
    ----------
    name
        As for :func:`ddml.data.files.load`, or a LIBSVM file.
    count
        Only the first so many training samples.
    scaling
        One of :data:`ddml.data.scaling.SCALINGS`; LIBSVM files are taken as they are.
    test
        A LIBSVM file to test with.
    base
        Index of the first feature in LIBSVM files, as for :func:`ddml.data.libsvm.read`.

    Raises
    ------
    InputError
        On all ranks: data that there are not, or cannot be read; labels that are no classes; fewer samples than asked
        for; one class.
    """
    found = _loaded(name, comm, count, scaling, test, base)
    if len(np.unique(found.labels)) < 2:
        raise InputError(f"the {len(found.labels)} samples of {name} are of one class: there is nothing to tell apart")
    return found


def _loaded(
    name: str,
    comm: MPI.Comm,
    count: int | None,
    scaling: str,
    test: str | None,
    base: str,
    first: str | None = None,
) -> Classified:
    """See :func:`load`; samples may be of one class. A LIBSVM file is read as one behind ``first``, if there is one."""
    if stored(name):
        if test is not None:
            raise InputError(f"option -test_data is for LIBSVM files, not for -data {name}")
        return _of_set(name, comm, count, scaling)
    with agreed(comm):
        if not Path(name).exists() and not {"/", "."} & set(name):
            raise InputError(
                f"there is no data '{name}': -data is one of {', '.join(files.DATA)}, a data file .h5, "
                "path/to/file.py:Name, or a LIBSVM file"
            )
    return _of_libsvm(name, comm, count, test, base, first)


def joined(first: Classified, of: str, name: str, comm: MPI.Comm, base: str = "auto") -> Classified:
    """Samples with those of other data behind them, which are scaled as they are. Collective on ``comm``.

    Parameters
    ----------
    first, of
        What there is, and the name of its data: of two LIBSVM files it says which features there are.
    name, base
        As for :func:`load`; its samples to test with are left out, and those to train on may be of one class.

    Raises
    ------
    InputError
        On all ranks: what :func:`load` refuses; samples of another shape or of other classes.
    """
    inputs = first.inputs
    other = _loaded(name, comm, None, "none", None, base, None if stored(of) else of)
    unknown = [name for name in other.inputs.classes if name not in inputs.classes]
    if other.inputs.shape != inputs.shape or unknown:
        has = f"samples of shape {other.inputs.shape}" if not unknown else f"the class {unknown[0]}"
        raise InputError(
            f"{name} has {has}; those before it have shape {inputs.shape} and classes {', '.join(inputs.classes)}"
        )
    shift, scale = (np.reshape(values, (1, -1, 1)) for values in (inputs.shift, inputs.scale))
    values = other.samples.reshape(len(other.samples), inputs.shape[0], -1)
    scaled = ((values - shift) / scale).reshape(len(values), -1)
    numbers = np.array([inputs.classes.index(name) for name in other.inputs.classes])
    return replace(
        first, samples=np.concatenate([first.samples, scaled]),
        labels=np.concatenate([first.labels, numbers[other.labels]]), origin=f"{first.origin}; {other.origin}",
    )  # fmt: skip


def _of_set(name: str, comm: MPI.Comm, count: int | None, scaling: str) -> Classified:
    dataset = files.load(name, comm, count)
    try:
        needed = 8 * (dataset.inputs.size + dataset.test_inputs.size)
        check_memory(comm, needed, f"the samples of {name} on each rank", "take fewer -samples or ranks")
        scaled = Scaling(dataset, scaling, comm)
        tables = [_scaled(values, scaled) for values in (dataset.inputs, dataset.test_inputs)]
        return Classified(
            tables[0], dataset.labels.copy(), tables[1], dataset.test_labels.copy(), Inputs.of(dataset, scaled),
            repr(dataset),
        )  # fmt: skip
    finally:
        dataset.free()


def _scaled(values: NDArray[Any], scaling: Scaling) -> Floats:
    table = scaling.apply(torch.from_numpy(np.asarray(values, np.float64).copy())).numpy()
    return table.reshape(len(table), -1)


def _of_libsvm(
    name: str, comm: MPI.Comm, count: int | None, test: str | None, base: str, first: str | None
) -> Classified:
    before = [] if first is None else [first]
    tables = libsvm.read([*before, name, *([test] if test is not None else [])], comm, base)
    for table in tables[: len(before)]:
        table.free()
    tables = tables[len(before) :]
    try:
        with agreed(comm):
            values = np.unique(tables[0].labels)
            if (values != values.round()).any() or len(values) > MOST_CLASSES:
                raise InputError(
                    f"the labels of {name} are numbers, such as {values[values != values.round()][0]:g}, and no classes"
                    if (values != values.round()).any()
                    else f"{name} has {len(values)} different labels: those are numbers, and no classes"
                )
            wanted = len(tables[0].labels) if count is None else count
            if wanted > len(tables[0].labels):
                raise InputError(f"{wanted} training samples were asked for, {name} has {len(tables[0].labels)}")
            others = np.setdiff1d(tables[-1].labels, values)
            if len(others):
                raise InputError(f"test file {test} has the label {others[0]:g}, the training file has not")
        needed = 8 * sum(len(t.labels) * t.features for t in tables)
        check_memory(comm, needed, f"the samples of {name} on each rank", "take fewer ranks")
        pairs = [
            (_dense(t.matrix(slice(0, n))), np.searchsorted(values, t.labels[:n]).astype(np.int64))
            for t, n in zip(tables, (wanted, *(len(t.labels) for t in tables[1:])), strict=True)
        ]
        inputs = Inputs((tables[0].features,), tuple(f"{v:g}" for v in values), "none", (0.0,), (1.0,))
        tested = pairs[1] if test is not None else (None, None)
        return Classified(pairs[0][0], pairs[0][1], tested[0], tested[1], inputs, repr(tables[0]))
    finally:
        for table in tables:
            table.free()


def _dense(matrix: Any) -> Floats:
    return np.array(matrix if isinstance(matrix, np.ndarray) else matrix.toarray(), np.float64)
