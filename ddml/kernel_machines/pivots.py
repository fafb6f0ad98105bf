r"""Pivots: samples whose columns of K make a low-rank approximation :math:`F F^T` of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from ddml.errors import InputError
from ddml.linalg.small import cholesky
from ddml.parallel import agreed

from .cuts import Numbers, Values
from .operator import KernelOperator
from .picked import Wanted, picked

KINDS = ("uniform", "cholesky")


class Pivots:
    r"""Points P with :math:`F = K_{XP} L^{-T}, L L^T = K_{PP}`, so that :math:`F F^T \le K`, equal in P's columns.

    Where the points' kernel matrix is singular to rounding, a few roundings are added to its diagonal, and F F^T stays
    below K. Collective.

    Parameters
    ----------
    operator
        Of the samples.
    points
        (r, d), as the operator has them: inducing points of which it has :meth:`~KernelOperator.prepared` a table.
    places
        Of the points where they are samples.

    Raises
    ------
    InputError
        If there are more than samples.
    """

    def __init__(self, operator: KernelOperator, points: torch.Tensor, places: Numbers | None = None) -> None:
        if len(points) > operator.layout.size:
            raise InputError(f"{operator.layout.size} samples have as many pivots at most, got {len(points)}")
        self.operator, self.points, self.places = operator, points, places
        with agreed(operator.layout.comm):
            gram = operator.kernel(points, points.clone()).numpy()
            self.factor = cholesky(gram, np.finfo(float).eps * len(gram) * float(gram.diagonal().max()))

    @classmethod
    def chosen(cls, operator: KernelOperator, count: int, kind: str = "uniform", seed: int = 0) -> Pivots:
        """Some of the operator's samples, as of :func:`chosen`. Collective."""
        places = chosen(operator, count, kind, seed)
        return cls(operator, operator.samples[places], places)

    def __len__(self) -> int:
        return len(self.points)

    def mine(self, dtype: str = "float64", error: float = 0.0) -> Values:
        """This rank's rows of F, rounded to another precision. Collective.

        They are computed in that precision, too, where a rounding, over the least diagonal entry of L and times the
        largest, is below ``error``: about what F F^T is wrong by then, relative to the largest k(x, x).
        """
        pivots = self.factor.diagonal()
        share = float(pivots.min(initial=1.0) / pivots.max(initial=1.0))
        single = dtype == "float32" and np.finfo(dtype).eps <= error * share
        computed, operator, layout = dtype if single else "float64", self.operator, self.operator.layout
        if self.places is None or not operator.picks(computed):
            return operator.columns(self.points, self._solved, dtype, computed)
        assert operator.kept is not None
        ranges = pairwise(layout.ranges)
        wanted = [Wanted(rank, np.arange(a, b), self.places) for rank, (a, b) in enumerate(ranges)]
        found = picked(operator.half, operator.kept, wanted, computed)[0]
        for piece in map(layout.piece, layout.units):
            found[piece] = self._solved(found[piece])
        return found.astype(dtype, copy=False)

    def _solved(self, columns: Values) -> Values:
        # half of the time that scipy takes
        factor, given = torch.from_numpy(self.factor.astype(columns.dtype, copy=False)), torch.from_numpy(columns)
        found: Values = torch.linalg.solve_triangular(factor.T, given, upper=True, left=False).numpy()
        return found


def chosen(operator: KernelOperator, count: int, kind: str = "uniform", seed: int = 0) -> Numbers:
    """The places of ``count`` samples as pivots, the same on any number of ranks. Collective.

    ``uniform``: at random, all alike. ``cholesky``: randomly pivoted Cholesky factorisation (Chen, Epperly, Tropp,
    Webber 2023, algorithm 2.1), each with a probability in proportion to the diagonal of K - F F^T of the pivots
    before; it ends early where nothing is left of that to rounding.

    Raises
    ------
    InputError
        If the count is not 1 to n, or there is no such kind.
    """
    n = operator.layout.size
    if not 1 <= count <= n:
        raise InputError(f"{n} samples have 1 to {n} pivots, got {count}")
    if kind not in KINDS:
        raise InputError(f"pivots must be one of {', '.join(KINDS)}; got '{kind}'")
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return operator.layout.places[np.sort(rng.choice(n, count, replace=False))]
    return np.array(_pivoted(operator, count, rng), np.int64)


def _pivoted(operator: KernelOperator, count: int, rng: np.random.Generator) -> list[int]:
    layout = operator.layout
    mine = operator.samples[layout.begin : layout.end]
    factor = np.zeros((len(mine), count))
    with agreed(layout.comm):
        diagonal = operator.kernel.diagonal(mine).numpy().copy()
    whole = layout.everywhere(diagonal[:, None])[:, 0].sum()
    places: list[int] = []
    while len(places) < count:
        masses = layout.everywhere(diagonal[:, None])[:, 0].cumsum()
        if masses[-1] <= len(masses) * np.finfo(float).eps * whole:
            break
        place = int(np.searchsorted(masses, rng.random() * masses[-1], side="right"))
        owner = int(np.searchsorted(layout.ranges, place, side="right")) - 1
        row = layout.comm.bcast(factor[place - layout.begin] if owner == layout.comm.rank else None, owner)
        column = operator.columns(operator.samples[place : place + 1]) - layout.times(factor, row[:, None])
        pivot = layout.comm.bcast(float(column[place - layout.begin, 0]) if owner == layout.comm.rank else None, owner)
        if pivot > 0:
            factor[:, len(places)] = column[:, 0] / np.sqrt(pivot)
            diagonal = np.maximum(diagonal - factor[:, len(places)] ** 2, 0.0)
            places.append(place)
        if layout.begin <= place < layout.end:
            diagonal[place - layout.begin] = 0.0
    return places
