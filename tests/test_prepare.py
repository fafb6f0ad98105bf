"""data/prepare.py: official files, and small files of their form, become data files."""

import gzip
import importlib.util
import os
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
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(path.parent.glob(f"{path.name}.*"))
    return str(end.value)


def write_idx(folder: Path, name: str, array: np.ndarray, zipped: bool) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path = folder / f"{name}-ubyte{'.gz' * zipped}"
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    images = {name: RNG.integers(0, 256, (n, 28, 28), np.uint8) for name, n in (("train", 20), ("t10k", 8))}
    labels = {name: RNG.integers(0, 10, len(images[name])).astype(np.uint8) for name in images}
    for name in images:
        write_idx(tmp_path, f"{name}-images-idx3", images[name], zipped)
        write_idx(tmp_path, f"{name}-labels-idx1", labels[name], zipped)
    found = made(tmp_path / "mnist.h5", "mnist", tmp_path)
    assert np.array_equal(found.inputs, images["train"][:, None])
    assert np.array_equal(found.test_inputs, images["t10k"][:, None])
    assert np.array_equal(found.labels, labels["train"])
    assert np.array_equal(found.test_labels, labels["t10k"])
    assert (found.origin, len(found.classes)) == ("MNIST", 10)
    damaged = tmp_path / f"t10k-images-idx3-ubyte{'.gz' * zipped}"
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert damaged.name in refused(capsys, tmp_path / "mnist.h5", "mnist", tmp_path)
    damaged.unlink()
    assert "there is no file" in refused(capsys, tmp_path / "mnist.h5", "mnist", tmp_path)


def test_cifar_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = RNG.integers(0, 256, (3, 7, 3073), np.uint8)
    records[:, :, 0] %= 10
    for name, batch in zip(("data_batch_1", "data_batch_2", "test_batch"), records, strict=True):
        (tmp_path / f"{name}.bin").write_bytes(batch.tobytes())
    found = made(tmp_path / "cifar.h5", "cifar10", tmp_path)
    pixels = records[:, :, 1:].reshape(3, 7, 3, 32, 32)
    assert np.array_equal(found.inputs, np.concatenate(pixels[:2]))
    assert np.array_equal(found.test_inputs, pixels[2])
    assert found.labels.tolist() == records[:2, :, 0].ravel().tolist()
    assert found.classes[3] == "cat"
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    assert "records of 3,073 bytes, it has 3" in refused(capsys, tmp_path / "cifar.h5", "cifar10", tmp_path)
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
