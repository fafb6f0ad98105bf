"""data/prepare.py: official files, and small files of their form, become data files."""

import bz2
import gzip
import importlib.util
import lzma
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data import data_set, files

ROOT = Path(__file__).parents[1]
OFFICIAL = Path(os.environ.get("DDML_DATA", ROOT.parent / "shared" / "data"))
_spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
assert _spec
assert _spec.loader
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)
RNG = np.random.default_rng(0)


def made(path: Path, *words: Any) -> data_set.DataSet:
    prepare.main([*map(str, words), "-o", str(path)])
    return files.read(str(path), MPI.COMM_SELF)


def refused(capsys: pytest.CaptureFixture[str], path: Path, *words: Any) -> str:
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(SystemExit) as end:
        prepare.main([*map(str, words), "-o", str(path)])
    assert str(end.value).startswith("error: ")
    assert "\n" not in str(end.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(path.parent.glob(f"{path.name}.*"))
    return str(end.value)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder: Path, suffix: str = "", dash: str = "-", pack: Any = bytes, first: int = 0) -> dict[str, Any]:
    """Files of the form of MNIST, and what is in them."""
    found = {}
    for name, n in (("train", 20), ("t10k", 8)):
        found[f"{name}-images{dash}idx3"] = RNG.integers(0, 256, (n, 28, 28), np.uint8)
        found[f"{name}-labels{dash}idx1"] = (np.arange(n) % 10 + first).astype(np.uint8)
    for name, array in found.items():
        (folder / f"{name}-ubyte{suffix}").write_bytes(pack(idx(array)))
    return found


@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("pack", PACKED.values())
def test_idx_files(tmp_path: Path, suffix: str, dash: str, pack: Any, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels, test_images, test_labels = write_mnist(tmp_path, suffix, dash, pack).values()
    found = made(tmp_path / "mnist.h5", "mnist", tmp_path)
    assert np.array_equal(found.inputs, images[:, None])
    assert np.array_equal(found.test_inputs, test_images[:, None])
    assert np.array_equal(found.labels, labels)
    assert np.array_equal(found.test_labels, test_labels)
    assert (found.origin, len(found.classes)) == ("MNIST", 10)
    damaged = tmp_path / f"t10k-images{dash}idx3-ubyte{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert damaged.name in refused(capsys, tmp_path / "mnist.h5", "mnist", tmp_path)
    damaged.unlink()
    assert "there is no file" in refused(capsys, tmp_path / "mnist.h5", "mnist", tmp_path)


def test_letters_in_the_form_of_mnist_count_from_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path, first=5)
    found = made(tmp_path / "letters.h5", "mnist", tmp_path)
    assert found.classes == tuple(str(i) for i in range(5, 15))
    assert found.labels[:3].tolist() == [0, 1, 2]
    assert "note: labels 5, 6, 7" in capsys.readouterr().out


