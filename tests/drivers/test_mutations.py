"""Files that chance has changed are read, or refused in one line: no traceback, no crash, nothing else opened.

1,000 files; with DDML_LONG=1 10,000. A process reads one after the other, and is started anew where it dies.
"""

import gzip
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from calling import call
from launch import ROOT
from mpi4py import MPI
from sealing import sealed_anew

import ddml
from ddml.data import writing
from ddml.runs import exported

TIMES = 10 if os.environ.get("DDML_LONG") else 1
SECONDS, MEMORY, PATIENCE = 5.0, 1 << 30, 120.0
RNG = np.random.default_rng(0)
QUICK = ("-points", 40, "-width", 4, "-depth", 1, "-test_points", 0, "-error_points", 16, "-progress", "none")

# kind of file: its reader, its name, and how many of a thousand
KINDS = {
    "run": ("run", "a.h5", 230), "run sealed anew": ("run", "a.h5", 25), "network sealed anew": ("network", "a.h5", 5),
    "restart sealed anew": ("restart", "a.h5", 5), "data": ("data", "a.h5", 20), "packed data": ("data", "a.h5", 15),
    "idx": ("idx", "train-images-idx3-ubyte", 100), "idx.gz": ("idx", "train-images-idx3-ubyte", 70),
    "cifar": ("cifar", "test_batch.bin", 50), "npz": ("numpy", "a.npz", 100), "packed npz": ("numpy", "a.npz", 100),
    "npy": ("numpy", "a.npy", 100), "png": ("image", "a.png", 30), "jpg": ("image", "a.jpg", 20),
    "gif": ("image", "a.gif", 20), "tif": ("image", "a.tif", 30), "libsvm": ("libsvm", "a.txt", 20),
    "libsvm.gz": ("libsvm", "a.txt", 20), "points": ("points", "a.csv", 20), "torch": ("torch", "a.pt", 20),
}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def numbers(save: Callable[..., Any], *unnamed: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *unnamed, **named)
    return file.getvalue()


