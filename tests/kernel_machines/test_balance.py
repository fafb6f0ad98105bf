"""Loads of subdomains made even: flows against dense algebra, cores against counting, on any number of ranks."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data.files import digits
from ddml.data.libsvm import parse
from ddml.errors import InputError
from ddml.kernel_machines import SampleDomain
from ddml.kernel_machines.balance import balanced, neighbours
from ddml.kernel_machines.flows import apportioned, flows, potentials
from ddml.kernel_machines.shapes import coordinates

OFFICIAL = Path(os.environ.get("DDML_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng(3)
DIGITS = digits().inputs.reshape(-1, 64) / 16.0
CLOUD = RNG.standard_normal((640, 3)) * [3.0, 2.0, 1.0]
ISLANDS = np.concatenate([CLOUD[:300] / 9, CLOUD[300:] / 9 + 50.0])
BITS = RNG.integers(0, 2, (400, 6)).astype(float)  # many equal samples
LABELS = digits().labels

DOMAINS: dict[str, tuple[Any, Any]] = {
    "boxes": (DIGITS, lambda x: SampleDomain.by_boxes(x, (4, 4))),
    "many boxes": (DIGITS, lambda x: SampleDomain.by_boxes(x, (8, 8))),
    "boxes in three directions": (DIGITS, lambda x: SampleDomain.by_boxes(x, (3, 2, 4), 0.0)),
    "a row of boxes": (CLOUD, lambda x: SampleDomain.by_boxes(x, (16,), 0.2)),
    "boxes between islands": (ISLANDS, lambda x: SampleDomain.by_boxes(x, (8, 2), 0.1)),
    "boxes of equal samples": (BITS, lambda x: SampleDomain.by_boxes(x, (4, 4), 0.1)),
    "boxes of one sample": (np.ones((50, 2)), lambda x: SampleDomain.by_boxes(x, (2, 4), 0.1)),
    "classes": (DIGITS, lambda x: SampleDomain.of_labels(np.where(np.arange(len(x)) < 900, 0, LABELS + 1))),
    "labels, some empty": (CLOUD, lambda x: SampleDomain.of_labels(np.minimum(np.arange(len(x)) // 7, 40) % 31 * 2)),
    "all in one": (CLOUD, lambda x: SampleDomain(len(x), [[], range(len(x)), [], [], []])),
    "sets": (CLOUD, lambda x: SampleDomain(640, [range(600), range(600, 640)], [range(630), range(580, 640)])),
    "sets of empty cores": (CLOUD, lambda x: SampleDomain(640, [range(640), [], []], [range(640), [3], [3, 4]])),
    "beside none": (CLOUD, lambda x: SampleDomain(640, [range(9), range(9, 640), []], [range(10), range(9, 640), []])),
    "a sample each": (CLOUD[:12], lambda x: SampleDomain.by_boxes(x, (4, 3), 0.5)),
    "PETSc's": (CLOUD, lambda x: SampleDomain.partitioned(x, 7, "average")),
}  # fmt: skip
LOADS = np.array([100.0, 40.0, 20.0, 0.0])
PATH, RING = [(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize(
    ("edges", "d", "flow", "norm"),
    [
        (PATH, [160, 100, 40, 0], [60, 60, 40], 93.808315196469),
        (RING, [40, 20, 0, 0], [20, 20, 0, -40], 48.989794855664),
    ],
)
def test_potentials_are_those_of_hu_and_blake(edges: Any, d: Any, flow: Any, norm: float) -> None:
    found = potentials(LOADS - 40, edges)
    assert np.abs(found - d).max() < 1e-12 * 160
    carried = flows(found, edges)
    assert np.abs(carried - flow).max() < 1e-12 * 60
    assert np.linalg.norm(carried) == pytest.approx(norm, rel=1e-12)


GRAPHS = {
    "star": [(0, i) for i in range(1, 9)],
    "complete": list(itertools.combinations(range(9), 2)),
    "long path": [(i + 1, i) for i in range(200)],
    "tree": [(i, (i - 1) // 2) for i in range(1, 60)],
    "random": [*((i, i + 1) for i in range(39)), *{(i, j) for i, j in RNG.integers(0, 40, (60, 2)) if i > j + 1}],
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_flows_even_out_with_the_least_norm(name: str, scale: float) -> None:
    edges = GRAPHS[name]
    p = max(map(max, edges)) + 1
    b = np.random.default_rng(p).standard_normal(p) * scale
    b -= b.mean()
    incidence = np.zeros((p, len(edges)))
    for e, (i, j) in enumerate(edges):
        incidence[[i, j], e] = 1, -1
    found = potentials(b, edges)
    assert found.min() == 0
    expected = np.linalg.lstsq(incidence, b, rcond=None)[0]  # of least norm
    assert np.abs(flows(found, edges) - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("surplus", "edges", "words"),
    [
        ([1, -1, 0], [(0, 1)], "not connected"),
        ([1, -1], [], "not connected"),
        ([1, -1, 1, -1], [(0, 1), (2, 3)], "not connected"),
        ([1, 1], [(0, 1)], "sum to 0"),
        ([1, np.nan], [(0, 1)], "must be finite"),
        ([np.inf, -np.inf], [(0, 1)], "must be finite"),
        ([1, -1], [(0, 0)], "pairs of different numbers from 0 to 1"),
        ([1, -1], [(0, 1), (1, 0)], "each once"),
        ([1, -1], [(0, 2)], "from 0 to 1"),
        ([1, -1], [(-1, 0)], "from 0 to 1"),
    ],
)
def test_what_cannot_flow_is_refused(surplus: Any, edges: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        potentials(surplus, edges)


def test_shares_are_whole_and_at_least_one() -> None:
    assert apportioned(10, np.ones(4)).tolist() == [3, 3, 2, 2]
    assert apportioned(100, np.array([1.0, 3.0])).tolist() == [25, 75]
    assert apportioned(10, np.array([1e-9, 1.0, 2.0])).tolist() == [1, 3, 6]
    assert apportioned(3, np.array([1e-9, 1e-9, 1.0])).tolist() == [1, 1, 1]


@pytest.mark.ranks
@pytest.mark.parametrize("name", DOMAINS)
def test_loads_are_even_within_four_rounds_on_any_ranks(comm: MPI.Comm, name: str) -> None:
    samples, cut = DOMAINS[name]
    domain = cut(samples)
    n, p = len(samples), len(domain)
    found = balanced(domain, samples)
    assert found.reached
    sizes = [len(core) for core in found.domain.cores]
    assert sum(sizes) == n
    assert min(sizes) >= max(1, min(0.98 * max(sizes), n // p))
    assert found.after == min(sizes) / max(sizes) == found.domain.balance
    assert found.before == domain.balance
    assert len(found.rounds) <= 4
    if found.rounds:
        assert all(r.moved > 0 and r.flow > 0 for r in found.rounds)
        assert [r.balance for r in found.rounds][-1] == found.after
        homes = np.empty((2, n), np.int64)
        for row, cores in zip(homes, (domain.cores, found.domain.cores), strict=True):
            for i, core in enumerate(cores):
                row[core] = i
        assert found.resettled == np.count_nonzero(homes[0] != homes[1]) <= sum(r.moved for r in found.rounds)
        beyond = sum(map(len, found.domain.sets)) - n
        nominal = (sum(map(len, domain.sets)) - n) / n
        assert nominal * n - p <= beyond <= 2 * nominal * n + p
    else:
        assert found.domain is domain
    lines = found.described().splitlines()
    assert len(lines) == len(found.rounds) + 1
    assert f"{found.before:.4f} before and {found.after:.4f} after {len(found.rounds)} rounds" in lines[0]
    everywhere = comm.allgather([part.tobytes() for part in (*found.domain.cores, *found.domain.sets)])
    assert all(other == everywhere[0] for other in everywhere)
    again = balanced(found.domain, samples)
    assert again.domain is found.domain


def official(name: str) -> np.ndarray:
    """6,400 samples of a public set, if it is here."""
    if name == "digits":
        return DIGITS
    path = OFFICIAL / {"mnist": "mnist", "cifar-10": "cifar-10-batches-bin", "a9a": "libsvm/a9a.gz"}[name]
    if not path.exists():
        pytest.skip(f"{name} is not here")
    if name == "mnist":
        with gzip.open(path / "train-images-idx3-ubyte.gz") as file:
            return np.frombuffer(file.read(16 + 6400 * 784), np.uint8, offset=16).reshape(6400, -1) / 255.0
    if name == "a9a":
        with gzip.open(path) as file:
            entries = parse(b"".join(itertools.islice(file, 6400)))
        assert entries is not None
        table = np.zeros((6400, 124))
        table[np.repeat(np.arange(6400), entries.counts), entries.indices] = entries.values
        return table
    rows = np.fromfile(path / "data_batch_1.bin", np.uint8, 6400 * 3073).reshape(-1, 3073)[:, 1:]
    return rows.reshape(-1, 3, 16, 2, 16, 2).mean(axis=(3, 5)).reshape(6400, -1) / 255.0  # of half the resolution


@pytest.mark.parametrize("parts", [(4, 4), (8, 8)])
@pytest.mark.parametrize("name", ["digits", "mnist", "a9a", "cifar-10"])
def test_boxes_of_public_sets_are_even_within_four_rounds(name: str, parts: tuple[int, int]) -> None:
    samples = official(name)
    domain = SampleDomain.by_boxes(samples, parts)
    found = balanced(domain, samples)
    assert found.before < 0.01
    assert found.after >= min(0.98, found.possible)
    assert found.reached
    assert len(found.rounds) <= 4


@pytest.mark.parametrize("name", DOMAINS)
def test_the_graph_of_neighbours_is_connected_and_is_the_grid_where_there_is_one(name: str) -> None:
    samples, cut = DOMAINS[name]
    domain = cut(samples)
    edges = neighbours(domain, coordinates(domain, samples))
    assert edges == sorted({(i, j) for i, j in edges if i < j})
    reached = {0}
    for _ in domain.cores:
        reached |= {k for pair in edges if not reached.isdisjoint(pair) for k in pair}
    assert reached == set(range(len(domain)))
    if domain.grid is not None:
        places = list(itertools.product(*map(range, domain.grid.parts)))
        beside = [(i, j) for i, j in itertools.combinations(range(len(places)), 2)
                  if sum(abs(a - b) for a, b in zip(places[i], places[j], strict=True)) == 1]  # fmt: skip
        assert edges == beside
    else:
        assert set(domain.neighbours) <= set(edges)


def test_those_nearest_to_the_common_face_go_first() -> None:
    x = np.arange(100.0)[:, None] ** 0.5
    found = balanced(SampleDomain.of_labels((x[:, 0] > 3).astype(int)), x, wanted=1.0).domain
    assert found.cores[0].tolist() == list(range(50))
    found = balanced(SampleDomain.by_boxes(-x, (5,), 0.0), -x, wanted=1.0).domain
    assert [core.tolist() for core in found.cores] == [list(range(k, k + 20)) for k in (80, 60, 40, 20, 0)]
    row = SampleDomain.of_labels(
        np.repeat([0, 1, 2, 3], [91, 5, 3, 1])
    )  # far more than 1 and 2 have flows through them
    assert [len(core) for core in balanced(row, x, wanted=1.0).domain.cores] == [25] * 4


@pytest.mark.parametrize("name", ["boxes", "classes", "sets", "all in one", "boxes of equal samples", "islands"])
def test_costs_and_speeds_are_evened_out(name: str) -> None:
    samples, cut = DOMAINS.get(name, (ISLANDS, lambda x: SampleDomain.by_boxes(x, (2, 2))))
    domain = cut(samples)
    p, sizes = len(domain), np.array([len(core) for core in domain.cores])
    prices = np.linspace(1.0, 5.0, p)
    costs = 1e-4 * sizes * prices  # seconds
    found = balanced(domain, samples, costs=costs, wanted=0.9)
    price = np.empty(len(samples))
    for core, cost in zip(domain.cores, costs, strict=True):
        price[core] = cost / max(len(core), 1)
    loads = np.array([price[core].sum() for core in found.domain.cores])
    assert found.after == pytest.approx(loads.min() / loads.max())
    assert found.reached
    assert loads.sum() == pytest.approx(costs.sum())
    speeds = np.linspace(1.0, 2.0, p)[::-1]
    found = balanced(domain, samples, speeds=speeds)
    times = np.array([len(core) for core in found.domain.cores]) / speeds
    assert found.after == pytest.approx(times.min() / times.max())
    assert found.reached
    both = balanced(domain, samples, costs=costs, speeds=speeds, wanted=0.9)
    assert both.reached


def test_what_is_not_reached_says_so() -> None:
    domain = SampleDomain.by_boxes(DIGITS, (4, 4))
    found = balanced(domain, DIGITS, wanted=1.0, rounds=0)
    assert found.domain is domain
    assert not found.reached
    assert "NOT the 1 that was wanted" in repr(found)
    found = balanced(domain, DIGITS, wanted=1.0)
    assert found.reached
    assert found.after == found.possible == 89 / 90
    assert "whole samples do not allow it" in repr(found)
    assert "balanced" in repr(found.domain)
    assert "NOT" not in repr(balanced(domain, DIGITS))
    two = SampleDomain.of_labels([0, 0, 1])
    assert balanced(two, CLOUD[:3], costs=[1.0, 10.0], wanted=0.9).reached is False  # one sample has nearly all


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wanted": 1.1}, "from 0 to 1 within"),
        ({"wanted": -0.1}, "from 0 to 1 within"),
        ({"wanted": float("nan")}, "from 0 to 1 within"),
        ({"rounds": -1}, "within 0 or more rounds"),
        ({"costs": [1.0] * 15}, "each of 16 subdomains needs a cost"),
        ({"costs": [1.0] * 15 + [0.0]}, "a cost above 0 where it has samples"),
        ({"costs": [1.0] * 15 + [-1.0]}, "cost above 0"),
        ({"costs": [1.0] * 15 + [float("nan")]}, "cost above 0"),
        ({"costs": np.ones((4, 4))}, "cost above 0"),
        ({"speeds": [0.0] + [1.0] * 15}, "speed above 0"),
        ({"speeds": [float("inf")] * 16}, "speed above 0"),
        ({"speeds": 1.0}, "speed above 0"),
        ({"samples": CLOUD}, "cut with 64 numbers each, got 3"),
        ({"samples": DIGITS[:100]}, "has 1437 samples, got 100"),
        ({"samples": np.where(DIGITS > 0.9, np.nan, DIGITS)}, "not finite"),
        ({"samples": np.zeros((0, 64))}, "there are no samples"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(settings: dict[str, Any], words: str) -> None:
    domain = SampleDomain.by_boxes(DIGITS, (4, 4))
    with pytest.raises(InputError, match=words):
        balanced(domain, **({"samples": DIGITS} | settings))


@pytest.mark.parametrize("cut", [
    lambda x: SampleDomain.by_boxes(x, (4, 3)),
    lambda x: SampleDomain(len(x), [range(len(x)), *[[]] * 11]),
    lambda x: SampleDomain.of_labels(np.arange(len(x)) + 1),
])  # fmt: skip
def test_fewer_samples_than_subdomains_are_refused(cut: Any) -> None:
    x = CLOUD[:11]
    with pytest.raises(InputError, match="11 samples cannot fill 12 subdomains"):
        balanced(cut(x), x)
