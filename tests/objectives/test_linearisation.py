"""Linearised residuals against the dense Jacobian."""

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy import sparse

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.work import DOUBLE, PASSED, STORED
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.residual import ResidualObjective
from ddml.problems import Burgers, PDELoss
from ddml.problems.pde.charges import AUTOGRAD

ASSEMBLED = pytest.mark.parametrize("assembled", [True, False])


def burgers(points: int = 61) -> PDELoss:
    network = TanhNetwork(2, 6, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, points)


class Case:
    """An objective on some ranks, its initial point and the dense Jacobian there."""

    def __init__(self, comm: MPI.Comm, blocks: int, assembled: bool = True, points: int = 61) -> None:
        self.loss = loss = burgers(points)
        layout = ParameterLayout(loss.parameters, comm)
        self.objective = ResidualObjective(loss, layout, blocks=blocks)
        self.x, self.vec = layout.vector(), layout.vector()
        self.objective.initial(self.x)
        self.at = Linearisation(self.objective, self.x, assembled)
        self.J = loss.jacobian(loss.initial()).numpy()
        self.r = loss.residual(loss.initial()).numpy()

    def whole(self, pieces: list[Any]) -> np.ndarray:
        """Residual-space pieces of all ranks."""
        gathered = self.objective.comm.allgather([np.asarray(p) for p in pieces])
        return np.concatenate([p for rank in gathered for p in rank])

    def split(self, values: np.ndarray) -> list[torch.Tensor]:
        """A residual-space vector as this rank's pieces."""
        sizes = self.objective.comm.allgather([len(r) for r in self.at.residual])
        pieces = np.split(values, np.cumsum([size for rank in sizes for size in rank])[:-1])
        begin = sum(map(len, sizes[: self.objective.comm.rank]))
        return [torch.from_numpy(p.copy()) for p in pieces[begin : begin + len(self.at.residual)]]

    def gathered(self) -> np.ndarray:
        return self.objective.layout.gather(self.vec).numpy().copy()


@ASSEMBLED
@pytest.mark.parametrize("blocks", [0, 5])
def test_products_are_those_of_the_dense_jacobian(comm: MPI.Comm, assembled: bool, blocks: int) -> None:
    case = Case(comm, blocks, assembled)
    at, J, rng = case.at, case.J, np.random.default_rng(0)
    assert at.count == len(J)
    assert at.value == pytest.approx(case.r @ case.r, rel=1e-13)
    assert case.whole(at.residual) == pytest.approx(case.r, rel=1e-12, abs=1e-14)
    v, w = rng.standard_normal(J.shape[1]), rng.standard_normal(len(J))
    assert case.whole(at.product(torch.from_numpy(v))) == pytest.approx(J @ v, rel=1e-11, abs=1e-11)
    at.transpose_product(case.split(w), case.vec)
    assert case.gathered() == pytest.approx(J.T @ w, rel=1e-11, abs=1e-11)
    at.diagonal(case.vec)
    assert case.gathered() == pytest.approx((J**2).sum(0), rel=1e-11, abs=1e-14)


@ASSEMBLED
def test_products_with_some_columns(comm: MPI.Comm, assembled: bool) -> None:
    case = Case(comm, 5, assembled)
    ranges = (slice(3, 20), slice(40, 41))
    v, w = np.zeros(case.J.shape[1]), np.random.default_rng(0).standard_normal(len(case.J))
    for r in ranges:
        v[r] = np.arange(r.start, r.stop)
    assert case.whole(case.at.product(torch.from_numpy(v), ranges)) == pytest.approx(case.J @ v, rel=1e-11, abs=1e-11)
    case.at.transpose_product(case.split(w), case.vec, ranges)
    for r in ranges:
        assert case.gathered()[r] == pytest.approx((case.J.T @ w)[r], rel=1e-11, abs=1e-11)


