r"""Loads of subdomains made even by moving samples across their common boundaries (D'Amore's DyDD, made precise here).

A round solves for the flow of least norm on the graph of neighbours (:mod:`ddml.kernel_machines.flows`) and lets it go:
from the highest potential downwards each subdomain, once it has what flows in, gives away what it has above its share,
divided as the flow is, rounded to whole samples. Across each edge those go that are nearest to the common boundary.

Neighbours are (our choices): boxes beside each other on a grid; else subdomains that share samples. A subdomain that
shares none is joined to the :data:`NEAREST` centroids that are nearest; one without samples that is beside none with
some, to one of the largest; and where not all are connected then, the nearest centroids of two components are joined.

All ranks do the same on all samples: nothing depends on their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from ddml.errors import InputError

from .cuts import Array, principal_directions, steps
from .domain import SampleDomain
from .flows import Edge, apportioned, flows, potentials
from .shapes import centroids, coordinates, reshaped

NEAREST = 4  # our choice


@dataclass(frozen=True)
class Round:
    """What a round has done: samples moved (across several edges several times), norm of the flow, balance then."""

    moved: int
    flow: float
    balance: float

    def __repr__(self) -> str:
        return f"{self.moved} samples moved, norm of the flow {self.flow:.6g}, balance {self.balance:.4f}"


@dataclass(frozen=True)
class Balance:
    """A domain whose loads are even, and how they became so.

    Attributes
    ----------
    domain : SampleDomain
        The same object as before if nothing had to move.
    rounds : tuple of Round
    before, after : float
        The least load over the largest one.
    wanted, possible : float
        What ``after`` was to be, and what whole samples nearest to their shares give.
    resettled : int
        Samples that are in another core than before.
    """

    domain: SampleDomain
    rounds: tuple[Round, ...]
    before: float
    after: float
    wanted: float
    possible: float
    resettled: int

    @property
    def reached(self) -> bool:
        """Whether the balance is what was wanted, or what is possible."""
        return self.after >= min(self.wanted, self.possible)

    def __repr__(self) -> str:
        end = "" if self.reached else f"; NOT the {self.wanted:g} that was wanted"
        if self.reached and self.after < self.wanted:
            end = f"; {self.wanted:g} was wanted, but whole samples do not allow it"
        return (
            f"balance {self.before:.4f} before and {self.after:.4f} after {len(self.rounds)} rounds, "
            f"{self.resettled} of {self.domain.size} samples in another subdomain{end}"
        )

    def described(self) -> str:
        """A line for all and one for each round."""
        return "\n".join([repr(self), *(f"  round {k}: {this!r}" for k, this in enumerate(self.rounds, 1))])


def balanced(
    domain: SampleDomain,
    samples: Any,
    costs: Sequence[float] | Array | None = None,
    speeds: Sequence[float] | Array | None = None,
    wanted: float = 0.98,
    rounds: int = 8,
) -> Balance:
    """Move samples between neighbours until the least load is ``wanted`` of the largest, or rounds help no more.

    Empty subdomains are filled. Sets are built anew around the cores, with as many samples beyond them as before in
    relation (:func:`~ddml.kernel_machines.shapes.widened`).

    Parameters
    ----------
    domain
        n samples, cut.
    samples
        (n, ...), finite, the same on all ranks.
    costs
        (p,), what each subdomain takes: seconds or operations, the same on all ranks; its samples take equal shares of
        it with them. The load is the number of samples by default. Above 0 where there are samples.
    speeds
        (p,), above 0, how fast each subdomain is worked on (:meth:`~ddml.kernel_machines.speeds.Speeds.subdomains`);
        loads are divided by them.
    wanted
        From 0 to 1.
    rounds
        At most.

    Raises
    ------
    InputError
        If these are not so, or there are fewer samples than subdomains.
    """
    points = coordinates(domain, samples)
    loads = _Loads(domain, points, costs, speeds)
    if not 0 <= wanted <= 1 or rounds < 0:
        raise InputError(f"a balance from 0 to 1 within 0 or more rounds can be wanted, got {wanted} and {rounds}")
    before, done = loads.evenness, list[Round]()
    now, possible = before, loads.possible
    edges = [] if before[0] >= wanted else neighbours(domain, points)
    while now[0] < wanted and len(done) < rounds:
        cores = list(loads.cores)
        moved, flow = loads.even_out(edges)
        if loads.evenness <= now:
            loads.cores = cores  # with whole samples it gets no better
            break
        now = loads.evenness
        done.append(Round(moved, flow, now[0]))
    if not done:
        return Balance(domain, (), before[0], before[0], wanted, possible, 0)
    resettled = sum(
        len(np.setdiff1d(new, old, assume_unique=True)) for new, old in zip(loads.cores, domain.cores, strict=True)
    )
    origin = domain.origin.removesuffix(BALANCED) + BALANCED
    found = reshaped(domain, samples, loads.cores, origin)
    return Balance(found, tuple(done), before[0], now[0], wanted, possible, resettled)


BALANCED = ", balanced"


class _Loads:
    """Cores that give samples to each other."""

    def __init__(self, domain: SampleDomain, points: Array, costs: Any, speeds: Any) -> None:
        n, p = domain.size, len(domain)
        if len(points) != n:
            raise InputError(f"the domain has {n} samples, got {len(points)}")
        if n < p:
            raise InputError(f"{n} samples cannot fill {p} subdomains")
        self.points, self.grid, self.cores = points, domain.grid, list(domain.cores)
        self.speeds = _numbers("speed", speeds, np.ones(p, bool))
        sizes = np.array([len(core) for core in self.cores])
        self.weights = np.ones(n)
        if costs is None:
            self.targets = apportioned(n, self.speeds)
            relative = self.targets / self.speeds
            self.possible = float(relative.min() / relative.max())
        else:
            given = _numbers("cost", costs, sizes > 0)
            for core, cost in zip(self.cores, given, strict=True):
                self.weights[core] = cost / max(len(core), 1)
            self.targets, self.possible = self.weights.sum() * (self.speeds / self.speeds.sum()), 1.0

    @property
    def values(self) -> Array:
        """The load of each subdomain."""
        return np.array([self.weights[core].sum() for core in self.cores])

    @property
    def evenness(self) -> tuple[float, float]:
        """The least load over the largest one, and less that: both grow as loads get even."""
        relative = self.values / self.speeds
        return float(relative.min() / relative.max()), -float(relative.max())

    def even_out(self, edges: Sequence[Edge]) -> tuple[int, float]:
        """A round: how many samples moved, and the norm of the flow."""
        surplus = self.values - self.targets
        d = potentials(surplus, edges)
        carried = flows(d, edges)
        ways: list[list[tuple[float, int]]] = [[] for _ in self.cores]
        for (i, j), flow in zip(edges, carried.tolist(), strict=True):
            if flow:
                ways[i if flow > 0 else j].append((abs(flow), j if flow > 0 else i))
        moved = 0
        for i in np.argsort(-d, kind="stable").tolist():
            left, out = self.weights[self.cores[i]].sum() - self.targets[i], sorted(ways[i], reverse=True)
            for k, (flow, j) in enumerate(out):
                if left <= 0:
                    break
                count, weight = self._give(i, j, left * (flow / sum(other for other, _ in out[k:])))
                moved, left = moved + count, left - weight
        return moved, float(np.linalg.norm(carried))

    def _give(self, i: int, j: int, load: float) -> tuple[int, float]:
        """Move the samples of i nearest to j whose load is nearest to this, not all; how many, and their load."""
        core = self.cores[i]
        if len(core) < 2:
            return 0, 0.0
        order = np.argsort(-steps(self.points[core] @ self._direction(i, j)), kind="stable")
        sums = np.concatenate([[0.0], self.weights[core[order]].cumsum()[:-1]])
        count = int(np.abs(sums - load).argmin())
        self.cores[j] = np.concatenate([self.cores[j], core[order[:count]]])
        self.cores[i] = np.sort(core[order[count:]])
        return count, float(sums[count])

    def _direction(self, i: int, j: int) -> Array:
        """From subdomain i to its neighbour j: along the grid, or to the centroid, or if j is empty along i."""
        if self.grid is not None:
            here, there = (np.array(np.unravel_index(box, self.grid.parts)) for box in (i, j))
            return np.asarray(there - here, dtype=np.float64)
        mine = self.points[self.cores[i]]
        if not len(self.cores[j]):
            return principal_directions(mine)[:, 0]
        return np.asarray(self.points[self.cores[j]].mean(axis=0) - mine.mean(axis=0))


def _numbers(name: str, values: Any, needed: Any) -> Array:
    """A number for each subdomain, above 0 where it is needed; ones by default."""
    if values is None:
        return np.ones(len(needed))
    found = np.asarray(values, dtype=np.float64)
    if found.shape != needed.shape or not np.isfinite(found).all() or (found < 0).any() or (found[needed] == 0).any():
        raise InputError(
            f"each of {len(needed)} subdomains needs a {name} above 0 where it has samples, got {np.asarray(values)}"
        )
    return found


def neighbours(domain: SampleDomain, points: Array) -> list[Edge]:
    """The connected graph along whose edges samples move: increasing pairs of subdomains."""
    p = len(domain)
    if domain.grid is not None:
        boxes = np.arange(p).reshape(domain.grid.parts)
        along = [
            zip(boxes.take(range(m - 1), k).ravel().tolist(), boxes.take(range(1, m), k).ravel().tolist(), strict=True)
            for k, m in enumerate(boxes.shape)
        ]
        return sorted(pair for pairs in along for pair in pairs)
    found = set(domain.neighbours)
    full = {i for i in range(p) if len(domain.cores[i])}
    centres = centroids(points, domain.cores)
    distances = cdist(centres, centres)  # NaN of empty ones

    def join(i: int, those: Iterable[int]) -> None:
        found.update((min(i, j), max(i, j)) for j in those)

    for i in sorted(full.difference(*found)):
        join(i, [j for j in np.argsort(distances[i], kind="stable").tolist() if j in full - {i}][:NEAREST])
    beside = {i for pair in found if not full.isdisjoint(pair) for i in pair}
    largest = sorted(full, key=lambda i: -len(domain.cores[i]))
    for k, i in enumerate(sorted(set(range(p)) - full - beside)):
        join(i, [largest[k % len(full)]])
    component = np.arange(p)
    for i, j in [*sorted(found), *sorted(combinations(sorted(full), 2), key=lambda pair: distances[pair])]:
        if component[i] != component[j]:
            component[component == component[j]] = component[i]
            join(i, [j])
    return sorted(found)
