"""The figures: what is drawn is what the histories and fields hold."""

import io
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from ddml.errors import InputError
from ddml.runs import figures
from ddml.runs.history import History

WORK = np.arange(50.0)
COLUMNS = ("work", "work_critical", "time")


def run(scale: float = 1.0, **columns: np.ndarray) -> History:
    ones = {"work": WORK * scale, "work_critical": WORK * scale / 2, "time": WORK * scale / 10}
    return History.from_columns({**ones, "loss": np.exp(-WORK), **columns})


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def test_panels_hold_the_columns_of_the_histories() -> None:
    figure = figures.new_figure()
    error = np.where(WORK % 5 == 0, np.exp(-WORK / 2), np.nan)
    figures.convergence(figure, [("a", run(error=error)), ("b", run(2.0))])
    assert len(figure.axes) == 6
    for number, axes in enumerate(figure.axes):
        column = COLUMNS[number % 3]
        history = run(error=error)
        rows = np.isfinite(error) if number >= 3 else np.full(50, True)
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), history[column][rows])
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), history["error" if number >= 3 else "loss"][rows])
        assert len(axes.lines) == 2
        assert axes.get_yscale() == "log"
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["loss", "relative L2 error"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "", *(figures._LABELS[name] for name in COLUMNS)]
    assert len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert png(figure).startswith(b"\x89PNG")


def test_accuracy_stands_in_for_a_missing_error() -> None:
    figure = figures.new_figure()
    figures.convergence(figure, [("a", run(accuracy=WORK / 50))])
    assert figure.axes[3].get_ylabel() == "accuracy"
    assert figure.axes[3].get_ylim()[0] == pytest.approx(max(0.0, 1 - 5 * (1 - WORK.max() / 50)))
    assert figure.axes[3].get_yscale() == "linear"


def test_loss_alone_is_one_row_and_a_negative_loss_is_linear() -> None:
    figure = figures.new_figure()
    figures.convergence(figure, [("a", run(loss=1 - WORK))])
    assert len(figure.axes) == 3
    assert figure.axes[0].get_yscale() == "linear"


def test_work_is_logarithmic_when_the_runs_end_far_apart() -> None:
    for scale, expected in ((5.0, "linear"), (50.0, "log")):
        figure = figures.new_figure()
        figures.convergence(figure, [("a", run()), ("b", run(scale))])
        assert figure.axes[0].get_xscale() == expected


def test_eight_runs_differ_in_colour_and_marker_and_neighbours_in_line() -> None:
    figure = figures.new_figure()
    figures.convergence(figure, [(f"run {number}", run(1 + number / 10)) for number in range(8)])
    lines = figure.axes[0].lines
    assert len({to_rgb(line.get_color()) for line in lines}) == 8
    assert len({line.get_marker() for line in lines}) == 8
    assert all(a.get_linestyle() != b.get_linestyle() for a, b in pairwise(lines))


@pytest.mark.parametrize(
    "history",
    [History(), History.from_columns({"loss": [1.0], "work": [0.0]}), run(loss=np.full(50, np.nan))],
    ids=["no rows", "one row", "nan"],
)
def test_runs_with_little_in_them_can_be_drawn(history: History) -> None:
    for runs in ([("a", history)], [("a", history), ("b", run())]):
        figure = figures.new_figure()
        figures.convergence(figure, runs)
        assert png(figure).startswith(b"\x89PNG")


X, T = np.linspace(-1, 1, 31), np.linspace(0, 1, 21)
FIELD = np.sin(3 * X)[:, None] * np.exp(-T)[None, :]


def test_maps_show_solution_reference_and_error() -> None:
    figure = figures.new_figure()
    figures.maps(figure, X, T, ("x", "t"), [("u", FIELD + 0.5, FIELD), ("v", FIELD, None)])
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert titles == ["u: solution", "u: reference", "u: absolute error", "v: solution"]
    solution, reference, error = (figure.axes[number].collections[0] for number in range(3))
    np.testing.assert_array_equal(np.asarray(reference.get_array()).reshape(21, 31), FIELD.T)
    np.testing.assert_allclose(np.asarray(error.get_array()), 0.5)
    assert solution.get_clim() == reference.get_clim() == (FIELD.min(), FIELD.max() + 0.5)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("x", "t")
    assert png(figure).startswith(b"\x89PNG")


def test_solution_alone_is_one_map() -> None:
    figure = figures.new_figure()
    figures.maps(figure, X, T, ("x", "t"), [("u", FIELD, None)])
    assert sum(bool(axes.collections and axes.get_title()) for axes in figure.axes) == 1


def test_one_coordinate_gives_curves() -> None:
    figure = figures.new_figure()
    figures.maps(figure, X, None, ("x",), [("u", np.sin(X) + 0.1, np.sin(X)), ("v", X, None)])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 0.1)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), np.sin(X))
    assert not figure.axes[3].get_visible()
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, T, ("x", "t"), []), "at least one field"),
        ((X, T, ("x",), [("u", FIELD, None)]), "2 coordinates"),
        ((X, T, ("x", "t"), [("u", FIELD.T, None)]), r"'u' must have the shape \(31, 21\)"),
        ((X, None, ("x",), [("u", X, X[1:])]), r"\(31,\)"),
    ],
)
def test_maps_refuse_what_does_not_fit(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        figures.maps(figures.new_figure(), *arguments)


def test_no_run_is_refused() -> None:
    with pytest.raises(InputError, match="at least one run"):
        figures.convergence(figures.new_figure(), [])


def test_without_matplotlib_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="need matplotlib"):
        figures.new_figure()
