"""Figures of runs and of solutions, drawn into matplotlib figures; no window and no backend is ever chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError

from .history import WORK_OF_LEVELS, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind readers can tell apart, from dark to light as far as neighbours go;
# in grey, marker and line style carry the distinction.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F6A00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", (0, (1, 1.2)))

_LABELS = {
    "loss": "loss",
    "error": "relative L2 error",
    "accuracy": "accuracy",
    "work": "work (full-gradient equivalents)",
    "work_critical": "critical-path work",
    "time": "time (s)",
}


def new_figure() -> Figure:
    """Make an empty figure that draws without a display; ``figure.savefig(path)`` writes it.

    Raises
    ------
    InputError
        When matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib, which is not installed; pip install matplotlib") from error
    return Figure(dpi=200)


def finish(axes: Axes) -> None:
    """Bring the texts of a panel to the size that all figures have."""
    axes.tick_params(labelsize=8, which="both")
    axes.set_xlabel(axes.get_xlabel(), fontsize=9)
    axes.set_ylabel(axes.get_ylabel(), fontsize=9)


def levels(figure: Figure, history: History) -> None:
    """Draw what each level of a hierarchy has taken, in work units, against the iteration.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    history : History
        Of a solver on levels.

    Raises
    ------
    InputError
        When the history has no work of levels.
    """
    names = [name for name in WORK_OF_LEVELS if name in history.used()]
    if not names:
        raise InputError("the run has no levels")
    figure.set_size_inches(4.2, 2.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    labels = [f"level {number}" for number in range(len(names))]
    labels[0] += " (coarsest)"
    labels[-1] += " (finest)"
    shades = [(0.85 - 0.65 * number / max(len(names) - 1, 1),) * 2 + (0.9,) for number in range(len(names))]
    axes.stackplot(history["iteration"], [history[name] for name in names], labels=labels, colors=shades)
    axes.set_xlabel("iteration")
    axes.set_ylabel(_LABELS["work"])
    axes.margins(0)
    axes.legend(loc="upper left", fontsize=7, frameon=False, reverse=True)
    axes.spines[["top", "right"]].set_visible(False)
    finish(axes)


def _far_apart(histories: Sequence[History], column: str) -> bool:
    """Say whether a run ends so early that it would be a vertical line on a linear axis."""
    ends = [float(np.nanmax(history[column])) for history in histories if np.isfinite(history[column]).any()]
    return bool(ends) and 0 < 10 * min(ends) < max(ends)


def _positive(histories: Sequence[History], measure: str) -> bool:
    values = np.concatenate([history[measure] for history in histories])
    values = values[np.isfinite(values)]
    return values.size > 0 and bool((values > 0).all())


def _marked(x: Array, number: int, runs: int) -> list[int]:
    """Return rows that get a marker: about eight, spread evenly and differently for each run, and the last."""
    if x.size < 2:
        return list(range(x.size))
    targets = x[0] + (x[-1] - x[0]) * (np.arange(8) + number / runs) / 8
    return sorted({*np.searchsorted(x, targets).clip(max=x.size - 1).tolist(), x.size - 1})


def _panel(axes: Axes, runs: Sequence[tuple[str, History]], column: str, measure: str) -> None:
    histories = [history for _, history in runs]
    far_apart = _far_apart(histories, column)
    if far_apart:
        axes.set_xscale("log")
    if measure == "accuracy":
        errors = 1 - np.concatenate([history[measure] for history in histories])
        span = max(5 * float(np.nanmin(errors)), 0.05)  # so that what matters, the last few percent, is seen
        axes.set_ylim(max(0.0, 1 - span), 1 + 0.02 * min(1.0, span))
    elif _positive(histories, measure):
        axes.set_yscale("log")
    for number, history in enumerate(histories):
        x, y = history[column], history[measure]
        shown = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not far_apart))
        x, y = x[shown], y[shown]
        axes.plot(
            x,
            y,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=LINES[number % len(LINES)],
            linewidth=1.3,
            markersize=4.5,
            markerfacecolor="white",
            markevery=_marked(np.log(x) if far_apart else x, number, len(runs)),
        )
    if not any(np.size(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=axes.transAxes, fontsize=8)
    axes.grid(True, which="major", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def convergence(figure: Figure, runs: Sequence[tuple[str, History]]) -> None:
    """Draw loss and error of runs against work, critical-path work and time, one column of panels each.

    The second row shows the error; the accuracy where no run has an error; it is left out where none has either.
    A loss or error axis is logarithmic when all values are positive; a horizontal axis is logarithmic when the runs'
    ends are more than a factor 10 apart, and then leaves out rows at 0. Values that are not finite are not drawn.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    runs : sequence of (str, History)
        Label and history of each run; 1 to 8 are distinguishable, also in grey.

    Raises
    ------
    InputError
        When there is no run.
    """
    if not runs:
        raise InputError("a convergence figure needs at least one run, none was given")
    measures = ["loss"]
    for measure in ("error", "accuracy"):
        if any(np.isfinite(history[measure]).any() for _, history in runs):
            measures.append(measure)
            break
    columns = ("work", "work_critical", "time")
    legend_columns = min(len(runs), 4)
    legend_rows = -(-len(runs) // legend_columns)
    figure.set_size_inches(9.0, 2.6 * len(measures) + 0.25 * legend_rows)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(measures), len(columns), sharex="col", sharey="row", squeeze=False)
    for row, measure in zip(panels, measures, strict=True):
        for axes, column in zip(row, columns, strict=True):
            _panel(axes, runs, column, measure)
            if measure == measures[-1]:
                axes.set_xlabel(_LABELS[column])
        row[0].set_ylabel(_LABELS[measure])
        for axes in row:
            finish(axes)
    figure.legend(
        panels[0, 0].get_lines(),
        [label for label, _ in runs],
        loc="outside upper center",
        ncols=legend_columns,
        frameon=False,
        fontsize=8,
        handlelength=3.0,
    )


def _map(axes: Axes, x: Array, y: Array, field: Array, colours: str, low: float, high: float) -> None:
    from matplotlib.ticker import ScalarFormatter

    mesh = axes.pcolormesh(x, y, field.T, shading="gouraud", cmap=colours, vmin=low, vmax=high, rasterized=True)
    numbers = ScalarFormatter()
    numbers.set_powerlimits((-2, 3))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, format=numbers)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.ax.tick_params(labelsize=7)


def _limits(*fields: Array) -> tuple[float, float]:
    values = np.concatenate([field[np.isfinite(field)] for field in fields])
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def maps(
    figure: Figure,
    x: Array,
    y: Array | None,
    names: Sequence[str],
    panels: Sequence[tuple[str, Array, Array | None]],
) -> None:
    """Draw fields of one or two coordinates: solution, reference and absolute error, one row a field.

    Two coordinates give maps, where solution and reference share their colours; one coordinate gives curves.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    x : ndarray, shape (nx,)
        First coordinate, increasing.
    y : ndarray, shape (ny,), or None
        Second coordinate, increasing; None for functions of `x` alone.
    names : sequence of str
        Names of the one or two coordinates.
    panels : sequence of (str, ndarray, ndarray or None)
        Name, solution and reference of each field, of shape (nx, ny) or, without `y`, (nx,). Where the reference is
        None only the solution is drawn.

    Raises
    ------
    InputError
        When there is no field, or shapes and names do not match the coordinates.
    """
    shape = x.shape if y is None else (x.size, y.size)
    if not panels:
        raise InputError("a map needs at least one field, none was given")
    if len(names) != len(shape):
        raise InputError(f"a function of {len(shape)} coordinates needs as many names, not {list(names)}")
    for name, solution, reference in panels:
        for field in (solution,) if reference is None else (solution, reference):
            if field.shape != shape:
                raise InputError(f"field {name!r} must have the shape {shape} of its coordinates, not {field.shape}")
    columns = 3 if any(reference is not None for _, _, reference in panels) else 1
    if y is None:
        columns = min(columns, 2)
    figure.set_size_inches(3.1 * columns + 0.4, 2.4 * len(panels) + 0.1)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for row, (name, solution, reference) in zip(grid, panels, strict=True):
        if y is None:
            _draw_curves(row, x, names[0], name, solution, reference)
        else:
            _draw_maps(row, x, y, names, name, solution, reference)
        for axes in row:
            finish(axes)


def _draw_maps(
    row: Sequence[Axes],
    x: Array,
    y: Array,
    names: Sequence[str],
    name: str,
    solution: Array,
    reference: Array | None,
) -> None:
    both = (solution,) if reference is None else (solution, reference)
    drawn = [(f"{name}: solution", solution, "viridis", *_limits(*both))]
    if reference is not None:
        error = np.abs(solution - reference)
        drawn.append((f"{name}: reference", reference, "viridis", *_limits(*both)))
        drawn.append((f"{name}: absolute error", error, "magma", 0.0, _limits(error)[1]))
    for axes, (title, field, colours, low, high) in zip(row, drawn, strict=False):
        _map(axes, x, y, field, colours, low, high)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(names[0])
    row[0].set_ylabel(names[1])
    for axes in row[len(drawn) :]:
        axes.set_visible(False)


def _draw_curves(
    row: Sequence[Axes], x: Array, coordinate: str, name: str, solution: Array, reference: Array | None
) -> None:
    if reference is not None:
        row[0].plot(x, reference, color="0.65", linewidth=3.0, label="reference")
        error = np.abs(solution - reference)
        row[1].plot(x, error, color=COLOURS[1], linewidth=1.3)
        if (error > 0).any():
            row[1].set_yscale("log", nonpositive="mask")
        row[1].set_title(f"{name}: absolute error", fontsize=9)
    elif len(row) > 1:
        row[1].set_visible(False)
    row[0].plot(x, solution, color=COLOURS[2], linestyle="--", linewidth=1.3, label="solution")
    row[0].set_title(name, fontsize=9)
    row[0].legend(fontsize=8, frameon=False)
    for axes in row:
        axes.set_xlabel(coordinate)
        axes.grid(True, color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
