"""Arrays of numpy: files known by their bytes, numbers of any type, labels as people number them."""

import bz2
import gzip
import io
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddml.data import arrays
from ddml.errors import InputError

NAMES = ("inputs", "labels")
X = np.arange(12.0).reshape(6, 2)


def stored(*unnamed: Any, **named: Any) -> bytes:
    """The bytes of an .npy file, or of an .npz file of several arrays."""
    file = io.BytesIO()
    np.savez(file, **named) if named else np.save(file, *unnamed)
    return file.getvalue()


def declaring(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """An .npy file that says it has this shape, and has two numbers."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (64 - (len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(16)


def zipped(**members: bytes) -> bytes:
    """An .npz file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a"])
def test_files_are_known_by_their_bytes(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(pack(stored(X)))
    assert np.array_equal(arrays.load(path, NAMES)[""], X)
    path.write_bytes(pack(stored(inputs=X, labels=X[:, 0], more=np.array([None]))))
    found = arrays.load(path, NAMES)
    assert list(found) == ["inputs", "labels"]
    assert np.array_equal(found["inputs"], X)


def bomb() -> bytes:
    """An .npz file of zeros that are packed well."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("inputs.npy", "w") as member,
    ):
        member.write(declaring((50331648,))[:-16])
        for _ in range(6):
            member.write(bytes(64 << 20))
    return file.getvalue()


PACKED = bomb()
OBJECTS = np.array([1, 2, None], object)
GOOD = stored(inputs=X, labels=X[:, 0])
REFUSED: dict[str, tuple[bytes, str]] = {
    "objects": (stored(OBJECTS), "Python objects"),
    "labels that are objects": (
        stored(inputs=X, labels=OBJECTS),
        "cannot read labels of .*Python objects; store numbers",
    ),
    "a pickle": (b"\x80\x04]\x94.", "is no .npz or .npy file"),
    "text": (b"1,2,3\n", "is no .npz or .npy file"),
    "nothing": (b"", "is no .npz or .npy file"),
    "text in gzip": (gzip.compress(b"1,2,3\n"), "is no .npz or .npy file"),
    "an array that is cut off": (stored(X)[:-8], "cannot read"),
    "a head that is cut off": (stored(X)[:30], "cannot read"),
    "a head of nonsense": (stored(X).replace(b"'descr'", b"'d(scr'"), "cannot read"),
    "an archive that is cut off": (GOOD[:-30], "cut off or damaged"),
    "an archive with other bytes": (GOOD.replace(X.tobytes(), bytes(len(X.tobytes()))), "inputs of .* damaged"),
    "an archive of no arrays": (zipped(), "it has none"),
    "an archive of other names": (stored(x_train=X, y_train=X), "it has x_train, y_train"),
    "an archive of text": (zipped(inputs=b"text", labels=b"text"), "inputs of .* is no array of numpy"),
    "an absurd shape": (declaring((10**15, 3)), "cannot read"),
    "an absurd shape in an archive": (
        zipped(inputs=declaring((10**15, 3))),
        "inputs of .* is to hold .* and has 16 bytes",
    ),
    "a shape beyond 64 bits": (declaring((10**30,)), "cannot read"),
    "a negative shape": (zipped(inputs=declaring((-3,))), "inputs of "),
    "10^12 numbers": (declaring((10**12,)), "cannot read"),
    "10^12 numbers, packed": (gzip.compress(declaring((10**12,))), "cannot read"),
    "10^12 numbers in an archive": (zipped(inputs=declaring((10**12,))), "is to hold float64 .* and has 16 bytes"),
    "fewer numbers than there are in an archive": (zipped(inputs=declaring((1,))), "is to hold .* and has 16 bytes"),
    "384 MB of zeros in an archive": (PACKED, "bytes unpack to 402653"),
    "384 MB of zeros": (6 * gzip.compress(bytes(64 << 20)), "no .npz or .npy file"),
    "384 MB behind an array": (gzip.compress(stored(X)) + 6 * gzip.compress(bytes(64 << 20)), "bytes unpack to"),
    "an array of the tenth version": (zipped(inputs=b"\x93NUMPY\n\0" + bytes(99)), "an array of version"),
    "an archive of an array cut in its head": (zipped(inputs=stored(X)[:9]), "inputs of "),
    "an archive without a directory": (GOOD[:100], "cut off or damaged"),
    "gzip that is cut off": (gzip.compress(GOOD)[:-20], "cut off or damaged"),
    "gzip with a bad block": (gzip.compress(GOOD)[:10] + b"\xff" + gzip.compress(GOOD)[11:], "cut off or damaged"),
    "xz that is cut off": (lzma.compress(GOOD)[:-20], "cut off or damaged"),
    "bzip2 with other bytes": (bz2.compress(GOOD)[:40] + b"abcdef" + bz2.compress(GOOD)[46:], "cut off or damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_one_line_with_their_names(name: str, tmp_path: Path) -> None:
    content, expected = REFUSED[name]
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        arrays.load(path, NAMES)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.npy", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"cannot read {path}"):
            arrays.load(path, NAMES)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.uint8, np.uint8), (np.int8, np.float32), (np.uint16, np.float32), (">i2", np.float32), (bool, np.float32),
        (np.int32, np.float64), (np.uint64, np.float64), (">i8", np.float64), (np.float16, np.float32),
        (np.float32, np.float32), (">f4", np.float32), (">f8", np.float64), (np.longdouble, np.float64),
    ],
)  # fmt: skip
def test_tables_are_taken_as_numbers(given: Any, expected: Any) -> None:
    x = (X % 2 if given is bool else X).astype(given)
    dtype = arrays.stored_type("inputs", x)
    assert dtype == expected
    source = arrays.source(x, np.arange(6), np.array([1, 4]), dtype, "inputs")
    ((values, labels),) = source.pieces()
    assert (values.dtype, source.dtype, source.count, source.shape) == (expected, expected, 2, (2,))
    assert np.array_equal(values, x[[1, 4]])
    assert labels.tolist() == [1, 4]


def test_types_that_belong_together_and_that_do_not() -> None:
    assert arrays.stored_type("both", X.astype(np.float32), X.astype(np.int64)) == np.float64
    with pytest.raises(InputError, match=r"both must be bytes \(uint8\) all of them or none, got uint8, float64"):
        arrays.stored_type("both", X.astype(np.uint8), X)
    for wrong in (X.astype(complex), X.astype(str), X.astype("datetime64[s]"), np.zeros(3, [("a", float)])):
        with pytest.raises(InputError, match="inputs must be real numbers, got"):
            arrays.stored_type("inputs", wrong)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_with_their_place(value: float) -> None:
    x = np.ones((50, 2, 3))
    x[41, 1, 2] = value
    source = arrays.source(x, np.zeros(50, int), np.arange(10, 50), np.float32, "inputs of a.npz")
    with pytest.raises(InputError, match=r"inputs of a.npz must be finite: \[41, 1, 2\] is (nan|-?inf)"):
        list(source.pieces())


# labels: the numbers of their classes, the names, and a text of the note if there is one
LABELS: dict[str, tuple[Any, list[int], list[str], str]] = {
    "from 0": ([2, 0, 1, 2], [2, 0, 1, 2], ["0", "1", "2"], ""),
    "from 1": ([1, 2, 3, 1], [0, 1, 2, 0], ["1", "2", "3"], "labels 1, 2, 3 became classes 0 to 2"),
    "with a gap": ([0, 7, 2, 7], [0, 2, 1, 2], ["0", "2", "7"], "labels 0, 2, 7 became"),
    "with signs": ([1, -1, -1], [1, 0, 0], ["-1", "1"], "labels -1, 1 became"),
    "of one class": ([5, 5], [0, 0], ["5"], "labels 5 became"),
    "many": (np.arange(20) * 3, list(range(20)), [str(3 * i) for i in range(20)], "15, 18, 21, ... became"),
    "large": (np.array([2**63, 0], np.uint64), [1, 0], ["0", str(2**63)], "became"),
    "floats": ([0.0, 2.0, 1.0], [0, 2, 1], ["0", "1", "2"], "labels are floats"),
    "floats with a gap": ([2.0, 4.0], [0, 1], ["2", "4"], "labels 2, 4 became"),
    "floats of 16 bits": (np.array([1, 0], np.float16), [1, 0], ["0", "1"], "labels are floats"),
    "in a column": ([[1], [0], [1]], [1, 0, 1], ["0", "1"], ""),
    "of bool": ([True, False], [1, 0], ["0", "1"], ""),
    "big-endian": (np.array([1, 0], ">i4"), [1, 0], ["0", "1"], ""),
    "words": (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"], "labels cat, dog became"),
    "words in bytes": (["Käse".encode(), b"cat"], [0, 1], ["Käse", "cat"], "labels Käse, cat became"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_become_numbers_of_classes(name: str) -> None:
    given, numbers, names, note = LABELS[name]
    (found,), classes, notes = arrays.classes_of(("labels", np.asarray(given)))
    assert (found.tolist(), classes) == (numbers, names)
    assert (len(notes) == 1 and note in notes[0]) if note else not notes


def test_labels_to_train_on_and_to_test_with_have_the_same_classes() -> None:
    numbers, names, _ = arrays.classes_of(("labels", np.array([4, 1])), ("test_labels", np.array([2.0, 4.0])))
    assert [n.tolist() for n in numbers] == [[2, 0], [1, 2]]
    assert names == ["1", "2", "4"]
    with pytest.raises(InputError, match="labels and test_labels must be both numbers or both words"):
        arrays.classes_of(("labels", np.array([4, 1])), ("test_labels", np.array(["a", "b"])))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.0, 1.5], r"must be integers: \[1\] is 1.5"),
        ([0.0, 1.0, np.nan], r"must be integers: \[2\] is nan"),
        (np.eye(3, dtype=int), r"got int64 \(3, 3\); of columns for the classes take the largest"),
        ([[[0]]], "must be integers"),
        (3, "must be integers"),
        ([], "must be integers"),
        ([1j], "must be integers"),
    ],
)
def test_labels_that_name_no_classes_are_refused(given: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"^labels {expected}|^labels must be integers.*{expected}"):
        arrays.classes_of(("labels", np.asarray(given)))
