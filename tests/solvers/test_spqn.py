"""ASPQN and MSPQN: limits in which they are known methods, what they cost, and the same bits everywhere."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.decomposition.options import subdomains
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective
from ddml.problems import Burgers, PDELoss
from solvers.line_search import LineSearch
from solvers.schwarz.schwarz import Schwarz

Train = Callable[..., SimpleNamespace]
Make = Callable[..., Loss]
DENSE = {"decomposition": "windows", "local_solver": "ssbroyden", "local_memory": "keep"}
FIELDS = ("losses", "norms", "steps", "theta")
BOTH = pytest.mark.parametrize("solver", ["aspqn", "mspqn"])


def burgers(width: int = 5, depth: int = 4, points: int = 24, seed: int = 0) -> PDELoss:
    network = TanhNetwork(2, width, depth, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(seed))
    return PDELoss(Burgers(), network, points)


def assert_same_bits(one: SimpleNamespace, other: SimpleNamespace) -> None:
    for field in FIELDS:
        a, b = getattr(one, field), getattr(other, field)
        assert a.shape == b.shape, field
        assert a.tobytes() == b.tobytes(), f"{field} differ from iteration {np.argmax(a != b)} on"


# Limits -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("settings", [{}, {"momentum": 1, "memory": 5}, {"secant": "half"}, {"first_step": "scaled"}])
def test_without_local_steps_the_method_is_lbfgs(train: Train, solver: str, settings: dict[str, Any]) -> None:
    plain = train(burgers(), "lbfgs", 8, **settings)
    preconditioned = train(burgers(), solver, 8, local_steps=0, **settings)
    for field in FIELDS:
        a, b = getattr(plain, field), getattr(preconditioned, field)
        assert np.abs(a - b).max() <= 1e-14 * np.abs(a).max(), field
    assert (np.diff(plain.losses) < 0).all()


@pytest.mark.parametrize("settings", [{}, {"decomposition": "tensors"}])
def test_with_one_subdomain_additive_and_multiplicative_are_the_same(train: Train, settings: dict[str, Any]) -> None:
    common = {"subdomains": 1, "local_steps": 4, **settings}
    additive = train(burgers(), "aspqn", 6, additive_step=1, **common)
    multiplicative = train(burgers(), "mspqn", 6, **common)
    assert np.abs(additive.theta - multiplicative.theta).max() <= 1e-12 * np.abs(additive.theta).max()
    assert additive.losses == pytest.approx(multiplicative.losses, rel=1e-12)


@BOTH
def test_the_first_iteration_is_a_plain_one(train: Train, solver: str) -> None:
    plain, preconditioned = train(burgers(), "lbfgs", 1), train(burgers(), solver, 2, local_steps=3)
    assert np.array_equal(plain.theta, preconditioned.theta[:2])
    assert np.array_equal(plain.gradients, preconditioned.gradients[:2])
    assert preconditioned.gradients[2] > plain.gradients[1] + 4


# Half-steps on a quadratic ------------------------------------------------------------------------------------------

LAYERS = [2, 3, 1, 2, 3]
SPLITS = {
    "two groups of layers": {"subdomains": 2},
    "one layer each": {"subdomains": 5},
    "all in one": {"subdomains": 1},
    "overlap of one layer": {"subdomains": 3, "overlap": 1},
    "windows": {"decomposition": "windows"},
    "overlap of all layers": {"subdomains": 2, "overlap": 5},
    "tensors at random": {"subdomains": 3, "decomposition": "random", "decomposition_seed": 4},
    "tensors with overlap": {"subdomains": 2, "decomposition": "random", "overlap": 1},
}
EXACT = {
    "our L-BFGS": {"sub_memory": 6, "sub_tao_ls_gtol": 0.1},
    "PETSc's": {"sub_tao_type": "bqnls"},
}


def half_step(
    comm: MPI.Comm, prefix: str, loss: Loss, parallel: bool, settings: dict[str, Any]
) -> tuple[np.ndarray, Subdomains]:
    """The change of the initial point by one Schwarz sweep with nearly exact local solves."""
    for name, value in settings.items():
        PETSc.Options().setValue(prefix + name, value)
    chosen = subdomains(loss, prefix)
    objective = Objective(loss, ParameterLayout(loss.parameters, comm, chosen.ownership(comm.size)))
    x, g, change = (objective.layout.vector() for _ in range(3))
    objective.initial(x)
    x.copy(change)
    f = objective.value_gradient(x, g)
    schwarz = Schwarz(objective, chosen, parallel, f"{prefix}sub_", [25] * len(chosen))
    if parallel:
        schwarz.additive(x, f, g, change)
    else:
        schwarz.multiplicative(x, f, g)
        change.aypx(-1.0, x)
    values = objective.layout.gather(change).numpy().copy()
    schwarz.destroy()
    return values, chosen


def dense_half_step(loss: Any, chosen: Subdomains, parallel: bool) -> np.ndarray:
    """Block Jacobi, overlapping entries divided by their multiplicity, or block Gauss-Seidel."""
    table, start = loss.rows.numpy(), loss.initial().numpy()
    A, b = table[:, :-1].T @ table[:, :-1], table[:, :-1].T @ table[:, -1]
    sets = [np.concatenate([np.arange(r.start, r.stop) for r in ranges]) for ranges in chosen.ranges]
    x, change = start.copy(), np.zeros_like(start)
    multiplicity = np.bincount(np.concatenate(sets), minlength=len(start))
    for entries in sets:
        at = start if parallel else x
        correction = np.linalg.solve(A[np.ix_(entries, entries)], (b - A @ at)[entries])
        change[entries] += correction / multiplicity[entries]
        x[entries] += correction
    return change if parallel else x - start


@pytest.mark.parametrize("parallel", [True, False], ids=["additive", "multiplicative"])
@pytest.mark.parametrize(
    ("split", "local"), [*((s, "our L-BFGS") for s in SPLITS), ("overlap of one layer", "PETSc's")]
)
def test_exact_local_solves_make_block_jacobi_and_block_gauss_seidel(
    comm: MPI.Comm, prefix: str, least_squares: Make, split: str, local: str, parallel: bool
) -> None:
    loss = least_squares(LAYERS, rows=30, seed=7)
    change, chosen = half_step(comm, prefix, loss, parallel, SPLITS[split] | EXACT[local])
    expected = dense_half_step(loss, chosen, parallel)
    assert np.linalg.norm(expected) > 1
    assert np.linalg.norm(change - expected) <= 1e-6 * np.linalg.norm(expected)


# Cost ---------------------------------------------------------------------------------------------------------------


class Bookkeeper:
    """Records every evaluation and every line search, iteration by iteration, independently of the counters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evaluations: list[Counter[Any]] = [Counter()]
        self.extras: list[Counter[Any]] = [Counter()]
        self.also: list[Counter[Any]] = [Counter()]
        evaluate, search = Objective.value_gradient, LineSearch.__call__

        def counted(objective: Objective, x: PETSc.Vec, g: PETSc.Vec) -> float:
            key = self.key(objective)
            self.evaluations[-1][key] += 1
            if key != "whole" and objective.loss.also:
                self.also[-1][key, objective.loss.active | objective.loss.also] += 1
            return evaluate(objective, x, g)

        def searched(line_search: LineSearch, *arguments: Any) -> Any:
            key = self.key(line_search.objective)
            before = self.evaluations[-1][key]
            result = search(line_search, *arguments)
            self.extras[-1][key] += self.evaluations[-1][key] - before - 1
            return result

        monkeypatch.setattr(Objective, "value_gradient", counted)
        monkeypatch.setattr(LineSearch, "__call__", searched)

    def key(self, objective: Objective) -> Any:
        """The layers of a local solve, or 'whole'."""
        return objective.loss.active if isinstance(objective, RestrictedObjective) else "whole"

    def next(self, context: Any, iteration: int) -> None:
        if not isinstance(context.objective, RestrictedObjective):
            for records in (self.evaluations, self.extras, self.also):
                records.append(Counter())


