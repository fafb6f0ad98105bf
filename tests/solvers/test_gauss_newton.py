"""Gauss-Newton steps against dense least squares, preconditioners against their dense formulas."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.linalg.small import cholesky
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.residual import ResidualObjective
from ddml.options import preset
from ddml.parallel import cause
from ddml.problems import Burgers, PDELoss
from solvers.gauss_newton.neurons import neuron_basis
from solvers.gauss_newton.preconditioners import NormalEquations

Train = Callable[..., SimpleNamespace]
PRECONDITIONERS = ["nystrom", "schwarz", "multiplicative", "cholesky", "jacobi", "none"]


def burgers(points: int = 90, width: int = 4, depth: int = 3) -> PDELoss:
    network = TanhNetwork(2, width, depth, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, points)


def dense_step(loss: PDELoss, theta: np.ndarray, damping: float, acceleration: bool) -> np.ndarray:
    """V + a / 2 by least squares with the augmented Jacobian."""
    at = torch.as_tensor(theta)
    J, r = loss.jacobian(at).numpy(), loss.residual(at).numpy()
    augmented = np.vstack([J, np.sqrt(damping) * np.eye(J.shape[1])])

    def solve(right: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(augmented, -np.concatenate([right, np.zeros(J.shape[1])]), rcond=None)[0]

    v = solve(r)
    if not acceleration:
        return v
    there = loss.residual(torch.as_tensor(theta + 0.1 * v)).numpy()
    return v + solve(20 * ((there - r) / 0.1 - J @ v)) / 2


@pytest.mark.parametrize("acceleration", [True, False])
@pytest.mark.parametrize("jacobian", ["assembled", "free"])
@pytest.mark.parametrize("preconditioner", [*PRECONDITIONERS, "dual"])
def test_steps_are_those_of_dense_least_squares(
    train: Train, preconditioner: str, jacobian: str, acceleration: bool
) -> None:
    loss = burgers()
    settings: dict[str, Any] = {"jacobian": jacobian, "acceleration": acceleration, "damping": 0.1}
    if preconditioner == "dual":
        settings |= {"form": "dual"}
    else:
        settings |= {"form": "primal", "preconditioner": preconditioner, "gn_rank": 20}
        settings |= {"gn_ksp_rtol": 1e-13, "gn_ksp_max_it": 1000}
    dampings, following = [], []

    def watch(context: Any, iteration: int) -> None:
        dampings.append(context.equations.damping)
        following.append(context.damping)

    run = train(loss, "gauss_newton", 4, watch=watch, **settings)
    assert len(run.losses) == 5
    assert (np.diff(run.losses) < 0).all()
    for k, damping in enumerate(dampings[1:]):
        expected = dense_step(loss, run.theta[k], damping, acceleration)
        assert run.theta[k + 1] - run.theta[k] == pytest.approx(expected, abs=1e-7 * np.abs(expected).max())
        at, v = torch.as_tensor(run.theta[k]), dense_step(loss, run.theta[k], damping, False)
        J, r = loss.jacobian(at).numpy(), loss.residual(at).numpy()
        ratio = (run.losses[k] - run.losses[k + 1]) / (r @ r - (r + J @ v) @ (r + J @ v))
        factor = max(1 / 3, 1 - (2 * ratio - 1) ** 3)  # Nielsen 1999
        assert following[k + 1] == pytest.approx(damping * factor, rel=1e-5)
    first = loss.jacobian(torch.as_tensor(run.theta[0])).numpy()
    raised = dampings[1] / (0.1 * (first**2).sum(0).max())
    assert min(abs(raised - factor) for factor in (1, 2, 8, 64)) < 1e-9  # refused up to three times


def test_with_fewer_points_than_parameters_the_dual_form_is_taken(train: Train) -> None:
    forms = []
    for points in (30, 90):
        train(burgers(points), "gauss_newton", 1, watch=lambda context, iteration: forms.append(context.dual))
    assert forms == [False, True, False, False]  # before and after the first iteration


def test_a_bent_step_is_refused(train: Train) -> None:
    bends, loss = [], burgers()
    for limit in (1e9, 0.05):
        dampings: list[float] = []
        run = train(
            loss, "gauss_newton", 1, acceleration_limit=limit, damping=1e-4, preconditioner="cholesky",
            watch=lambda context, iteration, found=dampings: found.append(context.equations.damping),
        )  # fmt: skip
        v, both = (dense_step(loss, run.theta[0], dampings[1], bent) for bent in (False, True))
        bends.append(2 * np.linalg.norm(2 * (both - v)) / np.linalg.norm(v))
    assert bends[0] > 0.06
    assert bends[1] <= 0.05


@pytest.mark.ranks
@pytest.mark.parametrize("preconditioner", ["nystrom", "schwarz", "multiplicative", "cholesky", "dual"])
def test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks(train: Train, preconditioner: str) -> None:
    settings = {"form": "dual"} if preconditioner == "dual" else {"form": "primal", "preconditioner": preconditioner}
    together = train(burgers(), "gauss_newton", 5, blocks=12, gn_rank=15, **settings)
    alone = train(burgers(), "gauss_newton", 5, comm=MPI.COMM_SELF, blocks=12, gn_rank=15, **settings)
    assert together.theta.tobytes() == alone.theta.tobytes()
    assert together.losses[-1] < 0.6 * together.losses[0]


@pytest.mark.ranks
@pytest.mark.parametrize("preconditioner", ["nystrom", "schwarz", "jacobi"])
def test_without_blocks_a_run_is_the_same_to_rounding(train: Train, preconditioner: str) -> None:
    settings = {"form": "primal", "preconditioner": preconditioner, "gn_ksp_rtol": 1e-10, "gn_rank": 15}
    together = train(burgers(), "gauss_newton", 5, **settings)
    alone = train(burgers(), "gauss_newton", 5, comm=MPI.COMM_SELF, **settings)
    assert together.losses == pytest.approx(alone.losses, rel=1e-6)


@pytest.mark.parametrize("preconditioner", ["nystrom", "schwarz", "multiplicative", "cholesky", "jacobi", "dual"])
def test_a_resumed_run_goes_on_to_the_last_bit(train: Train, copied: Callable[[Any], Any], preconditioner: str) -> None:
    settings: dict[str, Any] = {"form": "dual"} if preconditioner == "dual" else {"preconditioner": preconditioner}
    settings |= {"form": "primal", "gn_rank": 30} if preconditioner != "dual" else {}
    kept: dict[str, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        if iteration == 6:
            kept.update(copied(context.state()))

    whole = train(burgers(), "gauss_newton", 12, watch=watch, **settings)
    assert (kept["preconditioner"] is not None) == (preconditioner in ("nystrom", "schwarz", "cholesky"))
    rest = train(burgers(), "gauss_newton", 12, start=whole.theta[6], state=kept, **settings)
    assert rest.losses.tobytes() == whole.losses[7:].tobytes()


@pytest.mark.parametrize(
    ("then", "now"), [("nystrom", "schwarz"), ("schwarz", "nystrom"), ("schwarz", "cholesky"), ("nystrom", "jacobi")]
)
def test_a_run_may_go_on_with_another_preconditioner(
    train: Train, copied: Callable[[Any], Any], then: str, now: str
) -> None:
    kept: dict[str, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        kept.update(copied(context.state()))

    first = train(burgers(), "gauss_newton", 4, form="primal", preconditioner=then, watch=watch)
    assert kept["preconditioner"] is not None
    rest = train(
        burgers(), "gauss_newton", 8, form="primal", preconditioner=now, start=first.theta[4], state=kept
    )  # fmt: skip
    assert len(rest.losses) == 4
    assert rest.losses[-1] < first.losses[-1]


class Systems:
    """A preconditioner of the Gauss-Newton matrix at the initial point, as a matrix."""

    def __init__(self, comm: MPI.Comm, prefix: str, blocks: int = 0, **settings: Any) -> None:
        self.loss = loss = burgers(width=5)
        layout = ParameterLayout(loss.parameters, comm)
        self.objective = ResidualObjective(loss, layout, blocks=blocks)
        self.x, self.y = layout.vector(), layout.vector()
        self.objective.initial(self.x)
        self.equations = NormalEquations(self.objective)
        self.equations.move(Linearisation(self.objective, self.x, True))
        self.equations.damping = 1e-3
        self.matrix = self.equations.matrix()
        self.ksp = PETSc.KSP().create(comm)
        self.ksp.setOptionsPrefix(prefix)
        self.ksp.setOperators(self.matrix)
        with preset(**{prefix + "pc_type": "python", **{prefix + k: v for k, v in settings.items()}}):
            self.ksp.setFromOptions()
        self.J = loss.jacobian(loss.initial()).numpy()
        self.theta = loss.initial().numpy()

    def inverse(self) -> np.ndarray:
        """M^-1, column by column."""
        self.ksp.setUp()
        columns = []
        for i in range(self.loss.size):
            self.x.set(0.0)
            if self.x.getOwnershipRange()[0] <= i < self.x.getOwnershipRange()[1]:
                self.x.setValue(i, 1.0)
            self.x.assemble()
            self.ksp.pc.apply(self.x, self.y)
            columns.append(self.objective.layout.gather(self.y).numpy().copy())
        return np.array(columns).T

    def dense(self, damping: float = 1e-3) -> np.ndarray:
        return self.J.T @ self.J + damping * np.eye(self.loss.size)

    def restrictions(self, windows: bool = True) -> list[np.ndarray]:
        """R_s of two neighbouring layers, or of all."""
        offsets = [self.loss.parameters[layer[0]].offset for layer in self.loss.layers] + [self.loss.size]
        eye = np.eye(self.loss.size)
        return [eye[a:b] for a, b in zip(offsets, offsets[2:], strict=False)] if windows else [eye]


SCHWARZ = {"pc_python_type": "solvers.SchwarzPC"}


def one_level(systems: Systems, A: np.ndarray) -> np.ndarray:
    return sum(R.T @ np.linalg.solve(R @ A @ R.T, R) for R in systems.restrictions())


def swept(systems: Systems, A: np.ndarray) -> np.ndarray:
    n, restrictions = len(A), systems.restrictions()
    error = np.eye(n)
    for R in (*restrictions, *reversed(restrictions[:-1])):
        error = (np.eye(n) - R.T @ np.linalg.solve(R @ A @ R.T, R @ A)) @ error
    return (np.eye(n) - error) @ np.linalg.inv(A)


def balanced(systems: Systems, A: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """With a coarse space of neurons, written out neuron by neuron."""
    columns = []
    for p in systems.loss.parameters:
        entries = np.arange(p.offset, p.offset + p.size)
        for neuron in entries.reshape(p.shape[0], -1):
            column = np.zeros(len(A))
            column[neuron] = systems.theta[neuron] if len(p.shape) > 1 else 1.0
            columns.append(column)
    Z = np.array(columns).T
    Q, one = Z @ np.linalg.solve(Z.T @ A @ Z, Z.T), np.eye(len(A))
    return Q + (one - Q @ A) @ inner @ (one - A @ Q)


@pytest.mark.parametrize("sweep", ["additive", "multiplicative"])
@pytest.mark.parametrize("coarse", ["neurons", "none"])
@pytest.mark.parametrize("blocks", [0, 5])
def test_schwarz_is_its_dense_formula(comm: MPI.Comm, prefix: str, sweep: str, coarse: str, blocks: int) -> None:
    systems = Systems(comm, prefix, blocks, **SCHWARZ, sweep=sweep, coarse=coarse)
    found, A = systems.inverse(), systems.dense()
    expected = (one_level if sweep == "additive" else swept)(systems, A)
    if coarse == "neurons":
        expected = balanced(systems, A, expected)
    assert found == pytest.approx(expected, abs=1e-6 * np.abs(expected).max())
    assert np.abs(found - found.T).max() < 1e-6 * np.abs(found).max()
    assert np.linalg.eigvalsh(found + found.T)[0] > 0


@pytest.mark.parametrize(
    ("matrix", "damping"),
    [
        (np.zeros((4, 4)), 0.0),
        (np.zeros((4, 4)), 1e-3),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), 0.0),
        (np.array([[1.0, 1.0], [1.0, 1.0]]), 0.0),
        (np.full((2, 2), 1e-310), 0.0),
        (-np.eye(3), 0.0),
        (np.diag([1.0, 2.0, 3.0]), 0.0),
    ],
)
def test_any_finite_matrix_has_a_factor(matrix: np.ndarray, damping: float) -> None:
    """L L^T is the matrix, and where it is not definite also a multiple of I."""
    factor = cholesky(matrix, damping)
    assert np.isfinite(factor).all()
    assert (np.diagonal(factor) > 0).all()
    rest = np.tril(factor) @ np.tril(factor).T - matrix
    assert np.abs(rest - rest[0, 0] * np.eye(len(rest))).max() <= 1e-14 * max(np.abs(matrix).max(), rest[0, 0])
    assert rest[0, 0] >= damping * (1 - 1e-14)


def test_one_subdomain_is_a_cholesky_factorisation(comm: MPI.Comm, prefix: str) -> None:
    systems = Systems(comm, prefix, **SCHWARZ, coarse="none", decomposition="layers", subdomains=1)
    expected = np.linalg.inv(systems.dense())
    assert systems.inverse() == pytest.approx(expected, abs=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("rank", [10, 30, 1000])
def test_nystrom_is_its_dense_formula(comm: MPI.Comm, prefix: str, rank: int) -> None:
    systems = Systems(comm, prefix, pc_python_type="solvers.NystromPC", rank=rank)
    found, n = systems.inverse(), systems.loss.size
    test = np.linalg.qr(np.random.default_rng(0).standard_normal((n, min(rank, n))))[0]
    # A T (T^T A T)^-1 T^T A of A = J^T J is J^T P J with P the projector on the range of J T
    _, singular, rows = np.linalg.svd(np.linalg.qr(systems.J @ test)[0].T @ systems.J)
    values, vectors = np.concatenate([singular**2, np.zeros(n)])[:n], rows.T
    values, vectors = values[: min(rank, n)], vectors[:, : min(rank, n)]
    inner = vectors * ((values[-1] + 1e-3) / (values + 1e-3) - 1)
    expected = np.eye(n) + inner @ vectors.T
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.linalg.eigvalsh(found + found.T)[0] > 0


@pytest.mark.parametrize("kind", [{"pc_python_type": "solvers.NystromPC", "rank": 20}, SCHWARZ])
def test_a_preconditioner_that_is_kept_stays_positive_definite(
    comm: MPI.Comm, prefix: str, kind: dict[str, Any]
) -> None:
    systems = Systems(comm, prefix, **kind)
    before = systems.inverse()
    context = systems.ksp.pc.getPythonContext()
    assert context.keeps
    systems.ksp.pc.setReusePreconditioner(True)
    systems.equations.damping = 1e-6
    systems.matrix.assemble()
    context.damp(1e-6)
    after = systems.inverse()
    assert np.abs(before - after).max() > 1e-3 * np.abs(before).max()
    assert np.linalg.eigvalsh(after + after.T)[0] > 0
    assert np.abs(after - after.T).max() < 1e-5 * np.abs(after).max()


def test_iterations_fall_with_better_preconditioners(comm: MPI.Comm, prefix: str) -> None:
    """In the order of the published experience: diagonal, overlap, with the coarse space, with all of it."""
    counts = []
    kinds: list[dict[str, Any]] = [
        {"pc_type": "jacobi"},
        {**SCHWARZ, "coarse": "none"},
        {**SCHWARZ},
        {**SCHWARZ, "sweep": "multiplicative"},
    ]
    for number, kind in enumerate(kinds):
        name = f"{prefix}{number}_"
        systems = Systems(comm, name, **kind)
        systems.equations.damping = 1e-8
        systems.ksp.setType("cg")
        systems.ksp.setTolerances(rtol=1e-8, max_it=5000)
        systems.x.set(1.0)
        right = systems.x.duplicate()
        systems.matrix.mult(systems.x, right)
        systems.ksp.solve(right, systems.y)
        counts.append(systems.ksp.getIterationNumber())
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3 * counts[2]


def test_the_coarse_space_is_orthonormal_even_where_weights_vanish() -> None:
    loss = burgers()
    theta = loss.initial().numpy().copy()
    theta[loss.parameters[2].range] = 0
    basis = neuron_basis(loss, theta)
    assert basis.shape == (loss.size, sum(p.shape[0] for p in loss.parameters))
    assert (basis.T @ basis).toarray() == pytest.approx(np.eye(basis.shape[1]), abs=1e-14)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preconditioner": "amg"}, "-.*preconditioner must be one of nystrom, schwarz"),
        ({"preconditioner": "schwarz", "gn_decomposition": "layers", "gn_subdomains": 9}, "subdomains must be 1 to 3"),
        ({"preconditioner": "schwarz", "gn_window": 7}, "a window must hold 1 to 3"),
        ({"preconditioner": "schwarz", "gn_sweep": "back"}, "sweep must be one of additive, multiplicative"),
        ({"gn_rank": 0}, "rank must be 1 or more"),
        ({"damping": 0}, "damping must be more than 0"),
    ],
)
def test_bad_options_are_refused(train: Train, settings: dict[str, Any], words: str) -> None:
    with pytest.raises((InputError, PETSc.Error)) as error:
        train(burgers(), "gauss_newton", 1, form="primal", **settings)
    found = cause(error.value, InputError)
    assert re.search(words, str(found))


def test_other_losses_are_refused(train: Train, least_squares: Callable[..., Loss]) -> None:
    with pytest.raises(InputError, match="needs a loss that is a sum of squared residuals"):
        train(least_squares([3, 4]), "gauss_newton", 1)


@pytest.mark.parametrize(("settings", "expected"), [({}, "windows"), ({"gn_subdomains": 2}, "layers")])
def test_a_number_of_subdomains_alone_is_of_layers(train: Train, settings: dict[str, Any], expected: str) -> None:
    loss, seen = burgers(), []
    layers = len(loss.layers)
    chosen = Subdomains.windows(loss, min(2, layers)) if expected == "windows" else Subdomains.by_layers(loss, 2)

    def watch(context: Any, iteration: int) -> None:
        if iteration:
            seen.append(context.preconditioner.decomposition.subdomains.ranges)

    train(loss, "gauss_newton", 1, watch=watch, form="primal", preconditioner="schwarz", **settings)
    assert seen == [chosen.ranges]
