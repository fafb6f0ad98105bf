"""Deterministic points, drawn for the whole problem and never for a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def radical_inverse(numbers: NDArray[np.int64], base: int) -> NDArray[np.float64]:
    """Integers (N,) with their digits mirrored at the point: van der Corput's sequence.

    scipy.stats.qmc has it, too, but takes a fifth of a driver's start to import.
    """
    result, weight = np.zeros(len(numbers)), 1.0
    while numbers.any():
        weight /= base
        result += weight * (numbers % base)
        numbers = numbers // base
    return result


def hammersley(count: int, bounds: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """The Hammersley points (count, d) of a box of up to nine dimensions, none on its boundary.

    Coordinate 0 is (i + 1/2) / count, the others are the radical inverses of i + 1 in the bases
    2, 3, 5, ... (Hammersley 1960), scaled to ``bounds``.
    """
    unit = np.empty((count, len(bounds)))
    if bounds:
        unit[:, 0] = (np.arange(count) + 0.5) / max(count, 1)
    for axis, base in zip(range(1, len(bounds)), PRIMES, strict=False):
        unit[:, axis] = radical_inverse(np.arange(1, count + 1), base)
    low, high = np.array(bounds, dtype=float).reshape(-1, 2).T
    return np.asarray(low + unit * (high - low))


def grid(count: int, bounds: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], ...]:
    """Equidistant axes, boundary included, whose tensor product has about ``count`` points."""
    each = max(round(count ** (1 / len(bounds))), 2)
    return tuple(np.linspace(a, b, each) for a, b in bounds)
