"""data/prepare.py with volumes, faces and a part that is held out."""

import importlib.util
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from test_prepare import OFFICIAL, made, prepare, refused

from ddml.data import files, volumes
from ddml.errors import InputError

RNG = np.random.default_rng(0)
LABELS = np.arange(20) % 2
YALE = OFFICIAL / "yale_b" / "extended_yale_b_96x84.h5"


def is_one_of(found: np.ndarray, wanted: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
    """Each sample is one of those that there were, and has its label."""
    for x, label in zip(found, labels, strict=True):
        same = (wanted == x).reshape(len(wanted), -1).all(axis=1)
        assert numbers[np.flatnonzero(same)].tolist() == [label]


@pytest.mark.parametrize("shape", [(1, 5, 6, 7), (2, 20, 20, 24), (5, 6, 7), (30, 9)])
@pytest.mark.parametrize("kind", ["npz", "npy", "h5"])
def test_arrays_of_volumes(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    x, y = RNG.standard_normal((20, *shape)).astype(np.float32), LABELS
    words: list[Any] = [tmp_path / f"x.{kind}"]
    if kind == "npz":
        np.savez(tmp_path / "x.npz", inputs=x, labels=y)
    elif kind == "h5":
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.create_dataset("images", data=x, compression="gzip")
            file["labels"] = y.astype(np.uint8)
    else:
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "y.npy", y)
        words.append(tmp_path / "y.npy")
    add = ["-add_channel"] * (len(shape) < 4)
    found = made(tmp_path / "a.h5", "arrays", *words, *add, "-held_out", 4)
    assert found.shape == (shape if len(shape) == 4 else (1, *shape))
    assert found.held_inputs is not None and found.held_labels is not None
    assert [len(a) for a in found.arrays().values()] == [12, 12, 4, 4, 4, 4]
    assert np.bincount(found.held_labels).tolist() == [2, 2]
    whole = x.reshape(20, *found.shape)
    every = [np.concatenate([getattr(found, f"{t}{n}") for t in ("", "test_", "held_")]) for n in ("inputs", "labels")]
    assert len(np.unique(every[0].reshape(20, -1), axis=0)) == 20
    is_one_of(every[0], whole, every[1], y)
    source = files.source(str(tmp_path / "a.h5"), MPI.COMM_SELF)
    assert source.held_labels is not None and np.array_equal(source.held_labels, found.held_labels)
    half = tuple(slice(n // 3, n // 3 + 3) for n in found.shape[1:])
    assert np.array_equal(source.tile(half).held_inputs, found.held_inputs[(..., *half)])


def test_slices_that_may_be_channels_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((20, 16, 8, 8)), labels=LABELS)
    assert made(tmp_path / "a.h5", "arrays", tmp_path / "a.npz").shape == (16, 8, 8)
    assert "note: inputs are images of 16 channels; -add_channel makes volumes of them" in capsys.readouterr().out
    for shape in ((20, 3), (20, 1, 4, 4, 4)):
        np.savez(tmp_path / "a.npz", inputs=np.ones(shape), labels=LABELS)
        line = refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "a.npz", "-add_channel")
        assert "-add_channel is for inputs (N, H, W) or (N, D, H, W)" in line


def test_arrays_of_volumes_of_several_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_any_size = np.empty(20, dtype=object)
    of_any_size[:] = [np.ones((4, 4, 4 + i % 2)) for i in range(20)]
    np.savez(tmp_path / "a.npz", inputs=of_any_size, labels=LABELS)
    assert "Python objects" in refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "a.npz")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["inputs"], file["images"] = np.ones((20, 4)), np.ones((20, 4))
        file["labels"] = h5py.Empty("i4")
    assert "labels of" in refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["pixels"] = np.ones((20, 4))
    assert "must hold arrays of the names inputs" in refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "b.h5")


