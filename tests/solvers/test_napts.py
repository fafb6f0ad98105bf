"""Non-monotone APTS: the coarse problem, the reduction to APTS, ranks, restarts."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from classifiers import batches, classifier
from mpi4py import MPI
from scipy import linalg, optimize

from solvers.schwarz.napts import small_step

Train = Callable[..., SimpleNamespace]
CASES: list[dict[str, Any]] = [{}, {"norm": "2", "decomposition": "layers"}, {"norm": "infinity", "nonmonotone": 2}]
cases = pytest.mark.parametrize("settings", CASES)


@pytest.mark.parametrize("seed", range(10))
def test_the_coarse_problem(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, radius = 4, 0.7
    W = rng.standard_normal((9, k)) * 10.0 ** rng.integers(-5, 3, k)
    H = rng.standard_normal((9, 9))
    H, g = H + H.T, rng.standard_normal(9)
    c, decrease = small_step(W.T @ g, W.T @ H @ W, W.T @ W, radius)
    step = W @ c
    assert np.linalg.norm(step) <= radius * (1 + 1e-9)
    assert decrease == pytest.approx(-(g @ step + step @ H @ step / 2), rel=1e-8)
    Q = linalg.orth(W / np.linalg.norm(W, axis=0))

    def model(u: np.ndarray) -> float:
        p = Q @ u
        p = p * min(1, radius / np.linalg.norm(p))
        return float(g @ p + p @ H @ p / 2)

    starts = [rng.standard_normal(k) for _ in range(30)]
    best = min(optimize.minimize(model, u, method="Nelder-Mead", options={"maxiter": 4000}).fun for u in starts[:6])
    assert -decrease <= best + 1e-6 * abs(best)


def test_directions_that_depend_on_others_add_nothing() -> None:
    rng = np.random.default_rng(0)
    w, H, g = rng.standard_normal((6, 1)), np.eye(6), rng.standard_normal(6)
    _, one = small_step(w.T @ g, w.T @ H @ w, w.T @ w, 0.3)
    W = np.hstack([w, 2 * w, 0 * w])
    c, three = small_step(W.T @ g, W.T @ H @ W, W.T @ W, 0.3)
    assert three == pytest.approx(one, rel=1e-12)
    assert np.isfinite(c).all() and np.linalg.norm(W @ c) <= 0.3 * (1 + 1e-12)


@cases
def test_without_window_and_coarse_directions_it_is_apts(train: Train, settings: dict[str, Any]) -> None:
    parts = batches(classifier(), 40, 4)

    def watch(context: Any, iteration: int) -> None:
        if iteration % 5 == 0 and iteration > 0:
            context.objective.replace(parts[iteration // 5])

    given = {**settings, "nonmonotone": 0}
    apts = train(parts[0], "apts_weights", 15, watch=watch, **given)
    napts = train(parts[0], "napts", 15, watch=watch, coarse_directions=0, **given)
    assert napts.theta.tobytes() == apts.theta.tobytes()
    assert napts.losses.tobytes() == apts.losses.tobytes()
    other = train(parts[0], "napts", 15, watch=watch, **given)
    assert np.abs(other.theta - apts.theta).max() > 1e-4


@cases
def test_combined_corrections_promise_no_less_and_save_the_global_step(
    train: Train, monkeypatch: Any, settings: dict[str, Any]
) -> None:
    from solvers.schwarz.apts import APTSWeights
    from solvers.schwarz.napts import NAPTS

    base, whole, seen = APTSWeights._correction, NAPTS._correction, []

    def local(self: Any, *args: Any) -> float:
        seen.append([base(self, *args), 0.0, len(self.displacements.P)])
        return float(seen[-1][0])

    def combined(self: Any, x: Any, delta: float, s: Any) -> float:
        predicted = whole(self, x, delta, s)
        seen[-1][1] = predicted
        return predicted

    monkeypatch.setattr(APTSWeights, "_correction", local)
    monkeypatch.setattr(NAPTS, "_correction", combined)
    run = train(classifier(), "napts", 12, coarse_directions=3, **settings)
    assert all(after >= before * (1 - 1e-9) for before, after, _ in seen)
    assert any(after > 1.01 * before > 0 for before, after, _ in seen)
    assert max(count for *_, count in seen) == 3
    monkeypatch.undo()
    plain = train(classifier(), "apts_weights", 1, **{**settings, "nonmonotone": 0})
    assert run.gradients[1] == plain.gradients[1] - 1


def test_a_global_step_follows_where_a_correction_is_refused(train: Train, monkeypatch: Any) -> None:
    from solvers.schwarz.napts import NAPTS

    seen: list[tuple[str, float]] = []

    def record(name: str, length: Callable[[Any], float]) -> None:
        base = getattr(NAPTS, name)

        def wrapper(self: Any, *args: Any) -> Any:
            result = base(self, *args)
            seen.append((name, length(result)))
            return result

        monkeypatch.setattr(NAPTS, name, wrapper)

    record("correct", float)
    record("advance", lambda result: result.step)
    run = train(classifier(), "napts", 25, norm="2", decomposition="layers", delta0=40.0, nonmonotone=0)
    corrections = [k for k, (name, _) in enumerate(seen) if name == "correct"]
    assert len(corrections) == 25
    for k in corrections:
        refused = seen[k][1] == 0
        assert refused == (k + 1 < len(seen) and seen[k + 1][0] == "advance")
    assert {seen[k][1] == 0 for k in corrections} == {True, False}
    assert (np.diff(run.losses) <= 0).all()


def test_the_window_lets_the_loss_rise_and_holds_it(train: Train) -> None:
    run = train(classifier(), "napts", 60, norm="2", decomposition="layers", delta0=4.0, nonmonotone=3)
    assert (np.diff(run.losses) > 0).any()
    assert run.losses.max() == run.losses[0]
    assert run.losses[-1] < 0.2 * run.losses[0]


@pytest.mark.ranks
@cases
def test_the_trajectory_is_that_on_one_rank(train: Train, settings: dict[str, Any]) -> None:
    together = train(classifier(), "napts", 12, **settings)
    alone = train(classifier(), "napts", 12, comm=MPI.COMM_SELF, **settings)
    assert np.abs(together.theta - alone.theta).max() <= 1e-8
    assert together.losses == pytest.approx(alone.losses, rel=1e-8)


@cases
def test_a_resumed_run_goes_on_to_the_last_bit(train: Train, copied: Any, settings: dict[str, Any]) -> None:
    kept: dict[str, Any] = {}

    def watch(context: Any, iteration: int) -> None:
        if iteration == 5:
            kept.update(copied(context.state()))

    whole = train(classifier(), "napts", 11, coarse_directions=3, watch=watch, **settings)
    assert len(kept["coarse"]["P"]) == 3
    rest = train(classifier(), "napts", 11, coarse_directions=3, start=whole.theta[5], state=kept, **settings)
    assert rest.theta.tobytes() == whole.theta[6:].tobytes()
    assert rest.losses.tobytes() == whole.losses[6:].tobytes()


def test_the_combination_is_the_best_of_the_last_displacements(train: Train, monkeypatch: Any) -> None:
    """Its conditions of optimality, with curvatures from the gradients of the trajectory."""
    from solvers.schwarz.apts import APTSWeights
    from solvers.schwarz.napts import NAPTS

    base, whole, seen = APTSWeights._correction, NAPTS._correction, list[dict[str, Any]]()

    def local(self: Any, x: Any, delta: float, s: Any) -> float:
        promise = float(base(self, x, delta, s))
        layout = self.objective.layout
        s_, g, x_ = (layout.gather(v).numpy().copy() for v in (s, self.g, x))
        seen.append({"s": s_, "g": g, "x": x_, "promise": promise, "radius": np.linalg.norm(s_) * delta / self.norm(s)})
        return promise

    def combined(self: Any, x: Any, delta: float, s: Any) -> float:
        decrease = float(whole(self, x, delta, s))
        seen[-1] |= {"found": self.objective.layout.gather(s).numpy().copy(), "decrease": decrease}
        return decrease

    monkeypatch.setattr(APTSWeights, "_correction", local)
    monkeypatch.setattr(NAPTS, "_correction", combined)
    train(classifier(), "napts", 14, coarse_directions=2, norm="2", decomposition="layers", local_steps=3)
    points = [seen[0]] + [b for a, b in pairwise(seen) if (a["x"] != b["x"]).any()]
    combinations = 0
    for k in range(2, len(points)):
        last, promise = points[k], points[k]["promise"]
        if not promise > 0:
            continue
        moves = [(b["x"] - a["x"], b["g"] - a["g"]) for a, b in pairwise(points[k - 2 : k + 1])]
        W = np.column_stack([last["s"], *(p for p, _ in moves)])
        Y = np.column_stack([y for _, y in moves])
        K = np.zeros((3, 3))
        K[0, 0] = 2 * (-last["g"] @ last["s"] - promise)
        K[0, 1:] = K[1:, 0] = last["s"] @ Y
        K[1:, 1:] = (W[:, 1:].T @ Y + Y.T @ W[:, 1:]) / 2
        c, *_ = np.linalg.lstsq(W, last["found"], rcond=None)
        assert W @ c == pytest.approx(last["found"], abs=1e-9 * np.linalg.norm(last["found"]))
        slopes, gram = W.T @ last["g"], W.T @ W
        assert last["decrease"] == pytest.approx(-slopes @ c - c @ K @ c / 2, rel=1e-7)
        residual, pull = K @ c + slopes, gram @ c
        multiplier = -(pull @ residual) / (pull @ pull)
        inside = last["radius"] - np.linalg.norm(last["found"])
        assert multiplier >= -1e-9 and inside >= -1e-9 * last["radius"]
        assert residual + multiplier * pull == pytest.approx(0, abs=1e-6 * np.linalg.norm(slopes))
        assert multiplier * inside == pytest.approx(0, abs=1e-6 * multiplier * last["radius"] + 1e-12)
        combinations += 1
    assert combinations >= 5
