"""Domains of samples against dense numpy: cuts, restrictions, extensions, the graph of neighbours."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.kernel_machines import SampleDomain, SampleLayout
from ddml.kernel_machines.cuts import principal_directions
from ddml.kernel_machines.restrictions import Exchange, extension, index_set, restriction

RNG = np.random.default_rng(5)
DIGITS = digits().inputs[:500].reshape(500, -1) / 16.0
CLOUD = RNG.standard_normal((230, 3)) * [3.0, 2.0, 1.0]
WIDE = RNG.standard_normal((60, 450))  # more numbers than samples
TWINS = np.repeat(CLOUD[:20], 4, axis=0)
OWN = RNG.integers(0, 5, 230)

DOMAINS: dict[str, Any] = {
    "one": lambda: SampleDomain.by_tree(CLOUD, 1),
    "tree": lambda: SampleDomain.by_tree(DIGITS, 8, 0.1),
    "tree without overlap": lambda: SampleDomain.by_tree(DIGITS, 16, 0.0),
    "tree of wide samples": lambda: SampleDomain.by_tree(WIDE, 4, 0.25),
    "tree of equal samples": lambda: SampleDomain.by_tree(np.ones((30, 2)), 4, 0.2),
    "tree of twins": lambda: SampleDomain.by_tree(TWINS, 8, 0.4),
    "coordinates": lambda: SampleDomain.by_tree(CLOUD, 16, 0.3, "coordinate"),
    "a sample in each": lambda: SampleDomain.by_tree(CLOUD[:8], 8, 0.9),
    "boxes": lambda: SampleDomain.by_boxes(CLOUD, (4, 4), 0.2),
    "boxes in three directions": lambda: SampleDomain.by_boxes(CLOUD, (2, 1, 3), 0.0),
    "labels": lambda: SampleDomain.of_labels(OWN),
    "sets": lambda: SampleDomain(6, [[0, 5], [3, 1, 2], [4]], [[5, 0, 1], range(6), [4, 2]]),
    "PETSc's": lambda: SampleDomain.partitioned(CLOUD, 5, "average"),
}  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize("name", DOMAINS)
def test_restrictions_and_extensions_are_the_dense_ones(comm: MPI.Comm, name: str) -> None:
    domain = DOMAINS[name]()
    layout = SampleLayout(domain, comm)
    n, whole = domain.size, layout.vector()
    values = np.sin(np.arange(n) + 1.0)[:, None]
    total = layout.vector()
    for i, wide in enumerate(domain.sets):
        R, E, places = restriction(layout, i), extension(layout, i), index_set(layout, i)
        assert comm.allreduce(places.getLocalSize()) == len(wide) == R.getSize()[0] == E.getSize()[1]
        layout.set(whole, values)
        local = R.createVecLeft()
        R.mult(whole, local)
        picked = np.concatenate(comm.allgather(local.array_r.copy()))
        assert picked.tobytes() == values[wide, 0].tobytes()
        if i in layout.mine:
            assert (layout.domain.order[places.getIndices()] == wide).all()
        E.multAdd(local, total, total)
        # <R x, z> = <x, R^T z>, and E = R^T D
        other, back = local.duplicate(), whole.duplicate()
        other.array[:] = np.cos(np.arange(len(other.array_r)))
        R.multTranspose(other, back)
        assert local.dot(other) == pytest.approx(whole.dot(back), rel=1e-13, abs=1e-13)
        extended = back.duplicate()
        E.mult(other, extended)
        cover = domain.coverage[:, None]
        assert layout.get(extended) * cover == pytest.approx(layout.get(back), abs=1e-15)
        for thing in (R, E, places, local, other, back, extended):
            thing.destroy()
    assert layout.get(total) == pytest.approx(values, abs=1e-15)


@pytest.mark.ranks
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", DOMAINS)
def test_the_exchange_does_what_all_matrices_do_with_the_same_bits_on_any_ranks(
    comm: MPI.Comm, name: str, columns: int
) -> None:
    domain, results = DOMAINS[name](), []
    X = np.sin(np.arange(domain.size * columns) ** 1.5).reshape(-1, columns)
    for on in (comm, MPI.COMM_SELF):
        layout = SampleLayout(domain, on)
        exchange = Exchange(layout)
        parts = exchange.restrict(X[layout.rows])
        for i, part in zip(layout.mine, parts, strict=True):
            assert part.tobytes() == X[domain.sets[i]].tobytes()
        mapped = [part * (i + 1) ** 0.5 for i, part in zip(layout.mine, parts, strict=True)]
        results.append(layout.everywhere(exchange.extend(mapped, columns))[layout.places])
    assert results[0].tobytes() == results[1].tobytes()
    factors = np.zeros(domain.size)
    for i, wide in enumerate(domain.sets):
        factors[wide] += (i + 1) ** 0.5
    assert results[0] == pytest.approx(X * factors[:, None], rel=1e-14)


@pytest.mark.parametrize("name", DOMAINS)
def test_cores_tile_the_samples_and_neighbours_share_them(name: str) -> None:
    domain = DOMAINS[name]()
    assert sorted(domain.order) == list(range(domain.size))
    assert all(set(core) <= set(wide) for core, wide in zip(domain.cores, domain.sets, strict=True))
    shared = {
        (i, j): len(np.intersect1d(domain.sets[i], domain.sets[j]))
        for i, j in itertools.combinations(range(len(domain)), 2)
    }
    assert domain.neighbours == {pair: count for pair, count in shared.items() if count}
    sizes = [len(core) for core in domain.cores]
    assert domain.balance == min(sizes) / max(sizes)
    wider = [len(wide) / len(core) - 1 for core, wide in zip(domain.cores, domain.sets, strict=True) if len(core)]
    assert domain.surface_over_volume == pytest.approx((np.mean(wider), max(wider)))
    lines = domain.described().splitlines()
    assert len(lines) == len(domain) + 1
    assert f"{len(domain)} subdomains of {domain.size} samples" in lines[0]
    assert ("empty" in lines[0]) == (0 in sizes)


@pytest.mark.parametrize(("count", "overlap"), [(2, 0.1), (4, 0.1), (16, 0.1), (16, 0.25), (64, 0.1)])
def test_trees_are_balanced_and_overlaps_grow_as_they_should(count: int, overlap: float) -> None:
    """The facts' |I_i| / |C_i| is (1 + overlap)^(log2 p), on the mean over the subdomains."""
    samples = digits().inputs[:1000].reshape(1000, -1) / 16.0
    domain = SampleDomain.by_tree(samples, count, overlap)
    sizes = [len(core) for core in domain.cores]
    assert max(sizes) - min(sizes) <= 1
    growth = sum(map(len, domain.sets)) / 1000
    assert growth == pytest.approx((1 + overlap) ** np.log2(count), rel=0.03)


