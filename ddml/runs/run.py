"""A run: one solver on one objective, with history, limits, checkpoints and progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError, NonFiniteError
from ddml.objectives.objective import Objective
from ddml.options import Option
from ddml.parallel import Interrupted, cause
from ddml.runs import run_file
from ddml.states import vectors_in

from .history import History

OPTIONS = (
    Option("max_it", 1000, "Outer iterations in all, restarts included.", minimum=0),
    Option("max_work", math.inf, "Stop when this many work units are spent.", above=0.0),
    Option("max_time", math.inf, "Stop after this many seconds, restarts included.", above=0.0),
    Option("target_error", 0.0, "Stop when the relative error is below this.", minimum=0.0),
    Option("checkpoint_interval", "60s", "Iterations between checkpoints, or seconds, as in 100 or 60s; 0 is never."),
    Option("output", None, "Run file to write (default: none, or the restart file)."),
    Option("overwrite", False, "Whether an existing run file may be replaced."),
    Option("restart", None, "Run file to go on from."),
    Option("error_interval", None, "Iterations between evaluations of the error (default 1; self-scaled solvers 10).",
           kind=int, minimum=1),
    Option("progress", "auto", "A bar, a line per iteration, or a bar on a terminal and lines elsewhere.",
           choices=("auto", "bar", "lines", "none")),
)  # fmt: skip

_REASONS = {
    PETSc.TAO.ConvergedReason.CONVERGED_GATOL: "the gradient is below tao_gatol",
    PETSc.TAO.ConvergedReason.CONVERGED_GRTOL: "the gradient is below tao_grtol",
    PETSc.TAO.ConvergedReason.CONVERGED_GTTOL: "the gradient is below tao_gttol",
    PETSc.TAO.ConvergedReason.CONVERGED_STEPTOL: "the step is below tao_steptol, or what is left to gain is rounding",
    PETSc.TAO.ConvergedReason.CONVERGED_MINF: "the loss is below tao_fmin",
    PETSc.TAO.ConvergedReason.DIVERGED_MAXITS: "max_it is reached",
    PETSc.TAO.ConvergedReason.DIVERGED_MAXFCN: "the limit of evaluations is reached",
    PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE: "no step along the direction decreases the loss",
    PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION: "no step in the trust region decreases the loss",
    PETSc.TAO.ConvergedReason.DIVERGED_NAN: "the loss is not finite",
}


_WIDTHS = (6, 13, 11, 9, 11, 10, 10, 8)  # of a line's columns


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


class Moving(Protocol):
    """Gives an objective other samples every so many iterations; deterministic, and the same on any number of ranks."""

    interval: int

    def move(self, theta: Tensor) -> None:
        """Replace the objective's loss, at the parameters theta (n,). Collective."""

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Give the objective the samples of a :meth:`state` again. Collective."""


class Run:
    """Runs a TAO solver and keeps what is needed to show it, to stop it and to go on.

    Collective on the objective's communicator.

    Parameters
    ----------
    objective, tao, x
        What is minimised, by what, and where the parameters are; ``tao`` has x as its solution.
    settings
        Values of :data:`OPTIONS`.
    attributes
        Of the run file: options in force, problem, network, solver, seed.
    measure
        From all parameters (n,) to further history columns, such as the error.
    moving
        What gives the objective other samples between iterations, if anything does.
    shown
        The history column that is shown beside the loss.

    Raises
    ------
    InputError
        Files that are not there, exist already or are of other runs; no iteration left for a solver that begins afresh.
    """

    def __init__(
        self,
        objective: Objective,
        tao: PETSc.TAO,
        x: PETSc.Vec,
        settings: Any,
        attributes: Mapping[str, str | int | float | bool],
        measure: Callable[[Tensor], Mapping[str, float]],
        moving: Moving | None = None,
        shown: str = "error",
    ) -> None:
        self.objective, self.tao, self.x = objective, tao, x
        self.settings, self.attributes, self.measure = settings, dict(attributes), measure
        self.moving, self.shown = moving, shown
        self.comm = objective.comm
        self.history = History()
        self.interval = Interval.parse(settings.checkpoint_interval)
        self.output: str | None = settings.output or settings.restart
        self.reason = ""
        self.measured: dict[str, float] = {}  # at the end of the run, if not in the history
        context = tao.getPythonContext() if tao.getType() == "python" else None
        self.context = context if hasattr(context, "state") else None
        self.notes: list[str] = list(getattr(context, "notes", ()))
        self.last = x.duplicate()  # parameters after the last complete iteration
        self.before = 0.0  # seconds of earlier runs
        self.first_iteration = 0
        self.offset = 0  # what is added to the solver's own iteration numbers
        self.started = time.perf_counter()
        self.written = (0, 0.0)  # iteration and time of the last checkpoint
        self.bar: Any = None
        if settings.output is not None:
            self._check_new(settings.output)
        if self.output is not None:
            run_file.check_writable(self.output, self.comm)
        if settings.restart is not None:
            self._load(settings.restart)
        # PETSc takes no 0: what is done already is noticed in _limit, and in execute
        tao.setMaximumIterations(max(settings.max_it - self.offset, 1))
        self.done = (
            settings.restart is not None
            and (self.offset > 0 or self.first_iteration == 0)
            and settings.max_it <= self.first_iteration
        )
        tao.setMonitor(self._monitor)
        self._event = PETSc.Log.Event("ddml checkpoint")

    def _check_new(self, path: str) -> None:
        from pathlib import Path

        restart, file = self.settings.restart, Path(path)
        if self.settings.overwrite or (restart is not None and file.resolve() == Path(restart).resolve()):
            return
        if self.comm.bcast(file.is_file() if self.comm.rank == 0 else None):
            raise InputError(f"{path} exists: go on with -restart {path}, or replace it with -overwrite")

    def _load(self, path: str) -> None:
        header = run_file.inspect(path, self.comm)
        mine = [(p.name, tuple(p.shape), p.offset) for p in self.objective.layout.parameters]
        if [(p.name, tuple(p.shape), p.offset) for p in header.parameters] != mine:
            raise InputError(
                f"{path} was written with another network ({header.attributes.get('network', 'unknown')}, "
                f"{header.size} parameters), this one is {self.attributes.get('network')} with {self.objective.size}"
            )
        for key in ("problem", "driver"):
            if header.attributes.get(key) != self.attributes.get(key):
                raise InputError(
                    f"{path} was written for {key} '{header.attributes.get(key)}', not '{self.attributes.get(key)}'"
                )
        state, self.history = run_file.read(path, self.x)
        self.objective.work.restore(state["work"])
        if self.moving is not None and "samples" in state:
            self.moving.restore(state["samples"])
        self.before = self.history.last("time")
        self.first_iteration = int(self.history.last("iteration"))
        self.written = (self.first_iteration, self.before)
        for key in (
            *("solver", "seed", "points", "resample", "dtype", "summation_blocks", "ranks"),
            *("data", "samples", "scaling", "batch_size", "batch_overlap", "batch_steps", "batch_growth"),
        ):
            then, now = header.attributes.get(key), self.comm.size if key == "ranks" else self.attributes.get(key)
            if then is not None and then != now:  # older files know fewer
                self.notes.append(f"{key} was {then} when {path} was written, now it is {now}")
        if header.attributes.get("summation") != self.attributes.get("summation"):
            self.notes.append("sums were added in another order when the file was written: the run goes on to rounding")
        if (
            self.context is not None
            and state["solver"]
            and header.attributes.get("solver") == self.attributes["solver"]
        ):
            self.context.restore(state["solver"])
            # the solver's own numbers, where it once began afresh from a file of another
            self.offset = self.first_iteration - int(state["solver"].get("iteration", self.first_iteration))
        else:
            for vec in vectors_in(state["solver"], "solver", self.x).values():
                vec.destroy()
            self.notes.append(
                "the solver begins afresh from the parameters of the file: it has no state of its own there"
            )
            self.offset = self.first_iteration
        self.x.copy(self.last)
        self.objective.work.settle()

    @property
    def exact(self) -> bool:
        """Whether a restart goes on to the last bit (solvers of ours), or from the parameters only (PETSc's)."""
        return self.context is not None

    def _monitor(self, tao: PETSc.TAO) -> None:
        iteration, f, gnorm, _, step, _ = tao.getSolutionStatus()
        iteration += self.offset
        now = self._clock()
        if not math.isfinite(f):
            if len(self.history) == 0:
                theta = self.objective.parameters(self.x)
                raise NonFiniteError(
                    f"the loss is not finite at the initial parameters: {self.objective.loss.explain(theta)}"
                )
            return  # PETSc stops on it; the last good state stays what it is
        if len(self.history) and iteration == self.first_iteration:
            return  # where a solver that begins afresh begins
        columns = {}
        if iteration % (self.settings.error_interval or 1) == 0:
            columns = dict(self.measure(self.objective.parameters(self.x)))
        work = self.objective.work
        self.history.append(
            iteration=iteration, time=now, loss=f, gradient_norm=gnorm, step=step,
            work=work.total, work_critical=work.critical, **columns,
        )  # fmt: skip
        self.x.copy(self.last)
        work.settle()
        self._show(iteration)
        if self.moving is not None and iteration > 0 and iteration % self.moving.interval == 0:
            self.moving.move(self.objective.parameters(self.x))
            work.settle()  # the state has the new samples
        stop = self._limit(now)
        if stop:
            self.reason = stop
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)
        elif self._due(iteration, now):
            self.save()

    def _clock(self) -> float:
        """Seconds since the start, earlier runs included: rank 0's, so that all ranks decide alike."""
        return float(self.comm.bcast(self.before + time.perf_counter() - self.started))

    def _limit(self, now: float) -> str:
        s = self.settings
        if self.objective.stop is not None and self.comm.allreduce(self.objective.stop.requested, MPI.LOR):
            return "a signal asked to stop"
        if s.max_it == 0:
            return "max_it is reached"
        if now >= s.max_time:
            return "max_time is reached"
        if self.objective.work.total >= s.max_work:
            return "max_work is reached"
        if self.history.last("error") < s.target_error:
            return "target_error is reached"
        if self.history.last("accuracy") >= getattr(s, "target_accuracy", math.inf):
            return "target_accuracy is reached"
        return ""

    def _due(self, iteration: int, now: float) -> bool:
        by_count = 0 < self.interval.iterations <= iteration - self.written[0]
        return by_count or now - self.written[1] >= self.interval.seconds > 0

    def save(self) -> None:
        """Write the run file as of the last complete iteration. Collective."""
        if self.output is None or len(self.history) == 0:
            return
        with self._event:
            state = {
                "work": self.objective.work.settled,
                "solver": self.context.state() if self.context is not None and not self.done else {},
            }
            if self.moving is not None:
                state["samples"] = self.moving.state()
            run_file.write(
                self.output, self.last, parameters=self.objective.layout.parameters, state=state,
                history=self.history, attributes=self.attributes,
            )  # fmt: skip
            self.written = (int(self.history.last("iteration")), self.history.last("time"))

    def execute(self) -> bool:
        """Run to the end, a limit or a signal, and write the run file; False if the run broke down.

        Raises
        ------
        InputError
            If the loss is not finite where the run starts, or the solver refuses what it is given.

        Where the run file has all iterations and the solver would begin afresh, nothing is done.
        """
        self.started = time.perf_counter()
        if self.done:
            self.reason = "max_it is reached"
            if self.output != self.settings.restart:  # else the file stays what it is
                self.save()
            return True
        self._open_bar()
        try:
            self._solve()
        except Exception as error:
            for kind in (NonFiniteError, InputError):
                ours = cause(error, kind)
                if ours is not None:
                    raise InputError(str(ours)) from error
            if cause(error, Interrupted) is None:
                if self.context is None and isinstance(error, PETSc.Error) and error.__cause__ is None:
                    text = str(error).splitlines()[-1].partition("] ")[2]
                    raise InputError(f"PETSc's {self.tao.getType()} cannot go on here: {text}") from error
                raise
            self.reason = "a signal asked to stop"
        finally:
            if self.bar is not None:
                self.bar.close()
        reason = self.tao.getConvergedReason()
        self.reason = self.reason or _REASONS.get(reason, f"PETSc's reason {reason}")
        self.save()
        if len(self.history) and self.history.last("iteration") % (self.settings.error_interval or 1):
            self.measured = dict(self.measure(self.objective.parameters(self.last)))
        return bool(reason != PETSc.TAO.ConvergedReason.DIVERGED_NAN)

    def _solve(self) -> None:
        """Solve; PETSc's own solvers, which know nothing of samples that change, begin afresh with each objective."""
        if self.moving is None or self.context is not None:
            self.tao.solve()
            return
        going = True
        while going:
            end = min(self.settings.max_it, (self.offset // self.moving.interval + 1) * self.moving.interval)
            self.tao.setMaximumIterations(max(end - self.offset, 1))
            self.tao.solve()
            going = self.tao.getConvergedReason() == PETSc.TAO.ConvergedReason.DIVERGED_MAXITS
            going = going and end < self.settings.max_it
            if going:
                self.offset = self.first_iteration = end

    def summary(self) -> str:
        """The last line of a run."""
        h = self.history
        if len(h) == 0:
            return f"stopped before the first iteration: {self.reason}; nothing was written"
        parts = [f"{int(h.last('iteration'))} iterations", f"loss {h.last('loss'):.6e}"]
        found = {name: self.measured.get(name, h.last(name)) for name in ("test_loss", "error", "accuracy")}
        if np.isfinite(found["test_loss"]):
            parts[-1] += f" (on other {'samples' if self.shown == 'accuracy' else 'points'} {found['test_loss']:.6e})"
        if np.isfinite(found["accuracy"]):
            parts.append(f"accuracy {found['accuracy']:.4f}")
        if np.isfinite(found["error"]):
            parts.append(f"relative error {found['error']:.4e}")
        parts += [f"work {h.last('work'):.1f} (critical {h.last('work_critical'):.1f})", f"{h.last('time'):.1f} s"]
        where = f"; run file {self.output}" if self.output else ""
        return f"stopped: {self.reason}. {', '.join(parts)}{where}"

    def _open_bar(self) -> None:
        mode = self.settings.progress
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self.mode = mode if self.comm.rank == 0 else "none"
        if self.mode == "bar":
            from tqdm import tqdm

            self.bar = tqdm(total=self.settings.max_it, initial=self.first_iteration, unit="it", dynamic_ncols=True)
        if self.mode == "lines":
            columns = ("it", "loss", "|gradient|", "step", self.shown, "work", "critical", "time")
            names = zip(columns, _WIDTHS, strict=True)
            print(" ".join(f"{name:>{width}}" for name, width in names), flush=True)

    def _show(self, iteration: int) -> None:
        if self.mode == "none":
            return
        row = {
            name: self.history.last(name)
            for name in ("loss", "gradient_norm", "step", self.shown, "work", "work_critical", "time")
        }
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.3e} {self.shown} {row[self.shown]:.3e}")
            self.bar.update(iteration - self.bar.n)
            return
        print(
            f"{iteration:6d} {row['loss']:13.6e} {row['gradient_norm']:11.3e} {row['step']:9.2e}"
            f" {row[self.shown]:11.4e} {row['work']:10.1f} {row['work_critical']:10.1f} {row['time']:8.1f}",
            flush=True,
        )
