"""logistic.py: fits, stops, goes on on any number of ranks, takes all forms of data, and refuses what is wrong."""

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from calling import call, check_refusal, check_refusal_of_a_start, refusal
from launch import ROOT, assert_same, content, launch, started
from mpi4py import MPI
from test_ranks import needs_three, train

from solvers import PETSC_TYPES, SOLVERS

OFFICIAL = Path(os.environ.get("DDML_DATA", ROOT.parent / "shared" / "data")) / "libsvm"
DIGITS = ("-data", "digits", "-classes", "4,9", "-progress", "none")

USER = """
import numpy as np


def rings():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (500, 2))
    x = np.column_stack([x, x**2])
    y = (np.hypot(*x.T[:2]) > 0.7).astype(int)
    train, test = {"inputs": x[:400], "labels": y[:400]}, {"test_inputs": x[400:], "test_labels": y[400:]}
    return {**train, **test, "classes": ["in", "out"]}
"""


def text(samples: int, seed: int, features: int = 6, labels: tuple[str, str] = ("-1", "+1")) -> bytes:
    """A LIBSVM file of samples that a plane nearly separates."""
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_normal((samples, features)) * (rng.random((samples, features)) < 0.4), 3)
    x[0, -1] = 1.5
    y = x @ np.arange(-2, features - 2) + 0.5 * rng.standard_normal(samples) > 0
    rows = (" ".join(f"{i + 1}:{v}" for i, v in enumerate(row) if v) for row in x)
    return b"".join(f"{labels[int(c)]} {row}\n".encode() for c, row in zip(y, rows, strict=True))


@pytest.fixture(scope="module")
def files(module_tmp: Path) -> Path:
    """A folder of data files, good and bad, and the run file of a few iterations."""
    path = module_tmp
    good, lines = text(120, 0), text(120, 0).splitlines(keepends=True)
    changed = {
        "order": b"1 5:1 3:1\n", "zero": b"1 0:1\n", "missing": b"1 3:\n", "text": b"1 3:x\n", "twice": b"1 3:1 3:1\n",
        "nan": b"1 3:nan\n",
    }  # fmt: skip
    contents = {
        "train": good, "train.gz": gzip.compress(good), "cut.gz": gzip.compress(good)[:-9], "empty": b"",
        "test": text(60, 1), "wide_test": text(60, 1, 8), "other_test": text(60, 1, labels=("0", "1")),
        "other": text(120, 2), "three": good + b"2 1:1\n", "one": b"1 1:1\n1 2:1\n", "mine.py": USER.encode(),
        "huge": b"1 1:1\n2 900000000000000:1\n",
        **{name: b"".join([*lines[:70], line, *lines[70:]]) for name, line in changed.items()},
    }  # fmt: skip
    if MPI.COMM_WORLD.rank == 0:
        for name, value in contents.items():
            (path / name).write_bytes(value)
        (path / "moved").mkdir()
        (path / "moved" / "train").write_bytes(good)
        (path / "changed").mkdir()
        (path / "changed" / "train").write_bytes(text(120, 2))
    MPI.COMM_WORLD.barrier()
    run = ("-data", path / "train", "-max_it", 3, "-output", path / "run.h5", "-progress", "none")
    assert call("logistic", *run) == 0
    MPI.COMM_WORLD.barrier()
    return path


def fit(path: Path, ranks: int, iterations: int, *options: object) -> str:
    """Run to so many iterations, from the run file and with its options if it is there; what was printed."""
    where = "-restart" if path.exists() else "-output"
    result = launch(ranks, where, path, *options, "-max_it", iterations, driver="logistic.py")
    assert result.rc == 0, result.out + result.err
    return result.out


