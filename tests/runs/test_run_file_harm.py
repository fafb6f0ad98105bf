"""Run files made to harm, with a seal that fits, are refused in one line on all ranks, and nothing else is opened."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from run_files import PARAMETERS, SIZE, comm, refused, vector
from sealing import seal_anew

import ddml
import ddml.runs.opened
import ddml.runs.run_file
from ddml import hdf5
from ddml.errors import RunFileError
from ddml.runs.history import History
from ddml.runs.run_file import write

pytestmark = pytest.mark.usefixtures("below_a_gigabyte")

ROWS = 5
SECRET = np.arange(SIZE, dtype="<f8")


def whole(path: Path) -> None:
    """A run file that is as it should be."""
    theta, columns = (
        vector(np.ones(SIZE)),
        {"iteration": np.arange(ROWS), "time": np.arange(ROWS), "loss": np.ones(ROWS)},
    )
    state = {"m": theta, "radius": 0.5, "iteration": 3, "name": "x", "list": [1, 2.0], "array": np.arange(4)}
    write(str(path), theta, parameters=PARAMETERS, state=state, history=History.from_columns(columns), attributes={})
    theta.destroy()


def changed(path: Path, change: Callable[[h5py.File], Any]) -> None:
    """Change a run file with HDF5, and seal it anew. Collective."""
    comm.barrier()
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            change(file)
        seal_anew(path)
    comm.barrier()


def put(name: str, *arguments: Any, **settings: Any) -> Callable[[h5py.File], Any]:
    """A dataset in the place of another one."""

    def change(file: h5py.File) -> None:
        kept = dict(file[name].attrs) if name.startswith("solver") else {}
        del file[name]
        file.create_dataset(name, *arguments, **settings).attrs.update(kept)

    return change


def linked(name: str, link: Any) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        file.pop(name, None)
        file[name] = link

    return change


def external(name: str, size: int) -> Callable[[h5py.File], Any]:
    """Values in another file, which is there."""

    def change(file: h5py.File) -> None:
        other = Path(file.filename).with_name("secret")
        SECRET.tofile(other)
        put(name, (size,), "<f8", external=[(str(other), 0, 8 * size)])(file)

    return change


def outside(name: str) -> Callable[[h5py.File], Any]:
    """A link to a dataset in another file, which is there."""

    def change(file: h5py.File) -> None:
        other = Path(file.filename).with_name("secret.h5")
        with h5py.File(other, "w") as secret:
            secret["x"] = SECRET[:ROWS]
        linked(name, h5py.ExternalLink(str(other), "/x"))(file)

    return change


def virtual(name: str) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        other = Path(file.filename).with_name("secret.h5")
        with h5py.File(other, "w") as secret:
            secret["x"] = SECRET[:ROWS]
        layout = h5py.VirtualLayout((ROWS,), "<f8")
        layout[:] = h5py.VirtualSource(str(other), "x", (ROWS,))
        del file[name]
        file.create_virtual_dataset(name, layout)

    return change


def packed(file: h5py.File) -> None:
    """A compressed part that says it is large."""
    put("solver/m", (9,), "f8", maxshape=(None,), chunks=(10**8,), compression="gzip")(file)
    file["solver/m"].id.write_direct_chunk((0,), bytes(20))


def ring(file: h5py.File) -> None:
    """Groups that hold each other."""
    file["solver"].create_group("a").attrs["kind"] = "dict"
    file["solver/a/b"] = file["solver"]


def deep(file: h5py.File) -> None:
    group = file["solver"]
    for _ in range(200):
        group = group.create_group("x")
        group.attrs["kind"] = "dict"


def again(file: h5py.File) -> None:
    """One vector under many names: the sum would be many times the file."""
    for i in range(50):
        file[f"solver/m{i}"] = file["solver/m"]


def kind(name: str, text: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file[name].attrs.create("kind", text)


HARM: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    # reads outside
    "theta is external": (external("parameters/theta", SIZE), "parameters/theta has its values in another file"),
    "a column is external": (external("history/loss", ROWS), "history/loss has its values in another file"),
    "a vector of the state is external": (external("solver/m", SIZE), "in another file"),
    "a column is virtual": (virtual("history/loss"), "history/loss has its values in another file"),
    "a column is in another file": (outside("history/loss"), "history/loss is a link to something else"),
    "a part of the state is in another file": (outside("solver/m"), "solver/m is a link"),
    "the history is in another file": (linked("history", h5py.ExternalLink("secret.h5", "/")), "history is a link"),
    "a soft link": (linked("solver/m", h5py.SoftLink("/parameters/theta")), "solver/m is a link"),
    "a dangling link": (linked("solver/m", h5py.SoftLink("/nowhere")), "solver/m is a link"),
    "a soft link to itself": (linked("solver/m", h5py.SoftLink("/solver/m")), "solver/m is a link"),
    "a device": (linked("solver/m", h5py.ExternalLink("/dev/zero", "/")), "solver/m is a link"),
    # loops and depth
    "groups in a ring": (ring, "solver/a/b stands there twice"),
    "groups in themselves": (lambda f: f.__setitem__("solver/a", f["solver"]), "stands there twice"),
    "the root in itself": (lambda f: f.__setitem__("solver/a", f["/"]), "stands there twice"),
    "a dataset many times": (again, "stands there twice"),
    "groups without an end": (deep, "more than 64 groups"),
    # silently wrong
    "theta is compressed": (put("parameters/theta", data=np.ones(SIZE), compression="gzip"), "no vector of float64"),
    "theta is of float32": (put("parameters/theta", data=np.ones(SIZE, "f4")), "float32 .* no vector of float64"),
    "theta is big-endian": (put("parameters/theta", data=np.ones(SIZE, ">f8")), "no vector of float64"),
    "theta in chunks": (put("parameters/theta", data=np.ones(SIZE), chunks=(9,)), "no vector of float64"),
    "theta is a matrix": (put("parameters/theta", data=np.ones((SIZE, 1))), "no vector of float64"),
    "a vector is compressed": (put("solver/m", data=np.ones(SIZE), compression="gzip"), "no vector of float64"),
    "a vector is of integers": (put("solver/m", data=np.ones(SIZE, int)), "no vector of float64"),
    "a column is compressed": (put("history/loss", data=np.ones(ROWS), compression="gzip"), "no numbers of its own"),
    "a number that is one of text": (put("solver/iteration", data="three"), "not laid out"),
    "an integer that is none": (put("solver/iteration", data=1.5), "float64 .* is no int"),
    "an integer that is NaN": (put("solver/iteration", data=np.nan), "is no int"),
    "a number in a row": (put("solver/radius", data=[1.0, 2.0]), "is no float"),
    "a truth that is a number": (kind("solver/iteration", "bool"), "is no bool"),
    "an unknown kind": (kind("solver/iteration", "program"), "not laid out"),
    "a kind that is a number": (kind("solver/iteration", 7), "not laid out"),
    "a group that says it is a vector": (kind("solver", "vector"), "not laid out"),
    # declared and stored
    "2e8 rows that nobody stored": (put("history/loss", (200_000_000,), "f8"), "of which 0 are stored"),
    "1e10 rows in chunks": (put("history/loss", (10**10,), "f8", chunks=(10**6,)), "parts, which are not all stored"),
    "1e12 parameters": (put("parameters/theta", (10**12,), "f8"), "of which 0 are stored"),
    "1e18 parts": (put("solver/m", (10**18,), "f8", chunks=(1,)), "which are not all stored"),
    "a part larger than all": (packed, "is to have 800000000 bytes, of which 20 are stored"),
    "an array that nobody stored": (put("solver/array", (10**11,), "i8"), "of which 0 are stored"),
    "texts that nobody stored": (put("parameters/names", (10**9,), h5py.string_dtype()), "of which 0 are stored"),
    "shapes that are not theta's": (put("parameters/shapes", data=[[10**9, 10**9]] * 3), "numbers of theta"),
    "places that are not theta's": (put("parameters/offsets", data=[0, 0, 0]), "are not the 3000 numbers of theta"),
    "fewer names": (put("parameters/names", data=["a"], dtype=h5py.string_dtype()), "not laid out"),
    # types
    "a column of text": (put("history/loss", data=["x"] * ROWS, dtype=h5py.string_dtype()), "no column of float64"),
    "a column of integers": (put("history/loss", data=np.ones(ROWS, int)), "no column of float64"),
    "columns of unequal length": (put("history/loss", data=np.ones(ROWS - 1)), "of the same length"),
    "an unknown column": (lambda f: f.create_dataset("history/secret", data=np.ones(ROWS)), "no column 'secret'"),
    "a column with columns": (put("history/loss", data=np.ones((ROWS, 2))), "one-dimensional"),
    "a group as a column": (lambda f: (f.pop("history/loss"), f.create_group("history/loss")), "no column"),
    "references": (put("solver/array", (3,), h5py.ref_dtype), "neither numbers nor texts"),
    "numbers of variable length": (put("solver/array", (3,), h5py.vlen_dtype("f8")), "neither numbers nor texts"),
    "compounds": (put("solver/array", data=np.zeros(3, [("a", "f8"), ("b", "i4")])), "neither numbers nor texts"),
    "opaque bytes": (put("solver/array", data=np.zeros(3, "V8")), "neither numbers nor texts"),
    "a type as a member": (linked("solver/m", np.dtype("f8")), "neither a group nor a dataset"),
    "an unknown filter": (put("solver/array", data=np.arange(9), chunks=(9,), scaleoffset=2), "other filters"),
    # attributes
    "another format": (lambda f: f.attrs.create("format", "ddml"), "do not say what it is"),
    "no ranks": (lambda f: f.attrs.pop("ranks"), "do not say what it is"),
    "ranks that are none": (lambda f: f.attrs.create("ranks", -1), "do not say what it is"),
    "attributes in a row": (lambda f: f.attrs.create("problem", ["a", "b"]), "not single numbers and texts"),
    "no names": (lambda f: f.pop("parameters/names"), "there is no 'dataset names'"),
    "no history": (lambda f: f.pop("history"), "it has no history"),
}  # fmt: skip


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("name", ["theta is external", "theta is compressed", "no ranks"])
def test_all_ranks_refuse_them_together(shared_tmp: Path, name: str) -> None:
    test_files_made_to_harm_are_refused(shared_tmp, name)


@pytest.mark.parametrize("name", HARM)
def test_files_made_to_harm_are_refused(shared_tmp: Path, name: str) -> None:
    change, expected = HARM[name]
    whole(shared_tmp / "run.h5")
    changed(shared_tmp / "run.h5", change)
    refused_by_read(shared_tmp / "run.h5", expected)


def refused_by_read(path: Path, expected: str) -> None:
    """By what reads all of it, with the same line on all ranks."""
    before = path.read_bytes()
    theta = vector(np.full(SIZE, 3.0))
    with pytest.raises(RunFileError, match=expected) as caught:
        ddml.runs.run_file.read(str(path), theta)
    assert (theta.array_r == 3).all()
    theta.destroy()
    assert len(set(comm.allgather(str(caught.value)))) == 1
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before


VALUES: dict[str, tuple[str, Any, str]] = {
    "theta is NaN": ("parameters/theta", np.nan, "parameters that are NaN or infinite"),
    "theta is infinite": ("parameters/theta", -np.inf, "parameters that are NaN or infinite"),
    "an iteration is NaN": ("history/iteration", np.nan, "iterations do not count up"),
    "an iteration is 1e300": ("history/iteration", 1e300, "iterations do not count up"),
    "an iteration is negative": ("history/iteration", -1.0, "iterations do not count up"),
    "an iteration is no integer": ("history/iteration", 3.5, "iterations do not count up"),
    "an iteration comes late": ("history/iteration", 2.0, "iterations do not count up"),
    "the time is infinite": ("history/time", math.inf, "time is negative or infinite"),
    "the time is negative": ("history/time", -1.0, "time is negative or infinite"),
    "the time is unknown": ("history/time", np.nan, "time is not known"),
    "the work is infinite": ("history/work", math.inf, "work is negative or infinite"),
    "the work of a level is negative": ("history/work_level_0", -1.0, "work_level_0 is negative"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_run_has_are_refused(tmp_path: Path, name: str) -> None:
    place, value, expected = VALUES[name]
    path = tmp_path / f"{comm.rank}.h5"

    def change(file: h5py.File) -> None:
        if place not in file:
            file.create_dataset(place, data=np.zeros(ROWS))
        file[place][-1] = value

    theta = vector(np.ones(SIZE), on=ddml.runs.opened.MPI.COMM_SELF)
    columns = {"iteration": np.arange(ROWS), "time": np.arange(ROWS)}
    write(str(path), theta, parameters=PARAMETERS, state={}, history=History.from_columns(columns), attributes={})
    with h5py.File(path, "r+") as file:
        change(file)
    seal_anew(path)
    with pytest.raises(RunFileError, match=expected):
        ddml.open_run(path)
    theta.destroy()


def test_an_iteration_may_come_twice(tmp_path: Path) -> None:
    """As files have it that were written with PETSc's ntr before it was passed over."""
    path, theta = tmp_path / f"{comm.rank}.h5", vector(np.ones(SIZE), on=ddml.runs.opened.MPI.COMM_SELF)
    columns = {"iteration": np.array([0.0, 1, 2, 2, 3]), "time": np.arange(5.0)}
    write(str(path), theta, parameters=PARAMETERS, state={}, history=History.from_columns(columns), attributes={})
    assert len(ddml.open_run(path).history) == 5
    theta.destroy()


