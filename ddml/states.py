"""Solver states in a run file: nested dicts and lists of numbers, texts, arrays and distributed vectors.

Each value is an HDF5 dataset or group whose attribute `kind` says what it was. Vectors are datasets that have a place
in the file and no values yet: every rank writes and reads its own range there, without HDF5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import h5py
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from .errors import RunFileError
from .hdf5 import Group, Stored
from .parallel import redistributed


@dataclass(frozen=True)
class Place:
    """Stands for a vector in a state that rank 0 has read: where its values are in the file (bytes), and how many."""

    offset: int
    size: int


def check_text(text: str, where: str) -> None:
    """Raise a RunFileError for a text that HDF5 cannot hold."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RunFileError(f"{where}: a text must hold neither the character NUL nor lone surrogates, not {text!r}")


def vectors_in(value: Any, where: str, theta: PETSc.Vec) -> dict[str, PETSc.Vec]:
    """Check a state and return its vectors by their name in the file; a RunFileError names what cannot be kept."""
    if isinstance(value, PETSc.Vec):
        if value.getSize() == theta.getSize() and value.getSizes() != theta.getSizes():
            raise RunFileError(f"{where}: a vector must have theta's layout {theta.getSizes()}, not {value.getSizes()}")
        return {where: value}
    if isinstance(value, dict | list):
        found = {}
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            name = str(key)
            if isinstance(value, dict) and (not isinstance(key, str) or "/" in name or name in ("", ".")):
                raise RunFileError(f"{where}: a key must be a str, not empty, not '.' and without '/', not {key!r}")
            check_text(name, where)
            found.update(vectors_in(child, f"{where}/{name}", theta))
        return found
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufc":
            raise RunFileError(f"{where}: an array must hold numbers or bools, not {value.dtype}")
    elif value is not None and not isinstance(value, int | float):
        raise RunFileError(
            f"{where}: a state holds dict, list, int, float, bool, str, None, numpy arrays and PETSc vectors, "
            f"not {type(value).__name__}"
        )
    return {}


