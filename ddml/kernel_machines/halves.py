"""Half of a symmetric matrix, which serves as all of it in products."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddml.parallel import agreed

from .cuts import Array, Numbers, Values
from .layout import SampleLayout
from .pieces import compiled

WIDTH = 1024  # columns of a piece, at most (our choice): one in float64 fits the second cache of a core
Places = slice | Numbers


class Piece(NamedTuple):
    """Rows and columns of the matrix, by place; ``twice``: whether they serve as columns and rows, too."""

    unit: int
    number: int
    rows: slice
    columns: slice
    twice: bool


Entries = Callable[[Piece, Places, Places], Tensor]
"""From one of this rank's pieces, and rows and columns of it, to these entries."""


class Rows:
    """Rows of a table (n, k) that there are, from one on, cyclically; others may be anything, and count as zero.

    Sums are formed in place: half of the memory need not be looked at.
    """

    def __init__(self, table: Tensor, begin: int, count: int) -> None:
        self.table, self.begin, self.end = table, begin, begin + count

    def _slices(self, begin: int, end: int) -> list[slice]:
        """The rows from one to another, which may both be beyond the last one and stand for the first ones then."""
        n = len(self.table)
        ranges = [(begin, min(end, n)), (max(begin, n) - n, end - n)]
        return [slice(a, b) for a, b in ranges if a < b]

    def zero(self, begin: int | None = None, end: int | None = None) -> None:
        """Set rows to zero: those that there are, or others."""
        for some in self._slices(self.begin if begin is None else begin, self.end if end is None else end):
            self.table[some] = 0.0

    def __iadd__(self, other: Rows) -> Rows:
        """Add others, which begin among these or right behind them."""
        again = self.begin + len(self.table)  # where these come once more
        for begin, end in ((other.begin, min(self.end, other.end)), (again, other.end)):
            for some in self._slices(begin, end):
                self.table[some] += other.table[some]
        for some in self._slices(self.end, min(other.end, again)):
            torch.add(other.table[some], 0.0, out=self.table[some])  # as if to zeros, which have a sign
        self.end = max(self.end, min(other.end, again))
        return self

    @property
    def whole(self) -> Array:
        """All rows, the other ones zero."""
        self.zero(self.end, self.begin + len(self.table))
        return self.table.numpy()


class Half:
    """Pieces of a symmetric matrix (n, n) that have each of its entries or the one opposite.

    Each unit of a layout has its own block and those with the half of the units that follow it, cyclically: units have
    equal work, and so have ranks. What is added to an entry of a product, and in which order, does not depend on the
    ranks: sums are formed within each unit, and along the layout's tree of them.

    Parameters
    ----------
    layout
        Of rows and columns.
    block
        Rows of a piece, at most.

    Attributes
    ----------
    seconds : float
        What this rank has taken for its pieces in products, without waiting for others.
    """

    def __init__(self, layout: SampleLayout, block: int) -> None:
        self.layout, self.block, self.seconds = layout, block, 0.0

    def columns(self, unit: int) -> list[slice]:
        """Where the columns of a unit are that are not its own, in order."""
        edges, count = self.layout.edges, len(self.layout.edges) - 1
        last = unit + (count // 2 if count % 2 or unit < count // 2 else count // 2 - 1)
        ranges = [(unit + 1, min(last + 1, count)), (0, last + 1 - count)]
        return [slice(edges[a], edges[b]) for a, b in ranges if a < b]

    def touched(self, unit: int) -> int:
        """How many rows of a product a unit adds to: from its own ones on, cyclically."""
        edges = self.layout.edges
        return edges[unit + 1] - edges[unit] + sum(columns.stop - columns.start for columns in self.columns(unit))

    def pieces(self, unit: int) -> list[Piece]:
        """The pieces of a unit."""
        edges = self.layout.edges
        begin, end = edges[unit], edges[unit + 1]
        rows = [slice(a, min(a + self.block, end)) for a in range(begin, end, self.block)]
        others = [
            slice(a, min(a + WIDTH, columns.stop))
            for columns in self.columns(unit)
            for a in range(columns.start, columns.stop, WIDTH)
        ]
        found = itertools.product([slice(begin, end), *others], rows)
        return [Piece(unit, i, some, columns, i >= len(rows)) for i, (columns, some) in enumerate(found)]

    @property
    def entries(self) -> int:
        """Entries of this rank's pieces."""
        sizes = np.diff(self.layout.edges)
        return sum(int(sizes[unit]) * self.touched(unit) for unit in self.layout.units)

    def product(self, entries: Entries, V: Values, places: Numbers | None = None) -> Array:
        """This rank's rows of the matrix times V (n, k), which is the same on all ranks; in float64. Collective.

        Parameters
        ----------
        entries
            In the precision of V.
        V
            By place.
        places
            Rows of V that are not zero, increasing (default: all).
        """
        tree, comm, spare = self.layout.tree, self.layout.comm, list[Rows]()
        v = torch.from_numpy(V)  # whose products with few columns take half the time of numpy's
        times = compiled(v) if places is None else None
        width = V.shape[1] if times is None else times.width

        def leaf(unit: int) -> Rows:
            table = spare.pop().table if spare else torch.empty(len(V), width, dtype=torch.float64)
            found = Rows(table, self.layout.edges[unit], self.touched(unit))
            found.zero()
            total = found.table
            for piece in self.pieces(unit):
                if times is not None:
                    block = entries(piece, piece.rows, piece.columns)
                    times.add(block, piece.rows, piece.columns, piece.twice, total)
                    continue
                if places is None:
                    block = entries(piece, piece.rows, piece.columns)
                    total[piece.rows] += block @ v[piece.columns]
                    if piece.twice:
                        total[piece.columns] += block.T @ v[piece.rows]
                    continue
                rows, columns = _inside(places, piece.rows), _inside(places, piece.columns)
                if len(columns):
                    total[piece.rows] += entries(piece, piece.rows, columns) @ v[columns]
                if len(rows) and piece.twice:
                    total[piece.columns] += entries(piece, rows, piece.columns).T @ v[rows]
            return found

        begun = time.perf_counter()
        with agreed(comm):
            sums = [tree.add(node, leaf, spare.append).whole[:, : V.shape[1]] for node in tree.nodes[comm.rank]]
            self.seconds += time.perf_counter() - begun
        return self.layout.scattered(sums)


def _inside(places: Numbers, some: slice) -> Numbers:
    return places[slice(*np.searchsorted(places, (some.start, some.stop)))]
