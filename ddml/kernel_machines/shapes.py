"""Where subdomains of samples lie: their centres, what is nearest to them, and overlaps of given cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddml.errors import InputError

from .cuts import Array, Numbers, steps
from .domain import SampleDomain, table


def coordinates(domain: SampleDomain, samples: Any) -> Array:
    """Samples (n, ...) as points whose mean is zero and whose distances count: on a grid along its directions only."""
    points = table(samples)
    if domain.grid is not None:
        if points.shape[1] != len(domain.grid.axes):
            raise InputError(f"the samples were cut with {len(domain.grid.axes)} numbers each, got {points.shape[1]}")
        points = points @ domain.grid.axes
    return points - points.mean(axis=0)


def centroids(points: Array, cores: Sequence[Numbers]) -> Array:
    """The mean of the points of each core (p, d); NaN for those without any."""
    return np.array([points[core].mean(axis=0) if len(core) else np.full(points.shape[1], np.nan) for core in cores])


def nearest(points: Array, centres: Array) -> Numbers:
    """The number of the centre nearest to each of some points, of those that are not NaN; the first of equal ones."""
    there = np.flatnonzero(~np.isnan(centres[:, 0]))
    return there[steps(_powers(points, centres[there])).argmin(axis=1)]


def _powers(points: Array, centres: Array) -> Array:
    """Squares of the distances of points to centres (m, p), less those of the points to the origin."""
    return np.asarray((centres * centres).sum(axis=1) - 2 * (points @ centres.T))


def widened(points: Array, cores: Sequence[Numbers], share: float) -> list[Numbers]:
    """Sets around cores: each gets, of the other samples, the nearest to its boundaries, ``share`` times its own size.

    The boundary between two cores is where points are as far from the one's centroid as from the other's. Samples at
    the distance of the last of them are in, too, up to as many again, as in :func:`ddml.kernel_machines.cuts.tree`.
    """
    if share == 0:
        return list(cores)
    centres = centroids(points, cores)
    owners = np.empty(len(points), np.int64)
    for i, core in enumerate(cores):
        owners[core] = i
    powers = _powers(points, centres)
    own = powers[np.arange(len(points)), owners]
    found = []
    for i, core in enumerate(cores):
        wanted = min(round(share * len(core)), len(points) - len(core))
        if not wanted:
            found.append(core)
            continue
        apart = np.linalg.norm(centres - centres[i], axis=1)[owners]
        margins = np.divide(powers[:, i] - own, 2 * apart, out=np.zeros(len(points)), where=apart > 0)
        margins = steps(margins)
        margins[core] = np.inf
        order = np.argsort(margins, kind="stable")
        last = int(np.searchsorted(margins[order], margins[order[wanted - 1]], side="right"))
        beyond = order[: min(last, 2 * wanted, len(points) - len(core))]
        found.append(np.sort(np.concatenate([core, beyond])))
    return found


def reshaped(domain: SampleDomain, samples: Any, cores: Sequence[Numbers], origin: str) -> SampleDomain:
    """A domain of other cores, of as many samples (n, ...) as they have, with sets as wide as before."""
    points = coordinates(domain, samples)
    found = [np.sort(core) for core in cores]
    return SampleDomain(len(points), found, widened(points, found, domain.share), origin, domain.grid, domain.share)


def grown(domain: SampleDomain, samples: Any) -> SampleDomain:
    """The domain with samples that have arrived: each in the core whose centroid is nearest.

    They have the numbers behind those that there were. Cores may be as unequal then as they happen to be, see
    :func:`~ddml.kernel_machines.balance.balanced`; sets are as wide as before, relative to their cores.

    Parameters
    ----------
    domain
        n samples, cut.
    samples
        (n + m, ...), finite: those that there were, and those that have arrived.

    Raises
    ------
    InputError
        If there are fewer samples than before, or not finite ones.
    """
    points = coordinates(domain, samples)
    n, late = domain.size, len(points) - domain.size
    if late < 0:
        raise InputError(f"there were {n} samples before more arrived, got {len(points)} with those")
    if not late:
        return domain
    homes = nearest(points[n:], centroids(points, domain.cores))
    cores = [np.concatenate([core, n + np.flatnonzero(homes == i)]) for i, core in enumerate(domain.cores)]
    return reshaped(domain, samples, cores, f"{domain.origin}, {late} samples later")


def carried(coefficients: Array, size: int) -> Array:
    """Coefficients (n, k) of the first of ``size`` samples as a first guess (size, k) for all, 0 for those behind.

    Raises
    ------
    InputError
        If there are more coefficients than samples.
    """
    if np.ndim(coefficients) != 2 or len(coefficients) > size:
        raise InputError(f"{size} samples have a row of coefficients each at most, got {np.shape(coefficients)}")
    return np.concatenate([coefficients, np.zeros((size - len(coefficients), coefficients.shape[1]))])
