"""Deterministic points, drawn for the whole problem and never for a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc


def hammersley(count: int, bounds: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """The Hammersley points (count, d) of a box, none on its boundary.

    Coordinate 0 is (i + 1/2) / count, the others are the radical inverses of i + 1 in the bases
    2, 3, 5, ... (Hammersley 1960), scaled to ``bounds``.
    """
    unit = np.empty((count, len(bounds)))
    if bounds:
        unit[:, 0] = (np.arange(count) + 0.5) / max(count, 1)
    if len(bounds) > 1:
        sequence = qmc.Halton(len(bounds) - 1, scramble=False)
        sequence.fast_forward(1)
        unit[:, 1:] = sequence.random(count)
    low, high = np.array(bounds, dtype=float).reshape(-1, 2).T
    return np.asarray(low + unit * (high - low))


def grid(count: int, bounds: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], ...]:
    """Equidistant axes, boundary included, whose tensor product has about ``count`` points."""
    each = max(round(count ** (1 / len(bounds))), 2)
    return tuple(np.linspace(a, b, each) for a, b in bounds)
