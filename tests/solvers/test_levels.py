"""Cycles over levels with trust regions, line searches and the cascade: on quadratics and on networks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_newton import linear_loss, squares
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import nn

from ddml.errors import InputError
from ddml.hierarchy.hierarchy import Hierarchy, Level, Transfer
from ddml.layout import ParameterLayout
from ddml.losses.module import ModuleLoss
from ddml.networks.euler import euler
from ddml.objectives.objective import Objective
from solvers import MGOPT, RMTR, Minimisation

Train = Callable[..., SimpleNamespace]
Array = NDArray[np.float64]

# Quadratics: a Laplacian on 31 points, and its Galerkin projection to 15 --------------------------------------------

FINE, COARSE = 31, 15
X = np.eye(FINE + 1, FINE) - np.eye(FINE + 1, FINE, -1)
y = np.random.default_rng(0).standard_normal(FINE + 1)
PROLONGATION = np.zeros((FINE, COARSE))
for _j in range(COARSE):
    PROLONGATION[2 * _j : 2 * _j + 3, _j] = 0.5, 1.0, 0.5
SOLUTION = np.linalg.lstsq(X, y, rcond=None)[0]
STRETCH = float(np.linalg.norm(PROLONGATION, 2))


def matrix(values: Array, rows: ParameterLayout, columns: ParameterLayout) -> PETSc.Mat:
    """A dense matrix by its rows."""
    rank = rows.comm.rank
    local = values[rows.ranges[rank] : rows.ranges[rank + 1]]
    sizes = ((len(local), rows.size), (int(columns.counts[rank]), columns.size))
    made = PETSc.Mat().createAIJ(sizes, nnz=columns.size, comm=rows.comm)
    for i, row in enumerate(local):
        made.setValues(rows.ranges[rank] + i, range(columns.size), row)
    made.assemble()
    return made


def flipped(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Minus the squares: a coarse model that is wrong."""
    return -squares(outputs, targets)