def test_a_fifo_and_devices_are_not_waited_for(shared_tmp: Path) -> None:
    if comm.rank == 0:
        os.mkfifo(shared_tmp / "fifo")
        (shared_tmp / "link").symlink_to("/dev/zero")
    comm.barrier()
    for name in ("fifo", "link"):
        refused(shared_tmp / name, "is no regular file")


def test_limits_of_a_cluster_that_are_lower_stay(tmp_path: Path) -> None:
    """Only root could raise them."""
    room = 5 << 30
    lines = ("import resource", f"resource.setrlimit(resource.RLIMIT_AS, ({room}, {room}))",
             "resource.setrlimit(resource.RLIMIT_CPU, (50, 60))", "from ddml import hdf5_child",
             f"hdf5_child.limit(70, {room + 1})",
             "print(*resource.getrlimit(resource.RLIMIT_AS), *resource.getrlimit(resource.RLIMIT_CPU))")  # fmt: skip
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(room), str(room), "50", "60"]


@pytest.mark.usefixtures("afresh")
def test_what_is_whole_is_read(shared_tmp: Path) -> None:
    whole(shared_tmp / "run.h5")
    assert len(ddml.open_run(shared_tmp / "run.h5").history) == ROWS


def test_a_file_is_looked_at_once_and_anew_where_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for number in (1, 2):
        with h5py.File(path, "w") as file:
            file.attrs["number"] = number
        with path.open("rb") as file:
            assert hdf5.outline(file, ()).attributes == {"number": number}
            path.unlink()  # what is open stays
            assert hdf5.outline(file, ()) == hdf5.outline(file, ())
