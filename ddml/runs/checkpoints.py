"""Checkpoints of a run: what they hold, when they are due, and how a run goes on from one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError, RunFileError
from ddml.losses.work import WorkCounter
from ddml.options import EACH_START, Option, same_reference
from ddml.parallel import StopRequest
from ddml.states import vectors_in

from . import run_file
from .history import History
from .run_file import Parameter

OPTIONS = (
    Option("checkpoint_interval", "60s", "Iterations between checkpoints, or seconds, as in 100 or 60s; 0 is never."),
    Option("keep_going", False, "Whether a run goes on to the next checkpoint where one cannot be written, instead of "
           "ending there."),
    Option("output", None, "Run file to write (default: none, or the restart file).", changes=EACH_START),
    Option("overwrite", False, "Whether an existing run file may be replaced.", changes=EACH_START),
    Option("restart", None, "Run file to go on from, with its options; those beside it come in their place.",
           changes=EACH_START),
    Option("trust", False, "Whether Python files, PETSc's types in Python, viewers and folders of TensorBoard that the "
           "run file names are used where they are not given anew.", changes=EACH_START),
)  # fmt: skip


class Table(Protocol):
    """Which parameters a vector is made of."""

    @property
    def parameters(self) -> Sequence[Parameter]: ...
    @property
    def size(self) -> int: ...


class Explaining(Protocol):
    """What a run asks of a loss."""

    def explain(self, theta: Tensor) -> str:
        """Why the loss is not finite at parameters (n,), in words."""


class Minimised(Protocol):
    """What a run asks of what is minimised: of an :class:`ddml.objectives.objective.Objective`, say."""

    comm: MPI.Comm
    work: WorkCounter
    stop: StopRequest | None

    @property
    def layout(self) -> Table: ...
    @property
    def loss(self) -> Explaining: ...
    def parameters(self, x: PETSc.Vec) -> Tensor:
        """All parameters (n,), on every rank. Collective."""


class ResumableSolver(Protocol):
    """What a run asks of a solver that goes on to the last bit, as :class:`ddml.runs.run.Run` is given it."""

    notes: list[str]
    spent: list[float]  # on each level, the coarsest first
    reason: str  # why it has ended, in words, where PETSc has none for that

    def state(self) -> dict[str, Any]:
        """What the next iteration needs besides the parameters, its number ``iteration`` among it. Collective."""

    def restore(self, state: dict[str, Any]) -> None:
        """Make the next solve go on from a :meth:`state`, whose vectors become the solver's. Collective.

        An InputError says that it cannot, with the options in force.
        """


class Moving(Protocol):
    """Gives an objective other samples every so many iterations; deterministic, and the same on any number of ranks."""

    interval: int

    def move(self, theta: Tensor) -> None:
        """Replace the objective's loss, at the parameters theta (n,). Collective."""

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Give the objective the samples of a :meth:`state` again. Collective."""


@dataclass(frozen=True)
class Interval:
    """When to write: every so many iterations or seconds."""

    iterations: int = 0
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Interval:
        """From ``100`` or ``60s``.

        Raises
        ------
        InputError
            If the text is neither.
        """
        try:
            value = cls(seconds=float(text[:-1])) if text.endswith("s") else cls(iterations=int(text))
        except ValueError:
            value = cls(iterations=-1)
        if value.iterations < 0 or not value.seconds >= 0:
            raise InputError(
                f"option -checkpoint_interval must be iterations or seconds, as in 100 or 60s; got '{text}'"
            )
        return value

    def over(self, iterations: int, seconds: float) -> bool:
        """Whether it is over after so many iterations and seconds."""
        return 0 < self.iterations <= iterations or seconds >= self.seconds > 0


@dataclass
class Beginning:
    """Where a run begins, which is iteration 0 unless it goes on from a run file.

    Attributes
    ----------
    history : History
        Of the run so far.
    iteration : int
        The last one that is complete.
    offset : int
        What is to be added to the solver's own iteration numbers.
    seconds : float
        What the run has taken so far.
    resumed : bool
        Whether there was a run file.
    notes : list of str
        What a user should know of it.
    """

    history: History = field(default_factory=History)
    iteration: int = 0
    offset: int = 0
    seconds: float = 0.0
    resumed: bool = False
    notes: list[str] = field(default_factory=list)


@contextmanager
def _understood(path: str) -> Iterator[None]:
    """Make whatever a state of an unknown form raises in this block a RunFileError of the file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, PETSc.Error) as error:
        said = " ".join(str(error).split())
        raise RunFileError(f"{path} has a state that nothing can go on from: {type(error).__name__}: {said}") from error


def check_new(path: str, source: str | None, comm: MPI.Comm) -> None:
    """Raise an InputError where a file is there already that is not the one that a run goes on from. Collective."""
    if source is not None and Path(path).resolve() == Path(source).resolve():
        return
    if comm.bcast(Path(path).is_file() if comm.rank == 0 else None):
        raise InputError(f"{path} exists: go on with -restart {path}, or replace it with -overwrite")


