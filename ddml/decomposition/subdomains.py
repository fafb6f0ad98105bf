r"""Decompositions of the parameters into subdomains, with restriction and extension as PETSc matrices.

Subdomain s is a set of entries of the global vector. :math:`R_s` picks them, and
:math:`E_s = R_s^T D_s` puts them back, :math:`D_s` dividing by the number of subdomains that an
entry belongs to, so that :math:`\sum_s E_s R_s = I` with and without overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.parallel import split


@dataclass(frozen=True)
class Subdomains:
    """Which entries of the global vector belong to which subdomain.

    Attributes
    ----------
    size : int
        n, the length of the global vector.
    ranges : tuple of tuples of slices
        Of each subdomain, sorted and disjoint: what it works on, overlap included.
    cores : tuple of tuples of slices
        The same without overlap; disjoint over the subdomains.
    costs : tuple of float
        Work units of one restricted evaluation in each subdomain.
    """

    size: int
    ranges: tuple[tuple[slice, ...], ...]
    cores: tuple[tuple[slice, ...], ...]
    costs: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.ranges)

    def __repr__(self) -> str:
        lines = [f"{len(self)} subdomains of {self.size} parameters"]
        for s, (ranges, cost) in enumerate(zip(self.ranges, self.costs, strict=True)):
            where = ", ".join(f"{r.start}:{r.stop}" for r in ranges[:3]) + (", ..." if len(ranges) > 3 else "")
            lines.append(f"  {s}: {length(ranges)} parameters ({where}), {cost:.2f} work units a gradient")
        return "\n".join(lines)

    @classmethod
    def by_layers(cls, loss: Loss, count: int, overlap: int = 0, balance: str = "layers") -> Subdomains:
        """Groups of consecutive layers, each widened by ``overlap`` layers on both sides.

        ``balance`` is ``layers`` (equal numbers of layers) or ``cost`` (the dearest restricted
        gradient is as cheap as possible: it sets the critical path of an additive phase).

        Raises
        ------
        InputError
            More subdomains than layers, less than one, a negative overlap.
        """
        depth = len(loss.layers)
        _check_count(count, depth, "layers", overlap)
        edges = split(depth, count)
        if balance == "cost":
            edges = _cheapest_groups(depth, count, lambda a, b: _layer_charge(loss, a - overlap, b + overlap))
        elif balance != "layers":
            raise InputError(f"balance must be 'layers' or 'cost', got '{balance}'")
        groups = [range(max(a - overlap, 0), min(b + overlap, depth)) for a, b in pairwise(edges)]
        return cls.of_layers(loss, groups, [range(a, b) for a, b in pairwise(edges)])

    @classmethod
    def windows(cls, loss: Loss, width: int = 2, shift: int = 1) -> Subdomains:
        """Groups of ``width`` neighbouring layers, each shifted by at most ``shift`` layers against the one before it.

        1 + (L - width) / shift of them, rounded up, the shifts as equal as can be. The cores divide what neighbours
        share in the middle.

        Raises
        ------
        InputError
            A width below one, or above the number L of layers; a shift below one, or above the width.
        """
        depth = len(loss.layers)
        if not 1 <= width <= depth:
            raise InputError(f"the network has {depth} layers: a window must hold 1 to {depth} of them, got {width}")
        if not 1 <= shift <= width:
            raise InputError(f"windows of {width} layers must be shifted by 1 to {width} layers, got {shift}")
        starts = split(depth - width, -(-(depth - width) // shift)) if depth > width else [0]
        edges = [0, *((a + width + b) // 2 for a, b in pairwise(starts)), depth]
        groups = [range(s, s + width) for s in starts]
        return cls.of_layers(loss, groups, [range(a, b) for a, b in pairwise(edges)])

    @classmethod
    def of_layers(
        cls, loss: Loss, groups: Sequence[Sequence[int]], cores: Sequence[Sequence[int]] | None = None
    ) -> Subdomains:
        """Given groups of layers, and the same without overlap."""

        def entries(layers: Sequence[int]) -> tuple[slice, ...]:
            return _ranges(loss, [k for i in layers for k in loss.layers[i]])

        return cls(
            loss.size,
            tuple(entries(g) for g in groups),
            tuple(entries(g) for g in (groups if cores is None else cores)),
            tuple(loss.charges.restricted(frozenset(g)) for g in groups),
        )

    @classmethod
    def by_blocks(cls, loss: Loss) -> Subdomains:
        """The parts that the network itself consists of: networks side by side, and the one behind them.

        Raises
        ------
        InputError
            If it has none.
        """
        if not loss.blocks:
            raise InputError(
                f"a {type(loss).__name__} has no networks side by side that could be subdomains: decompose it by layers"
            )
        return cls.of_layers(loss, loss.blocks)

    @classmethod
    def by_tensors(cls, loss: Loss, count: int, overlap: int = 0, seed: int | None = None) -> Subdomains:
        """Groups of parameter tensors in their order, or dealt at random with a ``seed`` (Trotti et al. 2023).

        ``overlap`` tensors on both sides, in that order, are shared with the neighbours.

        Raises
        ------
        InputError
            As :meth:`by_layers`, with tensors in the place of layers.
        """
        total = len(loss.parameters)
        _check_count(count, total, "parameter tensors", overlap)
        order = np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total)
        edges = split(total, count)
        wide = [order[max(a - overlap, 0) : min(b + overlap, total)] for a, b in pairwise(edges)]
        ranges = tuple(_ranges(loss, sorted(w)) for w in wide)
        cores = tuple(_ranges(loss, sorted(order[a:b])) for a, b in pairwise(edges))
        return cls(loss.size, ranges, cores, tuple(loss.charges.restricted(loss.layer_numbers(r)) for r in ranges))

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """1 / (number of subdomains that hold an entry), for every entry (n,); 1 where none does."""
        held = np.zeros(self.size)
        for ranges in self.ranges:
            for r in ranges:
                held[r] += 1
        return 1 / np.maximum(held, 1)

    def colours(self, limit: int) -> list[list[int]]:
        """Groups of at most ``limit`` subdomains that share no entries, each in the first group that takes it."""
        groups: list[list[int]] = []
        held: list[NDArray[np.bool_]] = []
        for s, ranges in enumerate(self.ranges):
            mine = np.zeros(self.size, dtype=bool)
            for r in ranges:
                mine[r] = True
            found = next((k for k, h in enumerate(held) if len(groups[k]) < limit and not (h & mine).any()), None)
            if found is None:
                groups.append([s])
                held.append(mine)
            else:
                groups[found].append(s)
                held[found] |= mine
        return groups

    def subset(self, numbers: Sequence[int]) -> Subdomains:
        """Some of the subdomains."""
        ranges, cores = (tuple(values[s] for s in numbers) for values in (self.ranges, self.cores))
        return Subdomains(self.size, ranges, cores, tuple(self.costs[s] for s in numbers))

    def assignment(self, ranks: int) -> list[list[int]]:
        """Subdomains of each of ``ranks`` ranks, consecutive, the largest sum of costs as small as possible.

        With more ranks than subdomains the ranks form one group a subdomain, and each rank's list
        holds the subdomain of its group.
        """
        count = len(self)
        if ranks >= count:
            edges = split(ranks, count)
            return [[s] for s in range(count) for _ in range(edges[s], edges[s + 1])]
        edges = _cheapest_groups(count, ranks, lambda a, b: sum(self.costs[a:b]))
        return [list(range(a, b)) for a, b in pairwise(edges)]

    def ownership(self, ranks: int) -> list[int]:
        """Boundaries (ranks + 1) for a :class:`ddml.layout.ParameterLayout` in which cores are local to their ranks.

        Equal shares where the cores do not follow each other in the global vector.
        """
        starts = [core[0].start for core in self.cores]
        if any(len(core) != 1 for core in self.cores) or starts != sorted(starts):
            return split(self.size, ranks)
        ends = [*starts[1:], self.size]
        assigned = self.assignment(ranks)
        edges = [0]
        for rank, mine in enumerate(assigned):
            begin, end = starts[mine[0]], ends[mine[-1]]
            group = [r for r, other in enumerate(assigned) if other == mine]
            edges.append(begin + split(end - begin, len(group))[group.index(rank) + 1])
        return edges


def length(ranges: Sequence[slice]) -> int:
    """Number of entries in some ranges."""
    return sum(r.stop - r.start for r in ranges)


def _check_count(count: int, atoms: int, what: str, overlap: int) -> None:
    if not 1 <= count <= atoms:
        raise InputError(f"the network has {atoms} {what}: subdomains must be 1 to {atoms}, got {count}")
    if overlap < 0:
        raise InputError(f"overlap must be 0 or more {what}, got {overlap}")


def _ranges(loss: Loss, numbers: Sequence[int]) -> tuple[slice, ...]:
    """The entries of some parameters as sorted ranges, neighbours merged."""
    merged: list[slice] = []
    for number in sorted(numbers):
        r = loss.parameters[number].range
        if merged and merged[-1].stop == r.start:
            merged[-1] = slice(merged[-1].start, r.stop)
        else:
            merged.append(r)
    return tuple(merged)


def _layer_charge(loss: Loss, begin: int, end: int) -> float:
    return loss.charges.restricted(frozenset(range(max(begin, 0), min(end, len(loss.layers)))))


def _cheapest_groups(atoms: int, groups: int, cost: object) -> list[int]:
    """Boundaries of ``groups`` consecutive non-empty groups whose largest ``cost(begin, end)`` is least."""
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for g in range(1, groups + 1):
        for end in range(g, atoms - groups + g + 1):
            best[g, end] = min(
                (max(best[g - 1, begin][0], cost(begin, end)), [*best[g - 1, begin][1], end])  # type: ignore[operator]
                for begin in range(g - 1, end)
                if (g - 1, begin) in best
            )
    return best[groups, atoms][1]
