"""Points where a residual is so much larger than elsewhere that it must not decide for the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pde import Array

COMMON, RAISE = 0.95, 1e3  # our choices, see Tier


class Tier(NamedTuple):
    """Points of a set that follow each other, and what their part of the loss is multiplied with.

    A network that is fitted to points for long has spikes between them, in corners where there are few: a handful of
    10,000 candidates have residuals 1e5 times those of most. One of them in a new set raises the loss by many orders of
    magnitude, and the steps that bring it down may spoil the solution everywhere by as much; a quasi-Newton method, H
    of which is long in directions that were flat on the old points, takes such steps. Then long runs get worse from
    draw to draw.

    So squares of residuals in a new set are cut off where their mean would be more than a thousand times that of the
    95 % of the candidates that have the smallest. That is done by weights, powers of ten that stay until the next draw:
    the training brings a spike down by as much as it gains between two draws, and then it weighs more (our choice).
    """

    number: int
    weight: float


def cut(squares: Array, limit: float) -> float:
    """Where to cut squares (n,) off so that their mean is the limit, or below."""
    ascending, count = np.sort(squares), len(squares)
    before = np.concatenate([[0.0], np.cumsum(ascending)[:-1]])
    heights = (count * limit - before) / np.arange(count, 0, -1)  # if that and all larger ones are cut off
    return float(heights[np.argmax(heights < ascending)]) if ascending.mean() > limit else np.inf


def tiers(squares: Array, candidates: Array) -> tuple[NDArray[np.int64], list[Tier]]:
    """An order of points by what they weigh, the heaviest first, and the tiers that they are in then.

    Parameters
    ----------
    squares
        Of the residuals (n,) at the points.
    candidates
        The same of all (N,) that they were drawn from.
    """
    common = np.sort(candidates)[: int(COMMON * len(candidates))]
    limit = RAISE * float(common.mean()) if len(common) else 0.0
    decades = np.zeros(len(squares), dtype=int)
    if np.isfinite(candidates).all() and limit > 0:
        height = cut(squares, limit)
        decades = np.ceil(np.log10(np.maximum(squares / height, 1.0))).astype(int)
    order = np.argsort(decades, kind="stable")
    found, numbers = np.unique(decades, return_counts=True)
    return order, [Tier(int(n), float(f"1e-{d}")) for d, n in zip(found, numbers, strict=True)]


def whole(count: int) -> list[Tier]:
    """All points in one tier."""
    return [Tier(count, 1.0)]
