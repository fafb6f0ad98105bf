"""Data sets: read in parallel, shared in a node, scaled, and refused by all ranks together."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.data import data_set, files, writing
from ddml.data.data_set import DataSet
from ddml.data.scaling import Samples, Scaling
from ddml.data.writing import Stream
from ddml.errors import InputError

NAMES = ("inputs", "labels", "test_inputs", "test_labels")


def arrays(dtype: Any = np.uint8, shape: tuple[int, ...] = (3, 4, 5), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 256, (n, *shape)).astype(dtype) for n in (37, 11)]
    return dict(zip(NAMES, (values[0], np.arange(37) % 4, values[1], np.arange(11) % 4), strict=True))


def write(path: Path, found: dict[str, Any], comm: MPI.Comm, **attributes: Any) -> str:
    """Any arrays as a data file, right or wrong."""
    if comm.rank == 0:
        with h5py.File(path, "w") as file:
            file.attrs.update({"format": writing.FORMAT, "origin": "random", **attributes})
            file.attrs.create("classes", list("abcd"), dtype=h5py.string_dtype())
            for name, array in found.items():
                file[name] = array
    comm.barrier()
    return str(path)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6,), (3, 4, 5)])
def test_every_rank_sees_what_is_in_the_file(
    comm: MPI.Comm, shared_tmp: Path, dtype: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_set, "PIECE", 300)  # several pieces
    expected = arrays(dtype, shape)
    found = files.read(write(shared_tmp / "data.h5", expected, comm), comm)
    for name, array in found.arrays().items():
        assert array.dtype == (np.int64 if "labels" in name else dtype)
        assert np.array_equal(array, expected[name])
    assert (found.classes, found.origin, found.count, found.shape) == (tuple("abcd"), "random", 37, shape)
    assert found.maximum == (255 if dtype == np.uint8 else 1)
    few = files.read(str(shared_tmp / "data.h5"), comm, samples=5)
    assert np.array_equal(few.inputs, expected["inputs"][:5])
    assert (few.count, len(few.test_labels)) == (5, 11)
    few.free()
    found.free()
    assert found.count == 0


def test_a_node_holds_the_data_once(comm: MPI.Comm, shared_tmp: Path) -> None:
    found = files.read(write(shared_tmp / "data.h5", arrays(), comm), comm)
    if comm.rank == comm.size - 1:
        found.inputs[3] = 7
    found.fence()
    assert (found.inputs[3] == 7).all()
    found.free()


def test_compressed_files_are_read(comm: MPI.Comm, shared_tmp: Path) -> None:
    expected, path = arrays(), shared_tmp / "data.h5"
    write(path, {n: a for n, a in expected.items() if n != "inputs"}, comm)
    if comm.rank == 0:
        with h5py.File(path, "a") as file:
            file.create_dataset("inputs", data=expected["inputs"], chunks=(10, 3, 4, 5), compression="gzip")
    comm.barrier()
    found = files.read(str(path), comm)
    assert np.array_equal(found.inputs, expected["inputs"])
    found.free()


def with_value(name: str, row: int, value: float, dtype: Any = np.uint8) -> dict[str, Any]:
    found = arrays(dtype)
    found[name][row] = value
    return found


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": (with_value("labels", 36, 4), "labels must be from 0 to 3.*sample 36 has 4"),
    "negative label": (with_value("test_labels", 10, -1), "test_labels must be from 0 to 3.*sample 10 has -1"),
    "NaN": (with_value("inputs", 20, np.nan, np.float32), "inputs must be finite; sample 20"),
    "infinity": (with_value("test_inputs", 0, np.inf, np.float64), "test_inputs must be finite; sample 0"),
    "fewer columns in the test": (arrays() | {"test_inputs": arrays()["test_inputs"][:, :2]}, "test_inputs must have"),
    "other type in the test": (arrays() | {"test_inputs": arrays(np.float32)["test_inputs"]}, "test_inputs must have"),
    "fewer labels": (arrays() | {"labels": np.arange(36) % 4}, "37 samples, but labels 36"),
    "labels in columns": (arrays() | {"labels": np.zeros((37, 1), int)}, "labels must be integers"),
    "labels that are no integers": (arrays() | {"labels": np.zeros(37)}, "labels must be integers"),
    "inputs without columns": (arrays() | {"inputs": np.zeros(37)}, r"inputs must be .*\(N, ...\)"),
    "inputs of a third type": (arrays() | {"inputs": arrays()["inputs"].astype(np.float16)}, "uint8, float32"),
    "inputs of another type": (arrays() | {"inputs": arrays()["inputs"].astype(np.int32)}, "uint8, float32"),
    "no samples": (arrays() | {"inputs": np.zeros((0, 3, 4, 5), np.uint8), "labels": np.zeros(0, int)}, "empty"),
    "no test labels": ({n: a for n, a in arrays().items() if n != "test_labels"}, "no data file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_all_ranks(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    found, expected = WRONG[name]
    path = write(shared_tmp / "data.h5", found, comm)
    with pytest.raises(InputError, match=expected) as caught:
        files.read(path, comm)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    assert path in str(caught.value)


def test_missing_foreign_and_short_files_are_refused(comm: MPI.Comm, shared_tmp: Path) -> None:
    text = shared_tmp / "text.h5"
    if comm.rank == 0:
        text.write_text("1 2 3\n")
    path = write(shared_tmp / "data.h5", arrays(), comm)
    for name, match in ((str(shared_tmp / "no.h5"), "no.h5: there is no such file"), (str(text), "no data file")):
        with pytest.raises(InputError, match=match):
            files.load(name, comm)
    with pytest.raises(InputError, match="38 training samples were asked for, there are 37"):
        files.load(path, comm, samples=38)
    with pytest.raises(InputError, match="maximum"):
        files.read(write(shared_tmp / "other.h5", arrays(), comm, maximum=0.0), comm)


FOREIGN: dict[str, tuple[Any, str]] = {
    "a group in the place of an array": (lambda f: (f.pop("inputs"), f.create_group("inputs")), "is no data file"),
    "a text in the place of an array": (
        lambda f: (f.pop("labels"), f.create_dataset("labels", data="0 1")), "labels must be integers",
    ),
    "an array without a shape": (
        lambda f: (f.pop("inputs"), f.create_dataset("inputs", data=h5py.Empty("f8"))), "inputs must be",
    ),
    "no classes": (lambda f: f.attrs.pop("classes"), "classes"),
    "a number in the place of classes": (lambda f: f.attrs.create("classes", 4), "is no data file"),
    "a maximum in words": (lambda f: f.attrs.create("maximum", "large"), "number above 0, got large"),
    "a maximum for each channel": (lambda f: f.attrs.create("maximum", [1.0, 2.0, 3.0]), "number above 0, got"),
    "more than any memory": (
        lambda f: [
            (f.pop(f"{t}inputs"), f.create_dataset(f"{t}inputs", (n, 10**6, 10**6), np.float64, chunks=(1, 1, 10**4)))
            for t, n in (("", 37), ("test_", 11))
        ],
        "parts, which are not all stored",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_content_is_refused_by_all_ranks(comm: MPI.Comm, shared_tmp: Path, name: str) -> None:
    change, expected = FOREIGN[name]
    path = write(shared_tmp / "data.h5", arrays(), comm, maximum=1.0)
    if comm.rank == 0:
        with h5py.File(path, "a") as file:
            change(file)
    comm.barrier()
    with pytest.raises(InputError, match=expected) as caught:
        files.read(path, comm)
    assert path in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_numbers_and_texts_of_other_programs_are_read(comm: MPI.Comm, shared_tmp: Path) -> None:
    expected = arrays(np.float64)
    path = write(shared_tmp / "data.h5", {n: a.astype(a.dtype.newbyteorder(">")) for n, a in expected.items()}, comm)
    if comm.rank == 0:
        with h5py.File(path, "a") as file:
            file.attrs["classes"], file.attrs["origin"] = (
                np.array([b"cat", b"dog", b"k\xc3\xa4fer", b"d"]),
                np.bytes_("x"),
            )
    comm.barrier()
    found = files.read(path, comm)
    assert (found.classes, found.origin) == (("cat", "dog", "käfer", "d"), "x")
    assert found.inputs.dtype == np.float64
    assert np.array_equal(found.inputs, expected["inputs"])
    found.free()


def test_damage_by_chance_is_noticed_or_is_one_of_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path, (x, y, test_x, test_y) = tmp_path / "data.h5", arrays(np.uint8, (1,)).values()
    writing.write(path, Stream.of(x, y), Stream.of(test_x, test_y), list("abcd"), "somewhere")
    good, refused = path.read_bytes(), 0
    for i in range(40):  # tests/drivers/test_mutations.py has more
        content = bytearray(good)
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content if i % 5 else content[: rng.integers(len(content))])
        try:
            found = files.read(str(path), MPI.COMM_SELF)
        except InputError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            assert (found.classes, found.origin, found.maximum) == (tuple("abcd"), "somewhere", 255)
            assert found.inputs.shape == x.shape
    assert 20 < refused < 40


def test_digits_are_those_of_scikit_learn(comm: MPI.Comm) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits().images, load_digits().target
    found = files.load("digits", comm)
    assert (found.count, found.shape, found.maximum, len(found.classes)) == (1437, (1, 8, 8), 16, 10)
    assert np.array_equal(np.concatenate([found.inputs, found.test_inputs])[:, 0], images)
    assert np.array_equal(np.concatenate([found.labels, found.test_labels]), labels)
    found.free()


USER = """
import numpy as np
from ddml.data.data_set import DataSet
x = np.arange(12.0).reshape(6, 2)
def lines(): return {"inputs": x, "labels": [0, 1] * 3, "test_inputs": x[:2], "test_labels": [1, 0], "maximum": 11}
ready = DataSet(x, [0, 1] * 3, x, [0, 1] * 3)
def number(): return 3
def fails(): raise OSError("no network")
def wrong(): return {"inputs": x, "labels": [0, 1, 7] * 2, "test_inputs": x, "test_labels": [0] * 6, "classes": "ab"}
"""


def test_a_users_data_set(comm: MPI.Comm, shared_tmp: Path) -> None:
    file = shared_tmp / "mine.py"
    if comm.rank == 0:
        file.write_text(USER)
    comm.barrier()
    for name in ("lines", "ready"):
        found = files.load(f"{file}:{name}", comm, samples=4)
        assert np.array_equal(found.inputs, np.arange(8.0).reshape(4, 2))
        assert found.labels.tolist() == [0, 1, 0, 1]
        found.free()
    for name, match in (
        ("number", "no ddml.data.data_set.DataSet but a int"),
        ("fails", "raised OSError: no network"),
        ("wrong", "sample 2 has 7"),
        ("nothing", "has no 'nothing'"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            files.load(f"{file}:{name}", comm)
        assert len(set(comm.allgather(str(caught.value)))) == 1
    with pytest.raises(InputError, match="unknown data set 'mnist'; there are digits"):
        files.load("mnist", comm)


def test_written_files_are_read(comm: MPI.Comm, shared_tmp: Path) -> None:
    expected, path = arrays(np.float32), str(shared_tmp / "data.h5")
    if comm.rank == 0:

        def pieces() -> Any:
            return ((expected["inputs"][i : i + 5], expected["labels"][i : i + 5]) for i in range(0, 37, 5))

        def damaged() -> Any:
            x = expected["inputs"].copy()
            x[22, 1] = np.nan
            return ((x[i : i + 5], expected["labels"][i : i + 5]) for i in range(0, 37, 5))

        train = Stream(37, (3, 4, 5), np.float32, pieces)
        test = Stream.of(expected["test_inputs"], expected["test_labels"])
        writing.write(path, train, test, list("abcd"), "somewhere", 255.0)
        before = Path(path).read_bytes()
        for wrong, match in (
            (Stream.of(expected["test_inputs"], expected["test_labels"] + 1), "labels must be from 0"),
            (Stream(12, (3, 4, 5), np.float32, test.pieces), "12 samples were announced, 11 came"),
            (Stream(37, (3, 4, 5), np.float32, damaged), "inputs must be finite; sample 22 has NaN"),
            (Stream.of(expected["test_inputs"][:, :1], expected["test_labels"]), "test_inputs must have"),
        ):
            with pytest.raises(InputError, match=match):
                writing.write(path, train, wrong, list("abcd"), "somewhere")
        with pytest.raises(InputError, match="cannot write"):
            writing.write(shared_tmp / "no" / "data.h5", train, test, list("abcd"), "somewhere")
        assert Path(path).read_bytes() == before
        assert [p.name for p in shared_tmp.iterdir()] == ["data.h5"]
    comm.barrier()
    found = files.read(path, comm)
    assert np.array_equal(found.inputs, expected["inputs"])
    assert (found.origin, found.maximum, found.classes) == ("somewhere", 255, tuple("abcd"))
    found.free()


@pytest.mark.parametrize("kind", ["unit", "standard", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling(comm: MPI.Comm, kind: str, dtype: torch.dtype) -> None:
    found = arrays(np.uint8, (3, 4, 5))
    found["inputs"][:, 2] = found["test_inputs"][:, 2] = 9  # a constant channel
    dataset = DataSet(**found, maximum=200)
    scaling = Scaling(dataset, kind, comm)
    samples = Samples(dataset.inputs, dataset.labels, scaling, dtype, torch.device("cpu"))
    x = dataset.inputs.astype(float)
    deviation = x.std(axis=(0, 2, 3), keepdims=True)
    expected = {"unit": x / 200, "none": x}
    expected["standard"] = (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.where(deviation > 0, deviation, 1)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert samples.inputs.dtype == dtype
    np.testing.assert_allclose(samples.inputs.numpy(), expected[kind], rtol=tolerance, atol=tolerance)
    assert np.array_equal(dataset.inputs, found["inputs"])  # what is stored is not touched
    numbers = torch.tensor([30, 2, 2, 17])
    for chosen, rows in (
        (samples.part(5, 9), [5, 6, 7, 8]),
        (samples.take(numbers), numbers),
        (samples.take(numbers).part(1, 3), [2, 2]),
        (samples.part(10, 20).take(torch.tensor([3, 1])), [13, 11]),
        (samples.part(4, 4), []),
    ):
        assert len(chosen) == len(rows)
        assert torch.equal(chosen.inputs, samples.inputs[torch.tensor(list(rows), dtype=torch.int64)])
        assert chosen.targets.tolist() == [dataset.labels[i] for i in rows]


def test_floats_are_scaled_in_a_copy(comm: MPI.Comm) -> None:
    dataset = DataSet(**arrays(np.float64), maximum=2.0)
    samples = Samples(
        dataset.inputs, dataset.labels, Scaling(dataset, "unit", comm), torch.float64, torch.device("cpu")
    )
    before = dataset.inputs.copy()
    assert np.array_equal(samples.inputs.numpy(), before / 2)
    assert np.array_equal(dataset.inputs, before)


def test_strides_do_not_depend_on_where_samples_come_from() -> None:
    """Axes of one entry have any, by which torch chooses how to compute, and so how to round."""
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    for inputs in (images[:, None], images.reshape(2, 1, 5, 4), np.broadcast_to(images[:, None], (2, 1, 5, 4))):
        made = DataSet(inputs, [0, 1], inputs[:1], [0])
        assert made.inputs.strides == (20, 20, 4, 1) and np.array_equal(made.inputs, inputs)
    assert files.digits().inputs.strides == (64, 64, 8, 1)
