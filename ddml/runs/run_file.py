"""The run file: one HDF5 file that holds all a run needs to go on, and its history.

A run file has these groups:

- ``/parameters``: ``theta``, the global vector in float64, and ``names``, ``shapes`` (padded with -1) and ``offsets``
  of the parameters in it;
- ``/solver``: the solver's state, one group or dataset for each value;
- ``/history``: one float64 dataset for each column of `ddml.runs.history.History`; ``iteration`` is the dimension scale
  of the others, as netCDF and xarray have it;
- the attributes of the root: those of the caller, the versions in force and the number of ranks that wrote it; what
  was measured at the end only, where the history, which a restart continues, has no value.

Vectors are never gathered: each rank writes and reads its own range, at the place where rank 0, which alone calls
HDF5, has laid out the dataset. `ddml.runs.sealed` makes the file safe against kills, full disks and damage, and
`ddml.hdf5` reads one that somebody has made to harm.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import h5py
import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import RunFileError
from ddml.hdf5 import Group, Stored, outline
from ddml.parallel import agreed_file
from ddml.regular import check_target
from ddml.states import Place, check_text, decode, encode, place, reserve, vectors_in, with_vectors
from ddml.version import __version__

from .history import COLUMNS, UNITS, WORK_OF_LEVELS, History
from .sealed import FORMAT_VERSION, SEAL_SIZE, Image, beside, store, verified

__all__ = ["Header", "Parameter", "ParameterEntry", "RunFileError", "check_writable", "inspect", "read", "write"]

FORMAT = "ddml run"
MEASURED = "measured "  # what the names of attributes begin with that belong into the last row of the history
LARGEST = 2**53  # iteration: a further one is no whole number in double precision


class Parameter(Protocol):
    """What a run file keeps of a parameter tensor: its name, its shape and where it starts in the global vector."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...


@dataclass(frozen=True)
class ParameterEntry:
    """Name, shape and offset of a parameter tensor, as read from a run file."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a run file says about itself.

    Attributes
    ----------
    attributes : dict
        The root's attributes: str, int, float or bool.
    parameters : tuple of ParameterEntry
        The parameter tensors.
    size : int
        Length of the global vector.
    rows : int
        Number of rows of the history.
    """

    attributes: dict[str, str | int | float | bool]
    parameters: tuple[ParameterEntry, ...]
    size: int
    rows: int


def _versions(ranks: int) -> dict[str, str | int]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ranks": ranks,
        "ddml_version": __version__,
        "petsc_version": ".".join(str(part) for part in PETSc.Sys.getVersion()),
        "numpy_version": np.__version__,
        "h5py_version": h5py.__version__,
        "hdf5_version": h5py.version.hdf5_version,
        "python_version": platform.python_version(),
    }