def write_table(folder: Path, shapes: list[tuple[int, ...]], head: str = "file,label", dtype: Any = np.float32) -> Path:
    lines = [head]
    for i, shape in enumerate(shapes):
        np.save(folder / f"{i}.npy", RNG.integers(0, 100, shape).astype(dtype))
        lines.append(f"{i}.npy,{['ill', 'well'][i % 2]}")
    (folder / "scans.csv").write_text("\n".join(lines) + "\n")
    return folder / "scans.csv"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("shape", [(4, 6, 5), (2, 4, 6, 5)])
def test_a_file_for_each_volume(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    table = write_table(tmp_path, [shape] * 10, dtype=dtype)
    found = made(tmp_path / "a.h5", "volumes", table, "-held_out", "0.25", "-maximum", 99)
    assert (found.classes, found.maximum, found.origin) == (("ill", "well"), 99, "scans")
    assert found.inputs.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    x = np.array([np.load(tmp_path / f"{i}.npy") for i in range(10)]).reshape(10, *found.shape)
    assert found.shape == (shape if len(shape) == 4 else (1, *shape))
    for part, n in (("", 6), ("test_", 2), ("held_", 2)):
        assert len(getattr(found, f"{part}inputs")) == n
        is_one_of(getattr(found, f"{part}inputs"), x, getattr(found, f"{part}labels"), LABELS)


def test_volumes_of_several_sizes_are_given_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, [(4, 6, 5), (4, 6, 5), (5, 6, 5), (8, 12, 10)])
    line = refused(capsys, tmp_path / "a.h5", "volumes", table, "-test_fraction", 0.5)
    assert "they must have one type and one size; -size HxWxD gives them one" in line
    found = made(tmp_path / "a.h5", "volumes", table, "-test_fraction", 0.5, "-size", "12x10x8")
    assert found.shape == (1, 8, 12, 10)
    x = np.load(tmp_path / "3.npy")
    both = np.concatenate([found.inputs, found.test_inputs])
    assert sum(np.array_equal(volume[0], x) for volume in both) == 1  # what has the size already
    constant = volumes.resized(np.full((1, 3, 4, 5), 7.0), (6, 5, 4))
    assert constant.shape == (1, 6, 5, 4) and np.allclose(constant, 7)
    ramp = volumes.resized(np.arange(8.0).reshape(1, 8, 1, 1), (4, 1, 1))
    assert np.allclose(ramp[0, :, 0, 0], [0.5, 2.5, 4.5, 6.5])
    for size in ("0", "3x4", "3x4x5x6", "axb", "-3", "1e3", "12x10x", "9" * 5000, "2000", "99999x1x99999"):
        assert "-size must be 1 or more" in refused(capsys, tmp_path / "a.h5", "volumes", table, f"-size={size}")


@pytest.mark.parametrize("labels", ["--3,4", "-1,7", "9999999999999999999999,1", "1.5,2", "1-2,3"])
def test_labels_of_volumes_are_integers_or_words(tmp_path: Path, labels: str) -> None:
    table = write_table(tmp_path, [(2, 3, 3)] * 6)
    text = table.read_text()
    for old, new in zip(("ill", "well"), labels.split(","), strict=True):
        text = text.replace(old, new)
    table.write_text(text)
    assert set(made(tmp_path / "a.h5", "volumes", table, "-test_fraction", 0.34).classes) == set(labels.split(","))


def test_what_is_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, [(2, 3, 3)] * 6)
    for name in ("scans.csv", "3.npy"):
        assert "is one of the files to read" in refused(capsys, tmp_path / name, "volumes", table)


