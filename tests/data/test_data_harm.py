"""Data files made to harm are refused in one line on all ranks: nothing else is read, nothing large is allocated."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from ddml.data import files
from ddml.data.data_set import DataSet
from ddml.errors import InputError

pytestmark = pytest.mark.usefixtures("below_a_gigabyte")

N, TESTS, D = 8, 4, 3
TEXT = h5py.string_dtype()


def write(path: Path) -> None:
    """A data file that is as it should be."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"origin": "chance", "classes": ["a", "b"], "maximum": 1.0})
        for t, n in (("", N), ("test_", TESTS)):
            file[f"{t}inputs"] = np.ones((n, D))
            file[f"{t}labels"] = np.arange(n) % 2


def put(name: str, *arguments: Any, **settings: Any) -> Callable[[h5py.File], Any]:
    return lambda file: (file.pop(name), file.create_dataset(name, *arguments, **settings))


def linked(name: str, link: Any) -> Callable[[h5py.File], Any]:
    return lambda file: (file.pop(name), file.__setitem__(name, link))


def secret(file: h5py.File) -> str:
    """Another data file, beside this one."""
    other = Path(file.filename).with_name("secret.h5")
    write(other)
    return str(other)


def external(file: h5py.File) -> None:
    put("inputs", (N, D), "u1", external=[(secret(file), 0, N * D)])(file)


def outside(file: h5py.File) -> None:
    linked("inputs", h5py.ExternalLink(secret(file), "/inputs"))(file)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((N, D), "f8")
    layout[:] = h5py.VirtualSource(secret(file), "inputs", (N, D))
    file.pop("inputs")
    file.create_virtual_dataset("inputs", layout)


def bomb(size: int, count: int) -> Callable[[h5py.File], Any]:
    """Inputs of zeros in parts of so many bytes that are stored well packed."""

    def change(file: h5py.File) -> None:
        put("inputs", (count, size), "u1", chunks=(1, size), compression="gzip")(file)
        put("labels", data=np.zeros(count, int))(file)
        packed = zlib.compress(bytes(size))
        for i in range(count):
            file["inputs"].id.write_direct_chunk((i, 0), packed)

    return change


def again(file: h5py.File) -> None:
    del file["test_inputs"]
    file["test_inputs"] = file["inputs"]


def damaged(file: h5py.File) -> None:
    """A part that is there and cannot be unpacked."""
    put("inputs", (N, D), "f8", chunks=(N, D), compression="gzip")(file)
    file["inputs"].id.write_direct_chunk((0, 0), b"nothing that gzip knows")


