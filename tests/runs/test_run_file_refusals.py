"""What run files cannot keep, and files that are none, are refused on all ranks."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc
from run_files import SIZE, assert_values, comm, numbers, refused, save, small, vector

from ddml.errors import RunFileError
from ddml.runs import sealed
from ddml.runs.history import History
from ddml.runs.run_file import check_writable, read, write


def test_another_size_is_refused(shared_tmp: Path) -> None:
    small(shared_tmp / "run.h5")
    theta = vector(np.full(SIZE + 1, 5.0))
    with pytest.raises(RunFileError, match=r"holds 3000 parameters, 3001 were expected"):
        read(str(shared_tmp / "run.h5"), theta)
    assert_values(theta, np.full(SIZE + 1, 5.0))
    theta.destroy()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": {1, 2}}, r"solver/x.*not set"),
        ({"x": [{"y": 1j}]}, r"solver/x/0/y.*not complex"),
        ({"x": np.array(["a"])}, r"solver/x: an array must hold numbers"),
        ({"x": {1: 2}}, r"solver/x: a key must be a str"),
        ({"a/b": 1}, "without '/'"),
        ({"": 1}, "not empty"),
        ({"x": "a\0b"}, "NUL"),
        ({"x": "\ud800"}, "surrogates"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused(shared_tmp: Path, state: dict[str, Any], message: str) -> None:
    path = shared_tmp / "run.h5"
    small(path)
    before = path.read_bytes()
    theta = vector(numbers(0))
    with pytest.raises(RunFileError, match=message):
        save(path, theta, state)
    theta.destroy()
    assert path.read_bytes() == before
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]


def test_a_vector_of_another_layout_is_refused_on_all_ranks(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.size == 1:
        pytest.skip("one rank knows one layout")
    theta = vector(np.zeros(SIZE))
    other = PETSc.Vec().createMPI((SIZE if comm.rank == 0 else 0, SIZE), comm=comm)
    with pytest.raises(RunFileError, match=r"solver/m: a vector must have theta's layout"):
        save(shared_tmp / "run.h5", theta, {"m": other})
    theta.destroy()
    other.destroy()


def test_a_vector_of_another_size_comes_back_in_equal_shares(comm: MPI.Comm, shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    size = 3 * SIZE + 1
    other = PETSc.Vec().createMPI((size if comm.rank == comm.size - 1 else 0, size), comm=comm)
    begin, end = other.getOwnershipRange()
    other.setArray(np.sqrt(np.arange(begin, end, dtype=float)))
    save(shared_tmp / "run.h5", theta, {"m": other})
    state, _ = read(str(shared_tmp / "run.h5"), theta)
    begin, end = state["m"].getOwnershipRange()
    assert end - begin - size // comm.size in (0, 1)
    assert np.array_equal(state["m"].array_r, np.sqrt(np.arange(begin, end, dtype=float)))
    for vec in (theta, other, state["m"]):
        vec.destroy()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"format": "x"}, "use another name"),
        ({"a": [1]}, "must be a str, int, float or bool, not a list"),
        ({"a": 2**63}, "64 bits"),
    ],
)
def test_attributes_that_cannot_be_kept_are_refused(shared_tmp: Path, attributes: Any, message: str) -> None:
    theta = vector(np.zeros(3))
    with pytest.raises(RunFileError, match=message):
        write(str(shared_tmp / "r.h5"), theta, parameters=(), state={}, history=History(), attributes=attributes)
    theta.destroy()


def test_an_error_on_one_rank_is_an_error_on_all(shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    state = {"x": {1} if comm.rank == comm.size - 1 else 1}
    with pytest.raises(RunFileError, match="not set"):
        save(shared_tmp / "run.h5", theta, state)
    theta.destroy()


@pytest.mark.skipif(comm.size == 1, reason="needs two ranks")
def test_vectors_that_only_some_ranks_have_are_refused(shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    with pytest.raises(RunFileError, match="rank 1 and rank 0 differ in solver/m"):
        save(shared_tmp / "run.h5", theta, {"m": theta} if comm.rank == 0 else {})
    theta.destroy()
    assert os.listdir(shared_tmp) == []


@pytest.mark.parametrize("place", ["folder", "missing/run.h5", "file/run.h5"])
def test_unwritable_places(shared_tmp: Path, place: str) -> None:
    if comm.rank == 0:
        (shared_tmp / "folder").mkdir()
        (shared_tmp / "file").write_text("in the way")
    comm.barrier()
    with pytest.raises(RunFileError, match="cannot write"):
        check_writable(str(shared_tmp / place), comm)
    with pytest.raises(RunFileError, match="cannot write"):
        small(shared_tmp / place)
    comm.barrier()
    assert sorted(os.listdir(shared_tmp)) == ["file", "folder"]
    assert (shared_tmp / "file").read_text() == "in the way"


def test_check_writable_leaves_no_trace(shared_tmp: Path) -> None:
    check_writable(str(shared_tmp / "run.h5"), comm)
    comm.barrier()
    assert os.listdir(shared_tmp) == []
    comm.barrier()
    small(shared_tmp / "run.h5")
    before = (shared_tmp / "run.h5").read_bytes()
    check_writable(str(shared_tmp / "run.h5"), comm)
    assert (shared_tmp / "run.h5").read_bytes() == before
    assert os.listdir(shared_tmp) == ["run.h5"]


def put(path: Path, content: bytes) -> None:
    """Rank 0 writes the file."""
    comm.barrier()
    if comm.rank == 0:
        path.write_bytes(content)
    comm.barrier()


def test_foreign_files_are_refused(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    refused(path, "there is no run file")
    refused(shared_tmp, "is a folder, not a run file")
    for content in (b"", b"x", b"garbage" * 1000, bytes(4096)):
        put(path, content)
        refused(path, "is not a run file")
    if comm.rank == 0:
        with h5py.File(path, "w") as file:
            file["parameters/theta"] = np.zeros(SIZE)
    comm.barrier()
    refused(path, "is an HDF5 file but not a run file")


def test_a_newer_format_is_refused(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "FORMAT_VERSION", 2)
        small(shared_tmp / "run.h5")
    refused(shared_tmp / "run.h5", "has run file format 2, this ddml reads formats up to 1; use a newer ddml")