def reserve(group: h5py.Group, name: str, size: int) -> h5py.Dataset:
    """Make a float64 dataset whose place in the file is fixed now and whose values HDF5 never touches."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((size,))
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), h5py.h5t.IEEE_F64LE, space, dcpl=properties))


def encode(group: h5py.Group, name: str, value: Any) -> None:
    """Write one value of a state as the dataset or group `name`; its attribute `kind` says what it was."""
    if isinstance(value, np.generic):
        value = value.item()
    node: h5py.Dataset | h5py.Group
    if isinstance(value, PETSc.Vec):
        kind, node = "vector", reserve(group, name, value.getSize())
    elif isinstance(value, np.ndarray):
        kind, node = "array", group.create_dataset(name, data=value)
    elif isinstance(value, list) and value and all(type(item) is float for item in value):
        # A long window of numbers is one dataset, not thousands.
        kind, node = "floats", group.create_dataset(name, data=np.array(value, "<f8"))
    elif isinstance(value, dict | list):
        kind = "dict" if isinstance(value, dict) else "list"
        node = group.create_group(name, track_order=True)
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            encode(node, str(key), child)
    elif value is None:
        kind, node = "none", group.create_dataset(name, data=h5py.Empty("<f8"))
    elif isinstance(value, int) and not isinstance(value, bool):
        # Random-number generators hold integers of 128 bits: those are kept as decimal text.
        fits = -(2**63) <= value < 2**63
        kind, node = "int", group.create_dataset(name, data=np.int64(value) if fits else str(value))
    else:
        kind = {bool: "bool", float: "float"}.get(type(value), "str")
        node = group.create_dataset(name, data=value)
    node.attrs["kind"] = kind


def decode(node: Group | Stored, file: IO[bytes]) -> Any:
    """Return what `encode` wrote into a file that is open, with a `Place` for each vector.

    Raises
    ------
    KeyError, ValueError
        What it has not written.
    """
    kind = node.attributes["kind"]
    if isinstance(node, Group):
        members = {name: decode(child, file) for name, child in node.members.items()}
        return {"dict": members, "list": list(members.values())}[kind]
    if kind == "vector":
        return place(node)
    if kind == "none":
        return None
    if kind in ("str", "int") and isinstance(node.texts, str):
        return node.texts if kind == "str" else int(node.texts)
    found = node.values(file)
    if kind == "array":
        return found
    if kind == "floats" and found.dtype == np.float64 and found.ndim == 1:
        return found.tolist()
    if found.shape or found.dtype.kind != {"int": "i", "float": "f", "bool": "b"}[kind]:
        raise ValueError(f"{found.dtype} {found.shape} is no {kind}")
    return found.item()


def place(node: Stored) -> Place:
    """Where a vector of float64 is; a ValueError where a dataset holds none."""
    if node.dtype != np.dtype("<f8") or node.shape is None or len(node.shape) != 1 or node.packed:
        raise ValueError(f"{node.dtype} {node.shape} is no vector of float64, as it is")
    return Place(node.offset or 0, node.count)


def with_vectors(value: Any, theta: PETSc.Vec, made: list[tuple[int, PETSc.Vec]]) -> Any:
    """Replace each place in a state by a new vector; append the place (bytes) and the vector to `made`."""
    if isinstance(value, Place):
        vec = theta.duplicate()
        if value.size != theta.getSize():
            vec.destroy()
            vec = PETSc.Vec().createMPI(value.size, comm=theta.comm)
        made.append((value.offset, vec))
        return vec
    if isinstance(value, dict):
        return {name: with_vectors(child, theta, made) for name, child in value.items()}
    if isinstance(value, list):
        return [with_vectors(child, theta, made) for child in value]
    return value


def widened(state: Any, comm: MPI.Comm, theta: PETSc.Vec, root: int) -> Any:
    """A state that some consecutive ranks hold, its vectors on theirs, as a state of all ranks. Collective on ``comm``.

    The other ranks pass None; ``root`` is one of those that have it. Vectors that are not as long as theta share the
    memory of the given ones. The caller destroys the vectors that are returned.
    """

    def outline(value: Any) -> Any:
        if isinstance(value, PETSc.Vec):
            return Place(0, value.getSize())
        if isinstance(value, dict):
            return {name: outline(child) for name, child in value.items()}
        return [outline(child) for child in value] if isinstance(value, list) else value

    def fill(form: Any, value: Any) -> Any:
        if isinstance(form, dict):
            return {name: fill(child, None if value is None else value[name]) for name, child in form.items()}
        if isinstance(form, list):
            return [fill(child, None if value is None else value[i]) for i, child in enumerate(form)]
        if not isinstance(form, Place):
            return form
        here = np.empty(0) if value is None else value.array
        vec = PETSc.Vec().createWithArray(here, (len(here), form.size), comm=comm)
        if form.size != theta.getSize():
            return vec
        like = theta.duplicate()
        like.array[:] = redistributed(comm, vec, *like.getOwnershipRange())
        vec.destroy()
        return like

    return fill(comm.bcast(outline(state) if comm.rank == root else None, root), state)


def narrowed(state: Any, comm: MPI.Comm, like: PETSc.Vec | None) -> Any:
    """A state of all ranks as one of those that pass a vector ``like`` of theirs; its vectors are destroyed.

    Vectors as long as ``like`` get its layout, others any. The other ranks pass None and get a state without
    vectors. Collective on ``comm``.
    """
    if isinstance(state, dict):
        return {name: narrowed(child, comm, like) for name, child in state.items()}
    if isinstance(state, list):
        return [narrowed(child, comm, like) for child in state]
    if not isinstance(state, PETSc.Vec):
        return state
    vec, begin, end = None, 0, 0
    if like is not None:
        same = state.getSize() == like.getSize()
        vec = like.duplicate() if same else PETSc.Vec().createMPI(state.getSize(), comm=like.comm)
        begin, end = vec.getOwnershipRange()
    values = redistributed(comm, state, begin, end)
    if vec is not None:
        vec.array[:] = values
    state.destroy()
    return vec