@started
def test_a_file_is_fitted_with_other_ranks_at_the_end_and_drawn(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    out = fit(path, 2, 4, "-data", files / "train.gz", "-test_data", files / "test", "-tao_gatol", 1e-8)
    lines = out.splitlines()
    assert "120 samples of 6 features, " in lines[0]
    assert "sparse products; classes -1 and +1; 60 to test with; all in each evaluation" in lines[0]
    assert "lambda 0.001, no intercept, 6 parameters; a product with the Hessian is charged 0." in lines[1]
    assert "solver tr on 2 ranks, sums in fixed order over 8 blocks" in lines[2]
    out = fit(path, 3, 30)
    assert "was written on 2 ranks" in out
    assert "read by nothing" not in out
    assert "the gradient is below tao_gatol" in out
    run = content(path)
    assert run.history["accuracy"][-1] > 0.85
    assert run.history["gradient_norm"][-1] < 1e-8
    assert np.isfinite(run.history["test_loss"]).all()
    assert run.attributes["driver"] == "logistic"
    assert run.attributes["option model"] == "hessian"
    assert call("plot", path, "-o", tmp_path / "figure.png") == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.ranks
@needs_three
@pytest.mark.parametrize("data", ["train.gz -intercept", "train -batch_size 40 -solver lbfgs"])
def test_other_numbers_of_ranks_go_on_to_the_last_bit(files: Path, data: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    file, *further = data.split()
    options = ("-data", files / file, "-test_data", files / "test", *further)
    train("logistic", whole, 2, 8, *options)
    for ranks, iterations in ((1, 3), (3, 5), (2, 8)):
        train("logistic", parts, ranks, iterations, *options)
    assert_same(whole, parts)
    assert list(content(whole).history["iteration"]) == list(range(9))
    comm.barrier()


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank is enough")
@pytest.mark.parametrize("solver", [*SOLVERS, *PETSC_TYPES])
def test_every_solver_runs_or_refuses(solver: str, tmp_path: Path) -> None:
    run = ("-solver", solver, "-max_it", 4, "-output", tmp_path / "run.h5")
    if solver == "gauss_newton":
        assert "sums of squares" in refusal("logistic", *DIGITS, *run)
        return
    if solver in SOLVERS and SOLVERS[solver].levels_of == "depth":
        assert "no depth hierarchy" in refusal("logistic", *DIGITS, *run)
        return
    assert call("logistic", *DIGITS, *run) == 0
    losses = content(tmp_path / "run.h5").history["loss"]
    assert losses[0] == pytest.approx(np.log(2)) or solver == "nm"  # which has looked around first
    assert losses.min() < 0.69


def fitted(comm: MPI.Comm, path: Path, *options: object) -> SimpleNamespace:
    """The run file of some iterations, read by all ranks."""
    assert call("logistic", *options, "-max_it", 10, "-output", path, "-overwrite", "-progress", "none") == 0
    comm.barrier()
    found = content(path)
    comm.barrier()
    return found


def test_all_forms_of_a_file_are_one(files: Path, shared_tmp: Path, comm: MPI.Comm) -> None:
    path = shared_tmp / "run.h5"
    first = fitted(comm, path, "-data", files / "train")
    assert np.isnan(first.history["test_loss"]).all()
    assert first.history["accuracy"][-1] > 0.85
    assert len(first.theta) == 6
    for options in (("train.gz",), ("train", "-index_base", 1), ("three", "-classes", "-1,1"), ("moved/train",)):
        again = fitted(comm, path, "-data", files / options[0], *options[1:])
        assert np.array_equal(again.history["loss"], first.history["loss"])
        assert np.array_equal(again.theta, first.theta)
    for options, size in ((("-features", 9), 9), (("-index_base", 0), 7), (("-intercept",), 7)):
        again = fitted(comm, path, "-data", files / "train", *options)
        assert len(again.theta) == size
        same = np.allclose(again.history["loss"][:5], first.history["loss"][:5], rtol=1e-12)
        assert same == ("-intercept" not in options)
    wide_test = fitted(comm, path, "-data", files / "train", "-test_data", files / "wide_test", "-features", 8)
    assert np.isfinite(wide_test.history["test_loss"]).all()


def test_data_sets_of_several_classes(files: Path, shared_tmp: Path, comm: MPI.Comm) -> None:
    path = shared_tmp / "run.h5"
    digits = fitted(comm, path, *DIGITS)
    assert len(digits.theta) == 64
    assert digits.history["accuracy"][-1] > 0.9
    turned = fitted(comm, path, *DIGITS, "-classes", "9,4")
    np.testing.assert_allclose(turned.theta, -digits.theta, rtol=1e-6, atol=1e-12)
    few = fitted(comm, path, *DIGITS, "-samples", 100, "-batch_size", 50)
    assert few.attributes["samples"] == 100
    own = fitted(comm, path, "-data", f"{files / 'mine.py'}:rings", "-intercept", "-lambda", 1e-4)
    assert own.history["accuracy"][-1] > 0.8
    generated = fitted(comm, path, "-data", "wide", "-samples", 200)
    assert len(generated.theta) == 5000
    assert generated.history["loss"][-1] < 0.3


def test_restarts_with_another_path_or_without_one(files: Path, comm: MPI.Comm, shared_tmp: Path) -> None:
    moved = ("-restart", files / "run.h5", "-data", files / "moved" / "train", "-output", shared_tmp / "more.h5")
    assert call("logistic", *moved, "-max_it", 5, "-progress", "none") == 0
    if comm.rank == 0:
        with h5py.File(shared_tmp / "more.h5") as file:
            assert file["history/iteration"][-1] == 5
    comm.barrier()


# what is wrong: (the options, a text that the error line must contain)
WRONG = {
    "no data": ("-max_it 2", "option -data is missing"),
    "no such data": ("-data imagenet", "no LIBSVM file imagenet; -data is one, or wide, digits"),
    "missing file": ("-data {folder}/nothing", "nothing: there is no such file"),
    "a folder": ("-data {folder}", "it is no regular file"),
    "indices out of order": ("-data {folder}/order", "order, line 71: index 3 stands behind index 5"),
    "an index twice": ("-data {folder}/twice", "twice, line 71: index 3 stands there twice"),
    "index 0": ("-data {folder}/zero -index_base 1", "zero, line 71: '0:1' has index 0"),
    "missing value": ("-data {folder}/missing", "missing, line 71: '3:' has no value"),
    "text": ("-data {folder}/text", "text, line 71: the value of '3:x' is no number"),
    "NaN": ("-data {folder}/nan", "nan, line 71: the value of '3:nan' must be finite"),
    "a huge index": ("-data {folder}/huge", "a model of 900000000000000 features takes "),
    "empty file": ("-data {folder}/empty", "empty is empty"),
    "truncated file": ("-data {folder}/cut.gz", "cut.gz: it is cut off or damaged"),
    "three classes": ("-data {folder}/three", "three has 3 classes, labels -1, 1, 2: a logistic model has two; -cl"),
    "one class": ("-data {folder}/one", "one has 1 class, label 1: a logistic model has two"),
    "one class among the first": ("-data {folder}/train -samples 1", "the first 1 samples of"),
    "too many samples": ("-data {folder}/train -samples 200", "200 training samples were asked for"),
    "classes that are none": ("-data {folder}/three -classes 1,5", "no sample has the label 5"),
    "one class by option": ("-data {folder}/three -classes 1", "-classes must be two classes"),
    "classes that are words": ("-data {folder}/three -classes cat,dog", "-classes must be two labels"),
    "wider test file": ("-data {folder}/train -test_data {folder}/wide_test", "wide_test has 8 features, but the tr"),
    "too few features": ("-data {folder}/train -features 3", "-features asks for 3: give -features 6"),
    "other labels in the test": ("-data {folder}/train -test_data {folder}/other_test", "other_test has the label 0"),
    "no features": ("-data {folder}/train -features 0", "-features must be 1 or more"),
    "unknown base": ("-data {folder}/train -index_base 2", "-index_base must be one of"),
    "negative lambda": ("-data {folder}/train -lambda -1", "-lambda must be 0 or more, got -1"),
    "infinite lambda": ("-data {folder}/train -lambda inf", "-lambda must be finite"),
    "ten classes": ("-data digits", "has 10 classes: a logistic model has two; -classes"),
    "class that is none": ("-data digits -classes 4,x", "digits has no class 'x'"),
    "test file for a data set": ("-data digits -classes 4,9 -test_data {folder}/test", "-test_data is for LIBSVM"),
    "features of a data set": ("-data wide -features 7", "-features is for LIBSVM"),
    "classes of a set of two": ("-data wide -classes 1,2", "-data wide has two"),
    "batch of too many": ("-data {folder}/train -batch_size 500", "-batch_size must be at most 120"),
    "batches that grow for a line search": (
        "-data {folder}/train -batch_size 50 -solver lbfgs -batch_growth 2", "trust region",
    ),
    "unknown solver": ("-data {folder}/train -solver sgd", "'sgd'"),
    "unknown option": ("-data {folder}/train -lamda 1", "-lamda"),
    "option of networks": ("-data {folder}/train -widths 9", "-widths"),
    "single precision": ("-data {folder}/train -dtype float32", "-dtype must be one of float64"),
    "restart with another file": ("-restart {run} -data {folder}/other", "-data cannot change"),
    "restart with a file of other numbers": (
        "-restart {run} -data {folder}/changed/train", "was written for problem 'logistic regression of 120 samples",
    ),
    "restart with another lambda": ("-restart {run} -lambda 1", "-lambda cannot change"),
    "restart with more features": ("-restart {run} -features 9", "another network"),
    "restart of another driver": ("-restart {run} -data digits -intercept", "-data cannot change"),
    "output exists": ("-data {folder}/train -output {run}", "-overwrite"),
}  # fmt: skip


def command(files: Path, options: str) -> list[str]:
    words = options.format(folder=files, run=files / "run.h5").split()
    overwrite = [] if {"-restart", "-output"} & set(words) else ["-output", str(files / "run.h5"), "-overwrite"]
    return ["-max_it", "5", *words, *overwrite]


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named_in_one_line_on_all_ranks(name: str, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, expected = WRONG[name]
    check_refusal("logistic", command(files, options), expected, files, capfd)


@started
@pytest.mark.parametrize("name", ["text", pytest.param("three classes", marks=pytest.mark.long)])
def test_a_driver_that_refuses_prints_one_line_and_ends_with_1(files: Path, name: str) -> None:
    options, expected = WRONG[name]
    check_refusal_of_a_start("logistic", command(files, options), expected, files)


@started
@pytest.mark.long
def test_help_lists_the_options() -> None:
    result = launch(1, "-help", driver="logistic.py")
    assert result.rc == 0
    for name in ("-data", "-lambda", "-index_base", "-batch_size", "-target_accuracy", "Options of -solver tr"):
        assert name in result.out
    assert "-widths" not in result.out


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official files are not at hand")
def test_official_files(comm: MPI.Comm, shared_tmp: Path) -> None:
    data = ("-data", OFFICIAL / "a9a.gz", "-test_data", OFFICIAL / "a9a.t.gz")
    run = fitted(comm, shared_tmp / "run.h5", *data)
    assert len(run.theta) == 123
    assert run.history["loss"][-1] == pytest.approx(0.3333408, abs=2e-7)
    assert run.history["accuracy"][-1] > 0.85