@pytest.mark.parametrize("directions", ["principal", "coordinate"])
def test_the_first_cut_is_at_the_median(directions: str) -> None:
    domain = SampleDomain.by_tree(CLOUD, 2, 0.1, directions)
    centred = CLOUD - CLOUD.mean(axis=0)
    axis = np.linalg.svd(centred)[2][0] if directions == "principal" else np.eye(3)[centred.std(axis=0).argmax()]
    values = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    order = np.argsort(values)
    assert set(domain.cores[0]) == set(order[:115])
    beyond = order[115:]
    assert set(domain.sets[0]) - set(domain.cores[0]) == set(beyond[:12])  # round(11.5) to even, and in order
    assert set(domain.sets[1]) - set(domain.cores[1]) == set(order[:115][-12:])


@pytest.mark.parametrize("directions", ["principal", "coordinate"])
def test_equal_samples_stay_together_as_far_as_the_share_allows(directions: str) -> None:
    """A cut in two: whoever equals a sample of an overlap is in it, too, up to twice the share."""
    values = np.random.default_rng(2).integers(0, 2, (300, 9)).astype(float)
    domain = SampleDomain.by_tree(values, 2, 0.1, directions)
    for core, wide in zip(domain.cores, domain.sets, strict=True):
        band = np.setdiff1d(wide, core)
        assert 15 <= len(band) <= 30
        equal = (values[:, None] == values[band]).all(axis=2).any(axis=1)
        assert set(np.flatnonzero(equal)) <= set(wide) or len(band) == 30
    assert len(SampleDomain.by_tree(np.ones((100, 2)), 2, 0.1, directions).sets[0]) == 50 + 2 * 5


def test_boxes_are_of_equal_size_and_may_be_empty() -> None:
    domain = SampleDomain.by_boxes(CLOUD, (4, 4), 0.2)
    values = (CLOUD - CLOUD.mean(axis=0)) @ principal_directions(CLOUD, 2)
    low, side = values.min(axis=0), np.ptp(values, axis=0) / 4
    for box, (i, j) in enumerate(itertools.product(range(4), range(4))):
        place = (values - low) / side - [i, j]
        inside = ((place >= 0) & (place < 1 + 1e-9)).all(axis=1)
        assert set(domain.cores[box]) <= set(np.flatnonzero(inside))
        near = ((place >= -0.2 - 1e-9) & (place <= 1.2 + 1e-9)).all(axis=1)
        assert set(domain.sets[box]) == set(np.flatnonzero(near))
    assert 0 in map(len, domain.cores)
    assert domain.balance == 0


