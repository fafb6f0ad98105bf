"""Local solvers that keep their curvature, colours, and step lengths from a subspace, against dense computations."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc

from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.options import understood
from ddml.problems import Burgers, PDELoss
from solvers import configure
from solvers.quasi_newton.inverse_hessian import InverseHessian
from solvers.schwarz.schwarz import Schwarz
from solvers.schwarz.spqn import best_lengths

Train = Callable[..., SimpleNamespace]
Make = Callable[..., Loss]
DENSE = {"decomposition": "windows", "local_solver": "ssbroyden", "local_memory": "keep"}


def burgers(points: int = 24) -> PDELoss:
    network = TanhNetwork(2, 5, 4, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, points)


def gradient(loss: Loss, theta: np.ndarray) -> np.ndarray:
    g = torch.zeros(loss.size, dtype=torch.float64)
    loss.value_gradient(torch.as_tensor(theta), g)
    return g.numpy()


def entries(ranges: tuple[slice, ...]) -> np.ndarray:
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])


# Kept matrices ------------------------------------------------------------------------------------------------------


def updated(H: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSBroyden2 with B = H^-1 as a matrix, as in the published code."""
    q, rho = H @ y, 1 / (y @ s)
    b, h = rho * s @ np.linalg.solve(H, s), rho * y @ q
    a = b * h - 1
    c = min(1, h * (1 - math.sqrt(abs(a) / (1 + a))))
    theta = max((c - 1) / a, min(1 / c, (1 - b) / b))
    sigma = 1 + theta * a
    bar = abs(sigma) ** (1 / (1 - len(s)))
    tau = min(min(1, 1 / b) * bar, sigma) if theta <= 0 else min(1, 1 / b) * min(bar, 1 / theta)
    phi, v = (1 - theta) / (1 + a * theta), rho * s - q / (y @ q)
    return (H - np.outer(q, q) / (y @ q) + phi * (y @ q) * np.outer(v, v)) / tau + rho * np.outer(s, s)


