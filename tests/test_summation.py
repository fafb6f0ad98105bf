"""Sums without an owner: the tree over blocks of samples, the cut of vectors into pieces, and PETSc's vectors."""

import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from ddml.data.sample_sets import TensorSamples
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.parameters import parameter_table
from ddml.problems.classification import ClassificationLoss
from ddml.summation import (
    LEAST_LEAVES,
    MOST_LEAVES,
    MOST_PIECES,
    PIECE,
    Tree,
    efficiency,
    fixes_order,
    halves,
    leaves,
    pieces,
    snapped,
)

ENTRYWISE = 17.0  # a sum of powers of it in another order has other bits


def test_the_largest_cut_keeps_any_number_of_ranks_busy() -> None:
    assert leaves(10**6, 1.0) == MOST_LEAVES
    assert min(efficiency(MOST_LEAVES, ranks) for ranks in range(1, 65)) >= 0.9
    dealt = [max(b - a for a, b in pairwise(Tree(MOST_LEAVES, ranks).edges)) for ranks in range(1, 65)]
    assert all(MOST_LEAVES / (ranks * most) >= 0.9 for ranks, most in enumerate(dealt, 1))


@pytest.mark.parametrize("count", [1, 3, 8, 100, 10_000])
@pytest.mark.parametrize("enough", [0.5, 30.0, 1e9])
def test_cuts_of_samples(count: int, enough: float) -> None:
    found = leaves(count, enough)
    assert 1 <= found <= count
    assert found == count or (LEAST_LEAVES <= found <= MOST_LEAVES and found & (found - 1) == 0)
    assert found <= LEAST_LEAVES or count / found >= enough


def by_halves(values: np.ndarray) -> Any:
    """The sum that the tree stands for, by recursion on arrays: the largest power of two, and the rest."""
    if len(values) == 1:
        return values[0]
    middle = 1
    while 2 * middle < len(values):
        middle *= 2
    return by_halves(values[:middle]) + by_halves(values[middle:])


@pytest.mark.ranks
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 48, 100])
def test_the_tree_does_not_depend_on_the_ranks_and_few_sums_travel(count: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, 3)) * ENTRYWISE ** rng.integers(-9, 9, (count, 1))
    expected = by_halves(values)
    assert halves((0, 12)) == ((0, 8), (8, 12))
    for ranks in range(1, 20):
        tree = Tree(count, ranks)
        covered = [leaf for nodes in tree.nodes for a, b in nodes for leaf in range(a, b)]
        assert covered == list(range(count))
        assert max(map(len, tree.nodes)) <= 2 * max(int(np.log2(count)), 1)
        sums = [tree.add(node, lambda i: values[i].copy()) for nodes in tree.nodes for node in nodes]
        assert tree.total(sums).tobytes() == expected.tobytes()


def test_summands_are_released() -> None:
    alive, most = 0, 0

    def leaf(number: int) -> np.ndarray:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return np.ones(1)

    def release(_: np.ndarray) -> None:
        nonlocal alive
        alive -= 1

    assert Tree(512, 1).add((0, 512), leaf, release) == 512
    assert alive == 1
    assert most == 10


