"""Section classifiers: accuracy of trust-region methods and of torch's optimisers by work."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import classify
import numpy as np
import rivals
import torch
from mpi4py import MPI

from ddml.data import files
from ddml.sampling.batches import Batches
from ddml.runs.history import History
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.problems.classification import TestSet
from ddml.data.scaling import Scaling

from .tools import LAUNCH, finished_run

NORMS: dict[str, tuple[str, ...]] = {"modular norm": (), "2-norm": ("-norm", "2")}
OURS: dict[str, Sequence[str]] = {
    "tr modular norm": ("-solver", "tr"),
    "tr 2-norm": ("-solver", "tr", "-norm", "2"),
    "tr infinity norm": ("-solver", "tr", "-norm", "infinity"),
    "tr K-FAC norm": ("-solver", "tr", "-norm", "kfac"),
    "tr K-FAC norm L-BFGS": ("-solver", "tr", "-norm", "kfac", "-model", "lbfgs", "-memory", "1"),
    "tr K-FAC norm Gauss-Newton": (
        *("-solver", "tr", "-norm", "kfac", "-model", "gauss_newton", "-curvature_fraction", "0.1"),
        *("-tr_ksp_max_it", "8"),
    ),
    "tr 2-norm L-SR1": ("-solver", "tr", "-model", "sr1"),
    "tr 2-norm L-BFGS": ("-solver", "tr", "-model", "lbfgs"),
    "apts_weights modular norm": ("-solver", "apts_weights"),
    "apts_weights 2-norm": ("-solver", "apts_weights", "-norm", "2"),
    **{
        f"{method} {n} tensor groups {norm}": (
            *("-solver", method, "-decomposition", "random", "-subdomains", str(n), *given),
        )
        for norm, given in NORMS.items()
        for method in ("apts_weights", "napts")
        for n in (2, 4, 6)
    },
    **{
        f"apts_data {n} parts {norm}": ("-solver", "apts_data", "-subdomains", str(n), *given)
        for norm, given in NORMS.items()
        for n in (2, 4, 6)
    },
    "napts modular norm": ("-solver", "napts"),
    "napts 2-norm": ("-solver", "napts", "-norm", "2"),
}
RIVALS = {
    "adam": (1e-3, 3e-3, 1e-2),
    "sgd": (0.01, 0.1),
    "muon": (0.003, 0.01, 0.03),
    "lbfgs": (1.0,),
}


class Row(NamedTuple):
    """A run: its history, and how many trials its trust region has rejected."""

    history: History
    rejected: float


def classifiers(settings: Any) -> None:
    """Test accuracy and loss of the batch at some numbers of work units, medians over the seeds."""
    marks = [float(m) for m in settings.marks.split(",")]
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    print("\n## Test accuracy (%) / loss of the batch, by work units; ms a work unit; one rank\n")
    for case in settings.classifiers.split(","):
        name, network, batch, samples = _parts(case)
        dataset = files.load(name, MPI.COMM_SELF, samples)
        interval = max(-(-dataset.count // (3 * batch)), 3) if batch else 1
        dataset.free()
        print(f"### {case}\n\n| method | " + " | ".join(f"{m:g}" for m in marks) + " | critical | rejected | ms |")
        print("|---|" + "---|" * (len(marks) + 3), flush=True)
        for label, given in OURS.items():
            if not _wanted(settings, label):
                continue
            options = [*case_options(case), "-max_work", str(marks[-1]), "-error_interval", str(interval), *given]
            print_row(label, marks, [_ours((*options, "-seed", str(seed))) for seed in seeds])
        for rival, rates in RIVALS.items():
            for rate in rates:
                label = f"torch {rival} {rate:g}"
                if not _wanted(settings, label):
                    continue
                runs = [_rival(rival, rate, name, samples, network, batch, seed, marks) for seed in seeds]
                print_row(label, marks, runs)
        print()


def _parts(case: str) -> tuple[str, str, int, int | None]:
    """Data, network, batch size and samples of data:network:batch[:samples]."""
    name, network, batch, *rest = case.split(":")
    return name, network, int(batch), int(rest[0]) if rest else None


def case_options(case: str) -> tuple[str, ...]:
    """Options of drivers/classify.py for data:network:batch[:samples]."""
    name, network, batch, samples = _parts(case)
    given = ("-data", name, "-network", network, "-batch_size", str(batch))
    return (*given, "-samples", str(samples)) if samples else given


def _wanted(settings: Any, label: str) -> bool:
    return any(word in label for word in settings.methods.split(","))


def print_row(label: str, marks: Sequence[float], runs: Sequence[Row]) -> None:
    """One method: medians over its runs."""
    cells = []
    for mark in marks:
        found = [_at(run.history, mark) for run in runs]
        accuracy, loss = (statistics.median(column) for column in zip(*found, strict=True))
        cells.append(f"{100 * accuracy:.1f} / {loss:.1e}")
    critical = statistics.median(run.history.last("work_critical") for run in runs)
    rejected = statistics.median(run.rejected for run in runs)
    cost = statistics.median(1e3 * _seconds(run.history) for run in runs)
    print(f"| {label} | " + " | ".join(cells) + f" | {critical:.0f} | {rejected:.0f} | {cost:.0f} |", flush=True)


def _at(history: History, mark: float) -> tuple[float, float]:
    """Accuracy and loss when so many work units were first spent: of the measurement there, or the last before."""
    last = int(np.searchsorted(history["work"], mark))
    known = np.flatnonzero(np.isfinite(history["accuracy"][: last + 1]))
    row = int(known[-1]) if len(known) else 0
    return float(history["accuracy"][row]), float(history["loss"][min(last, len(history) - 1)])


def _seconds(history: History) -> float:
    """Of a work unit, by the iterations without a measurement at either end, if there are some."""
    measured = np.isfinite(history["accuracy"])
    chosen = ~(measured[1:] | measured[:-1])
    chosen |= not chosen.any()
    return float(np.diff(history["time"])[chosen].sum() / np.diff(history["work"])[chosen].sum())


def _ours(given: Sequence[str]) -> Row:
    program = str(Path(classify.__file__))
    limits = ("-max_it", "10000000", "-progress", "none", "-checkpoint_interval", "0")
    done = finished_run([*LAUNCH, "-n", "1", sys.executable, "-m", "mpi4py", program, *given, *limits])
    return Row(done.history, done.solver["radius"]["rejected"])


def _rival(
    name: str, rate: float, file: str, samples: int | None, network: str, batch: int, seed: int, marks: Sequence[float]
) -> Row:
    defaults = {option.name: option.default for option in classify.OPTIONS}
    chosen = {**defaults, "network": network, "seed": seed, "batch_size": batch}
    settings = SimpleNamespace(**chosen)
    dataset = files.load(file, MPI.COMM_SELF, samples)
    loss, _, test = classify.build(settings, dataset, Scaling(dataset, settings.scaling, MPI.COMM_SELF))
    batches = None
    if 0 < batch < dataset.count:
        batches = Batches(Objective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF)), settings, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        measure = TestSet(loss, test, MPI.COMM_SELF)
        return Row(rivals.train(name, rate, loss, batches, marks[-1], measure, marks)[0], 0)
