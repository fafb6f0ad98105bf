"""Points where a residual is large in next to no part of the domain, so that they must not decide for the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pde import Array

RARE, RAISE = 1000, 10.0  # our choices, see Spikes


class Spikes(NamedTuple):
    """How many of a term's points, the last ones, are spikes, and what their part of the loss is multiplied with.

    A network that is fitted to points for long has spikes between them, in corners where there are few: some of 10,000
    candidates have residuals 1e4 times those of all others. One in the set raises the loss by orders of magnitude, and
    steps that bring it down may then spoil the solution everywhere by as much; a quasi-Newton method, whose H is long
    in directions that were flat on the old points, takes such steps, and long runs get worse from draw to draw.

    Spikes are candidates of which one alone would raise the mean over the points more than tenfold, where they are no
    more than one in a thousand. All of them in a set are weighted to raise it tenfold together: training brings them
    down by as much as it gains between two draws, and then they weigh more (our choice).
    """

    number: int = 0
    weight: float = 1.0


def is_spike(size: Array, points: int) -> tuple[NDArray[np.bool_], float]:
    """Which candidates are spikes in a set of so many points, and the mean of the others' squares.

    Parameters
    ----------
    size
        Absolute values (N,) of the residual at the candidates.
    points
        Of the set that is drawn of them.
    """
    squares = size**2
    order = np.argsort(-squares, kind="stable")
    rare, others = order[: len(size) // RARE], order[len(size) // RARE :]
    mean = float(np.mean(squares[others]))
    found = np.zeros(len(size), dtype=bool)
    found[rare] = np.isfinite(squares[rare]) & (squares[rare] > RAISE * points * mean)
    return found, mean


def weighted(squares: Array, points: int, mean: float) -> Spikes:
    """The spikes of a set of so many points, from the squares (n,) of their residuals and the mean of the others'."""
    return Spikes(len(squares), min(1.0, RAISE * points * mean / float(squares.sum()))) if len(squares) else Spikes()
