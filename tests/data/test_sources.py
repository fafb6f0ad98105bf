"""Tiles of the samples of a data set: what is in them, and that nothing else is read or held."""

import itertools
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from ddml.data import files, writing
from ddml.data.data_set import DataSet
from ddml.data.sources import Source
from ddml.data.writing import Stream
from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError

SELF = MPI.COMM_SELF
SHAPES = {"image": (2, 33, 30), "volume": (1, 9, 12, 11)}
COUNTS = {"": 23, "test_": 7, "held_": 5}
CLASSES = list("abcd")


def content(shape: tuple[int, ...], dtype: Any = np.float32, counts: dict[str, int] = COUNTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for part, n in counts.items():
        found[f"{part}inputs"] = rng.integers(0, 256, (n, *shape)).astype(dtype)
        found[f"{part}labels"] = np.arange(n) % 4
    return found


def write(path: Path, arrays: dict[str, np.ndarray], comm: MPI.Comm = SELF, userblock: int = 0, **plan: Any) -> str:
    """A data file whose inputs are stored in some way of HDF5."""
    if comm.rank == 0:
        with h5py.File(path, "w", userblock_size=userblock) as file:
            file.attrs.create("classes", CLASSES, dtype=h5py.string_dtype())
            file.attrs["origin"] = "chance"
            for name, array in arrays.items():
                file.create_dataset(name, data=array, **(plan if name.endswith("inputs") else {}))
    comm.barrier()
    return str(path)


def prepared(path: Path, arrays: dict[str, np.ndarray], comm: MPI.Comm = SELF) -> str:
    """The same as data/prepare.py writes it."""
    if comm.rank == 0:
        streams = [
            Stream.of(arrays[f"{part}inputs"], arrays[f"{part}labels"]) for part in COUNTS if f"{part}inputs" in arrays
        ]
        writing.write(path, streams[0], streams[1], CLASSES, "chance", None, *streams[2:])
    comm.barrier()
    return str(path)


def chunked(rows: int = 5, **plan: Any) -> Callable[..., str]:
    def made(path: Path, arrays: dict[str, np.ndarray], comm: MPI.Comm) -> str:
        shape = arrays["inputs"].shape
        return write(path, arrays, comm, chunks=(rows, 1, *(n // 2 - 1 for n in shape[2:])), **plan)

    return made


STORED: dict[str, Callable[..., str]] = {
    "in a row": write,
    "prepared": prepared,
    "in chunks": chunked(),
    "gzip": chunked(compression="gzip"),
    "gzip of shuffled": chunked(compression="gzip", shuffle=True),
    "lzf": chunked(compression="lzf"),
    "check sums": chunked(fletcher32=True),
    "behind something": chunked(userblock=512),
    "in very many chunks": lambda path, arrays, comm: write(
        path, arrays, comm, chunks=(1, 1, *[3] * (arrays["inputs"].ndim - 2))
    ),
    "other numbers": lambda path, arrays, comm: write(
        path, {n: a.astype(a.dtype.newbyteorder(">")) for n, a in arrays.items()}, comm
    ),
}  # fmt: skip


BY_HDF5 = ("lzf", "check sums", "behind something", "in very many chunks")  # in another process


def check(source: Source, arrays: dict[str, np.ndarray], ranges: tuple[slice, ...], samples: int | None = None) -> None:
    found = source.tile(ranges)
    assert isinstance(found, DataSet)
    for name, array in found.arrays().items():
        first = samples if name in ("inputs", "labels") else None
        expected = (
            arrays[name][:first] if name.endswith("labels") else arrays[name][(slice(0, first), slice(None), *ranges)]
        )
        assert array.flags.c_contiguous and array.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(array, expected), name
    assert found.arrays().keys() == arrays.keys()
    assert (found.classes, found.maximum) == (source.classes, source.maximum)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in STORED for k in SHAPES if n not in BY_HDF5 or k == "image"])
def test_tiles_are_slices(tmp_path: Path, name: str, kind: str) -> None:
    arrays, rng = content(SHAPES[kind]), np.random.default_rng(1)
    source = files.source(STORED[name](tmp_path / "a.h5", arrays, SELF), SELF)
    assert repr(source) == f"chance: 23 + 7 + 5 held out samples {'x'.join(map(str, SHAPES[kind]))}, 4 classes"
    if name not in BY_HDF5:
        assert repr(source) == repr(files.load(str(tmp_path / "a.h5"), SELF))
    for tile in Tiles(SHAPES[kind], 2, 2).ranges if name not in BY_HDF5 else ():
        check(source, arrays, tile)
    for _ in range(6 if name not in BY_HDF5 else 1):
        edges = [sorted(int(n) for n in rng.choice(n + 1, 2, replace=False)) for n in SHAPES[kind][1:]]
        check(source, arrays, tuple(slice(*e) for e in edges))
    source.free()


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["in a row", "prepared", "gzip", "lzf"])
def test_all_ranks_read_their_own_tiles(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    arrays = content(SHAPES["image"], np.uint8)
    path = STORED[name](shared_tmp / "a.h5", arrays, comm)
    source = files.source(path, comm, samples=11)
    assert (source.count, len(source.test_labels), source.shape) == (11, 7, (2, 33, 30))
    tiles = Tiles(source.shape, (4, 3), 3)
    for tile in range(comm.rank, len(tiles), comm.size)[: 1 if name in BY_HDF5 else None]:
        check(source, arrays, tiles.ranges[tile], samples=11)
    if comm.rank == comm.size - 1 and name not in BY_HDF5:  # alone
        check(source, arrays, tiles.ranges[0], samples=11)
    source.free()
    for samples in (None, 11)[: 1 if name in BY_HDF5 else None]:
        found = files.load(path, comm, samples)
        for array, expected in zip(found.arrays().values(), arrays.values(), strict=True):
            assert np.array_equal(array, expected[: len(array)])
        found.free()


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def cost(source: Source, ranges: tuple[slice, ...]) -> tuple[int, int, int]:
    """Bytes that are read for a tile, the most that are held, and those of the tile."""
    tracemalloc.start()
    before = bytes_read()
    tile = source.tile(ranges)
    read = bytes_read() - before
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(array.nbytes for array in tile.arrays().values())
    return read, held, size


counted = pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="counts by /proc")
LARGE = {"image": ((1, 96, 84), 150, 4, 8), "volume": ((1, 32, 32, 32), 40, (4, 4, 2), 2)}
WORKED_WITH = 400_000  # bytes, whatever the size of a tile


@counted
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("name", ["in a row", "prepared", "in chunks"])
def test_a_tile_costs_its_share_of_the_file(tmp_path: Path, name: str, kind: str) -> None:
    shape, count, parts, overlap = LARGE[kind]
    arrays = content(shape, np.float32, {"": count, "test_": count // 2})
    make = chunked(20) if name == "in chunks" else STORED[name]
    source = files.source(make(tmp_path / "a.h5", arrays, SELF), SELF)
    read, held, size = cost(source, Tiles(shape, parts, overlap).ranges[5])
    assert 0.99 * size < read < 1.1 * size and held < 1.05 * size + WORKED_WITH, (read, held, size)


@counted
def test_of_packed_files_the_chunks_that_touch_a_tile_are_read(tmp_path: Path) -> None:
    arrays = content((1, 96, 84), np.float32, {"": 300, "test_": 100})
    path = write(tmp_path / "a.h5", arrays, chunks=(50, 1, 24, 21), compression="gzip")
    read, held, size = cost(files.source(path, SELF), (slice(24, 48), slice(42, 63)))
    assert read < 1.1 * Path(path).stat().st_size / 16
    assert held < 1.05 * size + WORKED_WITH  # in chunks of 100 kB; zlib's own memory is not counted


POISONED: dict[str, tuple[int, int, int, int]] = {
    "a corner": (0, 0, 0, 0), "beside the tile": (3, 1, 8, 10), "the last sample": (22, 0, 20, 29),
    "one row above": (11, 1, 7, 15), "behind its end": (5, 0, 17, 10),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["in a row", "in chunks", "gzip"])
@pytest.mark.parametrize("name", POISONED)
def test_what_is_outside_of_a_tile_is_not_seen(tmp_path: Path, name: str, layout: str) -> None:
    arrays = content(SHAPES["image"])
    sample, channel, row, column = POISONED[name]
    arrays["inputs"][sample, channel, row, column] = np.nan
    arrays["held_inputs"][2, 1, row, column] = np.inf
    path = STORED[layout](tmp_path / "a.h5", arrays, SELF)
    source = files.source(path, SELF)
    check(source, arrays, (slice(8, 17), slice(11, 29)))
    with pytest.raises(
        InputError, match=f"chance, tile {row}:33 x {column}:30: inputs must be finite; sample {sample}"
    ) as e:
        source.tile((slice(row, 33), slice(column, 30)))
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="inputs must be finite"):
        files.load(path, SELF)


def wrong_label(name: str, value: int) -> dict[str, np.ndarray]:
    arrays = content(SHAPES["image"])
    arrays[name][3] = value
    return arrays


IMAGES = content(SHAPES["image"])
REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a label out of range": (wrong_label("labels", 4), "labels must be from 0 to 3, for 4 classes; sample 3 has 4"),
    "a negative label": (wrong_label("held_labels", -1), "held_labels must be from 0 to 3"),
    "a label of the test out of range": (wrong_label("test_labels", 1 << 40), "test_labels must be from 0 to 3"),
    "a class without a sample": (
        IMAGES | {"labels": IMAGES["labels"] % 3}, "has no sample to train on of class d: leave out"),
    "classes without a sample": (
        IMAGES | {"labels": IMAGES["labels"] * 0 + 1}, "no sample to train on of class a, c, d"),
    "held-out samples without labels": (
        {n: a for n, a in IMAGES.items() if n != "held_labels"}, "held_inputs and held_labels must be there both"),
    "held-out labels without samples": (
        {n: a for n, a in IMAGES.items() if n != "held_inputs"}, "held_inputs and held_labels must be there both"),
    "fewer held-out labels": (
        IMAGES | {"held_labels": np.zeros(4, int)}, "held_inputs has 5 samples, but held_labels 4"),
    "held-out samples of another size": (
        IMAGES | {"held_inputs": IMAGES["held_inputs"][..., 1:]}, "held_inputs must have samples as inputs has"),
    "held-out samples of another type": (
        IMAGES | {"held_inputs": IMAGES["held_inputs"].astype(float)}, "held_inputs must have samples as inputs has"),
    "no held-out samples": (
        IMAGES | {"held_inputs": IMAGES["held_inputs"][:0], "held_labels": np.zeros(0, int)}, "held_inputs is empty"),
    "vectors": (content((12,)), r"samples \(12,\): tiles are of images"),
    "samples of two axes": (content((3, 4)), r"samples \(3, 4\): tiles are of images"),
    "samples of five axes": (content((1, 2, 2, 2, 2)), r"tiles are of images"),
    "volumes of different sizes": (
        IMAGES | {"test_inputs": IMAGES["test_inputs"][:, :1]}, "test_inputs must have samples as inputs has"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_by_all_ranks(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    arrays, expected = REFUSED[name]
    path = write(shared_tmp / "a.h5", arrays, comm)
    with pytest.raises(InputError, match=expected) as caught:
        files.source(path, comm)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_few_samples_may_leave_a_class_without_one_on_all_ranks(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = write(shared_tmp / "a.h5", IMAGES, comm)
    for name in (path, "digits"):
        with pytest.raises(InputError, match="has no sample to train on of class"):
            files.source(name, comm, samples=3)
    with pytest.raises(InputError, match="24 training samples were asked for"):
        files.source(path, comm, samples=24)
    with pytest.raises(InputError, match="there is no such file"):
        files.source(str(shared_tmp / "b.h5"), comm)
    files.source(path, comm, samples=4).free()


@pytest.mark.parametrize(
    "ranges",
    [
        (slice(0, 5),),
        (slice(0, 5),) * 3,
        (slice(0, 34), slice(0, 5)),
        (slice(-1, 5), slice(0, 5)),
        (slice(4, 4), slice(0, 5)),
    ],
)
def test_ranges_that_are_none_of_the_samples_are_refused(tmp_path: Path, ranges: tuple[slice, ...]) -> None:
    source = files.source(write(tmp_path / "a.h5", IMAGES), SELF)
    with pytest.raises(InputError, match=r"is none of samples \(2, 33, 30\)"):
        source.tile(ranges)


def test_a_file_that_is_replaced_or_shortened_meanwhile(tmp_path: Path) -> None:
    source = files.source(write(tmp_path / "a.h5", IMAGES), SELF)
    (tmp_path / "a.h5").rename(tmp_path / "b.h5")
    write(tmp_path / "a.h5", content(SHAPES["volume"]))
    check(source, IMAGES, (slice(3, 9), slice(0, 30)))
    with open(tmp_path / "b.h5", "rb+") as file:
        file.truncate(3000)
    with pytest.raises(InputError, match=r"cannot read data file .*a.h5: it became shorter"):
        source.tile((slice(3, 9), slice(0, 30)))


USER = """
import numpy as np
def volumes(rng=np.random.default_rng): rng = rng(3); return {
    "inputs": rng.standard_normal((9, 1, 4, 5, 6)), "labels": [0, 1, 2] * 3,
    "test_inputs": rng.standard_normal((2, 1, 4, 5, 6)), "test_labels": [1, 2],
    "held_inputs": rng.standard_normal((3, 1, 4, 5, 6)), "held_labels": [2, 1, 0],
}
"""


@pytest.mark.ranks
def test_data_sets_that_are_no_files_are_cut_from_memory_on_all_ranks(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.rank == 0:
        (shared_tmp / "mine.py").write_text(USER)
    comm.barrier()
    for name, samples in itertools.product((f"{shared_tmp}/mine.py:volumes", "digits"), (None, 3, 60)):
        if (name == "digits") == (samples == 3) or (samples == 60 and name != "digits"):
            continue
        whole, source = files.load(name, comm, samples), files.source(name, comm, samples)
        ranges = (slice(1, 3), slice(2, 5), slice(0, 6))[: len(source.shape) - 1]
        check(source, whole.arrays(), ranges)
        assert repr(source) == repr(whole)
        mine, other = source.tile(ranges), source.tile(ranges)
        mine.inputs[...] = comm.rank  # is nobody else's
        comm.barrier()
        source.free()
        whole.free()
        assert (mine.inputs == comm.rank).all() and not (other.inputs == comm.rank).all()
        assert source.labels[:3].tolist() == [0, 1, 2]


def test_small_samples_lie_in_a_row_and_others_in_chunks(tmp_path: Path) -> None:
    assert writing.chunk(60_000, (1, 28, 28), 1) is None
    assert writing.chunk(100, (5_000,), 8) is None
    for count, shape, itemsize in (
        (1695, (1, 96, 84), 1), (3, (1, 96, 84), 8), (10**6, (3, 224, 224), 4), (2000, (1, 64, 64, 64), 4),
        (7, (2, 5, 999), 4),
    ):  # fmt: skip
        made = writing.chunk(count, shape, itemsize)
        assert made is not None and len(made) == len(shape) + 1 and made[1] == shape[0]
        assert 1 <= made[0] <= count and all(1 <= m <= n for m, n in zip(made[2:], shape[1:], strict=True))
        assert np.prod([-(-n // m) for n, m in zip((count, *shape), made, strict=True)]) <= 2 * writing.MOST


@counted
@pytest.mark.long
@pytest.mark.parametrize("name", ["in a row", "prepared"])
def test_a_rank_takes_its_share_of_two_gigabytes(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    count, shape = 2000, (1, 64, 64, 64)
    path = str(shared_tmp / "a.h5")
    if comm.rank == 0:
        rng = np.random.default_rng(0)
        some = rng.standard_normal((50, *shape)).astype(np.float32)

        def pieces() -> Any:
            return ((some, np.arange(50) % 4) for _ in range(count // 50))

        streams = Stream(count, shape, np.float32, pieces), Stream.of(some[:4], np.arange(4))
        if name == "prepared":
            writing.write(path, *streams, CLASSES, "chance")
        else:
            with h5py.File(path, "w") as file:
                file.attrs["classes"] = CLASSES
                for part, stream in zip(("", "test_"), streams, strict=True):
                    inputs = file.create_dataset(f"{part}inputs", (stream.count, *shape), "f4")
                    file[f"{part}labels"] = np.arange(stream.count) % 4
                    for i, (x, _) in enumerate(stream.pieces()):
                        inputs[i * len(x) : (i + 1) * len(x)] = x
    comm.barrier()
    source, tiles = files.source(path, comm), Tiles(shape, (4, 4, 2), 2)
    read, held, size = cost(source, tiles.ranges[(5 + comm.rank) % len(tiles)])
    assert read < 1.1 * size and held < 1.1 * size, (read, held, size)
    source.free()
    comm.barrier()
