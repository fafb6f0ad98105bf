"""Nested random sets of samples: hierarchies over samples, and curvature on some of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError


def part_of(count: int, fraction: float) -> int:
    """The number of samples, at least one, that is about this fraction of ``count``.

    Raises
    ------
    InputError
        If the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction of the samples must be above 0 and at most 1, got {fraction:g}")
    return min(max(round(fraction * count), 1), count)


def coarsened(count: int, levels: int, factor: float) -> list[int]:
    """Sizes of that many sets, from the smallest to all ``count`` samples, each about ``factor`` times the one before.

    Raises
    ------
    InputError
        If the factor is not above 1, there is no level, or the sets are not all of different sizes.
    """
    if not factor > 1:
        raise InputError(f"the factor between nested sets of samples must be above 1, got {factor:g}")
    if levels < 1:
        raise InputError(f"nested sets of samples have at least 1 level, not {levels}")
    sizes = [round(count * float(factor) ** -level) for level in reversed(range(levels))]
    if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise InputError(
            f"{levels} levels, each of {factor:g} times the samples of the one below, are too many for {count} samples"
        )
    return sizes


class NestedSets:
    """Random sets of N samples, each of which holds those before it: the first rows of one permutation.

    The permutation is drawn from the seed and its number for the whole data set: the sets do not depend on the number
    of ranks. Nothing here is collective.

    Parameters
    ----------
    count
        N.
    sizes
        Of the sets, increasing, from 1 to N (:func:`part_of`, :func:`coarsened`).
    seed
        Of the permutations.

    Attributes
    ----------
    sizes : tuple of int
        Of the sets now.
    number : int
        Of the permutation.

    Raises
    ------
    InputError
        If the sizes are not as said; more of them than samples is one way.
    """

    def __init__(self, count: int, sizes: Sequence[int], seed: int = 0) -> None:
        self.count, self.seed, self.number = count, seed, 0
        self.sizes = tuple(int(size) for size in sizes)
        if not self.sizes or self.sizes[0] < 1 or self.sizes[-1] > count or any(a >= b for a, b in pairwise(sizes)):
            raise InputError(
                f"nested sets of {count} samples must have increasing sizes from 1 to {count}, got "
                f"{', '.join(map(str, self.sizes)) or 'none'}"
            )
        self._order: NDArray[np.int64] | None = None
        self._rows: dict[int, NDArray[np.int64]] = {}

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        return f"nested sets of {sizes} of {self.count} samples, permutation {self.number} of seed {self.seed}"

    def draw(self, number: int) -> None:
        """Take the permutation of that number; the sizes stay."""
        self.number, self._order = number, None
        self._rows.clear()

    @property
    def order(self) -> NDArray[np.int64]:
        """The permutation (count,)."""
        if self._order is None:
            self._order = np.random.default_rng([self.seed, 3, self.number]).permutation(self.count)
        return self._order

    def rows(self, level: int) -> NDArray[np.int64]:
        """The sample numbers (size,) of a set, increasing; the same array until the set is another one."""
        if level not in self._rows:
            self._rows[level] = np.sort(self.order[: self.sizes[level]])
        return self._rows[level]

    def whole(self, level: int) -> bool:
        """Whether a set holds all samples."""
        return self.sizes[level] == self.count

    def grow(self, level: int, factor: float) -> None:
        """Enlarge a set, and those above where they would be smaller, by a factor: by one sample at least, N at most.

        Raises
        ------
        InputError
            If the factor is not above 1.
        """
        if not factor > 1:
            raise InputError(f"the factor by which a set of samples grows must be above 1, got {factor:g}")
        size = self.sizes[level]
        wanted = min(max(round(factor * size), size + 1), self.count)
        sizes = [*self.sizes[:level], *(max(other, wanted) for other in self.sizes[level:])]
        self._rows = {n: rows for n, rows in self._rows.items() if sizes[n] == self.sizes[n]}
        self.sizes = tuple(sizes)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {"count": self.count, "sizes": list(self.sizes), "seed": self.seed, "number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the sets of a :meth:`state`.

        Raises
        ------
        InputError
            If the state is of another number of samples, or of sets.
        """
        for name, here in (("count", self.count), ("sizes", len(self.sizes))):
            there = len(state[name]) if name == "sizes" else state[name]
            if there != here:
                what = "samples" if name == "count" else "nested sets of samples"
                raise InputError(f"the run file is of {there} {what}, there are {here}")
        self.sizes, self.seed = tuple(int(size) for size in state["sizes"]), int(state["seed"])
        self.draw(int(state["number"]))
