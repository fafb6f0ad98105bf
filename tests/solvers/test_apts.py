"""APTS in weights and in data: local objectives, trust region, reduction to the undivided method, ranks, restarts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import batches, classifier, value_gradient
from mpi4py import MPI
from petsc4py import PETSc

from ddml.decomposition.decomposition import Decomposition
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.consistent import ConsistentObjective, sample_parts, whole_copies
from ddml.objectives.objective import Objective

Train = Callable[..., SimpleNamespace]
WEIGHTS: list[tuple[str, dict[str, Any]]] = [
    ("apts_weights", {}),
    ("apts_weights", {"norm": "2", "decomposition": "layers"}),
    ("apts_weights", {"norm": "infinity", "decomposition": "random", "subdomains": 4}),
    ("apts_weights", {"decomposition": "tensors", "subdomains": 3, "forced_decrease": True}),
    ("apts_weights", {"decomposition": "layers", "subdomains": 2, "global_steps": 2}),
    ("apts_weights", {"model": "sr1", "decomposition": "layers", "overlap": 1}),
    ("apts_weights", {"local_solver": "lbfgs"}),
    ("apts_weights", {"norm": "kfac", "decomposition": "layers"}),
    ("apts_weights", {"norm": "kfac", "decomposition": "tensors", "subdomains": 3}),
]
DATA: list[tuple[str, dict[str, Any]]] = [
    ("apts_data", {}),
    ("apts_data", {"norm": "2", "subdomains": 3, "sample_overlap": 0.2}),
    ("apts_data", {"norm": "infinity", "subdomains": 4}),
    ("apts_data", {"model": "sr1", "subdomains": 2}),
    ("apts_data", {"norm": "kfac", "model": "lbfgs"}),
]
all_of_them = pytest.mark.parametrize(("solver", "settings"), WEIGHTS + DATA)


class Batches:
    """Replaces the objective's loss every few iterations, and copies the state at one of them."""

    def __init__(self, losses: list[Any], interval: int, first: int = 0, at: int = -1, copied: Any = None) -> None:
        self.losses, self.interval, self.first = losses, interval, first
        self.at, self.copied, self.state = at, copied, None

    def __call__(self, context: Any, iteration: int) -> None:
        if iteration % self.interval == 0 and iteration > self.first:
            context.objective.replace(self.losses[iteration // self.interval])
        if iteration == self.at:
            self.state = self.copied(context.state())


@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
@pytest.mark.parametrize("norm", ["modular", "2", "infinity", "kfac"])
def test_one_subdomain_is_the_trust_region_method(train: Train, solver: str, norm: str) -> None:
    parts = batches(classifier(), 30, 4)
    one = {"subdomains": 1} if solver == "apts_data" else {"subdomains": 1, "decomposition": "layers"}
    apts = train(parts[0], solver, 11, norm=norm, watch=Batches(parts, 5), **one)
    plain = train(parts[0], "tr", 11, norm=norm, watch=Batches(parts, 5))
    assert apts.theta.tobytes() == plain.theta.tobytes()
    assert apts.total == pytest.approx(plain.total, rel=1e-12)


@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_without_local_steps_either(train: Train, solver: str) -> None:
    apts, plain = train(classifier(), solver, 8, local_steps=0), train(classifier(), "tr", 8)
    assert apts.theta.tobytes() == plain.theta.tobytes()


def test_sample_parts() -> None:
    parts = sample_parts(103, 4, 0.1, seed=3)
    assert [len(p) for p in parts] == [25 + 2, 26 + 3, 26 + 3, 26 + 3]
    assert set(np.concatenate(parts)) == set(range(103))
    plain = sample_parts(103, 4, seed=3)
    assert sorted(np.concatenate(plain)) == list(range(103))
    assert all(set(a) <= set(b) for a, b in zip(plain, parts, strict=True))
    assert [set(w) - set(p) <= set(n) for w, p, n in zip(parts, plain, plain[1:] + plain[:1], strict=True)] == [
        True
    ] * 4
    assert (sample_parts(103, 1, 0.5)[0] == np.arange(103)).all()
    for count, number, overlap in ((3, 4, 0.0), (3, 0, 0.0), (9, 2, 1.5), (9, 2, -0.1)):
        with pytest.raises(InputError, match="subdomains"):
            sample_parts(count, number, overlap)


@pytest.mark.parametrize("count", [2, 4])
def test_local_objectives_agree_with_the_whole_one_to_first_order(count: int, comm: MPI.Comm) -> None:
    """grad h_p(theta_k) = grad L(theta_k); values and gradients elsewhere by definition and by differences."""
    loss = classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    decomposition = Decomposition(whole_copies(loss, count), layout, True)
    rng = np.random.default_rng(5)
    theta = loss.initial().numpy() + 0.3 * rng.standard_normal(loss.size)
    whole = value_gradient(loss, theta)[1]
    rows = sample_parts(loss.count, count, 0.1, 2)
    elsewhere, direction = theta + rng.standard_normal(loss.size), rng.standard_normal(loss.size)
    for s in decomposition.mine:
        h = ConsistentObjective(objective, decomposition, s, 0.1, 2)
        x, g, point = h.layout.vector(), h.layout.vector(), h.layout.vector()
        begin, end = x.getOwnershipRange()
        x.setArray(theta[begin:end])
        g.setArray(whole[begin:end])
        h.freeze(torch.as_tensor(theta))
        h.know(x, value_gradient(loss, theta)[0], g)
        gradients = h.work.gradients
        found = h.layout.vector()
        part = loss.sampled(torch.as_tensor(rows[s]))
        value, own = value_gradient(part, theta)
        assert h.value_gradient(x, found) == pytest.approx(value, rel=1e-13)
        assert h.start == pytest.approx(value, rel=1e-13)
        assert h.work.gradients == gradients  # known
        assert np.abs(h.layout.gather(found).numpy() - whole).max() <= 1e-14
        assert np.abs(whole - own).max() > 1e-3  # and not for want of a difference

        def at(where: np.ndarray, h: Any = h, point: PETSc.Vec = point, mine: slice = slice(begin, end)) -> float:
            point.setArray(where[mine])
            return float(h.value(point))

        there, slope = value_gradient(part, elsewhere)
        assert at(elsewhere) == pytest.approx(there + (whole - own) @ (elsewhere - theta), rel=1e-12)
        point.setArray(elsewhere[begin:end])
        assert h.value_gradient(point, found) == pytest.approx(at(elsewhere), rel=1e-13)
        gradient = h.layout.gather(found).numpy().copy()
        assert np.abs(gradient - (slope + whole - own)).max() <= 1e-13
        step = 1e-5
        difference = (at(elsewhere + step * direction) - at(elsewhere - step * direction)) / (2 * step)
        assert gradient @ direction == pytest.approx(difference, rel=1e-8)
        for vec in (x, g, point, found):
            vec.destroy()
        h.destroy()
    decomposition.destroy()


@all_of_them
def test_corrections_stay_in_the_trust_region_and_keep_their_promise(
    train: Train, monkeypatch: Any, solver: str, settings: dict[str, Any]
) -> None:
    """Every sum of local steps, before anything shortens it; and its promise to first order where it is short."""
    from solvers.schwarz.apts import APTSData, APTSWeights

    kind = APTSData if solver == "apts_data" else APTSWeights
    original, seen = kind._correction, []

    def watched(self: Any, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        predicted = original(self, x, delta, s)
        seen.append((delta, self.norm(s), predicted, -self.g.dot(s)))
        return predicted

    monkeypatch.setattr(kind, "_correction", watched)
    train(classifier(), solver, 8, **settings)
    assert len(seen) == 8
    # tensors of one matrix in two subdomains: a row of two parts of norm delta
    slack = np.sqrt(2) if settings.get("decomposition") == "tensors" else 1.0
    assert all(size <= slack * delta * (1 + 1e-9) for delta, size, _, _ in seen)
    assert any(predicted > 0 for _, _, predicted, _ in seen)
    seen.clear()
    train(classifier(), solver, 1, delta0=1e-5, **settings)
    delta, size, predicted, slope = seen[0]
    assert predicted == pytest.approx(slope, rel=1e-3)
    assert size > 0.2 * delta


class Promises:
    """Holds the decreases that local solves report against plain evaluations of the local objectives."""

    def __init__(self) -> None:
        self.theta: np.ndarray | None = None
        self.count, self.shortened = 0, 0

    def __call__(self, context: Any, iteration: int) -> None:
        layout, loss, begin = context.objective.layout, context.objective.loss, self.theta
        self.theta = layout.gather(context.point).numpy().copy()
        if begin is None:
            return
        local, decomposition = context.local, context.local.decomposition
        value, gradient = value_gradient(loss, begin)
        data = local.samples is not None
        rows = sample_parts(loss.count, len(local.x), *local.samples) if data else []
        decreases, slopes, correction = [], [], np.zeros(loss.size)
        for s, ranges in enumerate(decomposition.subdomains.ranges):
            step = np.concatenate(layout.comm.allgather(local.x[s].array_r.copy()))
            entries = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
            moved = begin.copy()
            moved[entries] += step
            correction[entries] += decomposition.subdomains.weights[entries] * step
            slopes.append(gradient[entries] @ step)
            if data:
                part = loss.sampled(torch.as_tensor(rows[s]))
                before, own = value_gradient(part, begin)
                decreases.append(before - value_gradient(part, moved)[0] - (gradient - own) @ step)
            else:
                decreases.append(value - value_gradient(loss, moved)[0])
        assert [local.decreases[s] for s in range(len(local.x))] == pytest.approx(decreases, rel=1e-12, abs=1e-15)
        promise = sum(decreases) * (gradient @ correction) / sum(slopes)
        assert local.promise == pytest.approx(promise, rel=1e-12, abs=1e-15)
        self.count += min(decreases) > 1e-3


LOCAL: list[dict[str, Any]] = [
    *({"local_solver": name} for name in ("lmvm", "bncg", "lbfgs", "ssbroyden")),
    *({"sub_tao_type": "bntr"}, {}),
]
PROMISED: list[tuple[str, dict[str, Any]]] = [
    ("apts_weights", {}),
    ("apts_weights", {"norm": "2", "decomposition": "layers"}),
    ("apts_data", {}),
    ("apts_data", {"norm": "2", "subdomains": 3, "sample_overlap": 0.2}),
    ("napts", {}),
]


# by turns with a radius that shortens local steps and one that does not
@pytest.mark.parametrize(
    ("solver", "settings", "local", "delta0"),
    [
        pytest.param(solver, settings, local, delta0, marks=[pytest.mark.long] * ((i + j + k) % 2))
        for i, (solver, settings) in enumerate(PROMISED)
        for j, local in enumerate(LOCAL)
        for k, delta0 in enumerate((0.5, 20.0))
    ],
)
def test_the_promise_is_the_true_decrease(
    train: Train, solver: str, settings: dict[str, Any], local: dict[str, Any], delta0: float
) -> None:
    promises = Promises()
    train(classifier(), solver, 5, watch=promises, delta0=delta0, delta_max=20.0, **settings, **local)
    assert promises.count >= 3


@all_of_them
def test_the_loss_never_increases(train: Train, solver: str, settings: dict[str, Any]) -> None:
    run = train(classifier(), solver, 12, **settings)
    assert (np.diff(run.losses) <= 0).all()
    assert run.losses[-1] < 0.2 * run.losses[0]
    assert np.isfinite(run.theta).all()


@pytest.mark.ranks
@all_of_them
def test_the_trajectory_is_that_on_one_rank(train: Train, solver: str, settings: dict[str, Any]) -> None:
    parts = batches(classifier(), 40, 4)
    together = train(parts[0], solver, 8, watch=Batches(parts, 5), **settings)
    alone = train(parts[0], solver, 8, comm=MPI.COMM_SELF, watch=Batches(parts, 5), **settings)
    assert np.abs(together.theta - alone.theta).max() <= 1e-8
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)
    assert together.total == pytest.approx(alone.total, rel=1e-12)
    assert together.critical == pytest.approx(alone.critical, rel=1e-12)
    assert (together.critical[1:] < together.total[1:]).all()


@all_of_them
@pytest.mark.parametrize("at", [4, 5])
def test_a_resumed_run_goes_on_to_the_last_bit(
    train: Train, copied: Any, solver: str, settings: dict[str, Any], at: int
) -> None:
    parts = batches(classifier(), 40, 4)
    watch = Batches(parts, 5, at=at, copied=copied)
    whole = train(parts[0], solver, 11, watch=watch, **settings)
    rest = train(
        parts[at // 5], solver, 11, start=whole.theta[at], state=watch.state, watch=Batches(parts, 5, first=at),
        **settings,
    )  # fmt: skip
    assert rest.theta.tobytes() == whole.theta[at + 1 :].tobytes()
    assert rest.losses.tobytes() == whole.losses[at + 1 :].tobytes()


@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_a_forced_decrease_blends_with_the_direction_that_goes_down(
    train: Train, monkeypatch: Any, solver: str
) -> None:
    """A correction uphill: without the blend it is refused, with it some part of steepest descent is taken."""
    from solvers.schwarz.apts import APTSData, APTSWeights

    tried: list[tuple[float, float]] = []

    def uphill(self: Any, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        dual = self.norm.steepest(self.g, s)
        s.scale(delta)
        return delta * dual

    original = APTSWeights._evaluate

    def watched(self: Any, x: PETSc.Vec, s: PETSc.Vec) -> float:
        tried.append((float(self.g.dot(s)) / self.norm.steepest(self.g, self.vectors["steepest"]), self.norm(s)))
        return original(self, x, s)

    for kind in (APTSData, APTSWeights):
        monkeypatch.setattr(kind, "_correction", uphill)
        monkeypatch.setattr(kind, "_evaluate", watched)
    train(classifier(), solver, 1, delta0=0.1, forced_decrease=True)
    # lengths and slopes 2^-j (1 - 2 b) of j tries with b = 0.2 j of steepest descent; the third goes downhill
    assert [slope for slope, _ in tried] == pytest.approx([0.1, 0.05 * 0.6, 0.025 * 0.2, 0.0125 * -0.2], rel=1e-9)
    assert all(size <= 0.1 * 0.5**j * (1 + 1e-12) for j, (_, size) in enumerate(tried))
    tried.clear()
    train(classifier(), solver, 1, delta0=0.1)
    assert len(tried) == 1


def test_samples_are_charged_by_their_number(train: Train) -> None:
    """One iteration with N parts, k local steps: N (k + 1) / N evaluations in all, (k + 1) / N on the critical path."""
    run = train(
        classifier(), "apts_data", 1, subdomains=4, sample_overlap=0.0, local_steps=3, delta0=0.01, sub_grow=1.0,
        norm="2",
    )  # fmt: skip
    assert run.total[1] - run.total[0] == pytest.approx(2 + 4)
    assert run.critical[1] - run.critical[0] == pytest.approx(2 + 4 / 4)


@pytest.mark.parametrize("solver", ["apts_data", "apts_weights"])
def test_batches_are_charged_as_the_fraction_that_they_are(train: Train, solver: str) -> None:
    def third(context: Any, iteration: int) -> None:
        context.objective.fraction = 1 / 3
        context.objective.replace(context.objective.loss)

    settings = {"local_steps": 3, "delta0": 0.01, "sub_grow": 1.0}
    whole = train(classifier(), solver, 2, **settings)
    run = train(classifier(), solver, 2, watch=third, **settings)
    # every iteration evaluates anew what has been replaced
    assert run.total[2] - run.total[1] == pytest.approx((whole.total[2] - whole.total[1] + 1) / 3)
    assert run.critical[2] - run.critical[1] == pytest.approx((whole.critical[2] - whole.critical[1] + 1) / 3)


@pytest.mark.parametrize(
    ("solver", "given", "message"),
    [
        ("apts_weights", {"subdomains": 9, "decomposition": "layers"}, "must be 1 to 3"),
        ("apts_weights", {"subdomains": 2, "decomposition": "windows"}, "use -window"),
        ("apts_weights", {"sub_norm": "modular", "model": "sr1"}, "needs -test"),
        ("apts_data", {"subdomains": 61}, "can be dealt into 1 to 60"),
        ("apts_data", {"sample_overlap": 1.5}, "fraction from 0 to 1"),
    ],
)
def test_what_does_not_go_together(train: Train, solver: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, PETSc.Error)) as error:
        train(classifier(), solver, 1, **given)
    found: BaseException | None = error.value
    while found is not None and not isinstance(found, InputError):
        found = found.__cause__ or found.__context__
    assert found is not None and message in str(found)