def dense_sweeps(
    loss: Loss, colours: list[Subdomains], steps: dict[int, list[float]], sweeps: int, local_steps: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Parameters after some sweeps, and the matrix of every subdomain (by the first of its entries)."""
    theta = loss.initial().numpy().copy()
    where = [[entries(r) for r in colour.ranges] for colour in colours]
    matrices = {int(e[0]): np.eye(len(e)) for colour in where for e in colour}
    left = {key: iter(values) for key, values in steps.items()}
    for _ in range(sweeps):
        for colour in where:
            start, change = theta.copy(), np.zeros_like(theta)
            for mine in colour:
                at, key = start.copy(), int(mine[0])
                g = gradient(loss, at)[mine]
                for _ in range(local_steps):
                    s = -next(left[key]) * matrices[key] @ g
                    at[mine] += s
                    y = gradient(loss, at)[mine] - g
                    matrices[key] = updated(matrices[key], s, y)
                    g = g + y
                change += at - start
            theta += change
    assert all(next(rest, None) is None for rest in left.values())
    return theta, matrices


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_kept_matrices_are_those_of_a_dense_implementation(
    comm: MPI.Comm, prefix: str, least_squares: Make, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    loss = least_squares([4, 5, 3, 6, 4], rows=60, bend=1.0, seed=2)
    windows = Subdomains.windows(loss)
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    colours = [windows] if limit == 1 else [windows.subset(c) for c in windows.colours(limit)]
    parallel = limit > 1
    schwarz = [Schwarz(objective, c, parallel, prefix + "sub_", [4] * len(c), "ssbroyden", True) for c in colours]
    first = {
        local.context: s.decomposition.subdomains.ranges[i][0].start for s in schwarz for i, local in s.local.items()
    }
    steps: dict[int, list[float]] = {key: [] for key in first.values()}
    update = InverseHessian.update

    def recorded(inverse: InverseHessian, step: float, *others: Any) -> bool:
        steps[next(key for solver, key in first.items() if solver.inverse is inverse)].append(step)
        return update(inverse, step, *others)

    monkeypatch.setattr(InverseHessian, "update", recorded)
    x, g, correction = (layout.vector() for _ in range(3))
    objective.initial(x)
    for _ in range(3):
        f = objective.value_gradient(x, g)
        for one in schwarz:
            if parallel:
                one.additive(x, f, g, correction)
                x.axpy(1.0, correction)
                f = objective.value_gradient(x, g)
            else:
                one.multiplicative(x, f, g)
    everywhere = {k: v for found in comm.allgather(steps) for k, v in found.items()}
    assert {len(v) for v in everywhere.values()} == {12}
    each = [windows.subset([s]) for s in range(len(windows))] if limit == 1 else colours
    theta, matrices = dense_sweeps(loss, each, everywhere, 3, 4)
    assert layout.gather(x).numpy() == pytest.approx(theta, rel=1e-8, abs=1e-10)
    for solver, key in first.items():
        column, product = solver.objective.layout.vector(), solver.objective.layout.vector()
        found = []
        for i in range(len(matrices[key])):
            column.set(0.0)
            begin, end = column.getOwnershipRange()
            if begin <= i < end:
                column.array[i - begin] = 1.0
            solver.inverse._multiply(column, product)
            solver.inverse.pending = None
            found.append(solver.objective.layout.gather(product).numpy().copy())
        assert np.abs(np.array(found) - matrices[key]).max() <= 1e-8 * np.abs(matrices[key]).max()
        assert np.abs(matrices[key] - np.eye(len(found))).max() > 0.1
    for one in schwarz:
        one.destroy()


def test_memory_makes_a_difference_from_the_second_correction_on(train: Train) -> None:
    kept, fresh = (
        train(burgers(), "mspqn", 4, local_steps=4, **DENSE | {"local_memory": m}) for m in ("keep", "fresh")
    )
    assert np.array_equal(kept.theta[:3], fresh.theta[:3])  # a plain step, and the first correction
    assert np.abs(kept.theta[3] - fresh.theta[3]).max() > 1e-3


def test_pairs_of_local_lbfgs_are_kept_too(train: Train) -> None:
    settings = {"decomposition": "windows", "local_steps": 3, "sub_memory": 8}
    pairs: list[int] = []

    def watch(context: Any, iteration: int) -> None:
        pairs.append(max(len(local.context.pairs) for s in context.local for local in s.local.values()))

    train(burgers(), "mspqn", 5, local_memory="keep", watch=watch, **settings)
    assert pairs == [0, 0, 3, 6, 8, 8]


# Colours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "groups"), [(1, 3), (2, 2), (7, 2)])
def test_colours_share_nothing(limit: int, groups: int) -> None:
    loss = burgers()
    windows = Subdomains.windows(loss)
    colours = windows.colours(limit)
    assert sorted(s for c in colours for s in c) == [0, 1, 2]
    assert len(colours) == groups
    for colour in colours:
        assert len(colour) <= limit
        held = np.concatenate([entries(windows.ranges[s]) for s in colour])
        assert len(np.unique(held)) == len(held)
    assert Subdomains.by_layers(loss, 4).colours(9) == [[0, 1, 2, 3]]
    assert Subdomains.by_layers(loss, 4).colours(2) == [[0, 1], [2, 3]]
    assert Subdomains.windows(loss, 3).colours(9) == [[0], [1]]


def test_a_colour_each_is_one_after_another(comm: MPI.Comm, prefix: str, least_squares: Make) -> None:
    """Colours of one subdomain, with whole steps, make the sequential multiplicative correction."""
    loss = least_squares([4, 5, 3, 6], rows=60, bend=0.5, seed=2)
    windows, layout = Subdomains.windows(loss), ParameterLayout(loss.parameters, comm)
    objective, results = Objective(loss, layout), []
    for colours in ([windows], [windows.subset([s]) for s in range(3)]):
        x, g, correction = (layout.vector() for _ in range(3))
        objective.initial(x)
        f = objective.value_gradient(x, g)
        schwarz = [Schwarz(objective, c, len(colours) > 1, prefix + "sub_", [4] * len(c)) for c in colours]
        for one in schwarz:
            if len(colours) == 1:
                one.multiplicative(x, f, g)
                continue
            one.additive(x, f, g, correction)
            x.axpy(1.0, correction)
            f = objective.value_gradient(x, g)
        results.append(layout.gather(x).numpy().copy())
        for one in schwarz:
            one.destroy()
    assert np.abs(results[0] - loss.initial().numpy()).max() > 0.1
    assert results[1] == pytest.approx(results[0], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("side_by_side", [0, 2])
def test_colours_descend_and_count_their_longest_solve(train: Train, side_by_side: int) -> None:
    run = train(burgers(), "mspqn", 4, local_steps=3, side_by_side=side_by_side, **DENSE)
    assert (np.diff(run.losses) < 0).all()
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert run.critical[-1] < run.total[-1]
    sequential = train(burgers(), "mspqn", 4, local_steps=3, **DENSE)
    assert sequential.critical[-1] == pytest.approx(sequential.total[-1], rel=1e-12)


def test_balanced_steps_fill_the_time_of_the_dearest_subdomain(train: Train) -> None:
    """Every subdomain of a colour takes about as many work units; on one rank after another nothing is balanced."""
    seen: dict[str, list[int]] = {}

    def watch(context: Any, iteration: int) -> None:
        if iteration == 2:
            here = {s: local.steps for one in context.local for s, local in one.local.items()}
            seen.setdefault("steps", list(here.values()))
            for one in context.local:
                chosen = one.decomposition.subdomains
                seen.setdefault("costs", list(chosen.costs))

    network = TanhNetwork(2, 60, 4, 1).double()  # wide enough that the last layers are much cheaper than the first
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(Burgers(), network, 40)
    costs = Subdomains.by_layers(loss, 4).costs
    plain = train(loss, "aspqn", 3, local_steps=12, comm=MPI.COMM_SELF)
    run = train(loss, "aspqn", 3, local_steps=12, balance_steps="true", comm=MPI.COMM_SELF, watch=watch)
    seen = MPI.COMM_WORLD.bcast(seen)
    assert seen["steps"] == [round(12 * max(costs) / cost) for cost in costs]
    assert seen["steps"][-1] > min(seen["steps"]) == 12
    assert max(seen["costs"]) < 1.2 * min(seen["costs"])
    assert run.total[-1] / run.critical[-1] > 1.2 * plain.total[-1] / plain.critical[-1]
    sequential = [train(loss, "mspqn", 3, local_steps=3, balance_steps=b).theta for b in ("true", "false")]
    assert np.array_equal(*sequential)


# A step length for every subdomain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 5])
def test_the_linear_model_is_the_dense_one(comm: MPI.Comm, blocks: int) -> None:
    loss = burgers(37)
    layout = ParameterLayout(loss.parameters, comm)
    objective = ResidualObjective(loss, layout, blocks=blocks)
    x = layout.vector()
    objective.initial(x)
    directions = np.random.default_rng(3).standard_normal((4, loss.size))
    vectors = []
    for d in directions:
        vec = layout.vector()
        vec.setArray(d[slice(*vec.getOwnershipRange())])
        vectors.append(vec)
    theta = loss.initial()
    W = np.column_stack([loss.jacobian(theta).numpy() @ directions.T, loss.residual(theta).numpy()])
    products = objective.linear_model(x, vectors)
    assert products == pytest.approx(W.T @ W, rel=1e-11)
    assert (objective.work.products, objective.work.losses) == (4, 1)
    assert objective.work.total == pytest.approx(4 * loss.charges.jacobian() + loss.charges.evaluation(gradient=False))
    expected = np.linalg.lstsq(W[:, :-1], -W[:, -1], rcond=None)[0]
    assert best_lengths(products) == pytest.approx(expected, rel=1e-7)


def test_best_lengths_of_columns_that_depend_on_each_other() -> None:
    rng = np.random.default_rng(0)
    W, r = rng.standard_normal((30, 3)), rng.standard_normal(30)
    columns = np.column_stack([W, W[:, 0] + W[:, 1], np.zeros(30), 1e9 * W[:, 2]])
    lengths = best_lengths(np.column_stack([columns, r]).T @ np.column_stack([columns, r]))
    best = W @ np.linalg.lstsq(W, -r, rcond=None)[0]
    assert columns @ lengths == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert lengths[4] == 0
    assert np.abs(lengths[:4]).max() < 10
    assert not best_lengths(np.full((3, 3), np.nan)).any()


def residual_run(comm: MPI.Comm, prefix: str, blocks: int = 0, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Losses and parameters of an ASPQN run on an objective with residuals."""
    loss = burgers()
    layout = ParameterLayout(loss.parameters, comm)
    objective = ResidualObjective(loss, layout, blocks=blocks)
    for name, value in settings.items():
        PETSc.Options().setValue(prefix + name, value)
    x, tao, losses = layout.vector(), PETSc.TAO().create(comm), []
    objective.initial(x)
    tao.setOptionsPrefix(prefix)
    configure(tao, "aspqn")
    objective.attach(tao)
    tao.setSolution(x)
    tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
    tao.setMaximumIterations(5)
    tao.setFromOptions()
    tao.setUp()
    tao.setMonitor(lambda tao: losses.append(tao.getObjectiveValue()))
    tao.solve()
    theta = layout.gather(x).numpy().copy()
    tao.destroy()
    return np.array(losses), theta


@pytest.mark.ranks
def test_steps_from_a_subspace_have_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, prefix: str) -> None:
    settings = {"additive_step": "subspace", "local_steps": 3, **DENSE}
    together = residual_run(comm, prefix, 4, **settings)
    alone = on_one_rank(lambda comm: residual_run(comm, prefix, 4, **settings))
    assert together[0].tobytes() == alone[0].tobytes()
    assert together[1].tobytes() == alone[1].tobytes()
    assert len(together[0]) == 6
    assert (np.diff(together[0]) < 0).all()
    searched = residual_run(comm, prefix, 4, **settings | {"additive_step": "search"})
    assert abs(searched[0][-1] - together[0][-1]) > 1e-6


