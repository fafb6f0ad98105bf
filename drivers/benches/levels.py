"""Section levels: solvers over the depth of a network against undivided ones, by work."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.data import files
from ddml.data.data_set import DataSet
from ddml.data.scaling import Samples
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.runs.history import History
from ddml.sampling.batches import Batches
from solvers import Minimisation, solver_class
from solvers.multilevel.adagrad import MultilevelAdaGrad
from solvers.multilevel.depth import RMTR, DepthSolver

from .classifiers import Task, train_rival

BASE = "tr L-SR1, gamma y'y / s'y"
UNDIVIDED: dict[str, Mapping[str, Any]] = {
    BASE: {"solver": "tr", "model": "sr1"},
    "tr L-BFGS": {"solver": "tr", "model": "lbfgs"},
    "tr modular norm": {"solver": "tr"},
}
RATES = (0.003, 0.01)
LEVELS: dict[str, Mapping[str, Any]] = {
    "rmtr, refinement 2": {"solver": "rmtr", "refinement": 2},
    "rmtr, refinement 16": {"solver": "rmtr", "levels": 2, "refinement": 16},
    "rmtr, no cascade, 3 levels": {"solver": "rmtr", "cascade": False, "levels": 3},
    "rmtr, no cascade, refinement 16": {"solver": "rmtr", "cascade": False, "levels": 2, "refinement": 16},
    "rmtr, no cascade, shared radius, 3 levels": {
        "solver": "rmtr",
        "cascade": False,
        "levels": 3,
        "correction_radius": "shared",
    },
    "mgopt": {"solver": "mgopt"},
    "cascade L-BFGS": {"solver": "cascade"},
    "cascade modular norm": {"solver": "cascade", "model": "first"},
}
ADAGRADS: dict[str, Mapping[str, Any]] = {
    "adagrad": {"solver": "adagrad"},
    "mladagrad, refinement 2": {"solver": "mladagrad", "refinement": 2},
    "mladagrad, 3 levels": {"solver": "mladagrad", "levels": 3},
    "mladagrad, refinement 16": {"solver": "mladagrad", "levels": 2, "refinement": 16},
    "asadagrad": {"solver": "asadagrad"},
}
# options of a case that are for the solvers with levels that have them
OF_LEVELS = {option.name for solver in (RMTR, MultilevelAdaGrad) for option in solver.options}

Run = Callable[[int, Sequence[float]], "Trained"]  # from a seed, and losses at which the accuracy is of interest

_prefixes = (f"levels{number}_" for number in itertools.count())


class Trained(NamedTuple):
    """A run.

    Attributes
    ----------
    history : History
        Where it was measured: ``work``, ``time`` without measurements, the loss on all samples of the undivided network
        as ``test_loss``, and ``accuracy`` at the marks and where the loss first came to one of the targets.
    cycles : tuple of int
        Corrections that were tried, and how many of them were refused.
    hierarchy : str
        The levels, in words.
    """

    history: History
    cycles: tuple[int, int] = (0, 0)
    hierarchy: str = ""


def levels(settings: Any) -> None:
    """Units to the losses of the undivided trust region with L-SR1, medians over the seeds.

    Raises
    ------
    InputError
        For a case that is none.
    """
    marks = [float(m) for m in settings.marks.split(",")]
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    print("\n## Levels of depth; one rank\n")
    print("Test accuracy (%) / loss on all training samples after so many work units; the units to the losses that")
    print("the first row has there, in brackets how many times less that is, and the accuracy there; corrections")
    print("tried, and refused; seconds of a work unit over those of the first row.\n")
    for case in settings.levels_cases.split(","):
        task = Task.parse(case)
        own = {name: value for name, value in task.given.items() if name in OF_LEVELS}
        task = task._replace(given={name: value for name, value in task.given.items() if name not in own})
        dataset = files.load(task.data, MPI.COMM_SELF, task.samples)
        print(f"### {case}, seeds {settings.seeds}\n")
        print(f"| method | {' | '.join(f'{m:g}' for m in marks)} | {' | '.join(f'to {m:g}' for m in marks)} ", end="")
        print("| tried, refused | seconds |\n|---|" + "---|" * (2 * len(marks) + 2), flush=True)
        base: list[Trained] = []
        hierarchies: dict[str, None] = {}
        for label, run in _methods(task, own, dataset, marks).items():
            if base and not any(word in label for word in settings.levels_methods.split(",")):
                continue
            runs = [run(seed, _targets(base[i].history, marks) if base else []) for i, seed in enumerate(seeds)]
            base = base or runs
            hierarchies |= dict.fromkeys(run.hierarchy for run in runs if run.hierarchy)
            print_row(label, marks, runs, base)
        for words in hierarchies:
            print("\n- " + "; ".join(line.strip() for line in words.splitlines()), flush=True)
        dataset.free()
        print()


def _methods(task: Task, own: Mapping[str, Any], dataset: DataSet, marks: Sequence[float]) -> dict[str, Run]:
    """The runs, by the method's name."""
    found: dict[str, Run] = {}
    for label, given in {**UNDIVIDED, **LEVELS, **ADAGRADS}.items():
        # a method's own levels come first
        kind = solver_class(given["solver"])
        known = {option.name for option in kind.options} if issubclass(kind, DepthSolver) else set()
        chosen = {**{name: value for name, value in own.items() if name in known}, **given}
        found[label] = partial(_ours, task, chosen, dataset, marks)
        if label == list(UNDIVIDED)[-1]:
            found |= {f"torch adam {rate:g}": partial(_adam, task, rate, dataset, marks) for rate in RATES}
    return found


def _targets(history: History, marks: Sequence[float]) -> list[float]:
    """The losses on all samples at the marks."""
    return [at(history, "test_loss", mark) for mark in marks]


