"""Overlaps of given cores, samples that arrive later, and rows that follow the speeds of ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance, named, speeds
from ddml.kernel_machines.balance import balanced
from ddml.kernel_machines.functions import Kernel
from ddml.kernel_machines.shapes import carried, centroids, coordinates, grown, nearest, widened
from ddml.kernel_machines.speeds import Speeds, seconds_of
from solvers import exchange_in_turn, fit_kernel

X = digits().inputs.reshape(-1, 64)[:600] / 16.0
Y = np.eye(10)[digits().labels[:600]] - 0.1
CLOUD = np.random.default_rng(8).standard_normal((300, 3)) * [3.0, 2.0, 1.0] + 100.0
TWINS = np.repeat(CLOUD[:60], 3, axis=0)
KERNEL = named("rbf", 0.5 * median_distance(X))
CUTS = {
    "tree": lambda x: SampleDomain.by_tree(x, 4, 0.1),
    "boxes": lambda x: SampleDomain.by_boxes(x, (3, 3), 0.1),
    "labels": lambda x: SampleDomain.of_labels(np.arange(len(x)) % 5 * (np.arange(len(x)) % 2)),
    "one": lambda x: SampleDomain.by_tree(x, 1),
}


def fitted(
    comm: MPI.Comm, domain: SampleDomain, shares: Any = None, rtol: float = 1e-12, start: Any = None, **settings: Any
) -> Any:
    layout = SampleLayout(domain, comm, shares)
    operator = KernelOperator(KERNEL, X[: domain.size], 0.1, layout, **settings)
    if operator.spare < 1e5:  # a limit that holds no factors either
        return fit_kernel(operator, Y[: domain.size], "none", start=start, ksp_rtol=1e-2)
    return fit_kernel(operator, Y[: domain.size], start=start, coarse_rank=60, ksp_rtol=rtol)


@pytest.mark.parametrize("points", [CLOUD, TWINS, X], ids=["cloud", "twins", "digits"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 5.0])
def test_sets_have_the_nearest_beyond_the_boundaries(points: np.ndarray, share: float) -> None:
    cores = CUTS["boxes"](points).cores
    sets = widened(points - points.mean(axis=0), cores, share)
    means = [points[core].mean(axis=0) for core in cores]
    for i, (core, wide) in enumerate(zip(cores, sets, strict=True)):
        assert set(core) <= set(wide)
        wanted = min(round(share * len(core)), len(points) - len(core))
        beyond = np.setdiff1d(wide, core)
        assert wanted <= len(beyond) <= 2 * wanted

        def margin(s: int, i: int = i) -> float:
            own = next(means[k] for k, other in enumerate(cores) if s in other)
            here, there = np.sum((points[s] - means[i]) ** 2), np.sum((points[s] - own) ** 2)
            return float((here - there) / (2 * np.linalg.norm(means[i] - own)))

        if len(beyond):
            outside = np.setdiff1d(np.arange(len(points)), wide)
            assert max(map(margin, beyond)) <= min(map(margin, outside), default=np.inf) + 1e-6


def test_equal_samples_and_centroids_make_no_trouble() -> None:
    domain = balanced(SampleDomain.of_labels([0] * 30 + [1] * 10), np.ones((40, 3))).domain
    assert [len(core) for core in domain.cores] == [20, 20]
    sets = widened(np.zeros((40, 3)), domain.cores, 0.1)
    assert [len(wide) for wide in sets] == [24, 24]  # twice the share, as all are as near


@pytest.mark.ranks
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("late", [1, 100, 299])
def test_late_samples_are_placed_and_balanced_on_any_ranks(comm: MPI.Comm, name: str, late: int) -> None:
    before = CUTS[name](X[: 600 - late])
    points = coordinates(before, X)
    middles = centroids(points, before.cores)
    domain = grown(before, X)
    assert domain.size == 600
    for i, (core, wide, old) in enumerate(zip(domain.cores, domain.sets, before.cores, strict=True)):
        assert (core[core < 600 - late] == old).all()
        assert set(core) <= set(wide)
        for s in core[core >= 600 - late]:
            distances = np.linalg.norm(points[s] - middles, axis=1)
            assert distances[i] <= np.nanmin(distances) + 1e-9
    assert sum(map(len, domain.sets)) == pytest.approx(600 * (1 + before.share), rel=0.03)
    assert f"{late} samples later" in repr(domain)
    found = balanced(domain, X)
    assert found.reached
    everywhere = comm.allgather([part.tobytes() for part in (*found.domain.cores, *found.domain.sets)])
    assert all(other == everywhere[0] for other in everywhere)
    assert grown(domain, X) is domain


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tree", "boxes"])
def test_a_fit_goes_on_from_the_old_coefficients_on_any_ranks(comm: MPI.Comm, name: str) -> None:
    before = CUTS[name](X[:550])
    old = fitted(comm, before, rtol=1e-6)
    domain = balanced(grown(before, X), X).domain
    start = carried(old.coefficients, 600)
    assert (start[:550] == old.coefficients).all()
    assert not start[550:].any()
    whole, on = (fitted(comm, domain, start=guess, rtol=1e-6) for guess in (None, start))
    assert whole.converged
    assert on.converged
    assert on.history[0] < 0.5
    assert on.iterations < whole.iterations
    direct = np.linalg.solve(KERNEL(torch.tensor(X), torch.tensor(X)).numpy() + 0.1 * np.eye(600), Y)
    assert np.linalg.norm(on.coefficients - direct) < 1e-4 * np.linalg.norm(direct)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: grown(d, X[:100]), "there were 300 samples before more arrived, got 100"),
        (lambda d: grown(d, CLOUD[:, :2]), "cut with 3 numbers each, got 2"),
        (lambda d: grown(d, np.concatenate([CLOUD, [[1.0, np.nan, 2.0]]])), "sample 300 has values that are not"),
        (lambda d: grown(d, np.concatenate([CLOUD, [[1.0, np.inf, 2.0]]])), "sample 300 has values that are not"),
        (lambda d: carried(np.zeros((301, 2)), 300), "300 samples have a row of coefficients each at most"),
        (lambda d: carried(np.zeros(20), 300), "300 samples have a row of coefficients"),
    ],
)
def test_what_cannot_arrive_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(SampleDomain.by_boxes(CLOUD, (2, 2)) if "numbers" in words else SampleDomain.by_tree(CLOUD, 2))


def test_the_nearest_centre_is_the_first_of_equal_ones() -> None:
    centres = np.array([[np.nan, np.nan], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]])
    assert nearest(np.array([[5.0, 0.0], [0.0, 2.0], [0.0, -0.1]]), centres).tolist() == [1, 1, 2]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["boxes", "labels"])
def test_balancing_does_not_change_the_solution_on_any_ranks(comm: MPI.Comm, name: str) -> None:
    domain = CUTS[name](X)
    even = balanced(domain, X, wanted=0.95)
    assert even.domain is not domain
    assert even.reached
    alpha, beta = (fitted(comm, cut).coefficients for cut in (domain, even.domain))
    assert np.linalg.norm(alpha - beta) < 1e-10 * np.linalg.norm(alpha)
    layout = SampleLayout(even.domain, comm, np.arange(comm.size) + 1.0)
    found = exchange_in_turn(KernelOperator(named("laplace", 1.0), X, 1.0, layout), Y, sweeps=60, rtol=1e-7)
    assert found.converged


def shared(comm: MPI.Comm) -> dict[str, list[float]]:
    P = comm.size
    return {
        "growing": [float(r + 1) for r in range(P)],
        "all on the last": [0.0] * (P - 1) + [2.0],
        "nearly all on the first": [1.0] + [1e-3] * (P - 1),
        "by a speed": Speeds.of([100] * P, [0.1 * (r + 1) ** 2 for r in range(P)]).shares,
    }


@pytest.fixture(scope="module")
def alone() -> dict[float, Any]:
    """What one rank finds, by memory."""
    return {
        memory: on_one_rank(lambda one, memory=memory: fitted(one, CUTS["tree"](X), memory=memory))
        for memory in (1e9, 1e5)
    }


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["growing", "all on the last", "nearly all on the first", "by a speed"])
def test_ranks_have_their_shares_and_everything_has_the_same_bits(
    comm: MPI.Comm, alone: dict[float, Any], name: str
) -> None:
    shares = np.array(shared(comm)[name])
    domain = CUTS["tree"](X)
    layout = SampleLayout(domain, comm, shares)
    counts = np.diff(layout.ranges)
    assert counts.sum() == 600
    unit = max(np.diff(layout.edges))
    assert np.abs(counts - 600 * shares / shares.sum()).max() <= unit
    assert (np.concatenate(comm.allgather(layout.rows)) == domain.order).all()
    assert sorted(i for here in comm.allgather(layout.mine) for i in here) == list(range(4))
    assert all(layout.ranges[owner] < layout.ranges[owner + 1] for owner in layout.owners)
    for memory, expected in alone.items():
        found = fitted(comm, domain, shares, memory=memory)
        assert found.coefficients.tobytes() == expected.coefficients.tobytes()
        assert found.history.tobytes() == expected.history.tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "make",
    [
        lambda comm: [1.0] * (comm.size + 1),
        lambda comm: [],
        lambda comm: [0.0] * comm.size,
        lambda comm: [-1.0] + [2.0] * comm.size,
        lambda comm: [float("nan")] * comm.size,
        lambda comm: [float("inf")] * comm.size,
        lambda comm: [1.0] * comm.size if comm.rank else [0.0] * comm.size,
    ],
)
def test_shares_that_are_none_are_refused_on_all_ranks(comm: MPI.Comm, make: Any) -> None:
    with pytest.raises(InputError, match=f"{comm.size} ranks need a share of the samples each"):
        SampleLayout(CUTS["tree"](X), comm, make(comm))


@pytest.mark.ranks
def test_ranks_with_different_shares_are_refused(comm: MPI.Comm) -> None:
    shares = [1.0] * comm.size
    shares[0] += comm.rank
    if comm.size == 1:
        assert SampleLayout(CUTS["tree"](X), comm, shares).ranges == [0, 600]
        return
    with pytest.raises(InputError, match="different shares"):
        SampleLayout(CUTS["tree"](X), comm, shares)


def slowed(comm: MPI.Comm, seconds: float) -> Kernel:
    """The kernel, which takes so much longer for each entry on rank 0."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if comm.rank == 0:
            time.sleep(seconds * len(x) * len(y))
        return KERNEL(x, y)

    return Kernel("slowed", function, KERNEL.diagonal, True)


