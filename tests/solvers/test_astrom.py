"""Trust regions with curvature from a growing set of samples, against dense matrices."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import batches, classifier
from dense_newton import Logistic, data, dense_astrom, linear_loss, squares
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.sampling.nested import NestedSets
from solvers import Minimisation

Train = Callable[..., SimpleNamespace]

X, y = data(300, 14)
DENSE, START = Logistic(X, y), np.zeros(14)
TR = {"model": "hessian", "delta0": 1.0, "shrink": 0.25}


def loss() -> Any:
    return linear_loss(X, y, START)


def first_rows(seed: int = 0) -> Callable[[int], NDArray[np.int64]]:
    return lambda m: NestedSets(300, [m], seed).rows(0)


class Seen:
    """What the solver had before each step, and the ratio of each."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rows: list[NDArray[np.int64]] = []
        self.ratios: list[float] = []
        self.work: list[tuple[float, int, int, int]] = []

    def __call__(self, context: Any, iteration: int) -> None:
        self.sizes.append(context.sets.sizes[0])
        self.rows.append(context.sets.rows(0))
        self.ratios.append(context.radius.ratio)
        work = context.objective.work
        self.work.append((work.total, work.gradients, work.losses, work.products))


@pytest.mark.parametrize("rule", ["fixed", "cap", "sqrt"])
def test_rules_of_conjugate_gradients(train: Train, rule: str) -> None:
    # the losses of an eighth step and a ninth one differ by rounding, and so does what is accepted
    expected, _, ratios = dense_astrom(DENSE, first_rows(), START, 7, m=300, rule=rule)
    run = train(loss(), "tr", 7, cg_rule=rule, **TR)
    assert np.abs(run.theta - expected).max() <= 1e-10
    assert run.norms[-1] < 1e-3 * run.norms[0] and min(ratios) > 0.1


def test_products_decide_by_the_rule(train: Train) -> None:
    """Ten iterations a step under ``cap``, fewer under ``sqrt``; KSP's own options come first."""
    products = {}
    cases: dict[str, dict[str, Any]] = {
        "cap": {"cg_rule": "cap"}, "sqrt": {"cg_rule": "sqrt"}, "own": {"cg_rule": "cap", "tr_ksp_max_it": 2},
    }  # fmt: skip
    for name, settings in cases.items():
        found: list[int] = []
        train(
            loss(), "tr", 4, watch=lambda c, _, found=found: found.append(c.objective.work.products), **TR, **settings
        )
        products[name] = np.diff(found)
    assert products["cap"][1:].tolist() == [10] * 3  # the first ends at the boundary
    assert products["sqrt"].sum() < products["cap"].sum() and products["own"].max() <= 2
    assert products["sqrt"][0] < products["sqrt"][-1] <= 10


@pytest.mark.parametrize("rule", ["fixed", "cap", "sqrt"])
@pytest.mark.parametrize("steps", [1, 3])
def test_from_all_samples_it_is_the_trust_region_method_to_the_last_bit(train: Train, rule: str, steps: int) -> None:
    seen = Seen()
    astrom = train(loss(), "astrom", 9, fraction=1.0, cg_rule=rule, coarse_steps=steps, watch=seen)
    newton = train(loss(), "tr", 9, cg_rule=rule, **TR)
    assert astrom.theta.tobytes() == newton.theta.tobytes()
    assert astrom.losses.tobytes() == newton.losses.tobytes() and astrom.total.tolist() == newton.total.tolist()
    assert set(seen.sizes) == {300} and len(np.unique(astrom.losses)) > 6


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"fraction": 0.1}, {"m": 30}),
        ({"fraction": 0.02, "cg_rule": "cap", "sample_seed": 3}, {"m": 6, "rule": "cap"}),
        (
            {"fraction": 0.01, "enlarge_below": 0.25, "accept": 0.25, "growth": 2.0, "keep_radius": True},
            {"m": 3, "accept": 0.25, "enlarge": 0.25, "growth": 2.0, "keep": True},
        ),
        ({"fraction": 0.02, "delta0": 30.0, "growth": 1.01}, {"m": 6, "delta": 30.0, "growth": 1.01}),
    ],
)
def test_iterates_are_those_of_a_dense_implementation(
    train: Train, settings: dict[str, Any], dense: dict[str, Any]
) -> None:
    expected, sizes, ratios = dense_astrom(DENSE, first_rows(settings.get("sample_seed", 0)), START, 14, **dense)
    seen = Seen()
    run = train(loss(), "astrom", 14, watch=seen, **settings)
    last = int((run.norms[:-1] > 1e-7).sum())  # behind these steps rounding decides which are accepted
    assert np.abs(run.theta - expected)[: last + 1].max() <= 1e-10 and last > 7
    assert seen.sizes[:last] == sizes[:last] and len(set(sizes[:last])) > 1
    assert seen.ratios[1 : last - 1] == pytest.approx(ratios[: last - 2], rel=1e-3)
    if settings.get("keep_radius") or "delta0" in settings:
        assert (run.steps[1:] == 0).any()