def picture(kind: str) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    file = io.BytesIO()
    image.fromarray(RNG.integers(0, 256, (20, 20, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each kind that is as it should be; those that it is read with lie beside it."""
    folder = tmp_path_factory.mktemp("good")
    assert call("pinn", *QUICK, "-max_it", 3, "-output", folder / "run.h5", comm=MPI.COMM_SELF) == 0
    run = ddml.open_run(folder / "run.h5")
    exported.save(folder / "net.pt", run, run.network())
    x, y = RNG.integers(0, 256, (12, 5), np.uint8), np.arange(12) % 3
    source = writing.Stream.of(x, y)
    writing.write(folder / "data.h5", source, source, list("abc"), "chance")
    with h5py.File(folder / "packed.h5", "w") as file:
        file.attrs["classes"] = list("abc")
        for t in ("", "test_"):
            file.create_dataset(f"{t}inputs", data=x, chunks=(5, 5), compression="gzip", shuffle=True)
            file.create_dataset(f"{t}labels", data=y, chunks=(5,), compression="lzf")
    pixels, lines = RNG.integers(0, 256, (6, 9, 9), np.uint8), b"1 1:0.5 3:2\n-1 2:1e-3\n" * 20
    batch = np.concatenate([np.arange(4, dtype=np.uint8)[:, None], RNG.integers(0, 256, (4, 3072), np.uint8)], 1)
    of_run, arrays = (folder / "run.h5").read_bytes(), {"inputs": x.astype(float), "labels": y}
    return {
        "run": of_run, "run sealed anew": of_run, "network sealed anew": of_run, "restart sealed anew": of_run,
        "data": (folder / "data.h5").read_bytes(), "packed data": (folder / "packed.h5").read_bytes(),
        "idx": idx(pixels), "idx.gz": gzip.compress(idx(pixels)), "cifar": batch.tobytes(),
        "npz": numbers(np.savez, **arrays), "packed npz": numbers(np.savez_compressed, **arrays),
        "npy": numbers(np.save, x.astype(float)), "png": picture("PNG"), "jpg": picture("JPEG"), "gif": picture("GIF"),
        "tif": picture("TIFF"), "libsvm": lines, "libsvm.gz": gzip.compress(lines),
        "points": b"t,x\n" + b"0.25,0.5\n" * 9, "torch": (folder / "net.pt").read_bytes(),
    }  # fmt: skip


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, extreme numbers written, a piece cut, doubled, or zero."""
    found, how = bytearray(content), rng.integers(6)
    for _ in range(rng.integers(1, 4)):
        # heads and tables stand in front more often than not
        place = int(rng.integers(len(found) if rng.random() < 0.6 else min(len(found), 4096)))
        size = int(rng.integers(1, 40))
        if how == 0:
            found[place] ^= 1 << int(rng.integers(8))
        elif how == 1:
            found[place] = int(rng.integers(256))
        elif how == 2:
            extreme = [
                b"\xff" * 8,
                b"\0" * 8,
                b"\xff" * 7 + b"\x7f",
                b"\xff" * 4,
                b"\0\0\0\x80",
                b"\0\0\0\0\0\0\xf8\x7f",
            ]
            found[place : place + 8] = extreme[rng.integers(len(extreme))]
        elif how == 3:
            found[place : place + size] = found[place : place + size] * 2
        elif how == 4:
            found[place : place + size] = bytes(size)
        else:
            del found[place : place + (size if rng.random() < 0.7 else len(found))]
        found = found or bytearray(b"\0")
    return bytes(found)


class Reader:
    """The process that reads."""

    def __init__(self) -> None:
        alone = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_"))}
        alone["PYTHONPATH"] = str(ROOT / "tests")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mutated.py"))], env=alone, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, reader: str, path: Path) -> dict[str, Any]:
        """What it says of a file; how it died, or that it hangs."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{reader} {path}\n".encode())
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            return {"said": "hangs", "seconds": 0.0, "opened": [], "peak": 0}
        line = self.process.stdout.readline()
        if not line:
            return {"said": f"died: {self.process.wait()}", "seconds": 0.0, "opened": [], "peak": 0}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[list[Reader]]:
    """The process that reads now."""
    held = [Reader()]
    yield held
    held[0].end()


def folder_of(kind: str, good: dict[str, bytes], folder: Path) -> Path:
    """A folder with what is read beside a file; where the file is to be."""
    reader, name, _ = KINDS[kind]
    path = folder / "class" / name
    path.parent.mkdir()
    if reader == "idx":
        for other, images in (("train", False), ("t10k", True)):
            (path.parent / f"{other}-labels-idx1-ubyte").write_bytes(idx(np.arange(6, dtype=np.uint8)))
            if images:
                (path.parent / f"{other}-images-idx3-ubyte").write_bytes(idx(np.zeros((6, 9, 9), np.uint8)))
    if reader == "cifar":
        (path.parent / "data_batch_1.bin").write_bytes(good["cifar"])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_chance_has_changed_is_read_or_refused_in_a_line(
    kind: str, good: dict[str, bytes], reader: list[Reader], tmp_path: Path
) -> None:
    path, rng = folder_of(kind, good, tmp_path), np.random.default_rng([7, *kind.encode()])
    path.write_bytes(good[kind])
    before = reader[0].ask(KINDS[kind][0], path)
    assert before["said"] == "read", before
    wrong, refused, slowest, peak = [], 0, 0.0, 0
    count = KINDS[kind][2] * TIMES
    for number in range(count):
        content = mutated(good[kind], rng)
        path.write_bytes(sealed_anew(content) if kind.endswith("anew") else content)
        found = reader[0].ask(KINDS[kind][0], path)
        said, slowest, peak = found["said"], max(slowest, found["seconds"]), max(peak, found["peak"] - before["peak"])
        refused += said.startswith("refused: ")
        one = said == "read" or (said.startswith("refused: ") and said.isprintable())
        if not one or found["opened"] or found["seconds"] > SECONDS:
            kept = tmp_path / f"wrong {number}"
            kept.write_bytes(path.read_bytes())
            wrong.append(f"{kept}: {said[-900:]} {found['seconds']:.1f} s {found['opened']}")
        if said.startswith(("died", "hangs")):
            reader[0].end()
            reader[0] = Reader()
    print(f"{kind}: {count} files, {refused} refused, slowest {slowest:.2f} s, {peak >> 20} MiB more")
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong[:20]])
    assert refused > count // 10
    assert peak < MEMORY