@pytest.mark.ranks
def test_ranks_that_are_slow_are_noticed_and_get_less(comm: MPI.Comm) -> None:
    domain = CUTS["tree"](X)
    operator = KernelOperator(slowed(comm, 1e-5), X, 0.1, SampleLayout(domain, comm), memory=1e5)
    with pytest.raises(InputError, match="no products yet"):
        Speeds.measured(operator)
    mine = Y[operator.layout.rows]
    first = operator.multiply(mine)
    speeds = Speeds.measured(operator)
    assert comm.allgather(speeds) == [speeds] * comm.size
    assert speeds.rows == tuple(np.diff(operator.layout.ranges))
    assert speeds.seconds[0] * 10 >= 1e-5 * speeds.rows[0] * 300
    layout = SampleLayout(domain, comm, speeds.shares)
    again = KernelOperator(operator.kernel, X, 0.1, layout, memory=1e5)
    assert operator.layout.everywhere(first).tobytes() == layout.everywhere(again.multiply(Y[layout.rows])).tobytes()
    if comm.size > 1:
        assert speeds.gain < 1
        assert layout.ranges[1] < operator.layout.ranges[1]
        even = balanced(domain, X, speeds=speeds.subdomains(operator.layout), wanted=0.9).domain
        assert len(even.cores[0]) < len(even.cores[-1])


