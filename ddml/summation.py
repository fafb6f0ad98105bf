"""Sums that are the same to the last bit on any number of ranks, and that no rank owns.

Samples are cut into leaves, and what leaves contribute is added along a binary tree; neither depends on the ranks. A
rank has consecutive leaves and adds those of the tree's nodes that lie whole with it; the sums of a few nodes, not
of all leaves, travel, and each rank adds up those entries that it owns.

Vector entries are cut into pieces, of which each rank owns whole ones. Dot products are sums over the pieces in their
order (``kernels/sums.c``).
"""

from __future__ import annotations

import ctypes
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml import kernels

from .parallel import split

Array = NDArray[Any]

# Our choices. With so many leaves every number of ranks up to 64 is busy for 90 % of the time; vector entries in a
# piece, and how many pieces there are at least and at most
MOST_LEAVES, LEAST_LEAVES = 512, 8
PIECE, LEAST_PIECES, MOST_PIECES = 1024, 16, 128

Node = tuple[int, int]
"""The leaves (begin, end) below a node of the tree."""


def leaves(count: int, enough: float) -> int:
    """Into how many leaves to cut ``count`` samples, if evaluating fewer than ``enough`` together is wasteful.

    A power of two, as it serves most numbers of ranks best, from 8 to 512 but not more than there are samples.
    """
    wanted = min(max(count / enough, LEAST_LEAVES), MOST_LEAVES)
    return max(min(1 << int(np.log2(wanted)), count), 1)


def efficiency(blocks: int, ranks: int) -> float:
    """The part of the time that ranks are busy on average if equal leaves are dealt to them."""
    return blocks / (ranks * -(-blocks // ranks))


def dealt(count: int, shares: Sequence[float]) -> list[int]:
    """Boundaries of contiguous ranges of ``range(count)`` whose sizes are nearest to some shares (0 or more)."""
    whole = sum(shares)
    return [round(count * (begun / whole)) for begun in itertools.accumulate(shares, initial=0.0)]


def halves(node: Node) -> tuple[Node, Node]:
    """The two nodes below one of several leaves: the left one has the largest power of two of them that it can."""
    begin, end = node
    middle = begin + (1 << ((end - begin - 1).bit_length() - 1))
    return (begin, middle), (middle, end)


class Tree:
    """The binary tree over ``count`` leaves, which ``ranks`` ranks share in order, alike or by their ``shares``."""

    def __init__(self, count: int, ranks: int, shares: Sequence[float] | None = None) -> None:
        self.count = count
        self.edges = split(count, ranks) if shares is None else dealt(count, shares)
        self.nodes = [list(self._covering((0, count), range(a, b))) for a, b in pairwise(self.edges)]

    def _covering(self, node: Node, mine: range) -> Iterator[Node]:
        """The largest nodes all of whose leaves are among these."""
        begin, end = node
        if mine.start <= begin and end <= mine.stop and begin < end:
            yield node
        elif end - begin > 1 and begin < mine.stop and mine.start < end:
            for half in halves(node):
                yield from self._covering(half, mine)

    def add(self, node: Node, leaf: Callable[[int], Any], release: Callable[[Any], None] = lambda _: None) -> Any:
        """The sum over a node of what ``leaf`` gives for each, in their order; sums are formed in place.

        A summand that is not needed any more is released: no more than the tree is high exist at a time.
        """
        if node[1] - node[0] == 1:
            return leaf(node[0])
        left, right = (self.add(half, leaf, release) for half in halves(node))
        left += right
        release(right)
        return left

    def total(self, sums: Sequence[Any]) -> Any:
        """The sum over all leaves from those of all ranks' :attr:`nodes`, in their order."""
        known = dict(zip([node for nodes in self.nodes for node in nodes], sums, strict=True))

        def below(node: Node) -> Any:
            if node in known:
                return known[node]
            left, right = (below(half) for half in halves(node))
            left += right
            return left

        return below((0, self.count))


def pieces(sizes: Sequence[int]) -> list[int]:
    """Where the pieces of a vector begin, and its length: equal ones, cut again where one of its tensors begins."""
    starts = np.cumsum([0, *sizes])
    size = int(starts[-1])
    equal = split(size, min(max(size // PIECE, LEAST_PIECES), MOST_PIECES, max(size, 1)))
    return sorted({*equal, *starts.tolist()})


def snapped(edges: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The edge of a piece next to each of some increasing places."""

    def nearest(place: int) -> int:
        right = bisect_left(edges, place)
        return edges[right] if right == 0 or edges[right] - place < place - edges[right - 1] else edges[right - 1]

    return [nearest(place) for place in wanted]


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(kernels.__file__).with_name(f"_sums{suffix}")
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def fixes_order() -> bool:
    """Whether vectors sum in a fixed order; not where what does it was not built."""
    return _library() is not None


def fix_order(vec: PETSc.Vec, edges: Sequence[int]) -> None:
    """Make a vector, whose ranks own whole pieces between ``edges``, and its duplicates sum piece by piece."""
    library = _library()
    if library is None:
        return
    begin, end = vec.getOwnershipRange()
    first, last = bisect_left(edges, begin), bisect_left(edges, end)
    mine = [edge - begin for edge in edges[first : last + 1]]
    failed = library.ddml_fix_order(
        ctypes.c_void_p(vec.handle), ctypes.c_long(len(edges) - 1), ctypes.c_long(first), ctypes.c_long(last - first),
        (ctypes.c_long * len(mine))(*mine),
    )  # fmt: skip
    if failed:
        raise PETSc.Error(failed)
