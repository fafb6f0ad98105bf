"""The run file of a divided classifier: parameters of all networks, their histories and what they say of the samples.

Its state, beside what every run file has:

- ``phase``: the last one that is finished, or an empty text;
- ``nets``: of each local network its ``history`` by column, ``reason``, and accuracies by split;
- ``logits``: by split, (N, B, K); ``labels``: by split, (B,).
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

from .nets import Outcome


def table_of(modules: Sequence[nn.Module]) -> tuple[Parameter, ...]:
    """The trained parameters of all networks, one network behind the other."""
    named = [(f"nets.{i}.{name}", p.shape) for i, module in enumerate(modules) for name, p in trained(module)]
    return parameter_table(named)


@dataclass
class Whole:
    """What a run of phases has come to.

    Attributes
    ----------
    phase : str
        The last one that is finished.
    theta : ndarray
        Of all networks (n,).
    nets : list of dict
        Of each local network its history, the reason why it stopped, and its accuracies.
    logits, labels : dict of str to ndarray
        Of each split, (N, B, K) and (B,).
    history : History
        One row behind each phase.
    """

    theta: NDArray[np.float64]
    phase: str = ""
    nets: list[dict[str, Any]] = field(default_factory=list)
    logits: dict[str, NDArray[Any]] = field(default_factory=dict)
    labels: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @classmethod
    def begun(cls, modules: Sequence[nn.Module]) -> Whole:
        """Nothing is trained."""
        values = [p.detach().double().reshape(-1).cpu().numpy() for module in modules for _, p in trained(module)]
        made = cls(np.concatenate(values))
        made.history.append(iteration=0, time=0.0, work=0.0, work_critical=0.0)
        return made

    @classmethod
    def read(cls, path: str, table: Sequence[Parameter], networks: int, comm: MPI.Comm) -> Whole:
        """That of a run file. Collective on ``comm``.

        Raises
        ------
        RunFileError
            A file that is missing, damaged, of other networks or of an undivided one.
        """
        header = run_file.inspect(path, comm)
        if [(p.name, tuple(p.shape)) for p in header.parameters] != [(p.name, tuple(p.shape)) for p in table]:
            raise RunFileError(
                f"{path} holds {header.size} parameters of other networks than these {networks}, of "
                f"{table[-1].range.stop}: it goes on with the tiles, the widths and the network it was written with"
            )
        layout = ParameterLayout(table, comm)
        x = layout.vector()
        try:
            state, history = run_file.read(path, x)
            run_file.check_values(path, x, history)
            theta = layout.gather(x).numpy().copy()
        finally:
            x.destroy()
        made = cls(theta, history=history)
        try:
            for name in ("phase", "nets", "logits", "labels"):
                setattr(made, name, state[name])
            made.check(path, networks)
        except (LookupError, TypeError, AttributeError) as error:
            raise RunFileError(f"{path} does not say what its networks have come to: {error}") from error
        return made

    def check(self, path: str, networks: int) -> None:
        """Refuse what lacks the outputs of a network.

        Raises
        ------
        RunFileError
            If it does.
        """
        found = {len(self.nets), *(len(logits) for logits in self.logits.values())} if self.phase else {networks}
        if found != {networks}:
            raise RunFileError(
                f"{path} has outputs of {min(found)} networks, there are {networks}: restart from a copy"
            )

    def take(self, outcomes: Sequence[Outcome], labels: Mapping[str, NDArray[np.int64]]) -> None:
        """The local phase is finished."""
        self.theta = np.concatenate([outcome.theta for outcome in outcomes])
        self.phase = "local"
        self.nets = [
            {"history": dict(o.history), "reason": o.reason, "accuracies": dict(o.accuracies)} for o in outcomes
        ]
        self.logits = {name: np.stack([outcome.logits[name] for outcome in outcomes]) for name in labels}
        self.labels = dict(labels)

    def write(self, path: str, table: Sequence[Parameter], attributes: Mapping[str, Any], comm: MPI.Comm) -> None:
        """Write the run file. Collective on ``comm``.

        Raises
        ------
        RunFileError
            If it cannot be written.
        """
        layout = ParameterLayout(table, comm)
        x = layout.vector()
        try:
            begin, end = layout.ranges[comm.rank], layout.ranges[comm.rank + 1]
            write(x, torch.from_numpy(self.theta[begin:end]))
            state = {"phase": self.phase, "nets": self.nets, "logits": self.logits, "labels": self.labels}
            run_file.write(path, x, parameters=table, state=state, history=self.history, attributes=attributes)
        finally:
            x.destroy()
