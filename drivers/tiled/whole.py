"""The run file of a divided classifier: parameters of all networks, their histories and what they say of the samples.

Its parameters are those of the last phase that is finished. Its state has

- ``phases``: those that are finished, separated by commas;
- ``nets``: of each local network its ``history`` by column, ``reason``, and accuracies by split;
- ``logits``: by split, (N, B, K); ``labels``: by split, (B,); of ``folds`` those of the training samples by networks
  that were trained without them, and their number;
- ``inputs``: of the ``image`` and of all ``tiles``, see `ddml.data.inputs.Inputs`;
- ``coarse``: of the coarse net its ``words``, ``link``, ``decay`` and ``losses``;
- ``local``, ``coarse_theta``: parameters behind those phases, where a later one has changed them.
"""

from __future__ import annotations

from common import training  # noqa: F401  # first: it initialises PETSc

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn

from ddml.errors import RunFileError
from ddml.layout import ParameterLayout
from ddml.losses.modules import trained
from ddml.parameters import Parameter, parameter_table
from ddml.runs import run_file
from ddml.runs.history import History
from ddml.vectors import write

from .folds import FOLDS, Folds
from .nets import Outcome
from .outputs import TEST, TRAIN, Outputs

PHASES = ("local", "coarse", "coherent")
Vector = NDArray[np.float64]
NONE: Any = np.empty(0)


def table_of(modules: Sequence[nn.Module], coarse: nn.Module | None = None) -> tuple[Parameter, ...]:
    """The trained parameters of all networks, one behind the other, and those of the coarse net."""
    parts = {f"nets.{i}": module for i, module in enumerate(modules)} | ({} if coarse is None else {"coarse": coarse})
    return parameter_table([(f"{part}.{name}", p.shape) for part, m in parts.items() for name, p in trained(m)])


def numbers_of(module: nn.Module) -> Vector:
    """The trained parameters of a network (n,)."""
    return np.concatenate([p.detach().double().reshape(-1).cpu().numpy() for _, p in trained(module)])