@pytest.mark.parametrize("sizes", [(1,), (5, 3), (1000, 7, 20, 1), (70_000, 50)])
def test_pieces_are_those_of_the_vector_and_of_its_tensors(sizes: tuple[int, ...]) -> None:
    edges = pieces(sizes)
    assert edges[0] == 0
    assert edges[-1] == sum(sizes)
    assert edges == sorted(set(edges))
    assert set(np.cumsum(sizes)) <= set(edges)
    assert max(np.diff(edges)) <= max(-(-sum(sizes) // MOST_PIECES), 2 * PIECE)
    assert snapped(edges, edges) == edges
    for wanted in range(0, sum(sizes), 97):
        found = snapped(edges, [wanted])[0]
        assert abs(found - wanted) == min(abs(edge - wanted) for edge in edges)


def test_ranks_own_equal_shares_to_a_piece(comm: MPI.Comm) -> None:
    for size in (40, 3_000, 100_000):
        layout = ParameterLayout(parameter_table([("x", (size,))]), comm)
        piece = max(np.diff(layout.edges))
        assert np.abs(layout.counts - size / comm.size).max() <= piece
        assert layout.vector().getLocalSize() == layout.counts[comm.rank]


# Vectors ------------------------------------------------------------------------------------------------------------

NORMS = (PETSc.NormType.NORM_1, PETSc.NormType.NORM_2, PETSc.NormType.NORM_INFINITY)


def numbers(comm: MPI.Comm, sizes: tuple[int, ...]) -> tuple[list[float], bytes]:
    """What PETSc computes of vectors of widely spread entries, whatever asks for it."""
    rng = np.random.default_rng(1)
    layout = ParameterLayout(parameter_table([(str(i), (n,)) for i, n in enumerate(sizes)]), comm)
    table = rng.standard_normal((3, layout.size)) * ENTRYWISE ** rng.integers(-9, 9, (3, layout.size))
    x, y, z = (layout.vector() for _ in range(3))
    for vec, values in zip((x, y, z), table, strict=True):
        vec.setArray(values[slice(*vec.getOwnershipRange())])
    w = z.duplicate()
    w.waxpy(0.3, x, y)
    w.axpy(-1.7, z)
    w.axpby(1.1, 0.3, x)
    w.aypx(0.7, y)
    w.maxpy([0.1, -0.2, 1 / 3], [x, y, z])
    found = [v.norm(kind) for v in (x, y, w) for kind in NORMS]
    found += [x.dot(y), w.tDot(z), *w.mDot([x, y, z]), *w.mtDot([y, x])]
    w.dotBegin(x)
    w.normBegin()
    found += [w.dotEnd(x), w.normEnd()]
    mine = slice(*x.getOwnershipRange())
    X = table.T[mine]
    Q, R = layout.orthonormal(X)
    assert np.abs(Q @ R - X).max(initial=0.0) <= 1e-12 * np.abs(table).max()
    found += [*layout.inner(X, X).ravel(), *R.ravel(), *layout.inner(Q, layout.times(X, R.T)).ravel()]
    whole = layout.gather(w).numpy().tobytes()
    if comm.size == 1:
        dense = [np.linalg.norm(v, kind) for v in (table[0], table[1]) for kind in (1, 2, np.inf)]
        assert found[:6] == pytest.approx(dense, rel=1e-12)
        assert found[9] == pytest.approx(float(table[0] @ table[1]), rel=1e-9)
        u = 0.7 * (1.1 * table[0] + 0.3 * (0.3 * table[0] + table[1] - 1.7 * table[2])) + table[1]
        u += 0.1 * table[0] - 0.2 * table[1] + table[2] / 3
        assert layout.gather(w).numpy() == pytest.approx(u, rel=1e-12, abs=1e-12 * np.abs(u).max())
    for vec in (x, y, z, w):
        vec.destroy()
    return found, whole


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [(2, 1), (100, 7, 50), (5000, 3, 1), (70_000, 9, 1000)])
def test_vectors_compute_the_same_bits_on_any_number_of_ranks(sizes: tuple[int, ...], comm: MPI.Comm) -> None:
    assert fixes_order()
    together, alone = numbers(comm, sizes), numbers(MPI.COMM_SELF, sizes)
    assert np.array(together[0]).tobytes() == np.array(alone[0]).tobytes()
    assert together[1] == alone[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_by_every_norm(bad: float, comm: MPI.Comm) -> None:
    layout = ParameterLayout(parameter_table([("x", (100,))]), comm)
    x = layout.vector()
    begin, end = x.getOwnershipRange()
    values = np.ones(100)
    values[57] = bad
    x.setArray(values[begin:end])
    for kind in NORMS:
        assert not np.isfinite(x.norm(kind))
    assert not np.isfinite(x.dot(x))
    x.destroy()


# What is distributed ------------------------------------------------------------------------------------------------


def wide(width: int) -> ClassificationLoss:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(50, width), nn.ReLU(), nn.Linear(width, 3))
    samples = TensorSamples(torch.randn(64, 50), torch.arange(64) % 3)
    return ClassificationLoss(network, samples, 3)


@pytest.mark.parametrize("solver", ["lbfgs", "tr"])
def test_every_vector_and_secant_pair_has_its_share_of_entries_on_a_rank(
    solver: str, comm: MPI.Comm, train: Callable[..., Any]
) -> None:
    seen: list[tuple[int, int]] = []
    loss = wide(400)

    def watch(context: Any, _: int) -> None:
        state = context.state()
        vectors = [
            *state["vectors"].values(),
            *(v for name in ("S", "Y") for v in state.get("pairs", {}).get(name, ())),
        ]
        seen.extend((v.getLocalSize(), v.getSize()) for v in vectors)

    train(loss, solver, 4, blocks=8, watch=watch)
    layout = ParameterLayout(loss.parameters, comm)
    assert len(seen) > 10
    assert {size for _, size in seen} == {loss.size}
    assert max(local for local, _ in seen) <= loss.size / comm.size + max(np.diff(layout.edges))


def test_a_gradient_over_many_blocks_needs_few_vectors() -> None:
    """Twice the blocks, not twice the memory: no more sums exist than the tree is high."""
    loss = wide(40_000)  # 2.2 million parameters, 9 MB a gradient in single precision
    objective = Objective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF), blocks=64)
    x, g = objective.layout.vector(), objective.layout.vector()
    objective.initial(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objective.value_gradient(x, g)
    spent = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert spent < 24 * 4 * loss.size  # 64 rows would be 64
    x.destroy()
    g.destroy()