HARM: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external bytes": (external, "inputs has its values in another file"),
    "an external link": (outside, "inputs is a link to something else"),
    "a virtual dataset": (virtual, "inputs has its values in another file"),
    "a soft link": (linked("test_labels", h5py.SoftLink("/labels")), "test_labels is a link to something else"),
    "a soft link to itself": (linked("labels", h5py.SoftLink("/labels")), "labels is a link"),
    "one dataset under two names": (again, "test_inputs stands there twice"),
    "2 GB in parts that nobody stored": (
        put("inputs", (N, 1 << 28), "u1", chunks=(1, 1 << 20), compression="gzip"), "which are not all stored"),
    "2 GB that nobody stored": (put("inputs", (N, 1 << 28), "u1"), "inputs is to have 2147483648 bytes"),
    "1e9 samples": (put("inputs", (10**9, D), "f8"), "of which 0 are stored"),
    "1e12 samples": (put("labels", (10**12,), "i8"), "of which 0 are stored"),
    "3e9 features": (put("inputs", (N, 3 * 10**9), "u1", chunks=(1, 1 << 20)), "which are not all stored"),
    "512 MB in 512 kB": (bomb(64 << 20, 8), "inputs is to have 536870912 bytes"),
    "a part that is damaged": (damaged, "inputs"),
    "an unknown filter": (put("labels", data=np.arange(N) % 2, chunks=(N,), scaleoffset=1), "with other filters"),
    "references": (put("inputs", (N, D), h5py.ref_dtype), "neither numbers nor texts"),
    "numbers of variable length": (put("inputs", (N, D), h5py.vlen_dtype("f8")), "neither numbers nor texts"),
    "compounds": (put("inputs", (N, D), np.dtype([("a", "f4"), ("b", "f4")])), "neither numbers nor texts"),
    "texts": (put("inputs", data=[["x"] * D] * N, dtype=h5py.string_dtype()), "inputs must be uint8"),
    "complex numbers": (put("inputs", data=np.ones((N, D), complex)), "inputs must be uint8"),
    "no names of classes": (lambda f: f.attrs.create("classes", [], dtype=TEXT), "its classes are no names"),
    "numbers of classes": (lambda f: f.attrs.create("classes", [0, 1]), "its classes are no names"),
    "a label of 3e9": (put("labels", data=[3 * 10**9] * N), "labels must be from 0 to 1"),
    "a maximum that is infinite": (lambda f: f.attrs.create("maximum", np.inf), "maximum"),
    "an origin in a row": (lambda f: f.attrs.create("origin", ["a"] * 3), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_files_made_to_harm_are_refused(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    change, expected = HARM[name]
    path = shared_tmp / "data.h5"
    if comm.rank == 0:
        write(path)
        with h5py.File(path, "r+") as file:
            change(file)
    comm.barrier()
    if not expected:
        files.read(str(path), comm).free()
        return
    with pytest.raises(InputError, match=expected) as caught:
        files.read(str(path), comm)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("name", ["external bytes", "a part that is damaged", "512 MB in 512 kB"])
def test_all_ranks_refuse_them_together(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    test_files_made_to_harm_are_refused(comm, shared_tmp, name)


@pytest.mark.parametrize(
    "name", ["external bytes", "an external link", "a virtual dataset", "512 MB in 512 kB", "1e9 samples"]
)
def test_tiles_of_them_are_refused_as_well(tmp_path: Path, name: str) -> None:
    change, expected = HARM[name]
    write(tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        change(file)
    with pytest.raises(InputError, match=expected):
        files.source(str(tmp_path / "data.h5"), MPI.COMM_SELF)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_not_waited_for_on_any_of_the_ranks(
    comm: MPI.Comm, shared_tmp: Path, kind: str
) -> None:
    path = shared_tmp / "data.h5"
    if comm.rank == 0:
        {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    comm.barrier()
    with pytest.raises(InputError, match=f"cannot read .*{path}.*no regular file"):
        files.read(str(path), comm)


def test_classes_are_not_counted_without_an_end() -> None:
    x = np.ones((2, 3))
    assert DataSet(x, [0, 7], x, [1, 1]).classes == tuple("01234567")
    with pytest.raises(InputError, match="a label is 3000000000: of more than 1000000 classes give the names"):
        DataSet(x, [0, 3 * 10**9], x, [1, 1])


def test_what_others_store_in_their_ways_is_read(comm: MPI.Comm, shared_tmp: Path) -> None:
    """In the head of a dataset, in chunks and with the filters that HDF5 brings, of other types."""
    path, x = shared_tmp / "data.h5", np.arange(N * D, dtype=float).reshape(N, D)
    if comm.rank == 0:
        write(path)
        with h5py.File(path, "r+") as file:
            del file["inputs"], file["test_inputs"], file["labels"]
            file.create_dataset("inputs", data=x, chunks=(3, 2), compression="gzip", shuffle=True, fletcher32=True)
            file.create_dataset("test_inputs", data=x[:TESTS].astype(">f8"), chunks=(3, 2), compression="lzf")
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_layout(h5py.h5d.COMPACT)
            space = h5py.h5s.create_simple((N,))
            made = h5py.h5d.create(file.id, b"labels", h5py.h5t.STD_U8BE, space, dcpl=plan)
            h5py.Dataset(made)[:] = np.arange(N) % 2
    comm.barrier()
    found = files.read(str(path), comm)
    assert np.array_equal(found.inputs, x) and np.array_equal(found.test_inputs, x[:TESTS])
    assert found.labels.tolist() == [0, 1] * (N // 2)
    found.free()
    few = files.read(str(path), comm, samples=5)
    assert np.array_equal(few.inputs, x[:5])
    few.free()
