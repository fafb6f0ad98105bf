"""Points that move: where they go, the same on any number of ranks, for every solver, and through a restart."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc
from whole_runs import Training, assert_goes_on

from ddml.layout import ParameterLayout
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.residual import ResidualObjective
from ddml.problems import Burgers, Interior, PDELoss, Points, Term
from ddml.problems.pde.charges import AUTOGRAD
from ddml.problems.pde.collocation import OPTIONS, FreshLoss, MovingPoints, residual_size, sobol
from ddml.problems.pde.spikes import RAISE, cut, tiers


class BurgersWithData(Burgers):
    """An interior term that moves and measurements that stay."""

    def terms(self) -> list[Term]:
        places = np.array([[0.5, 0.1], [0.25, -0.5], [0.75, 0.5]])
        return [
            Term(self.residual, Interior()),
            Term(lambda u, t, x, value: u - value, Points(places, value=places[:, 0])),
        ]


def made(
    comm: MPI.Comm, kind: str = "residual", blocks: int = 0, problem: Any = Burgers, points: int = 120, **settings: Any
) -> MovingPoints:
    network = TanhNetwork(2, 6, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(problem(), network, points)
    layout = ParameterLayout(loss.parameters, comm)
    values = {o.name: o.default for o in OPTIONS} | {"resample": kind, "resample_interval": 4} | settings
    return MovingPoints(ResidualObjective(loss, layout, blocks=blocks), SimpleNamespace(**values), seed=3)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["sobol", "residual"])
def test_points_and_losses_do_not_depend_on_the_number_of_ranks(comm: MPI.Comm, kind: str) -> None:
    values = []
    for ranks in (comm, MPI.COMM_SELF):
        moving = made(ranks, kind, problem=BurgersWithData)
        before = moving.objective.loss.sets
        for _ in range(2):
            moving.move(moving.objective.loss.initial())
        assert moving.objective.version == 2
        after = moving.objective.loss.sets
        assert torch.equal(before[1].coordinates, after[1].coordinates)
        assert after[0].scale == before[0].scale
        x = moving.objective.layout.vector()
        moving.objective.initial(x)
        values.append((moving.points[0], moving.objective.value(x)))
        x.destroy()
    assert np.array_equal(values[0][0], values[1][0])
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-12)
    points = values[0][0]
    assert points.shape == (120, 2)
    assert len(np.unique(points, axis=0)) == 120
    assert (points >= [0, -1]).all()
    assert (points <= [1, 1]).all()


def test_every_draw_is_another_one(comm: MPI.Comm) -> None:
    moving = made(comm)
    draws = []
    for _ in range(3):
        moving.move(moving.objective.loss.initial())
        draws.append(moving.points[0])
    assert not np.isin(draws[0], draws[1]).all(axis=1).any()
    assert not np.isin(draws[1], draws[2]).all(axis=1).any()
    other = made(comm)
    other.move(other.objective.loss.initial())
    assert np.array_equal(other.points[0], draws[0])


def test_points_go_where_the_residual_is_large(comm: MPI.Comm) -> None:
    """With c = 0 and a residual of |t - 1/2|, the density is that: twice the mass beyond a quarter."""

    class Slope(Burgers):
        def residual(self, u: Any, t: Any, x: Any) -> Any:
            return 0 * u + t - 0.5

    shares = []
    for power in (0.0, 1.0, 2.0):
        moving = made(comm, problem=Slope, resample_constant=0.0, resample_power=power, resample_candidates=50)
        moving.move(moving.objective.loss.initial())
        shares.append(float(np.mean(np.abs(moving.points[0][:, 0] - 0.5) > 0.25)))
    assert shares == pytest.approx([1 / 2, 3 / 4, 7 / 8], abs=0.12)
    assert shares[0] < shares[1] < shares[2]


def test_residuals_that_are_not_finite_do_not_stop_the_draw(comm: MPI.Comm) -> None:
    moving = made(comm)
    theta = moving.objective.loss.initial()
    moving.move(torch.full_like(theta, float("nan")))
    assert np.isfinite(moving.points[0]).all()


def test_residuals_of_zero_do_not_stop_the_draw(comm: MPI.Comm) -> None:
    class Corner(Burgers):
        def residual(self, u: Any, t: Any, x: Any) -> Any:
            return 0 * u + torch.where((t > 0.9) & (x > 0.5), 1.0, 0.0)

    moving = made(comm, problem=Corner, resample_constant=0.0)
    moving.move(moving.objective.loss.initial())
    assert moving.points[0].shape == (120, 2)
    assert np.mean((moving.points[0] > [0.9, 0.5]).all(axis=1)) > 0.05  # all candidates there


class Spike(Burgers):
    """A residual of 1e-3, and of 1e4 in a small part of the domain."""

    def residual(self, u: Any, t: Any, x: Any) -> Any:
        return 0 * u + torch.where((t - 0.5) ** 2 + (x - 0.25) ** 2 < 4e-4, 1e4, 1e-3)


@pytest.mark.ranks
def test_spikes_raise_the_loss_a_thousandfold_and_no_more(comm: MPI.Comm) -> None:
    moving = made(comm, problem=Spike, points=2000)
    theta = moving.objective.loss.initial()
    moving.move(theta)
    loss, (many, few) = moving.objective.loss, moving.tiers[0]
    assert many == (2000 - few.number, 1.0)
    assert 1 <= few.number <= 50
    values = residual_size(loss, 0, moving.points[0], theta)
    assert values == pytest.approx([1e-3] * many.number + [1e4] * few.number)
    assert RAISE / 10 < loss.value(theta) / 1e-6 < 1.01 * RAISE
    expected = (many.number * 1e-6 + few.number * few.weight * 1e8) / 2000
    gradient = torch.zeros(loss.size, dtype=torch.float64)
    assert loss.value_gradient(theta, gradient) == pytest.approx(expected, rel=1e-6)
    assert loss.part(0, 1000).value(theta) == pytest.approx(1e-6 / 2, rel=1e-6)
    some = loss.sampled(torch.cat([torch.arange(100), torch.tensor([1999])]))
    assert some.value(theta) == pytest.approx((100 * 1e-6 + few.weight * 1e8) / 101, rel=1e-6)


@pytest.mark.ranks
def test_what_points_weigh_comes_back_with_them(comm: MPI.Comm) -> None:
    """States of an older ddml have points only, which all weigh the same."""
    moving, other = (made(comm, problem=Spike, points=2000) for _ in range(2))
    theta = moving.objective.loss.initial()
    moving.move(theta)
    other.restore(moving.state())
    assert other.objective.loss.value(theta) == moving.objective.loss.value(theta)
    other.restore({key: value for key, value in moving.state().items() if key != "tiers"})
    assert other.objective.loss.value(theta) > 1e6 * moving.objective.loss.value(theta)


@pytest.mark.parametrize("power", [0.0, 2.0, 8.0, 20.0])
def test_residuals_are_cut_off_at_a_mean(power: float) -> None:
    squares = np.random.default_rng(0).uniform(0, 1, 500) ** power * 10.0**power
    limit = 1e3
    height = cut(squares, limit)
    if squares.mean() <= limit:
        assert height == np.inf
    else:
        assert np.minimum(squares, height).mean() == pytest.approx(limit)


@pytest.mark.parametrize(
    ("large", "many", "expected"),
    [
        (1e4, 100, {1.0, 1e-3}), (1e6, 100, {1.0, 1e-7}), (10.0, 100, {1.0}), (1e4, 4000, {1.0}), (1e4, 0, {1.0}),
        (float("inf"), 5, {1.0}), (float("nan"), 5, {1.0}),
    ],
)  # fmt: skip
def test_what_weighs_less(large: float, many: int, expected: set[float]) -> None:
    """Residuals far beyond those of 95 %; what more points have is no spike."""
    sizes = np.ones(10_000)
    sizes[np.random.default_rng(0).choice(10_000, many, replace=False)] = large
    order, found = tiers(sizes[:2000] ** 2, sizes**2)
    assert {tier.weight for tier in found} == expected
    assert sum(tier.number for tier in found) == 2000
    assert np.array_equal(np.sort(order), np.arange(2000))
    if len(found) == 2:
        assert (sizes[:2000][order][: found[0].number] == 1).all()


def test_where_most_residuals_are_zero_all_points_weigh_the_same() -> None:
    sizes = np.zeros(1000)
    sizes[:20] = 1.0
    assert [tier.weight for tier in tiers(sizes, sizes)[1]] == [1.0]


def test_the_residual_without_gradients_is_that_of_the_differentiable_path(comm: MPI.Comm) -> None:
    loss = made(comm, problem=BurgersWithData).objective.loss
    theta = loss.initial()
    expected = torch.cat([r.detach() for r in loss.residuals(theta)])
    assert torch.allclose(loss.residual(theta), expected, rtol=1e-11, atol=1e-13)
    points = sobol(17, loss.problem.bounds, 1)
    alone = loss.with_points({0: points})
    first = torch.cat([r.detach() for r in alone.residuals(theta)])[:17]
    assert residual_size(loss, 0, points, theta) == pytest.approx(np.abs(first.numpy()) * 17**0.5, rel=1e-11)


def test_candidates_are_charged_as_losses(comm: MPI.Comm) -> None:
    """And for what torch makes of points; points of Sobol's sequence take no evaluation."""
    moving = made(comm)
    loss, work = moving.loss, moving.objective.work
    moving.move(loss.initial())
    expected = 5 * 120 * (4 * loss.charges.passes().forward + 2 * AUTOGRAD)
    assert len(loss.indices) == 4
    assert work.total == pytest.approx(expected / (120 * loss.charges.operations), rel=1e-13)
    blind = made(comm, "sobol")
    blind.move(loss.initial())
    assert blind.objective.work.total == 0


