"""Half of a symmetric matrix against all of it, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, halves, named, pieces
from ddml.kernel_machines.halves import Half, Piece, Places

SIZES = (1, 2, 3, 5, 7, 8, 9, 130, 1500)


def layout_of(comm: MPI.Comm, n: int) -> SampleLayout:
    return SampleLayout(SampleDomain.of_labels(np.arange(n) * min(n, 4) // n), comm)


def symmetric(n: int) -> np.ndarray:
    half = np.random.default_rng(n).standard_normal((n, n))
    return half + half.T


@pytest.mark.ranks
@pytest.mark.parametrize("block", [1, 17, 1000])
@pytest.mark.parametrize("n", SIZES)
def test_pieces_have_each_pair_once_and_ranks_equal_work(comm: MPI.Comm, n: int, block: int) -> None:
    if n * n > 3000 * block:
        pytest.skip("many pieces, of nothing new")
    half = Half(layout_of(comm, n), block)
    counts = np.zeros((n, n), dtype=int)
    for unit in half.layout.units:
        for number, piece in enumerate(half.pieces(unit)):
            assert (piece.unit, piece.number) == (unit, number)
            assert piece.rows.stop - piece.rows.start <= block
            counts[piece.rows, piece.columns] += 1
            if piece.twice:
                counts.T[piece.rows, piece.columns] += 1
    assert (sum(comm.allgather(counts)) == 1).all()
    found = comm.allgather(half.entries)
    unit = max(np.diff(half.layout.edges))
    assert sum(found) <= n * n / 2 + n * unit  # each has its own block whole
    assert max(found) - min(found) <= unit * (n / 2 + 2 * unit)  # a unit's


@pytest.mark.ranks
@pytest.mark.parametrize("n", SIZES)
def test_products_are_those_of_the_whole_matrix(comm: MPI.Comm, n: int) -> None:
    A, V = symmetric(n), np.cos(np.arange(3.0 * n)).reshape(n, 3)
    at = torch.from_numpy(A)

    def entries(piece: Piece, rows: Places, columns: Places) -> torch.Tensor:
        return at[rows][:, columns]

    for some in (None, np.arange(n), np.arange(0, n, 3), np.arange(n // 2, n), np.arange(n - 1, n), np.arange(0)):
        given = V if some is None else np.where(np.isin(np.arange(n), some)[:, None], V, 0.0)
        together, alone = (Half(layout_of(on, n), 50).product(entries, given, some) for on in (comm, MPI.COMM_SELF))
        layout = layout_of(comm, n)
        assert np.abs(together - (A @ given)[layout.begin : layout.end]).max(initial=0.0) < 1e-11 * n
        assert together.tobytes() == alone[layout.begin : layout.end].tobytes()


compiled = pytest.mark.skipif(pieces.compiled(torch.zeros(1, 2)) is None, reason="the compiled products are not used")


@compiled
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("k", [2, 7, 8, 10, 16, 17, 33])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3), (13, 129), (40, 256), (7, 300)])
def test_compiled_products_of_pieces(m: int, n: int, k: int, dtype: str) -> None:
    rng = np.random.default_rng(m + n + k)
    size = m + n
    V = torch.tensor(rng.standard_normal((size, k)), dtype=getattr(torch, dtype))
    block = torch.tensor(rng.standard_normal((m, n)), dtype=V.dtype)
    made = pieces.compiled(V)
    assert made is not None
    rows, columns = slice(n, size), slice(0, n)
    for twice in (False, True):
        sums = torch.ones(size, made.width, dtype=torch.float64)
        made.add(block, rows, columns, twice, sums)
        exact = torch.ones(size, k, dtype=torch.float64)
        exact[rows] += block.double() @ V[columns].double()
        if twice:
            exact[columns] += block.double().T @ V[rows].double()
        assert (sums[:, :k] - exact).abs().max() < (1e-12 if dtype == "float64" else 1e-4)
        assert (sums[:, k:] == 1).all()


@compiled
@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_torch_where_nothing_is_compiled(comm: MPI.Comm, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((600, 5))
    layout = SampleLayout(SampleDomain.by_tree(x, 4, 0.1), comm)
    operator = KernelOperator(named("rbf", 2.0), x, 0.5, layout, dtype=dtype)
    V = np.cos(np.arange(600.0 * 10)).reshape(600, 10)[layout.rows]
    found = operator.multiply(V)
    monkeypatch.setattr(halves, "compiled", lambda _: None)
    assert np.abs(found - operator.multiply(V)).max() < (1e-11 if dtype == "float64" else 1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("memory", [1e9, 1e5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("columns", [1, 32, 33, 75])
def test_any_number_of_columns(comm: MPI.Comm, columns: int, dtype: str, memory: float) -> None:
    x = np.random.default_rng(0).standard_normal((600, 5))
    V = np.cos(np.arange(600.0 * columns)).reshape(600, columns)
    made = []
    for on in (comm, MPI.COMM_SELF):
        layout = SampleLayout(SampleDomain.by_tree(x, 4, 0.1), on)
        operator = KernelOperator(named("matern32", 2.0), x, 0.5, layout, memory, dtype)
        made.append(layout.everywhere(operator.multiply(V[layout.rows])))
        assert (operator.kept is None) == (memory < 1e6)
    points = operator.samples
    exact = operator.kernel(points, points.clone()).numpy() @ V[layout.rows] + 0.5 * V[layout.rows]
    assert np.abs(made[0] - exact).max() < (1e-11 if dtype == "float64" else 1e-3)
    assert made[0].tobytes() == made[1].tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize("memory", [1e9, 1e5])
@pytest.mark.parametrize("count", [0, 1, 40, 600])
def test_columns_at_some_places(comm: MPI.Comm, count: int, memory: float) -> None:
    x = np.random.default_rng(1).standard_normal((600, 5))
    places, V = np.random.default_rng(2).permutation(600)[:count], np.sin(np.arange(2.0 * count)).reshape(count, 2)
    made = []
    for on in (comm, MPI.COMM_SELF):
        layout = SampleLayout(SampleDomain.by_tree(x, 4, 0.1), on)
        operator = KernelOperator(named("rbf", 2.0), x, 0.5, layout, memory)
        made.append(layout.everywhere(operator.multiply_columns(places, V)))
    A = operator.kernel(operator.samples, operator.samples.clone()).numpy() + 0.5 * np.eye(600)
    assert np.abs(made[0] - A[:, places] @ V).max() < 1e-12 * 600
    assert made[0].tobytes() == made[1].tobytes()
