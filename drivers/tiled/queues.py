"""Which ranks train which local networks, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ddml.parallel import split


@dataclass(frozen=True)
class Queues:
    """Networks dealt to groups of ranks.

    Attributes
    ----------
    nets : tuple of tuple of int
        Numbers of each group's networks, in the order in which it trains them.
    edges : tuple of int
        Where each group's ranks begin, and how many there are.
    """

    nets: tuple[tuple[int, ...], ...]
    edges: tuple[int, ...]

    @classmethod
    def of(cls, costs: Sequence[float], ranks: int) -> Queues:
        """Groups of one rank each, or as many as there are networks, of sizes that differ by at most one.

        The dearest network goes first, and each to the group that has the least to do so far (Graham 1969): no queue
        is longer than 4/3 of what is possible.
        """
        groups = min(len(costs), ranks)
        nets, loads = [list[int]() for _ in range(groups)], [0.0] * groups
        for net in sorted(range(len(costs)), key=lambda net: (-costs[net], net)):
            least = loads.index(min(loads))
            nets[least].append(net)
            loads[least] += costs[net]
        return cls(tuple(map(tuple, nets)), tuple(split(ranks, groups)))

    def group(self, rank: int) -> int:
        """The number of a rank's group."""
        return next(i for i, end in enumerate(self.edges[1:]) if rank < end)

    def critical(self, spent: Sequence[float]) -> float:
        """The largest sum over a queue of what each network has taken, shared by the ranks of its group."""
        sizes = [b - a for a, b in pairwise(self.edges)]
        return max(sum(spent[net] for net in queue) / size for queue, size in zip(self.nets, sizes, strict=True))

    def __repr__(self) -> str:
        ranks, groups = self.edges[-1], len(self.nets)
        count = sum(map(len, self.nets))
        if groups < ranks:
            return f"{count} networks, each on {ranks // groups} or more of {ranks} ranks"
        longest = max(map(len, self.nets))
        return f"{count} networks on {ranks} rank{'s' * (ranks > 1)}, up to {longest} one after another"
