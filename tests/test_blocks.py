"""Parts of arrays in blocks of a file, against slices of the whole arrays."""

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddml.blocks import SPARE, Blocks
from ddml.errors import InputError

RNG = np.random.default_rng(0)
FILTERS: tuple[tuple[str, ...], ...] = ((), ("gzip",), ("shuffle", "gzip"), ("gzip", "shuffle"), ("shuffle",))


def packed(block: np.ndarray, filters: tuple[str, ...]) -> bytes:
    content = block.tobytes()
    for name in filters:
        if name == "gzip":
            content = zlib.compress(content)
        else:  # the first bytes of all numbers, then the second ones, and so on
            whole = len(content) - len(content) % block.itemsize
            rows = np.frombuffer(content[:whole], np.uint8).reshape(-1, block.itemsize)
            content = rows.T.tobytes() + content[whole:]
    return content


def stored(path: Path, array: np.ndarray, block: tuple[int, ...], filters: tuple[str, ...] = ()) -> Blocks:
    """An array in a file, block by block, in any order and with something between them."""
    counts = [-(-n // b) for n, b in zip(array.shape, block, strict=True)]
    padded = np.pad(array, [(0, c * b - n) for n, b, c in zip(array.shape, block, counts, strict=True)])
    indices = list(np.ndindex(*counts))
    contents = [
        packed(padded[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block, strict=True))], filters)
        for index in indices
    ]
    places, file = [0] * len(contents), io.BytesIO()
    for number in RNG.permutation(len(contents)):
        file.write(b"between")
        places[number] = file.tell()
        file.write(contents[number])
    path.write_bytes(file.getvalue())
    return Blocks("x", array.shape, array.dtype, block, places, [len(c) for c in contents], filters)


def part(shape: tuple[int, ...]) -> tuple[slice, ...]:
    edges = [sorted(RNG.choice(n + 1, 2, replace=False)) for n in shape]
    return tuple(slice(int(a), int(b)) for a, b in edges)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f8"])
def test_parts_are_slices(tmp_path: Path, dtype: str, filters: tuple[str, ...]) -> None:
    for axes in (1, 2, 3, 4, 5):
        for _ in range(6):
            shape = tuple(int(n) for n in RNG.integers(1, 9, axes))
            array = RNG.integers(0, 256, shape).astype(dtype)
            blocks = stored(tmp_path / "x", array, tuple(int(RNG.integers(1, n + 2)) for n in shape), filters)
            with open(tmp_path / "x", "rb") as file:
                for chosen in (*(part(shape) for _ in range(5)), tuple(slice(0, n) for n in shape)):
                    into = np.empty([s.stop - s.start for s in chosen], array.dtype.newbyteorder("="))
                    blocks.read(file, chosen, into)
                    assert np.array_equal(into, array[chosen]), (shape, blocks.block, chosen)
                blocks.read(file, [slice(0, 0)] * axes, np.empty([0] * axes))
                assert file.tell() == 0


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="counts by /proc")
def test_no_more_is_read_than_is_spared_calls_for(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (50, 2, 40, 30)).astype(np.float32)
    for block in ((50, 2, 40, 30), (7, 2, 10, 8), (50, 1, 40, 16)):
        blocks = stored(tmp_path / "x", array, block)
        with open(tmp_path / "x", "rb") as file:
            for chosen in (
                *(part(array.shape) for _ in range(20)),
                (slice(0, 50), slice(0, 2), slice(1, 40), slice(1, 30)),
            ):
                into = np.empty([s.stop - s.start for s in chosen], array.dtype)
                before = bytes_read()
                blocks.read(file, chosen, into)
                counted = bytes_read() - before
                assert into.nbytes <= counted <= SPARE * into.nbytes + 500, (block, chosen)  # /proc itself


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    blocks = stored(tmp_path / "x", np.ones((4, 5)), (4, 5))
    with open(tmp_path / "x", "rb+") as file:
        file.truncate(100)
        with pytest.raises(InputError, match="became shorter"):
            blocks.read(file, (slice(0, 4), slice(0, 5)), np.empty((4, 5)))


DAMAGE: dict[str, Any] = {
    "no gzip": lambda content: b"\0" * len(content),
    "cut": lambda content: content[:-6] + b"\0" * 6,
    "another block": lambda content: zlib.compress(bytes(8)).ljust(len(content), b"\0"),
    "more than a block": lambda content: zlib.compress(bytes(1 << 16))[: len(content)].ljust(len(content), b"\0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_blocks_that_cannot_be_unpacked_are_refused(tmp_path: Path, name: str) -> None:
    blocks = stored(tmp_path / "x", RNG.standard_normal((4, 5)), (4, 5), ("gzip",))
    content = (tmp_path / "x").read_bytes()
    begin = blocks.places[0]
    (tmp_path / "x").write_bytes(content[:begin] + DAMAGE[name](content[begin:]))
    with open(tmp_path / "x", "rb") as file, pytest.raises(InputError, match="x cannot be unpacked: "):
        blocks.read(file, (slice(0, 4), slice(0, 5)), np.empty((4, 5)))