def test_the_ratio_of_a_quadratic_loss_measures_the_curvature_that_was_missed(train: Train) -> None:
    values = X @ np.arange(14.0) + y
    quadratic, seen = linear_loss(X, values, START, squares), Seen()
    run = train(quadratic, "astrom", 6, fraction=0.15, delta0=99.0, enlarge_below=0.5, watch=seen)
    H, checked = X.T @ X / 300, 0
    for k in range(6):
        s, Z = run.theta[k + 1] - run.theta[k], X[seen.rows[k]]
        if run.losses[k] - run.losses[k + 1] > 1e-6:
            missed = (s @ H @ s) / (s @ (Z.T @ Z) @ s / len(Z))
            assert seen.ratios[k + 1] == pytest.approx(2 - missed, rel=1e-6)
            checked += abs(missed - 1) > 0.01
    assert checked >= 3


def test_samples_that_say_nothing_are_enlarged_until_they_are_all(train: Train) -> None:
    """The first 30 samples of the permutation know next to nothing of the curvature of the others."""
    few = NestedSets(300, [30]).rows(0)
    Z = X.copy()
    Z[few, 1:] *= 0.05
    bad, seen = linear_loss(Z, y, START), Seen()
    run = train(bad, "astrom", 25, delta0=50.0, growth=2.0, watch=seen)
    assert seen.sizes[0] == 30 and seen.sizes[-1] == 300 and (np.diff(seen.sizes) >= 0).all()
    assert set(seen.sizes) == {30, 60, 120, 240, 300} and (run.steps[1:] == 0).any()
    assert (np.diff(run.losses) <= 0).all()
    assert np.abs(run.theta[-1] - Logistic(Z, y).minimiser()).max() <= 1e-5
    for k in range(1, len(seen.sizes)):
        grew = seen.sizes[k] > seen.sizes[k - 1]
        assert grew == (seen.ratios[k] <= 0.75 and seen.sizes[k - 1] < 300)


def test_samples_that_say_everything_stay_few(train: Train) -> None:
    """All samples are the same ones: any of them have the whole curvature, and the ratio of a quadratic loss is 1."""
    seen = Seen()
    run = train(linear_loss(np.tile(X[:1], (60, 1)), np.ones(60), START, squares), "astrom", 4, watch=seen)
    assert set(seen.sizes) == {6} and run.losses[-1] < 1e-12 * run.losses[0]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_coarse_steps_reach_the_minimiser(train: Train, steps: int) -> None:
    seen = Seen()
    run = train(loss(), "astrom", 30, coarse_steps=steps, fraction=0.05, watch=seen)
    assert np.abs(run.theta[-1] - DENSE.minimiser()).max() <= 1e-7
    assert (np.diff(run.losses) <= 0).all() and seen.sizes[0] == 15 < seen.sizes[-1]