@dataclass
class Whole:
    """What a run of phases has come to; the same on every rank.

    Attributes
    ----------
    local, coarse_theta, coherent : ndarray
        Parameters of the local networks (n,) and of the coarse net, and of both behind the coherent phase; empty where
        there are none.
    phases : list of str
        Those that are finished.
    nets : list of dict
        Of each local network its history, the reason why it stopped, and its accuracies.
    logits, labels : dict of str to ndarray
        Of each split, (N, B, K) and (B,).
    folds : int
        How many there are.
    inputs : dict
        What the networks are given.
    coarse : dict
        What the coarse net is.
    history : History
        One row behind each phase.
    """

    local: Vector
    coarse_theta: Vector = field(default_factory=lambda: NONE)
    coherent: Vector = field(default_factory=lambda: NONE)
    phases: list[str] = field(default_factory=list)
    nets: list[dict[str, Any]] = field(default_factory=list)
    logits: dict[str, NDArray[Any]] = field(default_factory=dict)
    labels: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    folds: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    coarse: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @classmethod
    def begun(cls, modules: Sequence[nn.Module]) -> Whole:
        """Nothing is trained."""
        made = cls(np.concatenate([numbers_of(module) for module in modules]))
        made.history.append(iteration=0, time=0.0, work=0.0, work_critical=0.0)
        return made

    @classmethod
    def read(cls, path: str, modules: Sequence[nn.Module], comm: MPI.Comm) -> Whole:
        """That of a run file. Collective on ``comm``.

        Raises
        ------
        RunFileError
            A file that is missing, damaged, of other networks or of an undivided one; one that lacks the outputs of a
            network.
        """
        header, table = run_file.inspect(path, comm), table_of(modules)
        stored, count = [(p.name, tuple(p.shape)) for p in header.parameters], len(table)
        local = [(p.name, tuple(p.shape)) for p in table]
        if stored[:count] != local or not all(name.startswith("coarse.") for name, _ in stored[count:]):
            raise RunFileError(
                f"{path} holds {header.size} parameters of other networks than these {len(modules)}, of "
                f"{table[-1].range.stop}: it goes on with the tiles, the widths and the network it was written with"
            )
        layout = ParameterLayout(parameter_table(stored), comm)
        x = layout.vector()
        try:
            state, history = run_file.read(path, x)
            run_file.check_values(path, x, history)
            theta = layout.gather(x).numpy().copy()
        finally:
            x.destroy()
        try:
            made = cls._of(state, theta, table[-1].range.stop, history)
            made._check(path, len(modules))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, RunFileError):
                raise
            raise RunFileError(f"{path} does not say what its networks have come to: {error}") from error
        return made

    @classmethod
    def _of(cls, state: Mapping[str, Any], theta: Vector, size: int, history: History) -> Whole:
        phases = [phase for phase in PHASES if phase in state["phases"].split(",")]
        both = (theta[:size], theta[size:])
        local, coarse = (state["local"], state["coarse_theta"]) if "coherent" in phases else both
        return cls(
            local, coarse, theta if "coherent" in phases else NONE, phases, state["nets"], state["logits"],
            state["labels"], int(state.get("folds", 0)), state.get("inputs", {}), state["coarse"], history,
        )  # fmt: skip

    def _check(self, path: str, networks: int) -> None:
        if "local" not in self.phases:
            return
        found = {len(self.nets), *(len(logits) for logits in self.logits.values())}
        if found != {networks}:
            raise RunFileError(
                f"{path} has outputs of {min(found)} networks, there are {networks}: restart from a copy"
            )
        if (self.folds > 0) != (FOLDS in self.logits):
            raise RunFileError(f"{path} has {self.folds} folds and other outputs: restart from a copy")

    @property
    def theta(self) -> Vector:
        """Of the classifier that the phases have come to."""
        return self.coherent if len(self.coherent) else np.concatenate([self.local, self.coarse_theta])

    @property
    def splits(self) -> dict[str, Outputs]:
        """What the local networks say of the samples of each split."""
        return {name: Outputs(logits, self.labels[name]) for name, logits in self.logits.items()}

    def finish(self, phase: str, **row: float) -> None:
        """Note the end of a phase; later ones, of another run, have not been. The row is the history's."""
        self.phases = [*(p for p in self.phases if PHASES.index(p) < PHASES.index(phase)), phase]
        number = PHASES.index(phase) + 1
        self.history.truncate(int((self.history["iteration"] < number).sum()))
        for name in ("time", "work", "work_critical"):
            row[name] += self.history.last(name)
        self.history.append(iteration=number, **row)
        if phase != "coherent":
            self.coherent = NONE
        if phase == "local":
            self.coarse_theta, self.coarse = NONE, {}

    def complete(self, phase: str, accuracy: float) -> None:
        """Write the accuracy behind a phase to its row of the history."""
        rows = {name: self.history[name] for name in {*self.history.used(), "accuracy"}}
        rows["accuracy"][rows["iteration"] == PHASES.index(phase) + 1] = accuracy
        self.history = History.from_columns(rows)

    def forget(self, phase: str) -> None:
        """Forget a phase and those behind it, which are to be done anew."""
        self.phases = [p for p in self.phases if PHASES.index(p) < PHASES.index(phase)]
        self.history.truncate(int((self.history["iteration"] <= PHASES.index(phase)).sum()))
        self.coherent = NONE
        if phase != "coherent":
            self.coarse_theta, self.coarse = NONE, {}

    def check_like(
        self, path: str, mine: Mapping[str, Any], labels: Mapping[str, NDArray[np.int64]], comm: MPI.Comm
    ) -> None:
        """Refuse a run file of other tiles, networks, classes, scaling or samples. Collective.

        Raises
        ------
        RunFileError
            If it is.
        """
        then = run_file.inspect(path, comm).attributes
        for name in ("tiles", "network", "classes", "scaling"):
            if then.get(name) != mine[name]:
                raise RunFileError(
                    f"{path} was written with other {name}: {_short(then.get(name))}, not {_short(mine[name])}"
                )
        if self.labels and any(
            name not in self.labels or not np.array_equal(self.labels[name], found) for name, found in labels.items()
        ):
            raise RunFileError(f"{path} was written with other samples, or other parts of them: their labels differ")

    def take(self, outcomes: Sequence[Outcome], labels: Mapping[str, NDArray[np.int64]], folds: Folds) -> None:
        """What the local phase has come to."""
        own = [outcome for outcome in outcomes if not outcome.job.fold]
        self.local = np.concatenate([outcome.theta for outcome in own])
        self.nets = [{"history": dict(o.history), "reason": o.reason, "accuracies": dict(o.accuracies)} for o in own]
        self.logits = {name: np.stack([outcome.logits[name] for outcome in own]) for name in labels}
        self.labels, self.folds = dict(labels), folds.number
        if folds.number:
            self.logits[FOLDS] = folds.joined({o.job: o.logits[TEST] for o in outcomes if o.job.fold}, len(own))
            self.labels[FOLDS] = labels[TRAIN]

    def write(
        self, path: str, modules: Sequence[nn.Module], coarse: nn.Module, attributes: Mapping[str, Any], comm: MPI.Comm
    ) -> None:
        """Write the run file. Collective on ``comm``.

        Raises
        ------
        RunFileError
            If it cannot be written.
        """
        table = table_of(modules, coarse if len(self.theta) > len(self.local) else None)
        layout = ParameterLayout(table, comm)
        x = layout.vector()
        state = {
            "phases": ",".join(self.phases), "nets": self.nets, "logits": self.logits, "labels": self.labels,
            "folds": self.folds, "inputs": self.inputs, "coarse": self.coarse,
            "local": self.local if len(self.coherent) else NONE,
            "coarse_theta": self.coarse_theta if len(self.coherent) else NONE,
        }  # fmt: skip
        try:
            write(x, torch.from_numpy(self.theta[layout.ranges[comm.rank] : layout.ranges[comm.rank + 1]]))
            run_file.write(path, x, parameters=table, state=state, history=self.history, attributes=attributes)
        finally:
            x.destroy()


def _short(text: Any) -> str:
    words = " ".join(str(text).split())
    return words if len(words) < 80 else f"{words[:80]}..."