@pytest.mark.ranks
def test_the_loss_on_other_points(comm: MPI.Comm) -> None:
    loss = made(comm, problem=BurgersWithData).objective.loss
    theta = loss.initial()
    fresh = [FreshLoss(loss, ranks, 90, 5)(theta)["test_loss"] for ranks in (comm, MPI.COMM_SELF)]
    assert fresh[0] == pytest.approx(fresh[1], rel=1e-12)
    for blocks in (1, 4, 7, 200):  # the last: more than there are points
        same = [FreshLoss(loss, ranks, 90, 5, blocks)(theta)["test_loss"] for ranks in (comm, MPI.COMM_SELF)]
        assert same[0] == same[1]
        assert same[0] == pytest.approx(fresh[0], rel=1e-12)
    assert fresh[0] == pytest.approx(loss.with_points({0: sobol(90, loss.problem.bounds, 5)}).value(theta), rel=1e-12)
    assert fresh[0] != loss.value(theta)


def trained(comm: MPI.Comm, prefix: str, solver: str, **limits: Any) -> Training:
    return Training(made(comm, blocks=4), prefix, solver.split()[0], **limits)


SOLVERS = ["ssbroyden", "gauss_newton", "lbfgs", "aspqn", "mspqn", "mspqn_dense", "mspqn_dense in colours"]