def test_two_coarse_steps_are_newton_steps_on_the_consistent_loss(train: Train) -> None:
    few = NestedSets(300, [150]).rows(0)
    start, seen = 0.8 * DENSE.minimiser(), Seen()
    run = train(loss(), "astrom", 1, coarse_steps=2, fraction=0.5, delta0=50.0, cg_rule="cap", tr_ksp_max_it=60,
                start=start, watch=seen)  # fmt: skip
    coarse, g = DENSE.on(few), DENSE.gradient(start)
    theta, dg = start.copy(), g - coarse.gradient(start)
    for _ in range(2):
        theta -= np.linalg.solve(coarse.hessian(theta), coarse.gradient(theta) + dg)
    assert np.abs(run.theta[1] - theta).max() <= 1e-8
    decrease = coarse.value(start) - coarse.value(theta) - dg @ (theta - start)
    assert seen.ratios[1] == pytest.approx((DENSE.value(start) - DENSE.value(theta)) / decrease, rel=1e-8)


def test_coarse_steps_stay_in_the_trust_region(train: Train) -> None:
    run = train(loss(), "astrom", 5, coarse_steps=4, fraction=0.3, delta0=0.2)
    lengths = np.linalg.norm(np.diff(run.theta, axis=0), axis=1)
    radius = 0.2 * 2.0 ** np.arange(5)
    assert (lengths <= radius * (1 + 1e-9)).all() and lengths[0] >= 0.198


@pytest.mark.parametrize("steps", [1, 2])
def test_evaluations_on_some_samples_are_charged_for_those(train: Train, steps: int) -> None:
    seen, given = Seen(), loss()
    train(given, "astrom", 8, coarse_steps=steps, fraction=0.04, watch=seen)
    units = given.charges
    for k in range(8):
        total, gradients, losses, products = np.subtract(seen.work[k + 1], seen.work[k])
        part = seen.sizes[k] / 300
        coarse = (gradients - 1) + losses * units.evaluation(gradient=False) + products * units.hessian()
        assert total == pytest.approx(1 + part * coarse, rel=1e-12)
        assert products > 0 and (steps > 1 or (gradients == 1 and losses == 0))
    assert len(set(seen.sizes)) > 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_goes_on_from_the_middle_to_the_last_bit(train: Train, copied: Callable[[Any], Any], steps: int) -> None:
    kept: list[Any] = []

    def watch(context: Any, iteration: int) -> None:
        if iteration == 4:
            kept.append(copied(context.state()))

    settings = {"fraction": 0.02, "coarse_steps": steps, "sample_seed": 2, "growth": 1.5}
    whole = train(loss(), "astrom", 10, watch=watch, **settings)
    sizes = kept[0]["sets"]["sizes"]
    rest = train(loss(), "astrom", 10, start=whole.theta[4], state=kept[0], **settings)
    assert rest.theta.tobytes() == whole.theta[5:].tobytes() and len(rest.theta) == 6
    assert 6 < sizes[0] < 300


@pytest.mark.ranks
@pytest.mark.parametrize("settings", [{}, {"coarse_steps": 2}, {"model": "gauss_newton", "norm": "kfac"}])
def test_the_iterates_are_the_same_on_any_number_of_ranks(train: Train, settings: dict[str, Any]) -> None:
    make = classifier if "norm" in settings else loss
    together, alone = (
        train(make(), "astrom", 15, comm=comm, blocks=6, fraction=0.05, gathered=True, **settings)
        for comm in (MPI.COMM_WORLD, MPI.COMM_SELF)
    )
    assert together.theta.tobytes() == alone.theta.tobytes()
    assert together.losses[-1] < 0.9 * together.losses[0]


