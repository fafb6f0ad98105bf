"""Figures of classifiers of tiles: how good each local net is, and what fusions make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddml.errors import InputError

from .figures import COLOURS, LINES, MARKERS, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def local_accuracies(figure: Figure, accuracies: ArrayLike) -> None:
    """Draw the accuracy of each local net where its tile is; of volumes a slice along the first axis in each panel.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    accuracies : array_like
        From 0 to 1, (H, W) tiles of images or (D, H, W) of volumes.

    Raises
    ------
    InputError
        When they are of another shape, or there is none.
    """
    table = np.asarray(accuracies, dtype=np.float64)
    if table.ndim not in (2, 3) or not table.size:
        raise InputError(f"a map of tiles needs accuracies of (H, W) or (D, H, W) tiles, not of {table.shape}")
    slices = table[None] if table.ndim == 2 else table
    side = max(2.2, 0.5 * max(slices.shape[1:]))
    figure.set_size_inches(side * len(slices) + 0.9, side + 0.4)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(slices), squeeze=False)[0]
    for number, (axes, values) in enumerate(zip(panels, slices, strict=True)):
        image = axes.imshow(100 * values, cmap="viridis", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(values):
            dark = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=dark)
        axes.set_xticks([])
        axes.set_yticks([])
        if table.ndim == 3:
            axes.set_title(f"D, tiles {number}", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("accuracy of local nets (%)", fontsize=8)


def fusions(
    figure: Figure,
    overlaps: ArrayLike,
    fused: Mapping[str, ArrayLike],
    local: ArrayLike,
    undivided: float | None = None,
) -> None:
    """Draw the accuracy of fusions against the overlap of the tiles.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    overlaps : array_like, shape (n,)
        In pixels.
    fused : mapping of str to array_like, shape (n,)
        Accuracies from 0 to 1, by the fusion's name.
    local : array_like, shape (n, 3)
        Of the local nets: the smallest, the mean, the largest.
    undivided : float, optional
        That of the undivided network.
    """
    axes = _panel(figure, "overlap (pixels)")
    x, table = np.asarray(overlaps, dtype=np.float64), 100 * np.asarray(local, dtype=np.float64)
    if undivided is not None:
        axes.axhline(100 * undivided, color="0.5", linewidth=1.0, label="undivided network")
    for number, (name, accuracies) in enumerate(fused.items()):
        _line(axes, number, x, 100 * np.asarray(accuracies, dtype=np.float64), name)
    axes.fill_between(x, table[:, 0], table[:, 2], color="0.85", linewidth=0, label="local nets")
    axes.plot(x, table[:, 1], color="0.4", linewidth=1.0, linestyle=":", label="their mean")
    _legend(figure, axes)


def against_time(figure: Figure, runs: Sequence[tuple[str, ArrayLike, ArrayLike]]) -> None:
    """Draw accuracies against seconds on the critical path.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    runs : sequence of (str, array_like, array_like)
        Name, seconds (n,) and accuracies from 0 to 1 (n,) of each; what has no accuracy (NaN) is not drawn.
    """
    axes = _panel(figure, "critical time (s)")
    axes.set_xscale("log")
    for number, (name, seconds, accuracies) in enumerate(runs):
        x, y = (np.asarray(values, dtype=np.float64) for values in (seconds, accuracies))
        shown = np.isfinite(y) & (x > 0)
        _line(axes, number, x[shown], 100 * y[shown], name)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    _legend(figure, axes)


def _panel(figure: Figure, along: str) -> Axes:
    figure.set_size_inches(5.4, 3.0)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.set_xlabel(along)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(True, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    finish(axes)
    return axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the panel."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)


def _line(axes: Axes, number: int, x: NDArray[np.float64], y: NDArray[np.float64], name: str) -> None:
    """One run, in a colour, with a marker and a style of its own."""
    axes.plot(
        x, y, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        linestyle=LINES[number % len(LINES)], linewidth=1.3, markersize=4.5, markerfacecolor="white", label=name,
    )  # fmt: skip
