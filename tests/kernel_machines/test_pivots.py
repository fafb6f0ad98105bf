"""Pivots against dense numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, named
from ddml.kernel_machines.pivots import Pivots, chosen

RNG = np.random.default_rng(3)
CLOUD = RNG.standard_normal((260, 3))
TWINS = np.repeat(RNG.standard_normal((40, 3)), 5, axis=0)
CLUSTERS = np.concatenate([0.01 * RNG.standard_normal((150, 3)), 10 + 3 * RNG.standard_normal((50, 3))])
SAMPLES = {"cloud": CLOUD, "twins": TWINS, "clusters": CLUSTERS}


def made(comm: MPI.Comm, samples: np.ndarray, name: str = "rbf") -> KernelOperator:
    layout = SampleLayout(SampleDomain.by_tree(samples, 4, 0.1), comm)
    return KernelOperator(named(name), samples, 0.1, layout)


def matrix(operator: KernelOperator) -> np.ndarray:
    """K, in the layout's order."""
    x = operator.samples
    return operator.kernel(x, x.clone()).numpy()


@pytest.mark.ranks
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("kind", ["uniform", "cholesky"])
@pytest.mark.parametrize("name", ["rbf", "laplace", "polynomial"])
def test_factors_are_the_nystrom_ones(comm: MPI.Comm, name: str, kind: str, samples: str) -> None:
    operator = made(comm, SAMPLES[samples], name)
    places = chosen(operator, 20, kind, seed=1)
    assert (places == chosen(made(MPI.COMM_SELF, SAMPLES[samples], name), 20, kind, seed=1)).all()
    pivots, layout = Pivots.chosen(operator, 20, kind, seed=1), operator.layout
    F, K = layout.everywhere(pivots.mine()), matrix(operator)
    computed = layout.everywhere(Pivots(operator, operator.samples[places]).mine())
    assert np.abs(computed - F).max() < 1e-6 * np.abs(F).max()  # picked out of K, or computed
    scale, gram = np.abs(K).max(), K[np.ix_(places, places)]
    if np.linalg.cond(gram) < 1e8:
        assert np.abs(F @ F.T - K[:, places] @ np.linalg.solve(gram, K[places])).max() < 1e-7 * scale
    assert np.abs(F[places] @ F.T - K[places]).max() < 1e-6 * scale  # equal in the pivots' columns
    assert np.linalg.eigvalsh(K - F @ F.T)[0] > -1e-9 * scale * len(K)


def test_pivoted_cholesky_finds_every_cluster_and_no_twin() -> None:
    operator = made(MPI.COMM_SELF, TWINS)
    points = operator.samples[chosen(operator, 100, "cholesky")]
    assert len(points) == len(points.unique(dim=0)) == 40  # ends early: there are 40 different samples
    gaps = {}
    for kind in ("uniform", "cholesky"):
        K = matrix(operator := made(MPI.COMM_SELF, CLUSTERS))
        F = operator.layout.everywhere(Pivots.chosen(operator, 30, kind).mine())
        gaps[kind] = np.trace(K - F @ F.T)
    assert gaps["cholesky"] < 0.7 * gaps["uniform"]


@pytest.mark.parametrize("kind", ["uniform", "cholesky"])
def test_pivots_depend_on_the_seed_only_and_differ(kind: str) -> None:
    operator = made(MPI.COMM_SELF, CLOUD)
    first, again, other = (chosen(operator, 30, kind, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert set(first) != set(other)
    assert len(set(first)) == 30


@pytest.mark.ranks
def test_any_points_may_be_given(comm: MPI.Comm) -> None:
    operator = made(comm, CLOUD)
    points = np.linspace(-1, 1, 21).reshape(7, 3)
    kernel, moved = operator.kernel, operator.prepared(points)
    F = operator.layout.everywhere(Pivots(operator, moved).mine())
    cross, gram = kernel(operator.samples, moved).numpy(), kernel(moved, moved.clone()).numpy()
    assert np.abs(F @ F.T - cross @ np.linalg.solve(gram, cross.T)).max() < 1e-7


@pytest.mark.parametrize(
    ("count", "kind", "words"),
    [
        (0, "uniform", "260 samples have 1 to 260 pivots, got 0"),
        (-3, "cholesky", "1 to 260 pivots, got -3"),
        (261, "uniform", "1 to 260 pivots, got 261"),
        (5, "random", "one of uniform, cholesky; got 'random'"),
    ],
)
def test_pivots_that_there_are_not_are_refused(count: int, kind: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen(made(MPI.COMM_SELF, CLOUD), count, kind)
    with pytest.raises(InputError, match="have as many pivots at most, got 300"):
        Pivots(made(MPI.COMM_SELF, CLOUD), torch.zeros(300, 3, dtype=torch.float64))
