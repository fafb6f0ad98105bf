"""plot.py draws run files, and says what is wrong with those that it cannot."""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiled_runs
from calling import call, refusal
from launch import content, launch

import ddml
from ddml.errors import InputError


def test_convergence_and_maps(good: Path, tmp_path: Path) -> None:
    other = shutil.copy(good, tmp_path / "other.h5")
    figure = tmp_path / "figure.png"
    result = launch(1, good, other, "-o", figure, "-labels", "first", "second", driver="plot.py")
    assert result.rc == 0, result.err
    assert result.out.split() == ["wrote", str(figure), "wrote", str(tmp_path / "figure.maps.png")]
    for name in ("figure.png", "figure.maps.png"):
        image = plt.imread(tmp_path / name)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.05


def test_no_maps(good: Path, tmp_path: Path) -> None:
    assert call("plot", good, "-o", tmp_path / "figure.pdf", "-no_maps") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["figure.pdf"]


def test_help() -> None:
    result = launch(1, "-help", driver="plot.py")
    assert result.rc == 0, result.err
    assert "-no_maps" in result.out


def test_bad_input_is_named_in_one_line(good: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("loss 1.0\n")
    for options, expected in (
        ((text,), "not a run file"),
        ((tmp_path / "nothing.h5",), "nothing.h5"),
        ((good, "-o", tmp_path / "nowhere" / "figure.png"), "nowhere"),
        ((good, "-o", tmp_path / "figure.xyz"), "figure.xyz"),
        ((good, "-labels", "a", "b"), "labels"),
        ((good, "-color", "red"), "-color"),
        ((), "run.h5"),
    ):
        assert expected in refusal("plot", *options)
    assert [p.name for p in tmp_path.iterdir()] == ["text.h5"]


def test_work_of_levels(tmp_path: Path) -> None:
    run, figure = tmp_path / "run.h5", tmp_path / "figure.png"
    digits = ("-data", "digits", "-samples", 60, "-network", "euler", "-blocks", 4, "-width", 5, "-batch_size", 0)
    levels = ("-solver", "rmtr", "-levels", 3, "-cascade_work", 1)
    assert call("classify", *digits, *levels, "-max_it", 5, "-output", run, "-progress", "none") == 0
    history = content(run).history
    found = [history[f"work_level_{number}"] for number in range(3)]
    assert "work_level_3" not in history and sum(found) == pytest.approx(history["work"])
    assert all((np.diff(column) >= 0).all() and column[-1] > 0 for column in found)
    assert call("plot", run, "-o", figure) == 0
    assert plt.imread(tmp_path / "figure.levels.png")[..., :3].std() > 0.05


def test_the_accuracies_of_tiles_are_drawn_where_they_are(tmp_path: Path) -> None:
    run, figure = tmp_path / "run.h5", tmp_path / "figure.png"
    tiles = ("-data", "digits", "-samples", 60, "-tiles", "2x3", "-network", "vgg", "-depth", 1, "-width", 3)
    stop = ("-max_it", 20, "-progress", "none", "-output", run)
    assert call("classify", *tiles, "-phase", "local", *stop) == 0
    accuracies = ddml.open_run(run).local_accuracies()
    nets = tiled_runs.content(run).state["nets"]
    expected = [[float(nets[str(3 * i + j)]["accuracies"]["test"]) for j in range(3)] for i in range(2)]
    assert accuracies.tolist() == expected
    assert (ddml.open_run(run).local_accuracies("train") != accuracies).any()
    assert call("plot", run, "-o", figure) == 0
    assert plt.imread(tmp_path / "figure.tiles.png")[..., :3].std() > 0.05
    with pytest.raises(InputError, match="no accuracies of all 2x3 local networks for held_out samples"):
        ddml.open_run(run).local_accuracies("held_out")


def test_an_undivided_network_has_no_tiles(good: Path) -> None:
    with pytest.raises(InputError, match="is of no classifier of tiles"):
        ddml.open_run(good).local_accuracies()
