"""classify.py: trains, stops, goes on, on any number of ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from calling import call
from launch import LONG, ROOT, assert_same, content, finish, kill, launch, processes, start
from own_data import BATCHES, USER

OFFICIAL = Path(os.environ.get("DDML_DATA", ROOT.parent / "shared" / "data"))


def classify(ranks: int, *options: object, **settings: Any) -> SimpleNamespace:
    return launch(ranks, *options, driver="classify.py", **settings)


def train(path: Path, ranks: int, iterations: int, *options: object, fresh: bool = LONG) -> str:
    """Run to so many iterations, from the run file and with its options if it is there; what was printed."""
    where = "-restart" if path.exists() else "-output"
    result = classify(ranks, where, path, *options, "-max_it", iterations, fresh=fresh)
    assert result.rc == 0, result.out + result.err
    return result.out


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with default options on all digits."""
    path = tmp_path_factory.mktemp("learnt") / "run.h5"
    return SimpleNamespace(path=path, out=train(path, 2, 60, fresh=True))


def test_digits_are_learnt(learnt: SimpleNamespace) -> None:
    run = content(learnt.path)
    lines = learnt.out.splitlines()
    assert "1437 + 360 samples 1x8x8, 10 classes" in lines[0]
    assert "mlp 64-32-32-10, 3466 parameters in 3 layers, float32" in lines[1]
    assert run.history["accuracy"][-1] > 0.85
    last = next(line for line in lines if line.startswith("stopped"))
    assert f"accuracy {run.history['accuracy'][-1]:.4f}" in last
    assert f"loss {run.history['loss'][-1]:.6e} (on other samples {run.history['test_loss'][-1]:.6e})" in last
    assert f"work {run.history['work'][-1]:.1f}" in last
    assert run.attributes["driver"] == "classify"
    assert run.attributes["option data"] == "digits"
    assert np.isfinite(run.history["test_loss"]).all()
    assert np.isnan(run.history["error"]).all()


def test_loss_and_accuracy_are_drawn(learnt: SimpleNamespace, tmp_path: Path) -> None:
    assert call("plot", learnt.path, "-o", tmp_path / "figure.png") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    image = plt.imread(tmp_path / "figure.png")
    assert image.shape[0] > 900  # two rows of panels
    assert image[..., :3].std() > 0.05


@pytest.mark.long
def test_other_numbers_of_ranks_go_on_with_the_same_batches(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    options = ("-solver", "aspqn", "-local_steps", "3", "-subdomains", "2", *BATCHES)
    out = train(whole, 2, 12, *options)
    assert "5 batches an epoch of 288 and 29 of the one before, 2 iterations on each" in out
    train(parts, 1, 5, *options)
    for ranks, iterations in ((3, 8), (2, 12)):
        train(parts, ranks, iterations)
    assert_same(whole, parts)
    history = content(whole).history
    measured = np.isfinite(history["accuracy"])
    assert (measured == (np.arange(13) % 6 == 0)).all()  # 6 batches of 288 cost ten times what 360 test samples do
    assert history["work"][0] == pytest.approx(287 / 1437)


def test_a_killed_run_goes_on_with_other_ranks(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.h5", tmp_path / "killed.h5"
    options = (*BATCHES, "-checkpoint_interval", "1", "-solver", "mspqn", "-local_steps", "3")
    train(whole, 1, 12, *options)
    process = start(2, *options, "-max_it", 12, "-output", killed, driver="classify.py")
    end = time.monotonic() + 60
    while not killed.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    kill(process)
    finish(process)
    train(killed, 3, 12)
    assert_same(whole, killed)


@pytest.mark.long
def test_a_signal_stops_a_run_that_can_go_on(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.h5", tmp_path / "stopped.h5"
    endless = ("-max_it", 10**6, "-max_time", 100)  # only the signal ends it, however busy the machine
    process = start(2, *BATCHES, *endless, "-output", stopped, driver="classify.py", fresh=True)
    assert any(line.startswith("     2 ") for line in process.stdout)
    ranks = {rank: pid for pid, rank in processes(process.pid).items() if rank >= 0}
    os.kill(ranks[1], signal.SIGTERM)
    result = finish(process)
    assert result.rc == 0, result.err
    assert "stopped: a signal asked to stop" in result.out
    length = int(content(stopped).history["iteration"][-1]) + 10
    for run in (stopped, whole):
        train(run, 2, length, *BATCHES)
    assert_same(whole, stopped)


def test_limits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for limit, value, reason in (
        ("target_accuracy", 0.5, "target_accuracy is reached"),
        ("max_work", 3, "max_work is reached"),
    ):
        path = tmp_path / f"{limit}.h5"
        assert call("classify", f"-{limit}", value, "-output", path, "-max_it", 500) == 0
        assert f"stopped: {reason}" in capfd.readouterr().out
        column = content(path).history["accuracy" if "accuracy" in limit else "work"]
        assert column[-1] >= value
        assert (column[:-1] < value).all()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("user") / "mine.py"
    file.write_text(USER)
    return file


def test_ones_own_data_and_network(user: Path, tmp_path: Path) -> None:
    options = ("-data", f"{user}:rings", "-network", f"{user}:net", "-scaling", "standard", "-dtype", "float64")
    out = train(tmp_path / "run.h5", 2, 60, *options)
    assert "400 + 100 samples 2, 2 classes" in out
    assert content(tmp_path / "run.h5").history["accuracy"][-1] > 0.9


@pytest.mark.long
@pytest.mark.skipif(not (OFFICIAL / "mnist").is_dir(), reason="the official files are not at hand")
def test_mnist_takes_the_same_way_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    data = tmp_path / "mnist.h5"
    prepare = (str(ROOT / "data" / "prepare.py"), "mnist", str(OFFICIAL / "mnist"), "-o", str(data))
    subprocess.run([sys.executable, *prepare], check=True, capture_output=True, timeout=120)
    options = ("-data", data, "-samples", 2000, "-batch_size", 500, "-dtype", "float64", "-solver", "lbfgs")
    for ranks in (1, 2, 3):
        out = train(tmp_path / f"{ranks}.h5", ranks, 15, *options)
        assert "2000 + 10000 samples 1x28x28" in out
        assert_same(tmp_path / "1.h5", tmp_path / f"{ranks}.h5")
    for ranks in (1, 2):  # summed by ranks
        train(tmp_path / f"{ranks}b.h5", ranks, 15, *options, "-summation_blocks", 0)
    assert_same(tmp_path / "1b.h5", tmp_path / "2b.h5", 1e-8)