NAN = np.ones((4, 6, 5))
NAN[3, 2, 1] = np.nan
BAD_VOLUMES: dict[str, tuple[Any, str]] = {
    "NaN": (lambda p: np.save(p, NAN), "1.npy must be finite"),
    "one axis": (lambda p: np.save(p, np.ones(4)), "must have the axes (D, H, W) or (C, D, H, W), got (4,)"),
    "five axes": (lambda p: np.save(p, np.ones((1,) * 5)), "must have the axes"),
    "nothing in it": (lambda p: np.save(p, np.ones((4, 0, 5))), "must have the axes"),
    "objects": (lambda p: np.save(p, np.array([[[None]]]), allow_pickle=True), "Python objects"),
    "complex": (lambda p: np.save(p, NAN * 1j), "must be real numbers"),
    "text": (lambda p: p.write_text("1 2 3"), "neither a scan (NIfTI) nor an array"),
    "empty": (lambda p: p.write_bytes(b""), "neither a scan (NIfTI) nor an array"),
    "no file": (lambda p: p.unlink(), "there is no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "no regular file"),
    "another size": (lambda p: np.save(p, np.ones((4, 6, 4), np.float32)), "they must have one type and one size"),
    "another type": (lambda p: np.save(p, np.ones((4, 6, 5), np.uint8)), "they must have one type and one size"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_bad_volumes_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, [(4, 6, 5)] * 4)
    (tmp_path / "a.h5").write_bytes(b"old")
    BAD_VOLUMES[name][0](tmp_path / "1.npy")
    line = refused(capsys, tmp_path / "a.h5", "volumes", table, "-test_fraction", 0.5)
    assert BAD_VOLUMES[name][1] in line and "1.npy" in line


BAD_TABLES: dict[str, tuple[str, str]] = {
    "other columns": ("name,class\na.npy,1\n", "must have the columns file and label; it has name, class"),
    "no row": ("file,label\n", "has no row"),
    "nothing": ("", "has no row"),
    "no label": ("file,label\na.npy,\n", "line 2: there must be a file and its label"),
    "a short row": ("file,label\na.npy,1\nb.npy\n", "line 3: there must be a file and its label"),
    "one file twice": ("file,label\na.npy,1\na.npy,2\n", "line 3: a.npy stands there twice"),
    "no table": ("\0\1\2\xff", "scans.csv"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scans.csv").write_text(BAD_TABLES[name][0], "latin-1")
    assert BAD_TABLES[name][1] in refused(capsys, tmp_path / "a.h5", "volumes", tmp_path / "scans.csv")


def test_scans_without_nibabel_are_refused_in_a_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("nibabel"):
        pytest.skip("nibabel is installed")
    (tmp_path / "a.nii").write_bytes((348).to_bytes(4, "little") + bytes(400))
    with pytest.raises(InputError, match=r"a.nii: scans need nibabel, which is not installed; pip install nibabel"):
        volumes.volume(tmp_path / "a.nii")


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_scans(tmp_path: Path, kind: str, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    lines, scans = ["label,file"], RNG.integers(-1000, 1000, (10, 7, 6, 5)).astype(np.int16)
    for i, scan in enumerate(scans):
        lines.append(f"{i % 2},{i}.{ending}")
        flipped = np.diag([-1, 1, 1, 1])  # from right to left
        getattr(nibabel, kind)(scan[::-1], flipped).to_filename(tmp_path / f"{i}.{ending}")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    found = made(tmp_path / "a.h5", "volumes", tmp_path / "scans.csv", "-maximum", 1000)
    assert (found.shape, found.classes, found.inputs.dtype) == ((1, 5, 6, 7), ("0", "1"), np.float32)
    is_one_of(found.inputs, scans.transpose(0, 3, 2, 1)[:, None], found.labels, LABELS[:10])
    (tmp_path / f"3.{ending}").write_bytes((tmp_path / f"3.{ending}").read_bytes()[:-50])
    assert f"3.{ending}" in refused(capsys, tmp_path / "a.h5", "volumes", tmp_path / "scans.csv")
    nibabel.Nifti1Image(scans[:4], np.eye(4)).to_filename(tmp_path / f"3.{ending}")
    assert "a scan has three axes" in refused(capsys, tmp_path / "a.h5", "volumes", tmp_path / "scans.csv")


def test_folders_of_faces_in_files_of_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Extended Yale B comes: pgm files, a folder for each face, some of them without a face and of another size."""
    image: Any = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    faces = RNG.integers(0, 256, (3, 8, 12, 10), np.uint8)
    for person in range(3):
        folder = tmp_path / "faces" / f"yaleB0{person + 1}"
        folder.mkdir(parents=True)
        for i, face in enumerate(faces[person]):
            image.fromarray(face).save(folder / f"P00A+{i}.pgm")
        image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "P00_Ambient.pgm")
        (folder / "P00.info").write_text("P00A+0.pgm\n")
    words = ("folder", tmp_path / "faces", "-grey", "-size", "12x10", "-without", "*_Ambient.pgm")
    found = made(tmp_path / "a.h5", *words, "-held_out", "0.25", "-test_fraction", 0.25)
    assert found.classes == ("yaleB01", "yaleB02", "yaleB03")
    assert found.held_labels is not None and sum(map(len, (found.labels, found.test_labels, found.held_labels))) == 24
    assert (len(found.test_labels), len(found.held_labels)) == (6, 4)
    is_one_of(found.inputs, faces.reshape(24, 1, 12, 10), found.labels, np.repeat(np.arange(3), 8))
    assert found.shape == (1, 12, 10)
    for size in ("0", "12x", "x", "1x2x3", "99999999"):
        assert "-size must be 1 or more" in refused(capsys, tmp_path / "a.h5", *words[:3], "-size", size)
    (tmp_path / "faces" / "yaleB02" / "P00A+3.pgm").write_bytes(b"P5 10 12 255\n1")
    assert "P00A+3.pgm" in refused(capsys, tmp_path / "a.h5", *words)
    assert "must hold folders of images" in refused(capsys, tmp_path / "a.h5", *words[:-1], "*")


def test_folders_of_images_of_mixed_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image: Any = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for name in ("daisy", "rose", "tulip"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.full((20 + 7 * i, 40 - 3 * i, 3), (250, 3 * i, len(name)), np.uint8)
            image.fromarray(pixels).save(tmp_path / "flowers" / name / f"{i}.{'png' if i % 2 else 'bmp'}")
    found = made(tmp_path / "a.h5", "folder", tmp_path / "flowers", "-size", "16x24", "-held_out", 3)
    assert found.shape == (3, 16, 24) and found.held_labels is not None
    assert np.bincount(found.held_labels).tolist() == [1, 1, 1]
    for x, label in zip(found.inputs, found.labels, strict=True):
        assert (x[0] == 250).all() and (x[2] == len(found.classes[label])).all()
    (tmp_path / "flowers" / "rose" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "9.png" in refused(capsys, tmp_path / "a.h5", "folder", tmp_path / "flowers")
    (tmp_path / "none" / "daisy").mkdir(parents=True)
    assert "one for each class" in refused(capsys, tmp_path / "a.h5", "folder", tmp_path / "none")


@pytest.mark.parametrize("words", [("0",), ("1.0",), ("0.0",), ("16",), ("99",)])
def test_none_or_all_held_out_is_refused(tmp_path: Path, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((20, 4)), labels=LABELS)
    line = refused(capsys, tmp_path / "a.h5", "arrays", tmp_path / "a.npz", "-held_out", *words)
    assert f"{words[0]} held-out samples of 16 to train on leave none on one side" in line


def test_a_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.arange(20.0)[:, None], labels=LABELS, test_inputs=[[1.0]], test_labels=[0])
    words = ("arrays", tmp_path / "a.npz", "-held_out", "0.5", "-seed")
    found = [made(tmp_path / f"{i}.h5", *words, seed).held_inputs for i, seed in enumerate((1, 1, 2))]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.skipif(not YALE.is_file(), reason="the official file is not at hand")
def test_extended_yale_b_itself(tmp_path: Path) -> None:
    words = ("arrays", YALE, "-add_channel", "-held_out", 229, "-test_fraction", 0.203)
    found = made(tmp_path / "yale.h5", *words)
    assert (found.shape, len(found.classes), found.inputs.dtype) == ((1, 96, 84), 38, np.uint8)
    assert (found.count, len(found.test_labels)) == (1695, 490)
    assert found.held_labels is not None and np.bincount(found.held_labels).min() >= 5
    source = files.source(str(tmp_path / "yale.h5"), MPI.COMM_SELF)
    ranges = (slice(16, 56), slice(13, 50))
    assert np.array_equal(source.tile(ranges).inputs, found.inputs[(..., *ranges)])


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["-h"])
    assert "volumes TABLE" in capsys.readouterr().out