def documented_units(loss: Loss, active: frozenset[int]) -> tuple[float, float]:
    """A gradient by the active layers behind the kept prefix, and that prefix, as charged alone."""
    first = min(active) if loss.keeps(min(active)) else 0
    return loss.charges.evaluation(first, active), loss.charges.prefix(min(active))


LOSSES = {"burgers": burgers, "least squares": None}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("count", "steps"), [(1, 3), (2, 1), (4, 3)])
@BOTH
def test_an_iteration_takes_the_documented_number_of_evaluations(
    comm: MPI.Comm,
    train: Train,
    least_squares: Make,
    monkeypatch: pytest.MonkeyPatch,
    solver: str,
    steps: int,
    count: int,
    name: str,
) -> None:
    loss = burgers() if name == "burgers" else least_squares([5, 4, 3, 6], bend=0.02)
    books = Bookkeeper(monkeypatch)
    run = train(loss, solver, 3, subdomains=count, local_steps=steps, watch=books.next)
    edges = [4 * i // count for i in range(count + 1)]
    layers = [frozenset(range(a, b)) for a, b in pairwise(edges)]
    for iteration in range(2, 4):
        evaluations, extras, also = (r[iteration] for r in (books.evaluations, books.extras, books.also))
        # every group of ranks saw its own subdomains
        seen = [Counter(dict(c)) for c in comm.allgather(dict(evaluations))]
        local = {s: max(c[s] for c in seen) for s in layers}
        over = [Counter(dict(c)) for c in comm.allgather(dict(extras))]
        more = {s: max(c[s] for c in over) for s in layers}
        extended = {k: v for records in comm.allgather(dict(also)) for k, v in records.items()}
        assert evaluations["whole"] == 2 + extras["whole"]
        assert local == {s: steps + more[s] for s in layers}
        assert run.gradients[iteration] - run.gradients[iteration - 1] == evaluations["whole"] + sum(local.values())
        units = {}
        for s in layers:
            plain, prefix = documented_units(loss, s)
            units[s] = prefix + local[s] * plain
            for (where, wanted), times in extended.items():
                if where == s:  # the last local iteration computes the gradient of the next subdomain, too
                    units[s] += times * sum(loss.costs[i] for i in wanted - s) / loss.charges.passes().gradient
        total, critical = (np.diff(column)[iteration - 1] for column in (run.total, run.critical))
        longest = max(units.values()) if solver == "aspqn" else sum(units.values())
        assert total == pytest.approx(evaluations["whole"] + sum(units.values()), rel=1e-12)
        assert critical == pytest.approx(evaluations["whole"] + longest, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
@BOTH
def test_without_extra_evaluations_of_searches_the_cost_is_that_of_the_paper(
    train: Train, least_squares: Make, monkeypatch: pytest.MonkeyPatch, solver: str, count: int
) -> None:
    """2 + S k_s gradients: on a well-conditioned quadratic every search accepts its first trial."""
    loss = least_squares([2, 3, 2], seed=5)
    books = Bookkeeper(monkeypatch)
    settings = {"subdomains": count, "local_steps": 2, "momentum": 1, "sub_first_step": "0.4", "first_step": "0.4"}
    run = train(loss, solver, 4, watch=books.next, **settings)
    assert not any(any(extras.values()) for extras in books.extras)
    assert (np.diff(run.gradients)[1:] == 2 + count * 2).all()


@BOTH
def test_a_coarse_step_is_over_the_first_layer_of_each_subdomain(train: Train, solver: str) -> None:
    chosen = []
    loss = burgers()
    train(
        loss, solver, 1, subdomains=2, local_steps=1, coarse_step=True,
        watch=lambda context, iteration: chosen.append(context.coarse.decomposition.subdomains.cores),
    )  # fmt: skip
    layers = len(loss.layers)
    first = [0, -(-layers // 2)]  # of two runs of layers, the longer one first
    assert [sorted(loss.layer_numbers(core)) for core in chosen[0]] == [first]


# The same everywhere ------------------------------------------------------------------------------------------------

RUNS = {
    "lbfgs": ("lbfgs", {}),
    "lbfgs, half": ("lbfgs", {"secant": "half"}),
    "aspqn, 4": ("aspqn", {"subdomains": 4, "secant": "half"}),
    "aspqn, overlap": ("aspqn", {"subdomains": 3, "overlap": 1, "additive_step": 0.5}),
    "aspqn, coarse": ("aspqn", {"subdomains": 2, "coarse_step": True, "coarse_steps": 2}),
    "aspqn, random": ("aspqn", {"subdomains": 5, "decomposition": "random"}),
    "aspqn, petsc": ("aspqn", {"subdomains": 2, "sub_tao_type": "ntr"}),
    "mspqn, 2": ("mspqn", {"subdomains": 2, "secant": "half"}),
    "mspqn, kept matrices": ("mspqn", {**DENSE, "sub_matrix_dtype": "float32"}),
    "mspqn, colours": ("mspqn_dense", {"side_by_side": 0}),
    "mspqn, colours, pairs": ("mspqn", {**DENSE, "local_solver": "lbfgs", "side_by_side": 2}),
    "aspqn, kept matrices": ("aspqn", {**DENSE, "secant": "half"}),
    "mspqn, overlap": ("mspqn", {"subdomains": 3, "overlap": 1, "coarse_step": True, "coarse_steps": 2}),
}


def settings_of(name: str) -> tuple[str, dict[str, Any]]:
    solver, settings = RUNS[name]
    return solver, settings | ({} if solver == "lbfgs" else {"local_steps": 2})


@pytest.mark.ranks
@pytest.mark.parametrize("name", RUNS)
def test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks(train: Train, name: str) -> None:
    solver, settings = settings_of(name)
    blocks = 3 if solver == "lbfgs" else 4
    together = train(burgers(), solver, 3, blocks=blocks, **settings)
    alone = train(burgers(), solver, 3, comm=MPI.COMM_SELF, blocks=blocks, **settings)
    assert_same_bits(together, alone)
    assert together.losses[-1] < together.losses[0]
    assert together.total == pytest.approx(alone.total, rel=1e-12)
    assert together.critical == pytest.approx(alone.critical, rel=1e-12)


@pytest.mark.ranks
def test_without_blocks_a_run_is_the_same_to_rounding(train: Train) -> None:
    loss = burgers(20, 4, 400)
    settings = {"subdomains": 4, "local_steps": 5}
    together = train(loss, "aspqn", 10, **settings)
    alone = train(loss, "aspqn", 10, comm=MPI.COMM_SELF, blocks=2, **settings)
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)
    assert together.losses[-1] < 0.5 * together.losses[0]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("at", [3])
def test_a_resumed_run_goes_on_to_the_last_bit(train: Train, copied: Callable[[Any], Any], name: str, at: int) -> None:
    solver, settings = settings_of(name)
    kept: dict[str, Any] = {}

    def keep(context: Any, iteration: int) -> None:
        if iteration == at:
            kept.update(copied(context.state()))

    whole = train(burgers(), solver, at + 2, watch=keep, **settings)
    rest = train(burgers(), solver, at + 2, start=whole.theta[at], state=kept, **settings)
    for field in FIELDS:
        assert getattr(rest, field).tobytes() == getattr(whole, field)[at + 1 :].tobytes(), field
    assert len(rest.losses) == 2


# Variants -----------------------------------------------------------------------------------------------------------

VARIANTS = {
    "overlap and coarse step": {"subdomains": 3, "overlap": 1, "coarse_step": True},
    "balanced by cost": {"subdomains": 3, "balance": "cost"},
    "tensors, overlap": {"subdomains": 4, "decomposition": "tensors", "overlap": 2},
    "random": {"subdomains": 3, "decomposition": "random", "decomposition_seed": 1},
    "PETSc's lmvm": {"subdomains": 2, "sub_tao_type": "lmvm"},
    "between half-steps": {"secant": "half"},
}


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_decrease_the_loss_in_every_iteration(train: Train, solver: str, name: str) -> None:
    run = train(burgers(), solver, 3, local_steps=3, **VARIANTS[name])
    assert len(run.losses) == 4
    assert (np.diff(run.losses) < 0).all()
    assert run.losses[-1] < 0.8 * run.losses[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decomposition": "windows", "window": 5}, "4 layers: a window must hold 1 to 4 of them, got 5"),
        ({"decomposition": "windows", "subdomains": 2}, "subdomains does not go with .*windows: use -window"),
        ({"decomposition": "windows", "overlap": 1}, "overlap does not go with"),
        ({"decomposition": "windows", "balance": "cost"}, "balance does not go with"),
    ],
)
def test_options_that_do_not_go_together_are_refused(prefix: str, settings: dict[str, Any], words: str) -> None:
    for name, value in settings.items():
        PETSc.Options().setValue(prefix + name, value)
    with pytest.raises(InputError, match=words):
        subdomains(burgers(), prefix)


# Rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", ["lbfgs", "lmvm", "cg", "bncg", "bqnktl"])
@pytest.mark.parametrize("settings", [{}, {"side_by_side": 0}, {"local_solver": "aspqn"}])
@pytest.mark.parametrize("place", [1e-10, 1e-9])
def test_a_subdomain_whose_gradient_is_at_rounding_stays_where_it_is(
    train: Train, sum_over_rows: Any, local: str, settings: dict[str, Any], place: float
) -> None:
    """1 + x^4 at 1e-10, where PETSc's line search turns its interval round; the other subdomain is minimised."""

    def rows(theta: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[:, 0] * ((theta[0] - 1) ** 2 + (theta[1] - 2) ** 2 + 1 + (theta[2:] ** 4).sum())

    loss = sum_over_rows(rows, np.full((6, 1), 1 / 6), [2, 2], [3.0, 4.0, place, -place])
    name = "sub_local_solver" if settings.get("local_solver") else "local_solver"
    run = train(loss, "mspqn", 3, blocks=2, **{"local_steps": 10, **settings, name: local})
    assert run.losses[0] > 8 and (np.diff(run.losses) <= 0).all()
    assert run.losses[-1] == pytest.approx(1.0, abs=1e-8)
    assert np.abs(run.theta[-1, 2:]).max() < 1e-3