ZEROS = gzip.compress(bytes(64 << 20))  # members that stand behind each other are one content
GOOD = idx(RNG.integers(0, 256, (8, 28, 28), np.uint8))
BAD_IDX: dict[str, tuple[bytes, str]] = {
    "bad block": (gzip.compress(GOOD)[:10] + b"\xff" + gzip.compress(GOOD)[11:], "cut off or damaged"),
    "bad check sum": (gzip.compress(GOOD)[:-8] + bytes(8), "cut off or damaged"),
    "cut xz": (lzma.compress(GOOD)[:-40], "cut off or damaged"),
    "cut bzip2": (bz2.compress(GOOD)[:-40], "cut off or damaged"),
    "empty": (b"", "no idx file"),
    "head only": (GOOD[:7], "no idx file"),
    "cut": (GOOD[:-1], r"is to hold (8, 28, 28), and has 6271"),
    "too long": (GOOD + b"1", "is not whole"),
    "no images": (idx(np.zeros((0, 28, 28), np.uint8)), "or empty"),
    "labels": (idx(np.zeros(8, np.uint8)), "in 3 dimensions"),
    "floats": (b"\0\0\x0d\3" + GOOD[4:], "no idx file of bytes"),
    "absurd shape": (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "is not whole"),
    "sizes whose product is 2^64": (GOOD[:4] + b"\x80\0\0\0" * 2 + b"\0\0\0\x04" + GOOD[16:], "is not whole"),
    "255 dimensions": (GOOD[:3] + b"\xff" + GOOD[4:] * 2, "in 3 dimensions"),
    "cut in its head": (GOOD[:12], "no idx file"),
    "cut in its head, in gzip": (gzip.compress(GOOD[:12]), "no idx file"),
    "gzip without its end": (gzip.compress(GOOD)[:-4], "cut off or damaged"),
    "a head that asks for 3 GB": (gzip.compress(GOOD[:4] + b"\0\0\x08\0" * 3), "unpack to 8589934592 or more"),
    "a head that asks for little": (gzip.compress(GOOD) + 6 * ZEROS, "has 6273 bytes or more"),
    "zeros without an end": (6 * ZEROS, "no idx file"),
    "a web page": (b"<!DOCTYPE html>", "no idx file"),
    "fewer images than labels": (idx(np.zeros((7, 28, 28), np.uint8)), "7 images, but 8 labels for t10k"),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_bad_idx_files_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    (tmp_path / "mnist.h5").write_bytes(b"old")
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(BAD_IDX[name][0])
    line = refused(capsys, tmp_path / "mnist.h5", "mnist", tmp_path)
    assert BAD_IDX[name][1] in line
    assert str(path if "images" not in BAD_IDX[name][1] else tmp_path) in line


@pytest.mark.parametrize("pack", PACKED.values())
def test_cifar_batches(tmp_path: Path, pack: Any, capsys: pytest.CaptureFixture[str]) -> None:
    records = RNG.integers(0, 256, (3, 7, 3073), np.uint8)
    records[:, :, 0] %= 10
    for name, batch in zip(("data_batch_1.bin", "data_batch_2.bin.gz", "test_batch.bin"), records, strict=True):
        (tmp_path / name).write_bytes(pack(batch.tobytes()))
    (tmp_path / "data_batch_1.bin.xz").write_bytes(b"the plain one counts")
    (tmp_path / "data_batch_3.bin~").write_bytes(b"not this")
    (tmp_path / "._data_batch_1.bin").write_bytes(b"nor this")
    found = made(tmp_path / "cifar.h5", "cifar10", tmp_path)
    pixels = records[:, :, 1:].reshape(3, 7, 3, 32, 32)
    assert np.array_equal(found.inputs, np.concatenate(pixels[:2]))
    assert np.array_equal(found.test_inputs, pixels[2])
    assert found.labels.tolist() == records[:2, :, 0].ravel().tolist()
    assert found.classes[3] == "cat"
    records[1, 4, 0] = 10
    for content, expected in (
        (b"123", "records of 3,073 bytes, it has 3"),
        (b"", "it has 0"),
        (gzip.compress(records[0].tobytes())[:-9], "cut off or damaged"),
        (records[1].tobytes(), "record 4 has the label 10"),
    ):
        (tmp_path / "data_batch_2.bin.gz").write_bytes(content)
        line = refused(capsys, tmp_path / "cifar.h5", "cifar10", tmp_path)
        assert expected in line
        assert "data_batch_2.bin.gz" in line
    (tmp_path / "test_batch.bin").unlink()
    assert "test_batch.bin" in refused(capsys, tmp_path / "cifar.h5", "cifar10", tmp_path)


def test_folders_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = {}
    for split, count in (("train", 5), ("test", 2)):
        for label in ("cats", "dogs"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels[split, label, i] = RNG.integers(0, 256, (9, 9, 3), np.uint8)
                image.fromarray(pixels[split, label, i]).save(tmp_path / split / label / f"{i}.png")
    found = made(tmp_path / "a.h5", "folder", tmp_path / "train", "-test", tmp_path / "test", "-size", 9)
    assert found.classes == ("cats", "dogs")
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert np.array_equal(found.inputs[7], pixels["train", "dogs", 2].transpose(2, 0, 1))
    assert np.array_equal(found.test_inputs[3], pixels["test", "dogs", 1].transpose(2, 0, 1))
    small = made(tmp_path / "b.h5", "folder", tmp_path / "train", "-size", 4, "-grey", "-test_fraction", 0.3)
    assert (small.inputs.shape, small.test_inputs.shape) == ((7, 1, 4, 4), (3, 1, 4, 4))
    (tmp_path / "test" / "dogs" / "z.png").write_text("no image")
    words = ("folder", tmp_path / "train", "-test", tmp_path / "test")
    assert "z.png" in refused(capsys, tmp_path / "a.h5", *words)
    (tmp_path / "test" / "birds").mkdir()
    (tmp_path / "test" / "birds" / "0.png").write_bytes((tmp_path / "test" / "dogs" / "0.png").read_bytes())
    assert "same classes" in refused(capsys, tmp_path / "a.h5", *words)
    assert "one for each class" in refused(capsys, tmp_path / "a.h5", "folder", tmp_path / "nothing")


def test_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, labels = RNG.standard_normal((10, 4)).astype(np.float32), np.arange(10) % 3
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", labels)
    found = [
        made(tmp_path / "a.h5", "arrays", tmp_path / "a.npz", "-maximum", 3),
        made(tmp_path / "b.h5", "arrays", tmp_path / "x.npy", tmp_path / "y.npy"),
    ]
    assert np.array_equal(found[0].inputs, found[1].inputs)
    assert (found[0].maximum, found[1].maximum) == (3, 1)
    both = np.concatenate([found[0].inputs, found[0].test_inputs])
    assert sorted(map(tuple, both)) == sorted(map(tuple, inputs))
    for x, y in zip(both, np.concatenate([found[0].labels, found[0].test_labels]), strict=True):
        assert labels[np.flatnonzero((inputs == x).all(axis=1))[0]] == y
    np.savez(tmp_path / "c.npz", inputs=inputs[:6], labels=labels[:6], test_inputs=inputs[6:], test_labels=labels[6:])
    given = made(tmp_path / "c.h5", "arrays", tmp_path / "c.npz")
    assert np.array_equal(given.test_inputs, inputs[6:])
    for words, expected in (
        (("x.npy",), "one .npz file"),
        (("x.npy", "nothing.npy"), "nothing.npy"),
        (("a.npz", "-test_fraction", "1"), "leaves none"),
        (("y.npy", "x.npy"), "labels must be integers"),
    ):
        assert expected in refused(
            capsys, tmp_path / "a.h5", "arrays", *(tmp_path / w if "." in w else w for w in words)
        )
    assert "no such folder" in refused(capsys, tmp_path / "no" / "a.h5", "arrays", tmp_path / "a.npz")


def test_labels_and_numbers_as_people_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, labels = np.arange(20).reshape(10, 2), np.arange(10) % 3 + 1
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
    found = made(tmp_path / "a.h5", "arrays", tmp_path / "a.npz")
    assert found.classes == ("1", "2", "3")
    assert set(found.labels) | set(found.test_labels) == {0, 1, 2}
    assert (found.inputs.dtype, found.maximum) == (np.float64, 1)
    out = capsys.readouterr().out
    assert "note: labels 1, 2, 3 became classes 0 to 2" in out
    assert "note: inputs of int64 are stored as float64" in out
    np.save(tmp_path / "y.npy", np.where(labels == 3, "good", "bad"))
    (tmp_path / "x.npz").write_bytes((tmp_path / "y.npy").read_bytes())  # under another name
    np.save(tmp_path / "x.npy", inputs.astype(">u2"))
    found = made(tmp_path / "b.h5", "arrays", tmp_path / "x.npy", tmp_path / "x.npz", "-maximum", 19)
    assert found.classes == ("bad", "good")
    assert np.array_equal(np.sort(np.concatenate([found.inputs, found.test_inputs]), 0), inputs)
    assert found.maximum == 19
    np.savez(tmp_path / "c.npz", inputs=inputs, labels=labels, test_inputs=inputs / 2, test_labels=labels + 1.0)
    found = made(tmp_path / "c.h5", "arrays", tmp_path / "c.npz")
    assert found.test_labels.tolist() == labels.tolist()
    assert np.array_equal(found.test_inputs, inputs / 2)
    assert "note: no sample to train on is of class 4" in capsys.readouterr().out


X, Y = np.ones((10, 2)), np.arange(10) % 2
WITH_NAN = X.copy()
WITH_NAN[7, 1] = np.nan
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "labels that are objects": ({"inputs": X, "labels": np.array([0, 1] * 5, object)}, "cannot read labels of "),
    "inputs that are objects": ({"inputs": np.array([None] * 10), "labels": Y}, "cannot read inputs of "),
    "labels that are no integers": ({"inputs": X, "labels": Y + 0.5}, "labels must be integers: [0] is 0.5"),
    "fewer labels": ({"inputs": X, "labels": Y[:9]}, "inputs has the shape (10, 2), but there are 9 labels"),
    "one input": ({"inputs": np.float64(3), "labels": Y}, "inputs has the shape ()"),
    "NaN": ({"inputs": WITH_NAN, "labels": Y}, "bad.npz must be finite: [7, 1] is nan"),
    "NaN to test": (
        {"inputs": X, "labels": Y, "test_inputs": WITH_NAN, "test_labels": Y}, "test_inputs of ",
    ),
    "other columns to test": (
        {"inputs": X, "labels": Y, "test_inputs": X[:, :1], "test_labels": Y}, "test_inputs must have",
    ),
    "no labels to test": ({"inputs": X, "labels": Y, "test_inputs": X}, "both test_inputs and test_labels"),
    "complex inputs": ({"inputs": X * 1j, "labels": Y}, "inputs must be real numbers"),
    "inputs in a row": ({"inputs": X[:, 0], "labels": Y}, "(N, ...)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "bad.npz", **BAD_ARRAYS[name][0])
    (tmp_path / "a.h5").write_bytes(b"old")
    assert BAD_ARRAYS[name][1] in refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-test_fraction", "nan"), "leaves none"),
        (("-test_fraction", "-0.5"), "leaves none"),
        (("-seed", "-1"), "-seed must be 0 or more"),
        (("-maximum", "nan"), "maximum of a data set must be a number above 0"),
    ],
)
def test_numbers_out_of_range(
    tmp_path: Path, words: tuple[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    assert expected in refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "a.npz", *words)
    assert "one of the files to read" in refused(capsys, tmp_path / "a.npz", "arrays", tmp_path / "a.npz")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(SystemExit, match=r"error: cannot write .*folder.h5: what is there is no regular file"):
        prepare.main(["arrays", str(tmp_path / "a.npz"), "-o", str(tmp_path / "folder.h5")])


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((5000, 9)), labels=np.arange(5000) % 2)
    (tmp_path / "a.h5").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        line = refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "a.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"error: cannot write {tmp_path / 'a.h5'}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "a.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, number: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (tmp_path / "images" / "class").mkdir(parents=True)
    for i in range(30):
        image.new("L", (9, 9)).save(tmp_path / "images" / "class" / f"{i}.png")
    (tmp_path / "a.h5").write_bytes(b"old")
    words = ("folder", tmp_path / "images", "-size", "3000", "-o", tmp_path / "a.h5")  # which takes some seconds
    command = [sys.executable, ROOT / "data" / "prepare.py", *words]
    with subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=os.environ) as process:
        while not list(tmp_path.glob("a.h5.*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        assert process.stderr
        assert process.stderr.read() == "error: interrupted\n"
    assert process.returncode == 1
    assert (tmp_path / "a.h5").read_bytes() == b"old"
    assert not list(tmp_path.glob("a.h5.*"))


def test_files_beside_images_and_names_in_other_alphabets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for name in ("Käfer", "кошки", os.fsdecode(b"caf\xe9")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            image.fromarray(deep).save(tmp_path / "images" / name / f"{i}.png")
        (tmp_path / "images" / name / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (tmp_path / "images" / name / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "images" / "__MACOSX").mkdir()
    found = made(tmp_path / "a.h5", "folder", tmp_path / "images", "-size", 8, "-grey", "-test_fraction", 0.34)
    assert set(found.classes) == {"Käfer", "кошки", "caf�"}
    assert (found.count, found.origin) == (6, "images")
    assert (found.inputs == np.round(deep / 257)).all()
    out = capsys.readouterr().out
    assert "note: passed over 7 files and folders that are no images of a class: .DS_Store, Thumbs.db, " in out
    path = tmp_path / "images" / "Käfer" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    line = refused(capsys, tmp_path / "a.h5", "folder", tmp_path / "images")
    assert str(path) in line
    assert "-size must be 1 or more" in refused(capsys, tmp_path / "a.h5", "folder", tmp_path / "images", "-size", 0)


@pytest.mark.skipif(not (OFFICIAL / "mnist").is_dir(), reason="the official files are not at hand")
def test_mnist_itself(tmp_path: Path) -> None:
    found = made(tmp_path / "mnist.h5", "mnist", OFFICIAL / "mnist")
    assert (found.inputs.shape, found.test_inputs.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(found.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert found.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


@pytest.mark.skipif(not (OFFICIAL / "cifar-10-batches-bin").is_dir(), reason="the official files are not at hand")
def test_cifar_10_itself(tmp_path: Path) -> None:
    found = made(tmp_path / "cifar.h5", "cifar10", OFFICIAL / "cifar-10-batches-bin")
    assert found.inputs.shape[1:] == (3, 32, 32)
    assert found.count % 10_000 == 0
    assert np.bincount(found.test_labels).tolist() == [1000] * 10
