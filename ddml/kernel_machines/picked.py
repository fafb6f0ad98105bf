"""Entries of a symmetric matrix, picked out of the half of it that ranks keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .cuts import Numbers, Values
from .halves import Half, Piece, Places


class Wanted(NamedTuple):
    """Rows and columns, by place and in any order, and the rank that wants their entries; no columns: the rows' too."""

    rank: int
    rows: Numbers
    columns: Numbers | None = None


Part = tuple[int, slice, slice, Values]
"""Entries of what is wanted: its number, rows and columns of it by increasing place, and what they are."""


def picked(half: Half, kept: dict[int, list[Tensor]], wanted: Sequence[Wanted], dtype: str) -> list[Values]:
    """The entries (rows, columns) of each of what this rank wants, in order, in another precision. Collective.

    Parameters
    ----------
    half
        Which pieces ranks have.
    kept
        This rank's, by unit.
    wanted
        By any rank: the same on all of them.
    """
    comm = half.layout.comm
    sides = [(some.rows, some.rows if some.columns is None else some.columns) for some in wanted]
    mine = [i for i, some in enumerate(wanted) if some.rank == comm.rank]
    found = {i: np.empty((len(sides[i][0]), len(sides[i][1])), dtype) for i in mine}
    pieces = [(piece, kept[unit][piece.number].numpy()) for unit in half.layout.units for piece in half.pieces(unit)]
    edges = np.array([[(side.start, side.stop) for side in (piece.rows, piece.columns)] for piece, _ in pieces])
    others: list[list[Part]] = [[] for _ in range(comm.size)]

    def put(number: int, rows: slice, columns: slice, values: Values) -> None:
        found[number][rows, columns] = values
        if wanted[number].columns is None:
            found[number][columns, rows] = values.T

    for number, (some, (rows, columns)) in enumerate(zip(wanted, sides, strict=True)):
        for part in _parts(pieces, edges, np.sort(rows), np.sort(columns), some.columns is None):
            if some.rank == comm.rank:
                put(number, *part)
            else:
                others[some.rank].append((number, *part[:2], part[2].astype(dtype)))
    if comm.size > 1:
        for parts in comm.alltoall(others):
            for sent in parts:
                put(*sent)
    return [_in_order(found[i], *map(np.argsort, map(np.argsort, sides[i]))) for i in mine]


def _parts(
    pieces: Sequence[tuple[Piece, Values]], edges: Numbers, rows: Numbers, columns: Numbers, symmetric: bool
) -> Iterator[tuple[slice, slice, Values]]:
    """What pieces have of increasing rows and columns; of a symmetric part each entry or the one opposite.

    Where the rows and columns of each piece begin and end is in edges (m, 2, 2).
    """
    if not pieces:
        return
    for turned in (False,) if symmetric else (False, True):
        first, second = edges[:, int(turned)], edges[:, 1 - int(turned)]
        i, j = np.searchsorted(rows, first), np.searchsorted(columns, second)
        for k in np.flatnonzero((i[:, 0] < i[:, 1]) & (j[:, 0] < j[:, 1])).tolist():
            piece, block = pieces[k]
            if turned and not piece.twice:
                continue
            here, there = slice(*i[k]), slice(*j[k])
            a, b = _tight(rows[here] - first[k, 0]), _tight(columns[there] - second[k, 0])
            yield here, there, (block.T if turned else block)[a][:, b]


def _tight(places: Numbers) -> Places:
    """Increasing places as a range where they are one: what it picks is not copied."""
    begin, end = int(places[0]), int(places[-1]) + 1
    return slice(begin, end) if end - begin == len(places) else places


def _in_order(found: Values, rows: Numbers, columns: Numbers) -> Values:
    for axis, order in enumerate((rows, columns)):
        if (order != np.arange(len(order))).any():
            found = found.take(order, axis)
    return found