def test_other_samples_keep_their_part_in_another_order(train: Train) -> None:
    whole, seen, numbers = classifier(), Seen(), list[tuple[int, int]]()
    parts = batches(whole, 40, 3)

    def watch(context: Any, iteration: int) -> None:
        seen(context, iteration)
        numbers.append((context.sets.number, context.sets.count))
        if iteration == 2:
            context.objective.replace(parts[1])
        if iteration == 4:
            context.objective.replace(whole)

    train(parts[0], "astrom", 6, fraction=0.25, enlarge_below=1e-4, growth=1.5, watch=watch)
    assert numbers == [(0, 40)] * 3 + [(1, 40)] * 2 + [(2, 60)] * 2
    assert not np.array_equal(seen.rows[2], seen.rows[3])
    parts_of = [size / count for size, (_, count) in zip(seen.sizes, numbers, strict=True)]
    assert parts_of[0] == 0.25 and parts_of[3] == pytest.approx(parts_of[2], abs=0.01)
    assert parts_of[5] == pytest.approx(parts_of[4], abs=0.01) and parts_of[4] < 1


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": 0}, "fraction must be more than 0"),
        ({"fraction": 1.5}, "fraction must be at most 1, got 1.5"),
        ({"fraction": "nan"}, "fraction must be more than 0, got nan"),
        ({"fraction": "ten"}, "fraction must be a number"),
        ({"growth": 1}, "growth must be more than 1"),
        ({"growth": 0.5}, "growth must be more than 1"),
        ({"enlarge_below": 0.1, "accept": 0.2}, "enlarge_below must not be less than -.*accept, got 0.1 and 0.2"),
        ({"enlarge_below": -1}, "enlarge_below must be 0 or more"),
        ({"coarse_steps": 0}, "coarse_steps must be 1 or more"),
        ({"cg_rule": "none"}, "cg_rule must be one of fixed, cap, sqrt"),
        ({"model": "first"}, "model must be one of hessian, gauss_newton"),
        ({"norm": "modular"}, "norm must be one of 2, kfac"),
        ({"norm": "kfac"}, "has no K-FAC norm"),
        ({"accept": 0.8, "enlarge_below": 0.9}, "accept and .* must be less than -.*grow_above"),
        ({"sample_seed": -1}, "sample_seed must be 0 or more"),
    ],
)
def test_bad_options_are_refused(train: Train, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        train(loss(), "astrom", 1, **settings)
    assert "\n" not in str(error.value)


def test_the_state_of_other_samples_is_refused(train: Train, copied: Callable[[Any], Any]) -> None:
    kept: list[Any] = []
    train(loss(), "astrom", 2, watch=lambda context, _: kept.append(copied(context.state())))
    with pytest.raises(InputError, match="nested sets of 300 samples, there are 299"):
        train(linear_loss(X[1:], y[1:], START), "astrom", 2, state=kept[-1])


def test_a_user_sees_the_samples(comm: MPI.Comm, prefix: str, capfd: pytest.CaptureFixture[str]) -> None:
    made = Minimisation(loss(), "astrom", comm, prefix)
    assert made.context is not None
    assert any("30 of 300 samples at first, on 4 times as many" in note for note in made.context.notes)
    viewer = PETSc.Viewer().createASCII("stdout", comm=comm)
    made.context.view(made.tao, viewer)
    viewer.destroy()
    made.destroy()
    if comm.rank == 0:
        shown = capfd.readouterr().out
        assert "fraction: 0.1" in shown and "curvature: nested sets of 30 of 300 samples" in shown


@pytest.mark.parametrize("local", ["astrom", "newton"])
@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("aspqn", {}),
        ("apts_weights", {"norm": "2", "decomposition": "layers"}),
        ("apts_data", {"norm": "2", "subdomains": 3}),
    ],
)
def test_they_are_local_solvers(train: Train, solver: str, settings: dict[str, Any], local: str) -> None:
    settings = {"local_steps": 2, "gathered": True, **settings}
    run, other = (train(classifier(), solver, 3, local_solver=name, blocks=6, **settings) for name in (local, "lbfgs"))
    assert run.losses[-1] < 0.9 * run.losses[0]
    if MPI.COMM_WORLD.size > 1:
        alone = train(classifier(), solver, 3, comm=MPI.COMM_SELF, local_solver=local, blocks=6, **settings)
        assert run.losses == pytest.approx(alone.losses, rel=1e-8)
    assert np.abs(run.losses - other.losses[: len(run.losses)]).max() > 1e-6


def test_single_precision(train: Train) -> None:
    run = train(classifier(dtype=torch.float32), "astrom", 30, fraction=0.2)
    assert (np.diff(run.losses) <= 0).all() and run.losses[-1] < 0.05 * run.losses[0]
