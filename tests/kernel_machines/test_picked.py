"""Entries of K that are picked out of what ranks keep of it."""

import numpy as np
import pytest
from mpi4py import MPI

from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, named
from ddml.kernel_machines.picked import Wanted, picked
from ddml.kernel_machines.pivots import Pivots

CLOUD = np.random.default_rng(0).standard_normal((1000, 7))
DOMAINS = {
    "tree": SampleDomain.by_tree(CLOUD, 8, 0.2),
    "boxes": SampleDomain.by_boxes(CLOUD, (3, 3), 0.1),  # some are small
    "one": SampleDomain.by_tree(CLOUD, 1),
}


def made(comm: MPI.Comm, domain: str = "tree", dtype: str = "float64", keep: bool = True) -> KernelOperator:
    layout = SampleLayout(DOMAINS[domain], comm)
    return KernelOperator(named("rbf", 2.0), CLOUD, 0.1, layout, dtype=dtype, keep=keep)


@pytest.mark.ranks
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-14), ("float32", 1e-6)])
def test_matrices_of_subdomains_are_those_that_are_computed(
    comm: MPI.Comm, domain: str, dtype: str, near: float
) -> None:
    kept, computed = made(comm, domain), made(comm, domain, keep=False)
    assert kept.picks(dtype)
    assert not computed.picks(dtype)
    assert not made(comm, domain, "float32").picks("float64")
    x, layout = kept.samples, kept.layout
    found = kept.submatrices(dtype)
    for i, one, other in zip(layout.mine, found, computed.submatrices(dtype), strict=True):
        places = layout.places[layout.domain.sets[i]]
        exact = kept.kernel(x[places], x[places]).numpy()
        assert one.dtype == other.dtype == dtype
        assert np.abs(one - exact).max(initial=0) < near
        assert np.abs(np.tril(other - exact)).max(initial=0) < near


@pytest.mark.ranks
def test_anything_that_any_rank_wants_is_picked_in_its_order_and_has_the_same_bits(comm: MPI.Comm) -> None:
    rng = np.random.default_rng(1)
    wanted = [
        Wanted(rank % comm.size, rng.permutation(1000)[:count], columns)
        for rank, count, columns in ((0, 300, None), (1, 1000, rng.permutation(1000)[:50]), (2, 5, np.array([7])),
                                     (1, 0, np.array([3, 1])), (0, 0, None))
    ]  # fmt: skip
    operator, alone = made(comm), made(MPI.COMM_SELF)
    assert operator.kept is not None
    assert alone.kept is not None
    exact = picked(alone.half, alone.kept, [Wanted(0, *some[1:]) for some in wanted], "float64")
    mine = [i for i, some in enumerate(wanted) if some.rank == comm.rank]
    for i, found in zip(mine, picked(operator.half, operator.kept, wanted, "float64"), strict=True):
        assert (found == exact[i]).all()
        columns = wanted[i].rows if wanted[i].columns is None else wanted[i].columns
        x = operator.samples
        assert np.abs(found - operator.kernel(x[wanted[i].rows], x[columns]).numpy()).max(initial=0) < 1e-14


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["uniform", "cholesky"])
def test_factors_of_pivots_are_those_that_are_computed(comm: MPI.Comm, kind: str) -> None:
    kept, computed = (Pivots.chosen(made(comm, keep=keep), 50, kind) for keep in (True, False))
    assert kept.places is not None
    assert (kept.places == computed.places).all()
    for dtype, error, near in (("float64", 0.0, 1e-13), ("float32", 0.0, 1e-7), ("float32", 0.01, 1e-5)):
        assert np.abs(kept.mine(dtype, error) - computed.mine(dtype, error)).max(initial=0) < near
        assert kept.mine(dtype, error).dtype == dtype


def test_factors_are_computed_in_float32_only_where_pivots_allow_it() -> None:
    operator = made(MPI.COMM_SELF)
    exact = Pivots.chosen(operator, 50).mine()
    rounded = exact.astype("float32")
    assert (Pivots.chosen(operator, 50).mine("float32", 1e-12) == rounded).all()
    single = Pivots.chosen(operator, 50).mine("float32", 1e-2)
    assert (single != rounded).any()
    assert np.abs(single @ single.T - exact @ exact.T).max() < 1e-2