def test_speeds_are_rows_a_second() -> None:
    speeds = Speeds.of((300, 100, 0), (2.0, 0.5, 0.0))
    rates = np.array([150, 200, 1 / np.mean([2 / 300, 0.5 / 100])])
    assert speeds.shares == pytest.approx(rates / rates.sum())
    assert speeds.gain == pytest.approx(400 / rates.sum() / 2)
    assert speeds.balance == 0
    even = Speeds.of((10, 30), (1.0, 3.0))
    assert (even.gain, even.balance) == (pytest.approx(2 / 3), 1 / 3)
    assert "0.500, 0.500" in repr(even)
    assert Speeds.of((5,), (1.0,)).shares == [1]
    with pytest.raises(InputError, match="2 ranks need seconds above 0"):
        Speeds.of((5, 5), (1.0, 0.0))
    with pytest.raises(InputError, match="2 ranks need seconds above 0 each for their rows, now and before"):
        Speeds.of((5, 5), (1.0, 1.0), Speeds.of((5,), (1.0,)))


@pytest.mark.parametrize(
    ("fixed", "each"),
    [
        ([0.0, 0.0], [3.0, 1.0]),  # a slow rank
        ([100.0, 0.0], [1.0, 1.0]),  # the same delay in each product
        ([900.0, 0.0], [1.0, 1.0]),  # so long a one that the other does better alone
        ([5.0, 50.0, 0.0, 200.0], [1.0, 1.0, 4.0, 2.0]),
        ([10.0, 1.0, 700.0], [1.0, 2.0, 0.1]),
    ],
)
def test_two_measurements_tell_a_delay_from_a_slow_rank(fixed: list[float], each: list[float]) -> None:
    """With shares by them no other deal is faster."""
    n, P = 600, len(each)

    def took(rows: Any) -> list[float]:
        return [a + b * m if m > 0 else 0.0 for a, b, m in zip(fixed, each, rows, strict=True)]

    rows = [n / P] * P
    speeds = Speeds.of(rows, took(rows))
    for _ in range(2):
        rows = [n * share for share in speeds.shares]
        speeds = Speeds.of(rows, took(rows), speeds)
    rows = [n * share for share in speeds.shares]
    assert sum(rows) == pytest.approx(n)
    best = max(took(rows))
    assert best == pytest.approx(speeds.gain * max(speeds.seconds))
    rng = np.random.default_rng(1)
    others = [*rng.dirichlet([1.0] * P, 500), *np.eye(P), *[speeds.shares + d for d in (np.eye(P) - 1 / P) * 0.01]]
    assert best <= min(max(took(n * other)) for other in others if min(other) >= 0) * (1 + 1e-9)


@pytest.mark.ranks
def test_subdomains_that_take_longer_get_fewer_samples(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = SampleDomain.by_tree(X, 4, 0.1)
    first = torch.as_tensor(X[domain.sets[2]][0])

    def slow(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 4.0 if (x[0] == first).all() and len(x) > 100 else 1.0
        return KERNEL(x, y)

    now = 0.0
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: now)

    seconds = seconds_of(domain, Kernel("slow", slow, KERNEL.diagonal, False), X, 0.1, comm)
    assert all((seconds == other).all() for other in comm.allgather(seconds))
    assert seconds.tolist() == [1.0, 1.0, 4.0, 1.0]
    found = balanced(domain, X, seconds)
    assert found.after > 0.9
    assert len(found.domain.cores[2]) < 0.6 * len(domain.cores[2])