def test_the_search_begins_at_the_dense_minimiser_in_the_subspace(
    comm: MPI.Comm, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The correction is D a with a from numpy's least squares, with d_s as the local solves gave them."""
    from solvers.schwarz.spqn import ASPQN

    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    original = ASPQN._search_subspace

    def watched(solver: Any, x: PETSc.Vec, f: float) -> float:
        start = solver.objective.layout.gather(x).numpy().copy()
        value = original(solver, x, f)
        gather = solver.objective.layout.gather
        columns = np.column_stack([gather(d).numpy().copy() for d in solver._separate])
        seen.append((start, columns, gather(solver._half).numpy().copy()))
        return value

    monkeypatch.setattr(ASPQN, "_search_subspace", watched)
    residual_run(comm, prefix, additive_step="subspace", local_steps=3, **DENSE)
    assert len(seen) == 4
    loss = burgers()
    for theta, D, found in seen:
        at = torch.as_tensor(theta)
        J, r = loss.jacobian(at).numpy(), loss.residual(at).numpy()
        a = np.linalg.lstsq(J @ D, -r, rcond=None)[0]
        assert found == pytest.approx(D @ a, rel=1e-6, abs=1e-8)
        for s, ranges in enumerate(Subdomains.windows(loss).ranges):
            assert not np.delete(D[:, s], entries(ranges)).any()


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "settings", "words"),
    [
        ("aspqn", {"additive_step": "subspace"}, "additive_step subspace needs a loss that is a sum of squares"),
        ("aspqn", {"additive_step": "0"}, "'search', 'subspace' or a number above 0"),
        ("mspqn", {"local_memory": "keep", "sub_tao_type": "lmvm"}, "must be one of ours, not 'lmvm'"),
        ("mspqn", {"local_solver": "nonsense"}, "unknown solver 'nonsense'"),
        ("mspqn", {"local_memory": "some"}, "fresh, keep"),
        ("mspqn", {"side_by_side": -1}, "0 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    train: Train, least_squares: Make, solver: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words), understood():
        train(least_squares([4, 5, 3]), solver, 1, **settings)


def test_a_state_of_other_subdomains_is_refused(train: Train, copied: Callable[[Any], Any]) -> None:
    kept: dict[str, Any] = {}

    def keep(context: Any, iteration: int) -> None:
        if iteration == 2:
            kept.update(copied(context.state()))

    train(burgers(), "mspqn", 2, watch=keep, local_steps=2, **DENSE)
    for other in ({"window": 3}, {"local_solver": "lbfgs"}):
        with pytest.raises(InputError, match="other local solvers or subdomains"):
            train(burgers(), "mspqn", 3, state=kept, local_steps=2, **DENSE | other)


def test_memory_may_be_left_behind(train: Train, copied: Callable[[Any], Any]) -> None:
    """A run with fresh local solvers goes on from the state of one that kept them."""
    kept: dict[str, Any] = {}

    def keep(context: Any, iteration: int) -> None:
        if iteration == 3:
            kept.update(copied(context.state()))

    whole = train(burgers(), "mspqn", 4, watch=keep, local_steps=3, **DENSE)
    fresh = DENSE | {"local_memory": "fresh"}
    rest = train(burgers(), "mspqn", 4, start=whole.theta[3], state=kept, local_steps=3, **fresh)
    assert rest.losses[-1] < whole.losses[3]
    assert abs(rest.losses[-1] - whole.losses[4]) > 1e-6 * whole.losses[4]