@pytest.mark.parametrize("samples", [CLOUD, WIDE, DIGITS, np.tile(DIGITS, 5)[:450]], ids=["3", "wide", "64", "320"])
def test_principal_directions_are_singular_vectors(samples: np.ndarray) -> None:
    found = principal_directions(samples, 2)
    expected = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)[2][:2].T
    assert np.abs((found * expected).sum(axis=0)) == pytest.approx(1.0, abs=1e-6)
    assert found[np.abs(found).argmax(axis=0), [0, 1]] == pytest.approx(np.abs(found).max(axis=0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SampleDomain.by_tree(CLOUD, 6), "must be 4 or 8, got 6"),
        (lambda: SampleDomain.by_tree(CLOUD, 100), "must be 64 or 128"),
        (lambda: SampleDomain.by_tree(CLOUD, 0), "1 to 230 subdomains, got 0"),
        (lambda: SampleDomain.by_tree(CLOUD, -2), "1 to 230 subdomains, got -2"),
        (lambda: SampleDomain.by_tree(CLOUD[:7], 8), "7 samples can be cut into 1 to 7"),
        (lambda: SampleDomain.by_tree(CLOUD, 4, 1.0), "from 0 to below 1, got 1.0"),
        (lambda: SampleDomain.by_tree(CLOUD, 4, -0.1), "from 0 to below 1, got -0.1"),
        (lambda: SampleDomain.by_tree(CLOUD, 4, float("nan")), "from 0 to below 1, got nan"),
        (lambda: SampleDomain.by_boxes(CLOUD, (2, 2), 1.5), "from 0 to below 1, got 1.5"),
        (lambda: SampleDomain.by_tree(CLOUD, 4, 0.1, "random"), "principal, coordinate; got 'random'"),
        (lambda: SampleDomain.by_boxes(CLOUD, (2, 0)), "1 to 3 numbers of 1 or more"),
        (lambda: SampleDomain.by_boxes(CLOUD, (2, 2, 2, 2)), "1 to 3 numbers of 1 or more"),
        (lambda: SampleDomain.by_boxes(CLOUD, ()), "1 to 3 numbers of 1 or more"),
        (lambda: SampleDomain.by_tree(np.where(CLOUD > 4, np.nan, CLOUD), 4), "not finite"),
        (lambda: SampleDomain.by_tree(np.where(CLOUD > 4, np.inf, CLOUD), 4), "not finite"),
        (lambda: SampleDomain.by_tree(np.zeros((0, 3)), 1), "there are no samples"),
        (lambda: SampleDomain.of_labels([0.5, 1.0]), "integer from 0 on"),
        (lambda: SampleDomain.of_labels([0, -1]), "integer from 0 on"),
        (lambda: SampleDomain.of_labels([[0, 1]]), "integer from 0 on"),
        (lambda: SampleDomain(3, [[0, 1], [1, 2]]), "sample 1 is in 2"),
        (lambda: SampleDomain(3, [[0], [1]]), "sample 2 is in 0"),
        (lambda: SampleDomain(3, [[0, 1], [2, 3]]), "integers from 0 to 2"),
        (lambda: SampleDomain(3, [[0, 1], [2, 2]]), "different samples"),
        (lambda: SampleDomain(3, [[0, 1], [2.5]]), "different samples, integers"),
        (lambda: SampleDomain(3, [[0, 1], [-1]]), "different samples, integers"),
        (lambda: SampleDomain(3, [[0, 1], [2]], [[0, 1], [1]]), "subdomain 1 does not have all"),
        (lambda: SampleDomain(3, [[0, 1], [2]], [[0, 1]]), "as many sets, got 1"),
        (lambda: SampleDomain.partitioned(CLOUD, 5, "metis"), "no partitioner 'metis' here; there are average"),
        (lambda: SampleDomain.partitioned(CLOUD, 500, "average"), "230 samples can be cut into 1 to 230"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_partitioners_that_petsc_lacks_are_refused_with_those_it_has() -> None:
    refused = 0
    for name in ("parmetis", "ptscotch", "chaco", "party"):
        try:
            domain = SampleDomain.partitioned(CLOUD, 4, name)
        except InputError as error:
            refused += 1
            there = str(error).partition("there are ")[2].split(", ")
            assert "average" in there
            assert name not in there
        else:
            assert len(domain) == 4
    assert refused or SampleDomain.partitioned(CLOUD, 4, "parmetis").balance > 0.5


@pytest.mark.ranks
def test_ranks_that_cut_differently_are_refused(comm: MPI.Comm) -> None:
    domain = SampleDomain.by_tree(CLOUD, 2 if comm.rank == 0 else 4)
    if comm.size == 1:
        assert len(SampleLayout(domain, comm).rows) == 230
        return
    with pytest.raises(InputError, match="cut the samples differently"):
        SampleLayout(domain, comm)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tree", "boxes", "a sample in each", "sets"])
def test_ranks_share_the_samples_and_subdomains(comm: MPI.Comm, name: str) -> None:
    domain = DOMAINS[name]()
    layout = SampleLayout(domain, comm)
    rows = np.concatenate(comm.allgather(layout.rows))
    assert (rows == domain.order).all()
    assert sorted(i for here in comm.allgather(layout.mine) for i in here) == list(range(len(domain)))
    values = np.arange(domain.size * 2.0).reshape(-1, 2)
    vec = layout.vector(2)
    layout.set(vec, values)
    assert (layout.get(vec) == values).all()
    assert layout.inner(values[layout.rows], values[layout.rows]) == pytest.approx(values.T @ values)
    vec.destroy()
