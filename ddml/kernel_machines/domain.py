r"""The domain of the data: samples, cut into overlapping subdomains.

Subdomain i is a set :math:`I_i` of samples around its core :math:`C_i`; the cores are disjoint, and every sample is in
one. :math:`R_i` picks :math:`I_i` out of a vector with an entry for each sample, and :math:`E_i = R_i^T D_i` puts it
back, :math:`D_i` dividing by the number of subdomains that a sample is in, so that :math:`\sum_i E_i R_i = I`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from ddml.errors import InputError

from .cuts import ROUGH, Array, Grid, Numbers, boxes, partition, principal_directions, tree, widest_coordinate

DIRECTIONS: dict[str, Callable[[Array], Array]] = {
    "principal": partial(principal_directions, rtol=ROUGH),
    "coordinate": widest_coordinate,
}


class SampleDomain:
    """Which samples belong to which subdomain.

    The class methods cut: all ranks cut all samples alike, so that nothing depends on their number.

    Parameters
    ----------
    size
        n, the number of samples.
    cores
        The samples of each subdomain that no other core has: p arrays of numbers from 0 to n - 1; some may be empty.
    sets
        All samples of each, its core among them (default: the cores).
    origin
        How they were cut, in words.
    grid
        The boxes that the subdomains are or were, if they are any.
    share
        How many samples sets are meant to have beyond their cores, over those of the cores (default: what they have).

    Raises
    ------
    InputError
        If the cores are not disjoint, do not have all samples, or are not inside their sets.

    Attributes
    ----------
    cores, sets : list of ndarray
        Increasing.
    """

    def __init__(
        self,
        size: int,
        cores: Sequence[Any],
        sets: Sequence[Any] | None = None,
        origin: str = "given",
        grid: Grid | None = None,
        share: float | None = None,
    ) -> None:
        self.size, self.origin, self.grid = size, origin, grid
        self.cores = [_numbers(core, size) for core in cores]
        self.sets = self.cores if sets is None else [_numbers(wide, size) for wide in sets]
        if len(self.sets) != len(self.cores):
            raise InputError(f"{len(self.cores)} cores of subdomains need as many sets, got {len(self.sets)}")
        owners = np.bincount(self.order, minlength=size)
        if (owners != 1).any():
            sample = int((owners != 1).argmax())
            raise InputError(f"each sample must be in one core; sample {sample} is in {owners[sample]} of them")
        for i, (core, wide) in enumerate(zip(self.cores, self.sets, strict=True)):
            if not np.isin(core, wide).all():
                raise InputError(f"the set of subdomain {i} does not have all samples of its core")
        self.share = sum(map(len, self.sets)) / size - 1 if share is None else share

    @classmethod
    def by_tree(cls, samples: Any, count: int, overlap: float = 0.1, directions: str = "principal") -> SampleDomain:
        """Cores of equal size: a tree that cuts in two along principal directions, or a k-d tree along coordinates.

        Parameters
        ----------
        samples
            (n, ...), finite.
        count
            p, a power of two, at most n.
        overlap
            At each cut either side gets this share of its own size, from 0 to below 1, of the samples beyond it that
            are nearest.
        directions
            ``principal``: the first principal direction of each core; ``coordinate``: its coordinate of the largest
            variance.

        Raises
        ------
        InputError
            For any other count, overlap, directions or samples.
        """
        if directions not in DIRECTIONS:
            raise InputError(f"directions of a tree must be one of {', '.join(DIRECTIONS)}; got '{directions}'")
        points = _checked(samples, overlap)
        _check_count(count, len(points))
        parts = tree(points, count, overlap, DIRECTIONS[directions])
        cores, sets = zip(*parts, strict=True)
        return cls(len(points), cores, sets, f"tree of {directions} directions, overlap {overlap:g}")

    @classmethod
    def by_boxes(cls, samples: Any, parts: Sequence[int], overlap: float = 0.1) -> SampleDomain:
        """Boxes of equal size over the first principal directions of samples (n, ...); some may be empty.

        Parameters
        ----------
        samples
            (n, ...), finite.
        parts
            Boxes along each direction, as in (4, 4); the last one counts fastest.
        overlap
            By what share of its side, from 0 to below 1, a box is wider on each side.

        Raises
        ------
        InputError
            For any other parts, overlap or samples.
        """
        points = _checked(samples, overlap)
        if not 1 <= len(parts) <= points.shape[1] or any(part < 1 for part in parts):
            raise InputError(f"boxes need 1 to {points.shape[1]} numbers of 1 or more, as in 4,4; got {tuple(parts)}")
        words = f"{'x'.join(map(str, parts))} boxes over principal directions, overlap {overlap:g}"
        grid = Grid(tuple(parts), principal_directions(points, len(parts)))
        cores, sets = zip(*boxes(points @ grid.axes, parts, overlap), strict=True)
        return cls(len(points), cores, sets, words, grid)

    @classmethod
    def of_labels(cls, labels: Any, origin: str = "given") -> SampleDomain:
        """Subdomains without overlap from the number (n,) of the subdomain of each sample; some may be empty.

        Raises
        ------
        InputError
            If they are not integers from 0 on.
        """
        found = np.asarray(labels)
        if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer) or found.min() < 0:
            raise InputError("the subdomain of each sample must be an integer from 0 on: an array of one dimension")
        return cls(len(found), [np.flatnonzero(found == i) for i in range(found.max() + 1)], None, origin)

    @classmethod
    def partitioned(cls, samples: Any, count: int, name: str) -> SampleDomain:
        """Subdomains without overlap by PETSc's MatPartitioning of this name, of the graph of nearest neighbours.

        Raises
        ------
        InputError
            If PETSc was built without it, or there are fewer samples than ``count``.
        """
        points = _checked(samples, 0.0)
        _check_count(count, len(points))
        return cls.of_labels(partition(points, count, name), f"PETSc's partitioner {name}")

    def __len__(self) -> int:
        return len(self.cores)

    def state(self) -> dict[str, Any]:
        """What :meth:`restored` makes the same domain of: kinds that :mod:`ddml.states` can write."""
        grid = self.grid
        return {
            "origin": self.origin, "share": float(self.share), "parts": list(grid.parts) if grid else [],
            "axes": grid.axes if grid else np.zeros((0, 0)),
            "core_sizes": np.array([len(core) for core in self.cores], np.int64), "cores": self.order,
            "set_sizes": np.array([len(wide) for wide in self.sets], np.int64), "sets": np.concatenate(self.sets),
        }  # fmt: skip

    @classmethod
    def restored(cls, state: dict[str, Any]) -> SampleDomain:
        """The domain that gave a :meth:`state`.

        Raises
        ------
        InputError
            If none did.
        """
        cores, sets = (
            np.split(np.asarray(state[f"{name}s"]), np.cumsum(state[f"{name}_sizes"])[:-1]) for name in ("core", "set")
        )
        grid = Grid(tuple(state["parts"]), state["axes"]) if state["parts"] else None
        return cls(len(state["cores"]), cores, sets, str(state["origin"]), grid, float(state["share"]))

    @cached_property
    def order(self) -> Numbers:
        """All samples (n,), core by core."""
        return np.concatenate([*self.cores, np.empty(0, np.int64)])

    @cached_property
    def coverage(self) -> Numbers:
        """In how many subdomains each sample is, (n,)."""
        return np.bincount(np.concatenate(self.sets), minlength=self.size)

    def weights(self, i: int) -> Array:
        """The diagonal of D_i: one over the number of subdomains that each sample of subdomain i is in."""
        return 1.0 / self.coverage[self.sets[i]]

    @cached_property
    def neighbours(self) -> dict[tuple[int, int], int]:
        """The graph of neighbours: how many samples two subdomains i < j share, of all pairs that share some."""
        inside = np.zeros((len(self), self.size), dtype=bool)
        for row, wide in zip(inside, self.sets, strict=True):
            row[wide] = True
        shared = {(i, j): int(inside[i, self.sets[j]].sum()) for i, j in itertools.combinations(range(len(self)), 2)}
        return {pair: count for pair, count in shared.items() if count}

    @property
    def surface_over_volume(self) -> tuple[float, float]:
        """Samples that a subdomain gets from others, over those of its core: the mean over the subdomains, the most."""
        ratios = [(len(w) - len(c)) / len(c) for c, w in zip(self.cores, self.sets, strict=True) if len(c)]
        return float(np.mean(ratios)), max(ratios)

    @property
    def balance(self) -> float:
        """Samples in the smallest core over those in the largest; 1 is even, 0 where one is empty."""
        sizes = [len(core) for core in self.cores]
        return min(sizes) / max(sizes)

    def __repr__(self) -> str:
        mean, most = self.surface_over_volume
        empty = sum(not len(core) for core in self.cores)
        cores, sets = (_range([len(part) for part in parts]) for parts in (self.cores, self.sets))
        return (
            f"{len(self)} subdomains of {self.size} samples ({self.origin}): {cores} in a core, {sets} with overlap, "
            f"surface over volume {mean:.3g} (at most {most:.3g}), {len(self.neighbours)} pairs of neighbours, "
            f"balance {self.balance:.3g}{f', {empty} empty' if empty else ''}"
        )

    def described(self) -> str:
        """A line for all and one for each subdomain."""
        lines = [repr(self)]
        for i, (core, wide) in enumerate(zip(self.cores, self.sets, strict=True)):
            near = [str(k + j - i) for k, j in self.neighbours if i in (k, j)]
            lines.append(f"  {i}: {len(core)} samples, {len(wide)} with overlap, beside {', '.join(near) or 'none'}")
        return "\n".join(lines)


def _range(sizes: Sequence[int]) -> str:
    return " to ".join(str(size) for size in dict.fromkeys((min(sizes), max(sizes))))


def _numbers(values: Any, size: int) -> Numbers:
    given = np.asarray(values) if len(values) else np.empty(0, np.int64)
    found = np.unique(given)
    whole = np.issubdtype(given.dtype, np.integer) and len(found) == len(given)
    if not whole or (len(found) and not 0 <= found[0] <= found[-1] < size):
        raise InputError(f"a subdomain must have different samples, integers from 0 to {size - 1}")
    return found.astype(np.int64)


def _checked(samples: Any, overlap: float) -> Array:
    """The samples as a table (n, d)."""
    if not 0 <= overlap < 1:
        raise InputError(f"the overlap is a share from 0 to below 1, got {overlap}")
    return table(samples)


def table(samples: Any) -> Array:
    """Samples (n, ...) as a table (n, d) in float64.

    Raises
    ------
    InputError
        If there are none, or some are not finite.
    """
    found = np.asarray(samples, dtype=np.float64)
    if not found.size:
        raise InputError("there are no samples")
    found = found.reshape(len(found), -1)
    wrong = ~np.isfinite(found).all(axis=1)
    if wrong.any():
        raise InputError(f"sample {int(wrong.argmax())} has values that are not finite")
    return found


def _check_count(count: int, samples: int) -> None:
    if not 1 <= count <= samples:
        raise InputError(f"{samples} samples can be cut into 1 to {samples} subdomains, got {count}")
