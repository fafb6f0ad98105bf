"""Deterministic points, drawn for the whole problem and never for a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Bounds = Sequence[tuple[float, float]]

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107,
          109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167)  # fmt: skip

FULL = 3  # coordinates up to which errors are measured on a full grid: with more it is all boundary (our choice)


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


def hammersley(count: int, bounds: Bounds) -> NDArray[np.float64]:
    """The Hammersley points (count, d) of a box of up to forty dimensions, none on its boundary.

    Coordinate 0 is (i + 1/2) / count, the others are the radical inverses of i + 1 in the bases
    2, 3, 5, ... (Hammersley 1960), scaled to ``bounds``.
    """
    unit = np.empty((count, len(bounds)))
    if bounds:
        unit[:, 0] = (np.arange(count) + 0.5) / max(count, 1)
    for axis in range(1, len(bounds)):
        unit[:, axis] = radical_inverse(np.arange(1, count + 1), PRIMES[axis - 1])
    return _scaled(unit, bounds)


def sobol(count: int, bounds: Bounds, seed: int) -> NDArray[np.float64]:
    """Scrambled Sobol points (count, d) of a box."""
    engine = torch.quasirandom.SobolEngine(len(bounds), scramble=True, seed=seed)
    return _scaled(engine.draw(count, dtype=torch.float64).numpy(), bounds)


def spread(count: int, bounds: Bounds) -> NDArray[np.float64]:
    """Points (count, d) inside a box of any number of dimensions: Hammersley's to forty, Sobol's above."""
    return hammersley(count, bounds) if len(bounds) <= len(PRIMES) + 1 else sobol(count, bounds, 0)


def grid(count: int, bounds: Bounds) -> tuple[NDArray[np.float64], ...]:
    """Equidistant axes, boundary included, whose tensor product has about ``count`` points."""
    each = max(round(count ** (1 / len(bounds))), 2)
    return tuple(np.linspace(a, b, each) for a, b in bounds)


def measuring(count: int, bounds: Bounds) -> NDArray[np.float64]:
    """About ``count`` points (N, d) where errors are measured: the full :func:`grid` to three dimensions.

    Above those :func:`spread` has them: a full grid would be corners and faces only.
    """
    if len(bounds) > FULL:
        return spread(count, bounds)
    return np.stack([m.ravel() for m in np.meshgrid(*grid(count, bounds), indexing="ij")], axis=-1)


def one_of_each(count: int, parts: int) -> NDArray[np.int64]:
    """Numbers of points, one at random of each of equal parts of a set of ``count``; all of a set that is smaller.

    At equal distances the points of a Hammersley set may have nearly one value of a coordinate.
    """
    if count <= parts:
        return np.arange(count)
    edges = np.arange(parts + 1) * count // parts
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _scaled(unit: NDArray[np.float64], bounds: Bounds) -> NDArray[np.float64]:
    """Points of the unit cube (N, d) in a box."""
    low, high = np.array(bounds, dtype=float).reshape(-1, 2).T
    return np.asarray(low + unit * (high - low))
