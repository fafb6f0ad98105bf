"""Section classifiers: accuracy of trust-region methods and of torch's optimisers by work."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import classify
import numpy as np
import rivals
import torch
from mpi4py import MPI
from torch import Tensor

from ddml.data import files
from ddml.data.data_set import DataSet
from ddml.errors import InputError
from ddml.sampling.batches import Batches
from ddml.runs.history import History
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.data.scaling import Samples, Scaling

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
        task = Task.parse(case)
        dataset = files.load(task.data, MPI.COMM_SELF, task.samples)
        interval = max(-(-dataset.count // (3 * task.batch)), 3) if task.batch else 1
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
                print_row(label, marks, [_rival(rival, rate, task, dataset, seed, marks) for seed in seeds])
        dataset.free()
        print()


class Task(NamedTuple):
    """Data, network, samples of a batch (0: all), samples of the set, and further options of drivers/classify.py."""

    data: str
    network: str
    batch: int
    samples: int | None
    given: dict[str, str]

    @classmethod
    def parse(cls, case: str) -> Task:
        """From data:network:batch[:samples][:option=value]..., where data may be path/to/file.py:Name.

        Raises
        ------
        InputError
            For anything else.
        """
        words = case.split(":")
        if words[0].endswith(".py") and len(words) > 1:
            words[:2] = [":".join(words[:2])]
        given = dict(word.split("=", 1) for word in words if "=" in word)
        words = [word for word in words if "=" not in word]
        if not 3 <= len(words) <= 4 or not all(word.isdecimal() for word in words[2:]):
            raise InputError(f"a case must be data:network:batch[:samples][:option=value]..., got '{case}'")
        return cls(words[0], words[1], int(words[2]), int(words[3]) if words[3:] else None, given)

    def build(self, dataset: DataSet, seed: int) -> tuple[SimpleNamespace, ClassificationLoss, Samples]:
        """The driver's settings, the loss on the training samples, and the test samples.

        Raises
        ------
        InputError
            For an option that the driver has not.
        """
        known = {option.name: option for option in classify.OPTIONS}
        chosen: dict[str, Any] = {name: option.default for name, option in known.items()}
        for name, value in self.given.items():
            if name not in known:
                raise InputError(f"a case has the option '{name}', which there is not")
            chosen[name] = known[name].parse(value)
        settings = SimpleNamespace(**{**chosen, "network": self.network, "seed": seed, "batch_size": self.batch})
        loss, _, test = classify.build(settings, dataset, Scaling(dataset, settings.scaling, MPI.COMM_SELF))
        return settings, loss, test


def case_options(case: str) -> tuple[str, ...]:
    """Options of drivers/classify.py for a case, see :meth:`Task.parse`."""
    task = Task.parse(case)
    given = ["-data", task.data, "-network", task.network, "-batch_size", str(task.batch)]
    for name, value in task.given.items():
        given += [f"-{name}", value]
    return (*given, "-samples", str(task.samples)) if task.samples else tuple(given)


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


def _rival(name: str, rate: float, task: Task, dataset: DataSet, seed: int, marks: Sequence[float]) -> Row:
    settings, loss, test = task.build(dataset, seed)
    measure = TestSet(loss, test, MPI.COMM_SELF)
    return Row(train_rival(name, rate, settings, loss, measure, marks), 0)


def train_rival(
    name: str,
    rate: float,
    settings: Any,
    loss: ClassificationLoss,
    measure: Callable[[Tensor], Mapping[str, float]],
    marks: Sequence[float],
) -> History:
    """One of torch's optimisers on the batches of our solvers, see :func:`rivals.train`."""
    batches = None
    if 0 < settings.batch_size < loss.count:
        objective = Objective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF))
        batches = Batches(objective, settings, settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return rivals.train(name, rate, loss, batches, marks[-1], measure, marks)[0]