@ASSEMBLED
@pytest.mark.parametrize("blocks", [0, 5])
def test_gram_matrices_are_dense_ones(comm: MPI.Comm, assembled: bool, blocks: int) -> None:
    case = Case(comm, blocks, assembled)
    at, J = case.at, case.J
    scale = np.abs(J.T @ J).max()
    begin, end = case.x.getOwnershipRange()
    Y = np.random.default_rng(0).standard_normal((J.shape[1], 70))
    for columns in (Y, sparse.csc_array(np.where(Y > 1, Y, 0))):
        dense = columns if isinstance(columns, np.ndarray) else columns.toarray()
        assert at.gram_product(columns) == pytest.approx((J.T @ (J @ dense))[begin:end], abs=1e-11 * scale)
    gram = at.dual_gram()
    assert (gram is None) == (comm.rank > 0)
    if gram is not None:
        assert np.tril(gram) == pytest.approx(np.tril(J @ J.T), abs=1e-12 * scale)
    for subdomains in (Subdomains.windows(case.loss), Subdomains.by_tensors(case.loss, 3, overlap=1, seed=0)):
        decomposition = Decomposition(subdomains, case.objective.layout, parallel=True, gathered=True)
        blocks_found = at.gram_blocks(decomposition)
        assert sorted(s for rank in comm.allgather(list(blocks_found)) for s in rank) == list(range(len(subdomains)))
        for s, block in blocks_found.items():
            columns = np.concatenate([J[:, r] for r in subdomains.ranges[s]], axis=1)
            assert np.tril(block) == pytest.approx(np.tril(columns.T @ columns), abs=1e-12 * scale)
        decomposition.destroy()


@pytest.mark.ranks
def test_in_fixed_order_everything_has_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    found = []
    for ranks in (comm, MPI.COMM_SELF):
        case = Case(ranks, 12)
        at, n = case.at, case.loss.size
        v = torch.linspace(-1, 1, n, dtype=torch.float64)
        at.transpose_product(at.product(v), case.vec)
        pieces = [case.gathered()]
        decomposition = Decomposition(Subdomains.windows(case.loss), case.objective.layout, True, gathered=True)
        blocks = ranks.allgather(at.gram_blocks(decomposition))
        pieces += [np.tril(block) for rank in blocks for _, block in sorted(rank.items())]
        product = np.concatenate(ranks.allgather(at.gram_product(np.eye(n)[:, ::5])))
        pieces += [product, ranks.bcast(at.dual_gram())]
        found.append([piece.tobytes() for piece in pieces])
        decomposition.destroy()
    assert found[0] == found[1]


def test_work_is_charged(comm: MPI.Comm) -> None:
    """Stored rows by the numbers that are made and those that pass by, products without rows by passes."""
    case = Case(comm, 0)
    loss, total, m = case.loss, lambda: case.objective.work.total, 61
    forward, adjoint, *_ = loss.charges.passes()
    unit = 61 * loss.charges.operations
    residual, rows = 61 * 4 * forward, 61 * (4 * (2 * forward + adjoint) + AUTOGRAD) + STORED * m * loss.size
    assert len(loss.indices) == 4
    assert total() == pytest.approx((residual + rows) / unit, rel=1e-13)

    def spent(call: Any) -> float:
        before = total()
        call()
        return (total() - before) * unit

    once = PASSED * m * loss.size
    v = torch.zeros(loss.size, dtype=torch.float64)
    assert spent(lambda: case.at.product(v)) == pytest.approx(once, rel=1e-10)
    part = (slice(0, 5), slice(10, 17))
    assert spent(lambda: case.at.product(v, part)) == pytest.approx(PASSED * m * 12, rel=1e-10)
    assert spent(lambda: case.at.transpose_product(case.at.residual, case.vec)) == pytest.approx(once, rel=1e-10)
    assert spent(lambda: case.at.residual_at(case.x)) == pytest.approx(residual, rel=1e-10)
    assert spent(lambda: case.at.diagonal(case.vec)) == pytest.approx(once, rel=1e-10)
    products = DOUBLE * 2 * m * loss.size * 7
    assert spent(lambda: case.at.gram_product(np.zeros((loss.size, 7)))) == pytest.approx(products + once, rel=1e-10)
    free = Case(comm, 0, assembled=False)
    free.objective.work.reset()
    free.at.transpose_product(free.at.product(v), free.vec)
    passes = loss.charges.jacobian() + loss.charges.transpose()
    assert free.objective.work.total == pytest.approx(passes, rel=1e-13)
    assert free.objective.work.products == 2
    free.objective.work.reset()
    free.at.diagonal(free.vec)
    assert free.objective.work.total == pytest.approx((rows + once) / unit, rel=1e-10)


def test_a_jacobian_that_does_not_fit_is_refused(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000 if "PAGES" in name else 4)
    with pytest.raises(InputError, match=r"Jacobian of .* by .* parameters takes .* times the memory of a node"):
        Case(comm, 0)
    Case(comm, 0, assembled=False)
