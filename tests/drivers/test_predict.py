"""predict.py: tables of what a run has trained, and what is wrong with points."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call, check_refusal
from launch import content
from own_data import USER

import ddml
from ddml.errors import InputError

HERE = Path(__file__).parent
SHORT = ("-max_it", 1, "-points", 60, "-error_points", 50, "-test_points", 0, "-error_interval", 1, "-progress", "none")


@pytest.fixture(scope="module")
def rod(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's problem whose inputs are scaled."""
    path = tmp_path_factory.mktemp("rod") / "rod.h5"
    assert call("pinn", "-problem", f"{HERE}/scaled_problems.py:Rod", *SHORT, "-output", path) == 0
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.h5"
    more = ("-samples", 60, "-batch_size", 0, "-max_it", 2, "-error_interval", 1, "-progress", "none")
    assert call("classify", *more, "-output", path) == 0
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a .csv file."""
    with path.open(newline="") as file:
        names, *rows = list(csv.reader(file))
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def test_points_of_a_file(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    points, out = tmp_path / "points.csv", tmp_path / "out.csv"
    points.write_text("x,name,t\n0.5,a,0.25\n-1,b,1\n7,c,0\n")
    assert call("predict", good, "-at", points, "-o", out) == 0
    said = capfd.readouterr().out
    assert "note: 1 of 3 points are outside of the domain" in said and f"wrote {out}" in said
    found = {name: column.astype(float) for name, column in read(out).items()}
    assert list(found) == ["t", "x", "u", "u.t", "u.x", "u.xx", "residual", "u exact", "u error"]
    assert found["x"].tolist() == [0.5, -1, 7]
    u = ddml.open_run(good).network()(torch.tensor([[0.25, 0.5], [1, -1], [0, 7]], dtype=torch.float64))
    np.testing.assert_allclose(found["u"], u[:, 0].detach().numpy(), rtol=0, atol=1e-14)
    residual = found["u.t"] + found["u"] * found["u.x"] - 0.01 / np.pi * found["u.xx"]
    np.testing.assert_allclose(found["residual"], residual, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found["u error"], found["u"] - found["u exact"])
    assert np.isfinite(found["u exact"]).tolist() == [True, True, False]


@pytest.mark.parametrize("suffix", ["csv", "npz", "vti", "vtr", "vtu"])
def test_grids(suffix: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"out.{suffix}"
    out.write_text("of before")
    assert call("predict", good, "-grid", "4x3", "-o", out) == 0
    assert "at 12 points" in capfd.readouterr().out
    head = out.read_bytes()
    if suffix == "csv":
        assert read(out)["t"].astype(float).tolist() == sorted([0, 1 / 3, 2 / 3, 1] * 3)
    elif suffix == "npz":
        with np.load(out) as arrays:
            assert arrays["u"].shape == (4, 3) and arrays["x"].tolist() == [-1, 0, 1]
    else:
        extent = b'NumberOfPoints="12"' if suffix == "vtu" else b'Extent="0 3 0 2 0 0"'
        assert extent in head and b'Name="u.xx"' in head
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_the_error_is_that_of_the_run(rod: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("predict", rod, "-trust", "-grid", 7, "-o", tmp_path / "out.csv") == 0
    said = capfd.readouterr().out.split("relative error of u ")[1].split()[0]
    assert float(said) == pytest.approx(content(rod).history["error"][-1], rel=1e-4)  # 7 x 7 points there, too


def test_coefficients_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, problem = tmp_path / "run.h5", f"{HERE}/scaled_problems.py:Measured"
    assert call("pinn", "-problem", problem, *SHORT, "-output", run) == 0
    assert call("predict", run, "-problem", problem, "-grid", 3, "-o", tmp_path / "out.npz") == 0
    assert f"rate = {content(run).theta[-1]:.8g}" in capfd.readouterr().out.splitlines()


def test_test_samples_of_a_classifier(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert call("predict", digits, "-o", out) == 0
    found = read(out)
    accuracy = content(digits).history["accuracy"][-1]
    assert (found["class"] == found["label"]).mean() == accuracy
    assert f"accuracy {accuracy:.4f}" in capfd.readouterr().out
    chances = np.stack([found[f"probability {n}"].astype(float) for n in range(10)], axis=1)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-12)
    assert (chances.argmax(1).astype(str) == found["class"]).all()


def test_given_samples_of_a_classifier(digits: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8))
    np.save(tmp_path / "images.npy", images)
    for name in ("out.csv", "out.npz"):
        assert call("predict", digits, "-at", tmp_path / "images.npy", "-o", tmp_path / name) == 0
    module = ddml.open_run(digits).network()
    expected = module.probabilities(torch.from_numpy(images)).numpy()
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_array_equal(arrays["probability 3"], expected[:, 3])
    assert "label" not in read(tmp_path / "out.csv")


def test_classes_of_a_user(tmp_path: Path) -> None:
    user, run, points = tmp_path / "user.py", tmp_path / "run.h5", tmp_path / "points.csv"
    user.write_text(USER)
    named = ("-data", f"{user}:rings", "-network", f"{user}:net")
    assert call("classify", *named, "-batch_size", 0, "-max_it", 1, "-progress", "none", "-output", run) == 0
    points.write_text("a,b\n0,0\n0.9,0.9\n")
    # the data are not needed for samples of one's own, nor is their file trusted
    assert call("predict", run, "-at", points, *named[2:], "-o", tmp_path / "out.csv") == 0
    assert set(read(tmp_path / "out.csv")["class"]) <= {"in", "out"}


def test_samples_of_a_logistic_model(tmp_path: Path) -> None:
    data, run, points = tmp_path / "two.txt", tmp_path / "run.h5", tmp_path / "points.csv"
    data.write_text("\n".join(f"{(-1) ** i:+d} 1:{i % 5} 2:{(-1) ** i * 2 + i % 3}" for i in range(40)))
    assert call("logistic", "-data", data, "-batch_size", 0, "-max_it", 5, "-progress", "none", "-output", run) == 0
    points.write_text("a,b\n1,2\n1,-2\n")
    with pytest.raises(InputError, match="-at is missing"):
        call("predict", run, "-o", tmp_path / "out.csv")
    assert call("predict", run, "-at", points, "-o", tmp_path / "out.csv") == 0
    found, w = read(tmp_path / "out.csv"), content(run).theta
    assert found["class"].tolist() == ["+1", "-1"]
    expected = 1 / (1 + np.exp(-np.array([[1, 2], [1, -2]]) @ w))
    np.testing.assert_allclose(found["probability +1"].astype(float), expected, rtol=1e-13)


BAD = {
    "missing columns": (("-at", "missing.csv"), "missing.csv has no columns t; it has x, y"),
    "NaN": (("-at", "nan.csv"), "t is nan at point 1"),
    "no file": (("-at", "none.csv"), "none.csv"),
    "a folder": (("-at", "."), "no regular file"),
    "a grid above memory": (("-grid", "1000000x1000000"), "times the memory of a node"),
    "a grid beyond numbers": (("-grid", "9" * 30), "-grid must be numbers of 2 or more"),
    "a grid of words": (("-grid", "axb"), "-grid must be numbers"),
    "a grid of one": (("-grid", "1x5"), "-grid must be numbers of 2"),
    "a grid of three": (("-grid", "3x3x3"), "-grid must be 2 numbers, for t, x, or one"),
    "both": (("-grid", "3", "-at", "points.csv"), "either -at points.csv or -grid"),
    "neither": ((), "either -at points.csv or -grid"),
    "a grid's format": (("-at", "points.csv", "-o", "out.vti"), "give -grid, or write .vtu"),
    "an unknown format": (("-grid", "3", "-o", "out.xyz"), "-o must be a file .csv"),
    "a device": (("-grid", "3", "-o", "/dev/null"), "-o must be a file .csv"),
    "what is read": (("-at", "points.csv", "-o", "points.csv"), "it is read"),
    "no folder": (("-grid", "3", "-o", "nowhere/out.csv"), "no folder"),
    "an unknown option": (("-grids", "3"), "-grids"),
    "another problem": (("-grid", "3", "-problem", "allen_cahn"), "was written with -problem 'burgers'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(
    case: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("missing.csv").write_text("x,y\n1,2\n")
    Path("nan.csv").write_text("x,t\n1,nan\n")
    Path("points.csv").write_text("x,t\n1,0\n")
    Path("out.csv").write_text("of before")
    more = () if "-o" in options else ("-o", "out.csv")
    check_refusal("predict", [str(good), *options, *more], expected, tmp_path, capfd)


def test_what_does_not_fit_the_run_is_named(
    good: Path, rod: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    (tmp_path / "text.h5").write_text("loss")
    out = ["-o", str(tmp_path / "out.csv")]
    for words, expected in (
        ([str(good), "-grid", "3"], "-o is missing"),
        ([str(rod), "-grid", "3", *out], "names a file"),
        ([str(tmp_path / "text.h5"), "-grid", "3", *out], "not a run file"),
        ([str(digits), "-grid", "3", *out], "is of a classifier"),
        ([str(digits), "-o", str(tmp_path / "out.vtu")], "is of a classifier"),
        ([str(digits), "-at", str(tmp_path / "a.npy"), *out], "must hold numbers (N, 1, 8, 8) or (N, 64)"),
        ([*out], "run.h5"),
    ):
        check_refusal("predict", words, expected, tmp_path, capfd)
