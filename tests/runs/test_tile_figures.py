"""Figures of tiles: every accuracy is where its tile is, and every line holds what it was given."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from ddml.errors import InputError
from ddml.runs import tile_figures
from ddml.runs.figures import new_figure


def drawn(figure: Figure) -> bool:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(4, 4), (1, 3), (2, 3, 4), (1, 1, 1), (5, 1)])
def test_a_map_has_each_accuracy_where_its_tile_is(shape: tuple[int, ...]) -> None:
    figure, table = new_figure(), np.linspace(0, 1, int(np.prod(shape))).reshape(shape)
    tile_figures.local_accuracies(figure, table)
    panels = [axes for axes in figure.axes if axes.images]
    slices = table[None] if table.ndim == 2 else table
    assert len(panels) == len(slices)
    for axes, values in zip(panels, slices, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), 100 * values)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(j, i): f"{100 * values[i, j]:.0f}" for i, j in np.ndindex(values.shape)}
    assert drawn(figure)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 2), (0, 4), ()])
def test_what_is_no_map_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="a map of tiles needs"):
        tile_figures.local_accuracies(new_figure(), np.zeros(shape))


def test_fusions_against_overlap() -> None:
    figure, fused = new_figure(), {"average": [0.8, 0.9, 0.95], "coarse": [0.9, np.nan, 0.98]}
    tile_figures.fusions(figure, [0, 4, 8], fused, [[0.1, 0.3, 0.6], [0.2, 0.4, 0.7], [0.3, 0.5, 0.8]], undivided=0.97)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for name, values in fused.items():
        np.testing.assert_array_equal(lines[name].get_xdata(), [0, 4, 8])
        np.testing.assert_allclose(lines[name].get_ydata(), 100 * np.array(values))
    np.testing.assert_allclose(lines["their mean"].get_ydata(), [30, 40, 50])
    np.testing.assert_allclose(lines["undivided network"].get_ydata(), 97)
    assert drawn(figure)


def test_accuracies_against_time_leave_out_what_was_not_measured() -> None:
    figure = new_figure()
    runs = [("undivided", [0.0, 1.0, 2.0, 3.0], [0.1, np.nan, 0.8, 0.9]), ("tiles", [0.5], [0.95])]
    tile_figures.against_time(figure, runs)
    first, second = figure.axes[0].lines
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([2, 3], [80, 90])
    assert (second.get_xdata().tolist(), second.get_ydata().tolist()) == ([0.5], [95])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["undivided", "tiles"]
    assert first.get_color() != second.get_color() and drawn(figure)