class MatrixTransfer(Transfer):
    """By PETSc matrices, which are this object's from then on.

    Parameters
    ----------
    prolongation
        I (n of the fine level, n of the coarse one).
    projection
        P (n of the coarse level, n of the fine one).
    stretch
        The largest singular value of I.
    """

    def __init__(self, prolongation: PETSc.Mat, projection: PETSc.Mat, stretch: float = 1.0) -> None:
        self.prolongation, self.projection, self.stretch = prolongation, projection, stretch

    def prolong(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """See :meth:`Transfer.prolong`."""
        self.prolongation.mult(coarse, fine)

    def restrict(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`Transfer.restrict`."""
        self.prolongation.multTranspose(fine, coarse)

    def project(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`Transfer.project`."""
        self.projection.mult(fine, coarse)

    def destroy(self) -> None:
        """See :meth:`Transfer.destroy`."""
        self.prolongation.destroy()
        self.projection.destroy()


def two_grids(kind: type[Any], criterion: Any = squares) -> Any:
    """A solver on the two quadratics."""

    class TwoGrids(kind):  # type: ignore[misc]
        def make_hierarchy(self, objective: Objective) -> Hierarchy:
            loss = linear_loss(X @ PROLONGATION, y, np.zeros(COARSE), criterion)
            coarse = Objective(loss, ParameterLayout(loss.parameters, objective.comm), objective.stop)
            projection = np.linalg.solve(PROLONGATION.T @ PROLONGATION, PROLONGATION.T)
            fine = objective.layout
            transfer = MatrixTransfer(
                matrix(PROLONGATION, fine, coarse.layout), matrix(projection, coarse.layout, fine), STRETCH
            )
            return Hierarchy([Level(coarse, "15 points", 0.5), Level(objective, "31 points", 1.0)], [transfer])

    return TwoGrids()


@pytest.mark.parametrize("kind", [RMTR, MGOPT])
@pytest.mark.parametrize("model", ["sr1", "lbfgs"])
@pytest.mark.parametrize("start", [0, 1])
def test_two_grids_come_to_the_solution_of_a_quadratic(train: Train, kind: type[Any], model: str, start: int) -> None:
    begin = 100.0 * np.random.default_rng(start).standard_normal(FINE)
    run = train(linear_loss(X, y, begin, squares), two_grids(kind), 60, model=model, cascade=False, delta0=1.0)
    assert np.abs(run.theta[-1] - SOLUTION).max() <= 1e-4
    assert (np.diff(run.losses) <= 1e-12 * run.losses[0]).all()


@pytest.mark.parametrize("kind", [RMTR, MGOPT])
def test_a_coarse_model_of_the_wrong_sign_is_seen(train: Train, kind: type[Any]) -> None:
    """Corrections are refused, cycling stops, and the run converges all the same."""
    seen = SimpleNamespace(tried=0, refused=0)

    def watch(context: Any, iteration: int) -> None:
        seen.tried, seen.refused = context.cycle.tried, context.cycle.refused

    begin = 10.0 * np.random.default_rng(5).standard_normal(FINE)
    settings = {"cascade": False, "delta0": 1.0, "model": "lbfgs"}
    run = train(linear_loss(X, y, begin, squares), two_grids(kind, flipped), 120, watch=watch, **settings)
    assert np.abs(run.theta[-1] - SOLUTION).max() <= 1e-4
    assert (np.diff(run.losses) <= 1e-12 * run.losses[0]).all()
    if kind is RMTR:
        assert seen.refused > 0.1 * seen.tried > 0 and seen.tried < 60


def test_the_correction_stays_in_its_ball(train: Train) -> None:
    """The norm of a prolonged correction is at most the radius of corrections before it."""
    moves: list[tuple[float, float]] = []

    def watch(context: Any, iteration: int) -> None:
        coarse = context.levels[0]
        if iteration:
            moved = coarse.x.copy()
            moved.axpy(-1.0, coarse.start)
            whole = np.concatenate(moved.comm.tompi4py().allgather(moved.array_r))
            moves.append((float(np.linalg.norm(PROLONGATION @ whole)), before[-1]))
            moved.destroy()
        before.append(context.cycle.acceptance.radii[1].value)

    before: list[float] = []
    settings = {"cascade": False, "delta0": 0.05, "pre_steps": 0, "post_steps": 0}
    train(linear_loss(X, y, np.zeros(FINE), squares), two_grids(RMTR), 12, watch=watch, **settings)
    assert len(moves) >= 5 and any(size > 0 for size, _ in moves)
    assert all(size <= radius * (1 + 1e-10) for size, radius in moves)


# Networks -------------------------------------------------------------------------------------------------------------


def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def network_loss(blocks: int = 8) -> ModuleLoss:
    """Three classes of points of a plane on an Euler network."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 2, dtype=torch.float64)
    angles = torch.atan2(inputs[:, 0], inputs[:, 1])
    module = euler((2,), 3, blocks=blocks, width=5, horizon=2.0).double()
    return ModuleLoss(module, criterion, inputs, ((angles + 4) // 2.1).long().clamp(0, 2))


def image_loss() -> ModuleLoss:
    """Two classes of noisy images, 8 x 8 pixels on the finest level and 4 x 4 on all others."""
    torch.manual_seed(0)
    targets = torch.arange(40) % 2
    inputs = torch.randn(2, 1, 8, 8, dtype=torch.float64)[targets] + torch.randn(40, 1, 8, 8, dtype=torch.float64)
    return ModuleLoss(euler((1, 8, 8), 2, 8, 4, 2.0, 2).double(), criterion, inputs, targets)


def test_with_one_level_it_is_the_trust_region_method_to_the_last_bit(train: Train) -> None:
    expected = train(network_loss(), "tr", 12, model="sr1")
    run = train(network_loss(), "rmtr", 12, levels=1)
    assert (run.theta == expected.theta).all() and (run.losses == expected.losses).all()
    assert run.total == pytest.approx(expected.total)


# cycles, and settings
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "rmtr": (15, {"levels": 3, "cascade_work": 1.0, "coarse_steps": 4}),
    "rmtr, shared radius, W": (6, {"levels": 3, "cascade": False, "correction_radius": "shared", "cycle": "W"}),
    "rmtr, F, modular norm": (6, {"levels": 3, "cascade": False, "cycle": "F", "model": "first"}),
    "mgopt": (6, {"levels": 3, "cascade": False, "coarse_steps": 4}),
    "mgopt, smoothing by L-BFGS": (6, {"levels": 2, "cascade": False, "smoother": "lbfgs", "coarse_steps": 4}),
    "mladagrad": (6, {"levels": 3, "coarse_steps": 3}),
    "mladagrad, W, smoothing behind": (5, {"levels": 3, "cycle": "W", "coarse_steps": 2, "post_steps": 1}),
    "mladagrad, cascade": (15, {"levels": 3, "cascade": True, "cascade_work": 1.0}),
    "cascade": (15, {"cascade_work": "1,0,1"}),
    "rmtr, images": (12, {"levels": 3, "cascade_work": 1.0, "coarse_steps": 4}),
    "mgopt, images": (6, {"levels": 2, "cascade": False, "coarse_steps": 4}),
    "mladagrad, images": (6, {"levels": 3, "coarse_steps": 3}),
    "cascade, images, modular norm": (12, {"cascade_work": 1.0, "model": "first"}),
    "cascade, first order": (12, {"cascade_work": 1.0, "model": "first"}),
    "cascade by SSBroyden": (12, {"cascade_work": 1.0, "smoother": "ssbroyden"}),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly(train: Train, copied: Any, case: str) -> None:
    """Also from within the cascade, and where it goes on to the next level."""
    solver, (length, settings) = case.split(",")[0].split()[0], CASES[case]
    make = image_loss if "images" in case else network_loss
    states: dict[int, Any] = {}

    def keep(context: Any, iteration: int) -> None:
        if iteration in (2, length - 2)[MPI.COMM_WORLD.size > 1 :]:  # of the first on ranks: test_pinn_levels.py
            states[iteration] = copied(context.state())

    run = train(make(), solver, length, blocks=4, watch=keep, **settings)
    if MPI.COMM_WORLD.size > 1:
        alone = train(make(), solver, length, MPI.COMM_SELF, blocks=4, **settings)
        assert (run.theta == alone.theta).all() and (run.losses == alone.losses).all()
    for iteration, state in states.items():
        again = train(make(), solver, length, blocks=4, start=run.theta[iteration], state=state, **settings)
        assert (again.theta[-1] == run.theta[-1]).all() and again.losses[-1] == run.losses[-1]
    assert run.losses[-1] < 0.8 * run.losses[0]


@pytest.mark.parametrize("smoother", ["aspqn", "mspqn", "apts_weights", "gradient", "newton", "lmvm", "bntr"])
def test_any_solver_smooths(train: Train, smoother: str) -> None:
    settings: dict[str, Any] = {"levels": 2, "cascade": False, "smoother": smoother, "coarse_steps": 2}
    if smoother in ("aspqn", "mspqn"):
        settings |= {"smooth_local_steps": 2, "coarse_local_steps": 2}
    for solver in ("rmtr", "mgopt"):
        run = train(network_loss(4), solver, 3, **settings)
        assert (np.diff(run.losses) <= 1e-12).all() and run.losses[-1] < 0.9 * run.losses[0]


def test_the_levels_share_the_work(train: Train) -> None:
    """What the levels have spent adds up to the work, and coarse gradients cost their share."""
    seen: list[tuple[list[float], float]] = []

    def watch(context: Any, iteration: int) -> None:
        seen.append((list(context.spent), context.objective.work.total))

    train(network_loss(), "mgopt", 10, watch=watch, levels=3, cascade=False)
    for spent, total in seen:
        assert sum(spent) == pytest.approx(total)
    made = network_loss()
    one = network_loss(2)
    share = one.charges.operations / made.charges.operations
    coarse = np.diff([spent[0] for spent, _ in seen])
    cycles = coarse[coarse > 0]
    assert len(cycles) >= 3
    assert cycles == pytest.approx(11 * share)  # where it begins, and ten steps


@pytest.mark.parametrize("solver", ["rmtr", "mgopt"])
def test_cycles_begin_when_the_radius_has_found_its_size(train: Train, solver: str) -> None:
    """Before that steps are those of the undivided network; the coarse level then begins with its radius."""
    seen: list[tuple[float, float, float]] = []

    def watch(context: Any, iteration: int) -> None:
        seen.append((context.spent[0], context.top.radius, context.levels[0].radius))

    settings = {"model": "lbfgs", "norm": "2", "delta0": 0.1}
    run = train(network_loss(), solver, 10, watch=watch, levels=2, cascade=False, **settings)
    cycling = next(i for i, row in enumerate(seen) if row[0] > 0)
    alone = train(network_loss(), "tr", 10, **settings)
    assert cycling >= 4
    assert (run.theta[:cycling] == alone.theta[:cycling]).all()
    grown = [row[1] for row in seen[: cycling - 1]]
    assert grown[1:] == pytest.approx([0.1 * 2**k for k in range(1, cycling - 1)])
    assert seen[cycling - 1][1] <= grown[-1]
    assert seen[cycling][2] >= grown[-1] / 16 > 0.1 / 2  # not the first radius


@pytest.mark.parametrize(
    ("solver", "settings", "said"),
    [
        ("rmtr", {"levels": 5}, "a depth of 1 is not divisible by 2"),
        ("mgopt", {"levels": 2, "refinement": 3}, "a depth of 8 is not divisible by 3"),
        ("cascade", {"levels": 0}, "levels must be 1"),
        ("rmtr", {"cascade_work": "0,1"}, "cascade_work must be numbers of 0 or more"),
        ("cascade", {"cascade_work": "2,x"}, "cascade_work must be numbers of 0 or more"),
        ("rmtr", {"model": "first", "norm": "infinity", "smoother": "nothing"}, "nothing"),
        ("rmtr", {"coarse_solver": "gauss_newton"}, "residual"),
    ],
)
def test_bad_options_are_refused(comm: MPI.Comm, solver: str, settings: dict[str, Any], said: str) -> None:
    database = PETSc.Options()
    for key, value in settings.items():
        database.setValue(f"bad_{key}", value)
    try:
        with pytest.raises((InputError, PETSc.Error), match=said):
            Minimisation(network_loss(), solver, comm, "bad_").tao.solve()
    finally:
        for key in settings:
            database.delValue(f"bad_{key}")