@pytest.fixture
def local_steps(prefix: str) -> Callable[[str], None]:
    def choose(solver: str) -> None:
        if solver.endswith("colours"):
            PETSc.Options().setValue(prefix + "side_by_side", 0)
        if "spqn" in solver:
            PETSc.Options().setValue(prefix + "local_steps", 2)
            PETSc.Options().setValue(prefix + "secant", "half")

    return choose


@pytest.mark.ranks
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_follows_the_points_and_restarts_exactly(
    comm: MPI.Comm, prefix: str, shared_tmp: Path, solver: str, local_steps: Callable[[str], None]
) -> None:
    local_steps(solver)

    def made(comm: MPI.Comm, max_it: int, **limits: Any) -> Training:
        run = trained(comm, prefix, solver, max_it=max_it, **limits)
        if max_it == 9:
            assert run.moving.draws == 2
            x = run.objective.layout.vector()
            run.x.copy(x)
            value = run.objective.value(x)
            assert run.run.history.last("loss") == pytest.approx(value, rel=1e-12)  # of the points that are there now
            x.destroy()
        return run

    # between two draws, behind one, at one
    assert_goes_on(made, comm, str(shared_tmp / "run.h5"), 9, [3, 6, 4])


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["ssbroyden", "mspqn_dense", "mspqn_dense in colours"])
def test_matrices_restart_on_another_number_of_ranks(
    comm: MPI.Comm, prefix: str, shared_tmp: Path, solver: str, local_steps: Callable[[str], None]
) -> None:
    local_steps(solver)
    expected = on_one_rank(lambda one: trained(one, prefix, solver, max_it=7).result())
    mine, ours = str(shared_tmp / "mine.h5"), str(shared_tmp / "run.h5")
    on_one_rank(lambda one: trained(one, prefix, solver, max_it=5, output=mine).result())
    trained(comm, prefix, solver, max_it=5, output=ours).result()
    from_one = trained(comm, prefix, solver, max_it=7, restart=mine, output=ours, overwrite=True)
    assert from_one.result() == expected
    trained(comm, prefix, solver, max_it=5, output=ours, overwrite=True).result()
    settings = {"restart": ours, "output": mine, "overwrite": True}
    assert on_one_rank(lambda one: trained(one, prefix, solver, max_it=7, **settings).result()) == expected


@pytest.mark.parametrize("solver", ["lmvm", "bntr"])
def test_solvers_of_petsc_begin_afresh_with_new_points(comm: MPI.Comm, prefix: str, solver: str) -> None:
    run = trained(comm, prefix, solver, max_it=9)
    assert run.moving.draws == 2
    assert run.run.history["iteration"].tolist() == list(range(10))
    assert run.run.history.last("loss") < run.run.history["loss"][0]
    run.result()
