"""Subdomains, their restriction and extension matrices, and who works on what, against dense numpy."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains, length
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss


def make_loss(depth: int = 6, width: int = 3) -> PDELoss:
    network = TanhNetwork(2, width, depth, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, 12)


def entries(ranges: tuple[slice, ...]) -> np.ndarray:
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])


LOSS = make_loss()
SUBDOMAINS = {
    "one": Subdomains.by_layers(LOSS, 1),
    "layers": Subdomains.by_layers(LOSS, 4),
    "one layer each": Subdomains.by_layers(LOSS, 6),
    "by cost": Subdomains.by_layers(LOSS, 3, balance="cost"),
    "overlap": Subdomains.by_layers(LOSS, 3, overlap=1),
    "overlap by cost": Subdomains.by_layers(LOSS, 3, overlap=1, balance="cost"),
    "overlap of everything": Subdomains.by_layers(LOSS, 2, overlap=9),
    "tensors": Subdomains.by_tensors(LOSS, 5),
    "tensors with overlap": Subdomains.by_tensors(LOSS, 5, overlap=2),
    "random": Subdomains.by_tensors(LOSS, 4, seed=3),
    "random with overlap": Subdomains.by_tensors(LOSS, 4, overlap=1, seed=3),
    "windows of two": Subdomains.windows(LOSS),
    "windows of three": Subdomains.windows(LOSS, 3),
    "windows of three, shifted by two": Subdomains.windows(LOSS, 3, 2),
    "chosen layers": Subdomains.of_layers(LOSS, [[0, 3], [1, 5], [2, 4]]),
    "chosen layers with overlap": Subdomains.of_layers(LOSS, [[0, 1, 3], [1, 4, 5], [2, 4]], [[0, 3], [1, 5], [2, 4]]),
}
PARTIAL = Subdomains.of_layers(LOSS, [[0, 2]])
names = pytest.mark.parametrize("name", SUBDOMAINS)
modes = pytest.mark.parametrize(("parallel", "gathered"), [(True, False), (False, False), (True, True), (False, True)])


@names
@modes
def test_restrictions_and_extensions_are_the_dense_ones(
    comm: MPI.Comm, name: str, parallel: bool, gathered: bool
) -> None:
    subdomains = SUBDOMAINS[name]
    layout = ParameterLayout(LOSS.parameters, comm, [0] + [LOSS.size] * comm.size if gathered else None)
    decomposition = Decomposition(subdomains, layout, parallel, gathered)
    rng = np.random.default_rng(1)
    values = rng.standard_normal(LOSS.size)
    x, back, summed = layout.vector(), layout.vector(), layout.vector()
    begin, end = x.getOwnershipRange()
    x.setArray(values[begin:end])
    multiplicity = np.bincount(np.concatenate([entries(r) for r in subdomains.ranges]), minlength=LOSS.size)
    for s, ranges in enumerate(subdomains.ranges):
        chosen = entries(ranges)
        y, z = decomposition.vector(s), decomposition.vector(s)
        decomposition.R[s].mult(x, y)
        mine = decomposition.local_range(s)
        assert np.array_equal(y.array_r, values[chosen][mine])
        weights = rng.standard_normal(len(chosen))
        z.setArray(weights[mine])
        decomposition.R[s].multTranspose(z, back)
        expected = np.zeros(LOSS.size)
        expected[chosen] = weights
        assert np.array_equal(back.array_r, expected[begin:end])
        assert y.dot(z) == pytest.approx(x.dot(back), rel=1e-13, abs=1e-13)
        decomposition.E[s].mult(z, back)
        assert np.array_equal(back.array_r, (expected * (1 / np.maximum(multiplicity, 1)))[begin:end])
        decomposition.E[s].multAdd(y, summed, summed)
    assert summed.array_r == pytest.approx(values[begin:end], rel=1e-15)
    decomposition.destroy()


@names
def test_cores_tile_the_parameters_and_lie_in_their_subdomains(name: str) -> None:
    subdomains = SUBDOMAINS[name]
    assert np.array_equal(np.sort(np.concatenate([entries(c) for c in subdomains.cores])), np.arange(LOSS.size))
    for ranges, core in zip(subdomains.ranges, subdomains.cores, strict=True):
        assert set(entries(core)) <= set(entries(ranges))
        assert all(a.stop < b.start for a, b in itertools.pairwise(ranges))
        assert length(ranges) == len(entries(ranges))


def test_entries_that_no_subdomain_holds_are_left_alone(comm: MPI.Comm) -> None:
    layout = ParameterLayout(LOSS.parameters, comm)
    decomposition = Decomposition(PARTIAL, layout, parallel=False)
    x, y, back = layout.vector(), decomposition.vector(0), layout.vector()
    x.set(1.0)
    decomposition.R[0].mult(x, y)
    decomposition.E[0].mult(y, back)
    expected = np.zeros(LOSS.size)
    expected[entries(PARTIAL.ranges[0])] = 1
    assert np.array_equal(back.array_r, expected[slice(*back.getOwnershipRange())])
    assert (PARTIAL.weights == 1).all()
    decomposition.destroy()


@pytest.mark.parametrize(("count", "overlap"), [(1, 0), (3, 0), (4, 0), (3, 1), (3, 2), (6, 1)])
def test_layers_are_widened_by_the_overlap_on_both_sides(count: int, overlap: int) -> None:
    subdomains = Subdomains.by_layers(LOSS, count, overlap)
    edges = [6 * i // count for i in range(count + 1)]
    for s, (a, b) in enumerate(itertools.pairwise(edges)):
        wide = range(max(a - overlap, 0), min(b + overlap, 6))
        assert LOSS.layer_numbers(subdomains.ranges[s]) == frozenset(wide)
        assert LOSS.layer_numbers(subdomains.cores[s]) == frozenset(range(a, b))
        held = sum(LOSS.parameters[k].size for i in wide for k in LOSS.layers[i])
        assert length(subdomains.ranges[s]) == held


@pytest.mark.parametrize(
    ("width", "shift", "starts"),
    [(1, 1, [0, 1, 2, 3, 4, 5]), (2, 2, [0, 2, 4]), (3, 2, [0, 1, 3]), (3, 3, [0, 3]), (4, 4, [0, 2]), (6, 1, [0])],
)
def test_windows_may_be_shifted_further(width: int, shift: int, starts: list[int]) -> None:
    subdomains = Subdomains.windows(LOSS, width, shift)
    layers = [LOSS.layer_numbers(ranges) for ranges in subdomains.ranges]
    assert layers == [frozenset(range(s, s + width)) for s in starts]


@pytest.mark.parametrize("width", range(1, 7))
def test_windows_are_all_groups_of_neighbouring_layers(width: int) -> None:
    subdomains = Subdomains.windows(LOSS, width)
    assert len(subdomains) == 7 - width
    held: list[int] = []
    for s, (ranges, core) in enumerate(zip(subdomains.ranges, subdomains.cores, strict=True)):
        assert LOSS.layer_numbers(ranges) == frozenset(range(s, s + width))
        assert LOSS.layer_numbers(core) <= LOSS.layer_numbers(ranges)
        held += sorted(LOSS.layer_numbers(core))
    assert held == list(range(6))
    if width == 1:
        assert subdomains == Subdomains.by_layers(LOSS, 6)


def test_random_tensors_depend_on_the_seed_only() -> None:
    first, again, other = (Subdomains.by_tensors(LOSS, 4, seed=seed) for seed in (3, 3, 4))
    assert first.ranges == again.ranges
    assert first.ranges != other.ranges
    assert first.ranges != Subdomains.by_tensors(LOSS, 4).ranges


def layer_cost(loss: PDELoss, a: int, b: int) -> float:
    """Of a gradient by layers a to b behind the kept prefix."""
    return loss.charges.evaluation(a if loss.keeps(a) else 0, frozenset(range(a, b)))


@pytest.mark.parametrize("depth", [2, 5, 8])
@pytest.mark.parametrize("overlap", [0, 1])
def test_balancing_by_cost_is_optimal(depth: int, overlap: int) -> None:
    loss = make_loss(depth)
    for count in range(1, depth + 1):
        subdomains = Subdomains.by_layers(loss, count, overlap, "cost")
        plain = Subdomains.by_layers(loss, count, overlap)

        def dearest(edges: tuple[int, ...]) -> float:
            groups = itertools.pairwise((0, *edges, depth))
            return max(layer_cost(loss, max(a - overlap, 0), min(b + overlap, depth)) for a, b in groups)

        best = min(dearest(edges) for edges in itertools.combinations(range(1, depth), count - 1))
        assert max(subdomains.costs) == pytest.approx(best, rel=1e-13)
        assert max(subdomains.costs) <= max(plain.costs)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (Subdomains.by_layers, {"count": 7}, "6 layers.*1 to 6, got 7"),
        (Subdomains.by_layers, {"count": 0}, "got 0"),
        (Subdomains.by_layers, {"count": -1}, "got -1"),
        (Subdomains.by_layers, {"count": 2, "overlap": -1}, "overlap must be 0 or more layers, got -1"),
        (Subdomains.by_layers, {"count": 2, "balance": "size"}, "balance must be .* got 'size'"),
        (Subdomains.windows, {"width": 0}, "6 layers.* 1 to 6 .*got 0"),
        (Subdomains.windows, {"width": 7}, "got 7"),
        (Subdomains.windows, {"width": 3, "shift": 4}, "shifted by 1 to 3 layers, got 4"),
        (Subdomains.windows, {"width": 3, "shift": 0}, "got 0"),
        (Subdomains.by_tensors, {"count": len(LOSS.parameters) + 1}, "parameter tensors"),
        (Subdomains.by_tensors, {"count": 0}, "got 0"),
        (Subdomains.by_tensors, {"count": 2, "overlap": -3}, "overlap must be 0 or more parameter tensors"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(make: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(LOSS, **arguments)


@pytest.mark.ranks
@names
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 13, 64])
def test_every_subdomain_is_assigned_and_every_rank_has_work(name: str, ranks: int) -> None:
    subdomains = SUBDOMAINS[name]
    count, assigned = len(subdomains), subdomains.assignment(ranks)
    assert len(assigned) == ranks
    assert all(mine == list(range(mine[0], mine[-1] + 1)) for mine in assigned)
    assert sorted({s for mine in assigned for s in mine}) == list(range(count))
    if ranks <= count:
        assert [s for mine in assigned for s in mine] == list(range(count))
        load = max(sum(subdomains.costs[s] for s in mine) for mine in assigned)
        best = min(
            max(sum(subdomains.costs[a:b]) for a, b in itertools.pairwise((0, *edges, count)))
            for edges in itertools.combinations(range(1, count), ranks - 1)
        )
        assert load == pytest.approx(best, rel=1e-13)
    else:
        sizes = np.bincount([mine[0] for mine in assigned])
        assert all(len(mine) == 1 for mine in assigned)
        assert assigned == sorted(assigned)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.ranks
@names
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 9, 30])
def test_ownership_makes_cores_local_where_they_follow_each_other(name: str, ranks: int) -> None:
    subdomains = SUBDOMAINS[name]
    edges = subdomains.ownership(ranks)
    assert (edges[0], edges[-1], len(edges)) == (0, LOSS.size, ranks + 1)
    assert edges == sorted(edges)
    cores = [entries(core) for core in subdomains.cores]
    if not np.array_equal(np.concatenate(cores), np.arange(LOSS.size)):
        assert np.ptp(np.diff(edges)) <= 1
        return
    assigned = subdomains.assignment(ranks)
    for s, core in enumerate(cores):
        owners = set(np.searchsorted(edges, core, side="right") - 1)
        assert owners <= {rank for rank in range(ranks) if s in assigned[rank]}


@modes
@names
def test_groups_hold_the_subdomain_vectors(comm: MPI.Comm, name: str, parallel: bool, gathered: bool) -> None:
    subdomains = SUBDOMAINS[name]
    layout = ParameterLayout(LOSS.parameters, comm, subdomains.ownership(comm.size))
    decomposition = Decomposition(subdomains, layout, parallel, gathered)
    for s in range(len(subdomains)):
        mine = decomposition.local_range(s)
        shares = comm.allgather((mine.start, mine.stop, s in decomposition.mine))
        assert sum(b - a for a, b, _ in shares) == length(subdomains.ranges[s])
        assert all(inside or a == b for a, b, inside in shares)
        if gathered:
            assert sorted(b - a for a, b, _ in shares)[-1] == length(subdomains.ranges[s])
    if not parallel:
        assert decomposition.group.size == comm.size
        assert decomposition.mine == list(range(len(subdomains)))
    same = comm.allgather(decomposition.mine)
    assert decomposition.group.size == same.count(decomposition.mine)
    decomposition.destroy()
