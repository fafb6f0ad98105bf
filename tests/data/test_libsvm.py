"""LIBSVM files: the arrays that scikit-learn reads, on any number of ranks, and faults named with their lines."""

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data import libsvm
from ddml.data.rows import SparseRows, TwoClasses, two_labels
from ddml.errors import InputError

OFFICIAL = Path(os.environ.get("DDML_DATA", Path(__file__).parents[3] / "shared" / "data")) / "libsvm"
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip

# text, base: labels, indptr, indices, data
FORMS: dict[str, tuple[bytes, str, list[float], list[int], list[int], list[float]]] = {
    "labels with signs": (b"+1 1:0.5 3:-2\n-1 2:1e-3\n", "auto", [1, -1], [0, 2, 3], [0, 2, 1], [0.5, -2, 1e-3]),
    "labels 1 and 2": (b"1 1:1\n2 2:3\n", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "labels 0 and 1": (b"0 1:1\n1 2:3\n", "auto", [0, 1], [0, 1, 2], [0, 1], [1, 3]),
    "an index 0 in it": (b"0 1:1\n1 0:3\n", "auto", [0, 1], [0, 1, 2], [1, 0], [1, 3]),
    "from 0 on by option": (b"0 1:1\n1 2:3\n", "0", [0, 1], [0, 1, 2], [1, 2], [1, 3]),
    "from 1 on by option": (b"0 1:1\n1 2:3\n", "1", [0, 1], [0, 1, 2], [0, 1], [1, 3]),
    "comments": (b"# a head\n1 1:1 # of 2:2\n#\n2 2:3#x\n", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "qid": (b"1 qid:7 1:1\n2 qid:8 2:3\n", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "Windows": (b"1 1:1\r\n2 2:3 \r\n", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "no final newline": (b"1 1:1\n2 2:3", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "empty lines, spaces, tabs": (b"\n\n 1\t1:1  \n\n2   2:3\n\n", "auto", [1, 2], [0, 1, 2], [0, 1], [1, 3]),
    "samples without values": (b"1\n2 2:3\n1\n", "auto", [1, 2, 1], [0, 0, 1, 1], [1], [3]),
    "zeros that are stored": (b"1 1:0 2:0.0\n2 2:3\n", "auto", [1, 2], [0, 2, 3], [0, 1, 1], [0, 0, 3]),
    "all kinds of numbers": (
        b"-1.5e+2 1:+.5 2:5. 3:1E5 4:-0 5:1e-320 6:0.1 7:179769313486231570e291\n", "auto",
        [-150.0], [0, 7], [0, 1, 2, 3, 4, 5, 6], [0.5, 5, 1e5, -0.0, 1e-320, 0.1, 179769313486231570e291],
    ),
}  # fmt: skip


def written(folder: Path, comm: MPI.Comm, content: bytes, name: str = "data") -> str:
    """A file with this content, which all ranks see."""
    if comm.rank == 0:
        (folder / name).write_bytes(content)
    comm.barrier()
    return str(folder / name)


def same(found: SparseRows, labels: Any, indptr: Any, indices: Any, data: Any) -> bool:
    pairs = ((found.labels, labels), (found.indptr, indptr), (found.indices, indices), (found.data, data))
    return all(a.dtype == b.dtype or a.dtype.kind == "i" for a, b in pairs if isinstance(b, np.ndarray)) and all(
        np.array_equal(a, b) for a, b in pairs
    )


@pytest.mark.ranks
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_the_expected_arrays(comm: MPI.Comm, shared_tmp: Path, name: str, packed: str) -> None:
    text, base, labels, *arrays = FORMS[name]
    (found,) = libsvm.read([written(shared_tmp, comm, PACKED[packed](text))], comm, base)
    assert same(found, labels, *arrays)
    assert found.features == max(arrays[1]) + 1
    found.free()


@pytest.mark.parametrize("name", FORMS)
def test_the_expected_arrays_are_those_of_scikit_learn(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    text, base, labels, *arrays = FORMS[name]
    (tmp_path / "data").write_bytes(text)
    X, y = datasets.load_svmlight_file(str(tmp_path / "data"), zero_based={"auto": "auto", "0": True, "1": False}[base])
    assert np.array_equal(y, labels)
    for found, expected in zip((X.indptr, X.indices, X.data), arrays, strict=True):
        assert np.array_equal(found, expected)


def random_text(rng: np.random.Generator, lines: int) -> bytes:
    """Lines of all forms."""

    def line() -> str:
        indices = np.flatnonzero(rng.random(12) < rng.random()) + 1
        values = [repr(float(v)) for v in rng.standard_normal(len(indices)) * 10.0 ** rng.integers(-9, 9)]
        words = [str(rng.choice(["1", "-1", "+1", "2.5"])), *(f"{i}:{v}" for i, v in zip(indices, values, strict=True))]
        return " ".join(words) + str(rng.choice(["", " # 1:2", "\r", "\n", "\t"]))

    return "\n".join(line() for _ in range(lines)).encode()


def by_hand(text: bytes) -> tuple[list[float], list[int], list[int], list[float]] | None:
    """What a text says, word by word in plain Python; None where it is wrong."""
    labels, indptr, indices, data = [], [0], [], []
    try:
        for line in text.decode("latin-1").split("\n"):
            words = line.partition("#")[0].split(None)
            if not words:
                continue
            labels.append(float(words[0]))
            before = 0
            for word in words[1:]:
                index, value = word.split(":")
                assert index.isascii()
                assert index.isdigit()
                assert int(index) > before
                before = int(index)
                indices.append(before - 1)
                data.append(float(value))
            indptr.append(len(indices))
        assert "_" not in text.decode("latin-1")
        assert np.isfinite(labels + data).all()
    except (ValueError, AssertionError):
        return None
    return labels, indptr, indices, data


@pytest.mark.ranks
@pytest.mark.parametrize("packed", ["plain", "gz"])
def test_any_number_of_ranks_reads_the_same(comm: MPI.Comm, shared_tmp: Path, packed: str) -> None:
    for lines in (1, 2, 5, 300):
        text = random_text(np.random.default_rng(lines), lines)
        expected = by_hand(text)
        assert expected is not None
        (found,) = libsvm.read([written(shared_tmp, comm, PACKED[packed](text), str(lines))], comm, "1", 12)
        assert same(found, *expected)
        assert found.data.dtype == np.float64
        found.free()


def test_damage_by_chance_is_noticed_or_means_what_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "data", 0
    for _ in range(400):
        text = bytearray(random_text(rng, 4))
        for _ in range(rng.integers(1, 3)):
            text[rng.integers(len(text))] = rng.choice(list(b"0123456789+-.e: \n\r\t#nx\0"))
        expected = by_hand(bytes(text))
        path.write_bytes(text)
        try:
            (found,) = libsvm.read([str(path)], MPI.COMM_SELF, "1", 10**9)
        except InputError as error:
            assert expected is None or not expected[0], (bytes(text), str(error))
            refused += 1
        else:
            assert expected is not None, bytes(text)
            assert same(found, *expected), bytes(text)
    assert 100 < refused < 390


def test_nodes_hold_the_data_once_each(comm: MPI.Comm, shared_tmp: Path) -> None:
    text = random_text(np.random.default_rng(0), 50)
    for name, packed in PACKED.items():
        node = comm.Split(int(comm.rank >= 2), comm.rank)  # as if ranks from 2 on were on another one
        (found,) = libsvm.read([written(shared_tmp, comm, packed(text), name)], comm, "1", node=node)
        assert same(found, *by_hand(text))
        node.barrier()
        if node.rank == node.size - 1:
            found.data[3] = 7.0 + comm.rank
        node.barrier()
        assert found.data[3] == 7.0 + (1 if comm.rank < 2 and comm.size > 1 else comm.rank)
        node.barrier()
        found.free()
        node.Free()


def test_files_that_belong_together_have_one_base_and_one_width(comm: MPI.Comm, shared_tmp: Path) -> None:
    one = written(shared_tmp, comm, b"1 1:1 5:2\n2 2:3\n", "one")
    other = written(shared_tmp, comm, b"1 0:1\n2 2:3\n", "other")
    first, second = libsvm.read([one, other], comm)
    assert (first.features, second.features) == (6, 6)
    assert first.indices.tolist() == [1, 5, 2]
    with pytest.raises(InputError, match=r"one has 6 features, but the training file .*other has 3: give -features 6"):
        libsvm.read([other, one], comm)
    first, second = libsvm.read([other, one], comm, features=9)
    assert (first.features, second.features) == (9, 9)
    with pytest.raises(InputError, match=r"one has 5 features, but -features asks for 4: give -features 5"):
        libsvm.read([one], comm, features=4)


# content: a text that the error has; {line} stands where a line of 30 good ones in front of it counts
WRONG: dict[str, tuple[bytes, str]] = {
    "indices out of order": (b"1 1:1 5:1 3:2\n", "line {line}: index 3 stands behind index 5"),
    "an index twice": (b"1 1:1 3:1 3:2\n", "line {line}: index 3 stands there twice"),
    "index 0": (b"1 0:1\n", "line {line}: '0:1' has index 0, but -index_base 1"),
    "negative index": (b"1 -1:1\n", "line {line}: the index of '-1:1' is no whole number"),
    "index that is no integer": (b"1 1.5:1\n", "line {line}: the index of '1.5:1' is no whole number"),
    "index of 20 digits": (b"1 12345678901234567890:1\n", "is no whole number below"),
    "missing value": (b"1 1:1 3:\n", "line {line}: '3:' has no value"),
    "missing index": (b"1 :4\n", "line {line}: the index of ':4' is no whole number"),
    "two colons": (b"1 1:2:3\n", "line {line}: the value of '1:2:3' is no number"),
    "no colon": (b"1 1:2 7\n", "line {line}: '7' is no index:value"),
    "text as label": (b"yes 1:2\n", "line {line}: the label 'yes' is no number"),
    "text as value": (b"1 1:2 2:x\n", "line {line}: the value of '2:x' is no number"),
    "two labels": (b"1,2 1:2\n", "line {line}: the label '1,2' is no number"),
    "no label": (b" 1:2\n", "line {line}: the label '1:2' is no number"),
    "two numbers in one": (b"1 1:1-2\n", "line {line}: the value of '1:1-2' is no number"),
    "half an exponent": (b"1 1:1e\n", "line {line}: the value of '1:1e' is no number"),
    "underscores": (b"1 1:1_0\n", "line {line}: the value of '1:1_0' is no number"),
    "NaN": (b"1 1:nan\n", "line {line}: the value of '1:nan' must be finite"),
    "infinity": (b"1 1:-Inf\n", "line {line}: the value of '1:-Inf' must be finite"),
    "a number too large": (b"1 1:1e999\n", "line {line}: the value of '1:1e999' is too large"),
    "label NaN": (b"nan 1:1\n", "line {line}: the label 'nan' must be finite"),
    "bytes": (b"1 1:\xff!\n", r"line {line}: the value of '1:\xff!' is no number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_faults_are_named_with_their_lines_on_all_ranks(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    text, expected = WRONG[name]
    for before, packed in ((0, "plain"), (30, "plain"), (30, "bz2")):
        good = b"".join(b"%d 1:1 2:%d # c\r\n\n" % (i % 2, i) for i in range(before // 2))
        path = written(shared_tmp, comm, PACKED[packed](good + text + good + b"bad\n"), f"{before}.{packed}")
        with pytest.raises(InputError) as caught:
            libsvm.read([path], comm, "1")
        assert expected.format(line=before + 1) in str(caught.value)
        assert path in str(caught.value)
        assert len(set(comm.allgather(str(caught.value)))) == 1
        comm.barrier()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"# nothing\n\n", "is empty"),
        (b"1\n2 # 1:1\n", "no sample has a value"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(random_text(np.random.default_rng(0), 50))[:-20], "cut off or damaged"),
        (gzip.compress(random_text(np.random.default_rng(0), 50))[:60], "cut off or damaged"),
        (b"\x1f\x8b", "cut off or damaged"),
        (b"\x1f\x8bxxxxxxxxxxxxxx", "cut off or damaged"),
        (bz2.compress(random_text(np.random.default_rng(0), 50))[:-20], "cut off or damaged"),
        (b"BZhello", "cut off or damaged"),
        (gzip.compress(b"1 1:1\n")[:10] + b"\xff" * 9, "cut off or damaged"),
        (lzma.compress(random_text(np.random.default_rng(0), 50))[:-20], "cut off or damaged"),
        (b"\xfd7zXZ\0hello", "cut off or damaged"),
        (None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(comm: MPI.Comm, shared_tmp: Path, content: bytes | None, expected: str) -> None:
    path = written(shared_tmp, comm, content, "data.gz") if content is not None else str(shared_tmp / "missing")
    with pytest.raises(InputError, match=expected) as caught:
        libsvm.read([path], comm)
    assert path in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_two_classes_are_taken_out_of_a_table(comm: MPI.Comm, shared_tmp: Path) -> None:
    text = b"1 1:1\n2 2:2\n3 3:3\n2 4:4\n1 9000:5\n"
    (table,) = libsvm.read([written(shared_tmp, comm, text)], comm)
    with pytest.raises(InputError, match=r"it has 3 classes, labels 1, 2, 3: a logistic model has two; help"):
        two_labels(table.labels, "it", "; help")
    with pytest.raises(InputError, match=r"it has 1 class, label 2: a logistic model has two$"):
        two_labels(table.labels[1:2], "it", "; help")
    assert two_labels(table.labels[3:], "it") == (1.0, 2.0)
    samples = TwoClasses(table, (2.0, 3.0))
    assert samples.rows.tolist() == [1, 2, 3]
    assert samples.signs.tolist() == [-1, 1, -1]
    assert samples.matrix.toarray()[:, 1:4].tolist() == [[2, 0, 0], [0, 3, 0], [0, 0, 4]]
    all_of_them = TwoClasses(table, (1.0, 2.0), range(5)).part(1, 4)
    assert np.shares_memory(all_of_them.matrix.data, table.data)
    table.free()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official files are not at hand")
@pytest.mark.parametrize("name", ["a9a.t.gz", "australian", "australian_scale.txt", "splice"])
def test_official_files(comm: MPI.Comm, name: str) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    (found,) = libsvm.read([str(OFFICIAL / name)], comm)
    X, y = datasets.load_svmlight_file(str(OFFICIAL / name))
    assert same(found, y, X.indptr, X.indices, X.data)
    assert found.features == X.shape[1]
    found.free()