def _ours(
    task: Task,
    given: Mapping[str, Any],
    dataset: DataSet,
    marks: Sequence[float],
    seed: int,
    targets: Sequence[float],
) -> Trained:
    """A run of a solver of ours, measured wherever a further work unit has been spent, or at each iteration."""
    settings, loss, test = task.build(dataset, seed)
    name, prefix = str(given["solver"]), next(_prefixes)
    options = {f"{prefix}{key}": value for key, value in given.items() if key != "solver"}
    for key, value in options.items():
        PETSc.Options().setValue(key, value)
    chosen = solver_class(name).decompose(loss, prefix)
    made = Minimisation(
        loss, name, MPI.COMM_SELF, prefix, subdomains=chosen, blocks=settings.summation_blocks,
        samples=settings.batch_size, limit=settings.summation_limit, fmin=0.0,
    )  # fmt: skip
    objective, context = made.objective, made.context
    depth = context if isinstance(context, DepthSolver) else None
    moving = Batches(objective, settings, seed) if 0 < settings.batch_size < loss.count else None
    measure = _measure(loss, test)
    history, left, above = History(), list(marks), list(targets)
    aside, begin, next_unit = 0.0, time.perf_counter(), 0.0

    def monitor(tao: PETSc.TAO) -> None:
        nonlocal aside, next_unit
        iteration, value, *_ = tao.getSolutionStatus()
        started, work = time.perf_counter(), objective.work.total
        theta, known = objective.parameters(made.x), math.nan
        if moving is None and not (depth is not None and depth.climbing):
            known = value
        elif work >= next_unit:
            known = loss.value(theta.to(loss.dtype))
            next_unit = math.floor(work) + 1
        reached = [target for target in above if known <= target]
        columns = measure(theta) if reached or work >= left[0] else {"test_loss": known}
        above[:] = [target for target in above if target not in reached]
        left[:] = [mark for mark in left if mark > work]
        history.append(iteration=iteration, time=started - begin - aside, work=work, loss=value, **columns)
        aside += time.perf_counter() - started
        if not left:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)
        elif moving is not None and iteration and iteration % moving.interval == 0:
            moving.move(theta)

    made.tao.setMonitor(monitor)
    made.tao.setMaximumIterations(10**7)
    made.tao.solve()
    cycles, words = (0, 0), ""
    if depth is not None:
        cycles, words = (depth.cycle.tried, depth.cycle.refused), f"{depth.hierarchy!r}"
    made.destroy()
    for key in options:
        PETSc.Options().delValue(key)
    return Trained(history, cycles, words)


def _adam(
    task: Task, rate: float, dataset: DataSet, marks: Sequence[float], seed: int, targets: Sequence[float]
) -> Trained:
    """A run of torch's Adam, measured at each work unit."""
    settings, loss, test = task.build(dataset, seed)
    units = [float(unit) for unit in range(1, math.ceil(marks[-1]))]
    return Trained(train_rival("adam", rate, settings, loss, _measure(loss, test), sorted({*units, *marks})))


def _measure(loss: ClassificationLoss, test: Samples) -> Callable[[Tensor], dict[str, float]]:
    """From the parameters (n,) to the loss on all training samples, as ``test_loss``, and the test accuracy."""
    accuracy = TestSet(loss, test, MPI.COMM_SELF)

    def measure(theta: Tensor) -> dict[str, float]:
        found = loss.value(theta.to(loss.dtype))
        return {"test_loss": found, "accuracy": accuracy(theta)["accuracy"]}

    return measure


def at(history: History, column: str, mark: float) -> float:
    """A column where so many units were first spent, or the last before that is known; NaN if none is."""
    last = int(np.searchsorted(history["work"], mark))
    known = np.flatnonzero(np.isfinite(history[column][: last + 1]))
    return float(history[column][known[-1]]) if len(known) else math.nan


def units_to(history: History, loss: float) -> float:
    """The units after which the loss on all samples is first so small; infinite if it never is."""
    below = np.flatnonzero(history["test_loss"] <= loss)
    return float(history["work"][below[0]]) if len(below) else math.inf


def print_row(label: str, marks: Sequence[float], runs: Sequence[Trained], base: Sequence[Trained]) -> None:
    """One method: medians over its runs, each against the first method's of the same seed."""
    cells = []
    for mark in marks:
        accuracy, loss = (statistics.median(at(r.history, c, mark) for r in runs) for c in ("accuracy", "test_loss"))
        cells.append(f"{100 * accuracy:.1f} / {loss:.1e}")
    for mark in marks:
        targets = [at(run.history, "test_loss", mark) for run in base]
        each = [units_to(r.history, t) for r, t in zip(runs, targets, strict=True)]
        units = statistics.median(each)
        # the loss of the first row does not fall at each step: it may have been as small before the mark
        first = statistics.median(units_to(r.history, t) for r, t in zip(base, targets, strict=True))
        # at the mark the first row stands where it came to its loss
        places = [mark] * len(each) if runs is base else each
        there = [at(r.history, "accuracy", u) for r, u in zip(runs, places, strict=True) if math.isfinite(u)]
        words = f"{units:.1f} ({first / units:.2f}) {100 * statistics.median(there):.1f}" if there else ""
        cells.append(words if math.isfinite(units) else "-")
    tried, refused = (sum(run.cycles[i] for run in runs) for i in (0, 1))
    price = _price(runs) / _price(base)
    print(f"| {label} | {' | '.join(cells)} | {tried}, {refused} | {price:.2f} |", flush=True)


def _price(runs: Sequence[Trained]) -> float:
    """Seconds of a work unit."""
    return statistics.median(run.history.last("time") / run.history.last("work") for run in runs)
