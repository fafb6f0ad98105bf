"""data/synthetic.py: what times are measured on where no data is that large."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data import data_set, files

PATH = Path(__file__).parents[1] / "data" / "synthetic.py"
_spec = importlib.util.spec_from_file_location("synthetic", PATH)
assert _spec
assert _spec.loader
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


def made(path: Path, *words: Any) -> data_set.DataSet:
    synthetic.main([*map(str, words), "-o", str(path)])
    return files.read(str(path), MPI.COMM_SELF)


def test_enlarged_pixels_are_repeated(tmp_path: Path) -> None:
    digits, found = files.digits(), made(tmp_path / "a.h5", "enlarged", "digits", "-factor", 3)
    assert np.array_equal(found.inputs, np.kron(digits.inputs, np.ones((1, 1, 3, 3))))
    assert np.array_equal(found.test_inputs[:, :, ::3, 2::3], digits.test_inputs)
    assert (found.maximum, found.classes) == (digits.maximum, digits.classes)
    assert np.array_equal(found.labels, digits.labels)
    assert "synthetic" in found.origin


def test_solids_are_those_of_their_images(tmp_path: Path) -> None:
    digits = files.digits()
    words = ("solids", "digits", "-train", 70, "-held", 20, "-test", 30, "-side", 16)
    found, again = made(tmp_path / "a.h5", *words), made(tmp_path / "b.h5", *words)
    assert found.shape == (1, 16, 16, 16)
    assert [len(a) for n, a in found.arrays().items() if n.endswith("labels")] == [70, 30, 20]
    assert np.array_equal(found.labels, digits.labels[:70])
    assert np.array_equal(found.held_labels, digits.labels[70:90])
    assert all(np.array_equal(a, b) for a, b in zip(found.arrays().values(), again.arrays().values(), strict=True))
    other = made(tmp_path / "c.h5", *words, "-seed", 1)
    assert not np.array_equal(found.inputs, other.inputs)
    # through the noise, and turned and shifted a little: seen from the front they are most like their own images
    seen = found.inputs[:, 0].mean(axis=1).reshape(70, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(70, -1)
    images = digits.inputs[:70].reshape(70, -1)
    alike = np.corrcoef(seen, images)[:70, 70:]
    assert np.mean(np.diag(alike)) > np.mean(alike) + 0.2
    # value 0 is stored as 95.6 and the noise has half of 63.75; nothing beyond the solid
    front = found.inputs[:, 0, 0].astype(float)
    assert abs(front.mean() - 95.6) < 1.0
    assert abs(front.std() - 0.5 * 255 / 4) < 2.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("enlarged", "digits", "-factor", 0), "-factor must be 1 or more, got 0"),
        (("enlarged", "missing.h5"), "missing.h5"),
        (("solids", "digits", "-train", 9, "-test", 361), "-test must be 1 to 360, the images that there are; got 361"),
        (("solids", "digits", "-train", 1400, "-held", 300), "-train must be 1 to 1137"),
        (("solids", "digits", "-train", 0), "-train must be 1 to"),
        (("solids", "digits", "-side", 7), "-side must be 8 or more, got 7"),
        (("solids", "digits", "-seed", -1), "-seed must be 0 or more, got -1"),
    ],
)
def test_refused(tmp_path: Path, words: tuple[Any, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said) as end:
        made(tmp_path / "a.h5", *words)
    assert str(end.value).startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_its_own_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    made(path, "solids", "digits", "-train", 5, "-held", 0, "-test", 1, "-side", 8)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="give another one by -o"):
        made(path, "enlarged", path)
    with pytest.raises(SystemExit, match="images"):
        made(tmp_path / "b.h5", "solids", path)
    assert path.read_bytes() == before
