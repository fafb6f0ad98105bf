"""plot.py draws run files, and says what is wrong with those that it cannot."""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
from launch import launch


def test_convergence_and_maps(trained: Path, tmp_path: Path) -> None:
    other = shutil.copy(trained, tmp_path / "other.h5")
    figure = tmp_path / "figure.png"
    result = launch(1, trained, other, "-o", figure, "-labels", "first", "second", driver="plot.py")
    assert result.rc == 0, result.err
    assert result.out.split() == ["wrote", str(figure), "wrote", str(tmp_path / "figure.maps.png")]
    for name in ("figure.png", "figure.maps.png"):
        image = plt.imread(tmp_path / name)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.05


def test_no_maps(trained: Path, tmp_path: Path) -> None:
    result = launch(1, trained, "-o", tmp_path / "figure.pdf", "-no_maps", driver="plot.py")
    assert result.rc == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == ["figure.pdf"]


def test_help() -> None:
    result = launch(1, "-help", driver="plot.py")
    assert result.rc == 0, result.err
    assert "-no_maps" in result.out


def test_bad_input_is_named_in_one_line(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("loss 1.0\n")
    for options, expected in (
        ((text,), "not a run file"),
        ((tmp_path / "nothing.h5",), "nothing.h5"),
        ((trained, "-o", tmp_path / "nowhere" / "figure.png"), "nowhere"),
        ((trained, "-o", tmp_path / "figure.xyz"), "figure.xyz"),
        ((trained, "-labels", "a", "b"), "labels"),
        ((trained, "-color", "red"), "-color"),
        ((), "run.h5"),
    ):
        result = launch(1, *options, driver="plot.py")
        errors = [line for line in result.err.splitlines() if line.startswith("error:")]
        assert result.rc == 1, result.out + result.err
        assert len(errors) == 1, result.err
        assert expected in errors[0]
        assert "Traceback" not in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["text.h5"]
