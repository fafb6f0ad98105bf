"""Figures of kernel machines: how the residual falls, and where the subdomains are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddml.kernel_machines.cuts import principal_directions
from ddml.kernel_machines.domain import SampleDomain

from .figures import COLOURS, LINES, MARKERS, finish
from .history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 3000  # samples that are drawn (our choice)


def machine(figure: Figure, history: History, samples: NDArray[np.float64], domain: SampleDomain) -> None:
    """Draw residual and disagreement against work, and the cores of subdomains in two principal directions.

    Parameters
    ----------
    figure : Figure
        An empty figure; its size is set.
    history : History
        Of a run of drivers/kernel.py.
    samples : ndarray
        (n, d), what was cut.
    domain : SampleDomain
        How.
    """
    figure.set_size_inches(7.2, 3.2)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    _residuals(left, history)
    points = (samples - samples.mean(axis=0)) @ principal_directions(samples, 2)
    _subdomains(right, points, domain)
    for axes in (left, right):
        finish(axes)


def _residuals(axes: Axes, history: History) -> None:
    for number, name in enumerate(("residual", "disagreement")):
        values = history[name]
        there = np.isfinite(values) & (values > 0)
        if there.any():
            axes.semilogy(history["work"][there], values[there], color=COLOURS[number], linestyle=LINES[number],
                          marker=MARKERS[number], markersize=3, linewidth=1, label=name)  # fmt: skip
    axes.set_xlabel("work (products with the kernel matrix)")
    axes.set_ylabel("relative norm")
    axes.legend(fontsize=8)


def _subdomains(axes: Axes, points: NDArray[np.float64], domain: SampleDomain) -> None:
    step = max(-(-domain.size // MOST), 1)
    for number, core in enumerate(domain.cores):
        some = points[core[::step]]
        kind = MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.plot(*some.T, kind, color=COLOURS[number % len(COLOURS)], markersize=2.5, markeredgewidth=0)
    shared = np.flatnonzero(domain.coverage > 1)[::step]
    axes.plot(*points[shared].T, "o", markersize=4, markerfacecolor="none", markeredgecolor="#7F7F7F",
              markeredgewidth=0.4, zorder=0)  # fmt: skip
    axes.set_xlabel("first principal direction")
    axes.set_ylabel("second")
    axes.set_title(f"{len(domain)} subdomains; rings: in more than one", fontsize=9)