def _check_attributes(attributes: Mapping[str, str | int | float | bool]) -> None:
    ours = _versions(0)
    for name, value in attributes.items():
        check_text(name, f"attribute {name!r}")
        if name in ours:
            raise RunFileError(f"attribute {name!r} is written by the run file itself; use another name")
        if not isinstance(value, str | int | float):
            raise RunFileError(f"attribute {name!r} must be a str, int, float or bool, not a {type(value).__name__}")
        if isinstance(value, str):
            check_text(value, f"attribute {name!r}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise RunFileError(f"attribute {name!r} must be an integer of 64 bits, not {value}")


def _lay_out(
    theta: PETSc.Vec,
    parameters: Sequence[Parameter],
    state: Mapping[str, Any],
    history: History,
    attributes: Mapping[str, str | int | float | bool],
    vectors: Sequence[str],
) -> tuple[Image, dict[str, int]]:
    """Make the file in memory; return it and where each vector's values start in it (bytes)."""
    image = Image()
    with h5py.File(image, "w", userblock_size=SEAL_SIZE, alignment_threshold=1, alignment_interval=8) as file:
        file.attrs.update({**attributes, **_versions(theta.comm.size)})
        group = file.create_group("parameters")
        reserve(group, "theta", theta.getSize())
        group.create_dataset("names", data=[item.name for item in parameters], dtype=h5py.string_dtype())
        shapes = np.full((len(parameters), max((len(item.shape) for item in parameters), default=0)), -1, np.int64)
        for row, item in zip(shapes, parameters, strict=True):
            row[: len(item.shape)] = item.shape
        group.create_dataset("shapes", data=shapes)
        group.create_dataset("offsets", data=np.array([item.offset for item in parameters], np.int64))
        encode(cast(h5py.Group, file), "solver", dict(state))
        group = file.create_group("history")
        for name in dict.fromkeys((*COLUMNS, *history.used())):
            column = group.create_dataset(name, data=history[name])
            if name == COLUMNS[0]:
                column.make_scale(name)
            else:
                column.dims[0].attach_scale(group[COLUMNS[0]])
            if name in UNITS:
                column.attrs["units"] = UNITS[name]
        offsets = {name: file[name].id.get_offset() or 0 for name in vectors}
    return image, offsets


def write(
    path: str,
    theta: PETSc.Vec,
    *,
    parameters: Sequence[Parameter],
    state: Mapping[str, Any],
    history: History,
    attributes: Mapping[str, str | int | float | bool],
) -> None:
    """Write a run file, in place of the one that may be there.

    Collective on the communicator of `theta`. A file beside it is written, flushed to the disk and renamed: a
    kill at any moment leaves the old file or the new one.

    Parameters
    ----------
    path : str
        The file.
    theta : Vec, global size n
        The parameters; each rank writes the range it owns.
    parameters : sequence of Parameter
        The parameter tensors in `theta`, equal on all ranks.
    state : mapping of str to value
        What the solver needs to go on. A value is a dict with str keys, a list, an int (of any size), float, bool,
        str, None or numpy array of numbers, all equal on all ranks, or a Vec in the layout of `theta` or of another
        size. A numpy scalar comes back as the Python number.
    history : History
        The history, equal on all ranks.
    attributes : mapping of str to str, int, float or bool
        Attributes of the root, equal on all ranks.

    Raises
    ------
    RunFileError
        On all ranks, when any rank could not write, or for a state or attributes that a run file cannot hold; the
        old file is then unchanged.
    """
    comm = theta.comm.tompi4py()
    problem = (f"cannot write {path}", "the file that was there is unchanged")
    with agreed_file(comm, *problem):
        _check_attributes(attributes)
        for item in parameters:
            check_text(item.name, f"parameter {item.name!r}")
        vectors = {"parameters/theta": theta, **vectors_in(dict(state), "solver", theta)}
    image: Image | None = None
    offsets: dict[str, int] = {}
    with agreed_file(comm, *problem):
        if comm.rank == 0:
            image, offsets = _lay_out(theta, parameters, state, history, attributes, list(vectors))
    offsets = comm.bcast(offsets)
    with agreed_file(comm, *problem):
        if vectors.keys() != offsets.keys():
            raise RunFileError(
                f"cannot write {path}: the state must hold the same vectors on all ranks, "
                f"but rank {comm.rank} and rank 0 differ in {', '.join(sorted(vectors.keys() ^ offsets.keys()))}"
            )
        reserved = [(offsets[name], offsets[name] + 8 * v.getSize()) for name, v in vectors.items() if v.getSize()]
        pieces = [
            (
                offsets[name] + 8 * vector.getOwnershipRange()[0],
                np.asarray(vector.getArray(readonly=True), "<f8").view(np.uint8),
            )
            for name, vector in vectors.items()
            if vector.getLocalSize()
        ]
    store(path, comm, image, reserved, pieces)


def check_writable(path: str, comm: MPI.Comm) -> None:
    """Find out before a run whether its run file can be written.

    Collective on `comm`. `path` itself is neither created nor altered; a file beside it is made and removed.

    Raises
    ------
    RunFileError
        On all ranks, when `path` is a folder, its folder does not exist or cannot be written, or a rank does not
        see the files that rank 0 makes there.
    """
    problem = (f"cannot write {path}", "give -output a file in an existing folder that all ranks can write")
    _, new = beside(path, comm, problem)
    try:
        with agreed_file(comm, *problem):
            if comm.rank == 0:
                check_target(path)
                open(new, "xb").close()
        with agreed_file(comm, *problem):
            open(new, "r+b").close()
    finally:
        if comm.rank == 0:
            with suppress(OSError):
                os.unlink(new)
        comm.barrier()  # when a rank goes on, the new file is gone


def _header(root: Group, file: IO[bytes]) -> Header:
    group = root.group("parameters")
    theta, names = place(group.stored("theta")), group.stored("names")
    shapes, offsets = (group.stored(name).values(file) for name in ("shapes", "offsets"))
    if not (isinstance(names.texts, list) and shapes.dtype == offsets.dtype == np.int64 and shapes.ndim == 2):
        raise ValueError("its parameters have no names, shapes and offsets")
    entries = zip(names.texts, shapes.tolist(), offsets.tolist(), strict=True)
    parameters = tuple(
        ParameterEntry(name, tuple(extent for extent in shape if extent >= 0), offset)
        for name, shape, offset in entries
    )
    ends = np.cumsum([0, *(math.prod(p.shape) for p in parameters)], dtype=object).tolist()
    if parameters and [*(p.offset for p in parameters), theta.size] != ends:
        raise ValueError(f"its parameters are not the {theta.size} numbers of theta")
    attributes = dict(root.attributes)
    if attributes.get("format") != FORMAT or not isinstance(attributes.get("ranks"), int) or attributes["ranks"] < 1:
        raise ValueError("its attributes do not say what it is")
    if any(isinstance(value, list) for value in attributes.values()):
        raise ValueError("its attributes are not single numbers and texts")
    return Header(attributes, parameters, theta.size, root.group("history").stored("iteration").count)


def _column(name: str, node: Group | Stored, file: IO[bytes]) -> NDArray[np.float64]:
    if not isinstance(node, Stored) or node.dtype != np.float64:
        raise ValueError(f"the {name} of its history is no column of float64")
    return node.values(file)


def _read_root(path: str, file: IO[bytes], comm: MPI.Comm, whole: bool) -> tuple[Header, Place, Any, History]:
    """The header of a verified file, theta's place, and if `whole` the state and the history."""
    content: tuple[Header, Place, Any, History] | None = None
    with agreed_file(comm, f"cannot read {path}", "restart from a copy"):
        if comm.rank == 0:
            state, history = None, History()
            try:
                root = outline(file, ("parameters", "solver", "history"))
                header, theta = _header(root, file), place(root.group("parameters").stored("theta"))
                if whole:
                    columns = root.group("history").members.items()
                    history = History.from_columns({name: _column(name, node, file) for name, node in columns})
                    state = decode(root.group("solver"), file)
            except (KeyError, ValueError) as error:
                said = f"there is no {error}" if isinstance(error, KeyError) else error
                raise RunFileError(f"{path} is whole but not laid out as a run file: {said}") from error
            content = header, theta, state, history
    return cast("tuple[Header, Place, Any, History]", comm.bcast(content))


def inspect(path: str, comm: MPI.Comm) -> Header:
    """Return what a run file says about itself, after checking every byte of it.

    Collective on `comm`; each rank checks its share of the file.

    Raises
    ------
    RunFileError
        On all ranks, when the file is missing, foreign, of a newer format or damaged.
    """
    with verified(path, comm) as file:
        return _read_root(path, file, comm, whole=False)[0]


def read(path: str, theta: PETSc.Vec, with_state: bool = True) -> tuple[dict[str, Any], History]:
    """Read a run file into a vector of any ownership ranges.

    Collective on the communicator of `theta`, which need not have as many ranks as the one that wrote the file.

    Parameters
    ----------
    path : str
        The file.
    theta : Vec, global size n
        Filled with the parameters; each rank reads the range it owns.
    with_state : bool
        Whether the state is wanted, which may be many times as large; otherwise it is empty.

    Returns
    -------
    state : dict
        What `write` was given, every value of the same type and with the same bits. The caller destroys its
        vectors, which are duplicates of `theta`, or of another size and in equal shares.
    history : History
        The history.

    Raises
    ------
    RunFileError
        On all ranks, when the file is missing, foreign, of a newer format, damaged or of another size than `theta`;
        nothing is left to destroy.
    """
    comm = theta.comm.tompi4py()
    with verified(path, comm) as file:
        header, at, state, history = _read_root(path, file, comm, whole=True)
        if header.size != theta.getSize():
            raise RunFileError(
                f"{path} holds {header.size} parameters, {theta.getSize()} were expected; "
                "restart with the network that the file was written with"
            )
        made: list[tuple[int, PETSc.Vec]] = []
        state = with_vectors(state, theta, made) if with_state else {}
        try:
            with agreed_file(comm, f"cannot read {path}", "check that every rank sees the file"):
                for offset, vector in [*made, (at.offset, theta)]:
                    first, last = vector.getOwnershipRange()
                    file.seek(offset + 8 * first)
                    data = file.read(8 * (last - first))
                    if len(data) != 8 * (last - first):
                        raise RunFileError(f"{path} became shorter while it was read; restart from a copy")
                    vector.setArray(np.frombuffer(data, "<f8"))  # type: ignore[arg-type]
        except RunFileError:
            for _, vector in made:
                vector.destroy()
            raise
    return state, history


def check_values(path: str, theta: PETSc.Vec, history: History) -> None:
    """Refuse parameters and a history that nothing can go on from. Collective on the communicator of `theta`.

    Raises
    ------
    RunFileError
        On all ranks: parameters that are NaN or infinite; iterations that do not count up; times and amounts of work
        that are negative or infinite.
    """
    with agreed_file(theta.comm.tompi4py(), f"cannot read {path}", "restart from a copy"):
        if not np.isfinite(theta.array_r).all():
            raise RunFileError(f"{path} holds parameters that are NaN or infinite")
        iterations = history["iteration"]
        counts = (iterations >= 0) & (iterations <= LARGEST) & (iterations == iterations.round())
        if not len(history) or not counts.all() or (np.diff(iterations) < 0).any() or math.isnan(history.last("time")):
            raise RunFileError(f"{path} has a history whose iterations do not count up, or whose time is not known")
        for name in ("time", "work", "work_critical", *WORK_OF_LEVELS):
            if np.isinf(history[name]).any() or (history[name] < 0).any():
                raise RunFileError(f"{path} has a history whose {name} is negative or infinite")