class Checkpoints:
    """The run file of a run: checked before it begins, read where it goes on, written when it is due.

    Collective on the objective's communicator.

    Parameters
    ----------
    objective, solver, moving
        What has a state: work and loss, the solver (None for one of PETSc's, which has none), and the samples.
    settings
        Values of :data:`OPTIONS`.
    attributes
        Of the run file.

    Attributes
    ----------
    output : str or None
        The file that is written.

    Raises
    ------
    InputError
        An interval that is none, a file that exists already or cannot be written.
    """

    def __init__(
        self,
        objective: Minimised,
        solver: ResumableSolver | None,
        moving: Moving | None,
        settings: Any,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        self.objective, self.solver, self.moving = objective, solver, moving
        self.attributes = dict(attributes)
        self.interval = Interval.parse(settings.checkpoint_interval)
        self.source: str | None = settings.restart
        self.output: str | None = settings.output or settings.restart
        self.written = (0, 0.0)  # iteration and time of the last one
        self._event = PETSc.Log.Event("ddml checkpoint")
        if settings.output is not None and not settings.overwrite:
            check_new(settings.output, self.source, objective.comm)
        if self.output is not None:
            run_file.check_writable(self.output, objective.comm)

    def restore(self, x: PETSc.Vec, same_samples: bool = True) -> Beginning:
        """Give parameters, work, samples and the solver what the file holds that the run goes on from, if there is one.

        Parameters
        ----------
        x
            Takes the parameters.
        same_samples
            Whether the samples go on from those of the file, where there are any, or begin anew.

        Raises
        ------
        InputError
            A file that is not there, damaged, or of another run; a state that the solver cannot take over.
        """
        if self.source is None:
            return Beginning()
        header = run_file.inspect(self.source, self.objective.comm)
        self._check(header)
        state, history = run_file.read(self.source, x)
        run_file.check_values(self.source, x, history)
        with _understood(self.source):
            return self._taken_over(x, header, state, history, same_samples)

    def _taken_over(
        self, x: PETSc.Vec, header: run_file.Header, state: dict[str, Any], history: History, same_samples: bool
    ) -> Beginning:
        """Give work, samples and the solver what was read."""
        for name, vec in vectors_in(state, "state", x).items():
            if not math.isfinite(vec.norm(PETSc.NormType.NORM_INFINITY)):
                raise InputError(f"{self.source} has a {name} that is not finite")
        self.objective.work.restore(state["work"])
        if self.moving is not None and "samples" in state and same_samples:
            self.moving.restore(state["samples"])
        begin = Beginning(history, int(history.last("iteration")), 0, history.last("time"), True)
        self.written = (begin.iteration, begin.seconds)
        ranks = header.attributes["ranks"]
        if ranks != self.objective.comm.size:
            begin.notes.append(f"{self.source} was written on {ranks} rank{'s' * (ranks != 1)}")
        if header.attributes.get("summation") != self.attributes.get("summation"):
            begin.notes.append(
                "sums were added in another order when the file was written: the run goes on to rounding"
            )
        same = same_reference(str(header.attributes.get("solver")), str(self.attributes["solver"]))
        if self.solver is not None and state["solver"] and same:
            self.solver.restore(state["solver"])
            # the solver's own numbers, where it once began afresh from a file of another
            begin.offset = begin.iteration - int(state["solver"].get("iteration", begin.iteration))
        else:
            for vec in vectors_in(state["solver"], "solver", x).values():
                vec.destroy()
            begin.notes.append(
                "the solver begins afresh from the parameters of the file: it has no state of its own there"
            )
            begin.offset = begin.iteration
        return begin

    def _check(self, header: run_file.Header) -> None:
        """Raise an InputError if the file is of another network, problem or driver."""
        mine = [(p.name, tuple(p.shape), p.offset) for p in self.objective.layout.parameters]
        if [(p.name, tuple(p.shape), p.offset) for p in header.parameters] != mine:
            raise InputError(
                f"{self.source} was written with another network ({header.attributes.get('network', 'unknown')}, "
                f"{header.size} parameters), this one is {self.attributes.get('network')} with "
                f"{self.objective.layout.size}"
            )
        for key in ("problem", "driver"):
            then, now = str(header.attributes.get(key)), str(self.attributes.get(key))
            if not same_reference(then, now):
                raise InputError(f"{self.source} was written for {key} '{then}', not '{now}'")

    def due(self, iteration: int, seconds: float) -> bool:
        """Whether the interval since the last one is over."""
        return self.interval.over(iteration - self.written[0], seconds - self.written[1])

    def write(
        self,
        theta: PETSc.Vec,
        history: History,
        with_solver: bool = True,
        stopped: str = "",
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """Write the run file, if there is one, as of the last complete iteration. Collective.

        Parameters
        ----------
        theta
            The parameters then.
        history
            Up to then; nothing is written where it is empty.
        with_solver
            Whether the solver has begun, and so has a state.
        stopped
            Why the run has come to its end, for an attribute of that name, if the file is to have one.
        measured
            Of the last iteration, by columns of the history, which has it not: a run that goes on from there would have
            other rows than one that was not stopped. Attributes of these names behind :data:`.run_file.MEASURED`.
        """
        if self.output is None or len(history) == 0:
            return
        with self._event:
            state = {
                "work": self.objective.work.settled,
                "solver": self.solver.state() if self.solver is not None and with_solver else {},
            }
            if self.moving is not None:
                state["samples"] = self.moving.state()
            run_file.write(
                self.output, theta, parameters=self.objective.layout.parameters, state=state, history=history,
                attributes=self.attributes
                | ({"stopped": stopped} if "stopped" in self.attributes else {})
                | {f"{run_file.MEASURED}{k}": float(v) for k, v in (measured or {}).items() if not math.isnan(v)},
            )  # fmt: skip
            self.written = (int(history.last("iteration")), history.last("time"))
