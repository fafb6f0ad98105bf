"""A run: one solver on one objective, from its first iteration, or that of a restart, to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError, NonFiniteError, RunFileError
from ddml.options import Option
from ddml.parallel import Interrupted, agreed, cause, words_of

from . import board, checkpoints, limits, progress
from .board import Board
from .checkpoints import Checkpoints, Minimised, Moving, ResumableSolver
from .history import WORK_OF_LEVELS
from .limits import SIGNAL, Limits
from .progress import Progress

OPTIONS = (
    *limits.OPTIONS,
    *checkpoints.OPTIONS,
    Option("error_interval", None, "Iterations between evaluations of the error (default 1; self-scaled solvers 10).",
           kind=int, minimum=1),
    *progress.OPTIONS,
    *board.OPTIONS,
)  # fmt: skip


class Run:
    """Runs a TAO solver and keeps what is needed to show it, to stop it and to go on.

    Collective on the objective's communicator.

    Parameters
    ----------
    objective, tao, x
        What is minimised, by what, and where the parameters are; ``tao`` has x as its solution.
    settings
        Values of :data:`OPTIONS`, targets that have no meaning here apart.
    attributes
        Of the run file: options in force, problem, network, solver, seed.
    measure
        From all parameters (n,) to further history columns, such as the error.
    moving
        What gives the objective other samples between iterations, if anything does.
    shown
        The history column that is shown beside the loss.
    solver
        The context of ``tao``, which goes on from a run file to the last bit; None: one that knows parameters only, as
        PETSc's own.
    same_samples
        Whether a restart goes on with the samples of the run file, where they move, or begins with those at hand.
    more
        What every row of the history has besides, behind an iteration.

    Attributes
    ----------
    history : History
        Restarts included.
    last : Vec, global size n
        The parameters after the last complete iteration.
    notes : list of str
        What a user should know before the run begins.
    reason : str
        Why it stopped.
    failure : str
        Why the run file is not as of the end of the run, in a line; nothing where it is.

    Raises
    ------
    InputError
        Files that are not there, exist already or are of other runs; a state that the solver cannot take over.
    """

    def __init__(
        self,
        objective: Minimised,
        tao: PETSc.TAO,
        x: PETSc.Vec,
        settings: Any,
        attributes: Mapping[str, str | int | float | bool],
        measure: Callable[[Tensor], Mapping[str, float]],
        moving: Moving | None = None,
        shown: str = "error",
        *,
        solver: ResumableSolver | None,
        same_samples: bool = True,
        more: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.objective, self.tao, self.x, self.comm = objective, tao, x, objective.comm
        self.measure, self.moving, self.shown, self.solver, self.more = measure, moving, shown, solver, more
        self.limits, self.mode = Limits.of(settings), settings.progress if objective.comm.rank == 0 else "none"
        self.error_interval: int = settings.error_interval or 1
        self.reason = self.failure = ""
        self.keep_going = bool(settings.keep_going)
        self.measured: dict[str, float] = {}  # at the end of the run, if not in the history
        with agreed(self.comm):
            self.board = Board(settings.tensorboard if self.comm.rank == 0 else None)
        self.checkpoints = Checkpoints(objective, solver, moving, settings, attributes)
        begin = self.checkpoints.restore(x, same_samples)
        self.history, self.before = begin.history, begin.seconds
        self.first_iteration, self.offset = begin.iteration, begin.offset
        self.notes = [*(solver.notes if solver is not None else ()), *begin.notes]
        self.last = x.duplicate()
        if begin.resumed:
            x.copy(self.last)
            objective.work.settle()
        self.progress: Progress
        self.started = time.perf_counter()
        # PETSc takes no 0: what is done already is noticed in _limit, and in execute
        tao.setMaximumIterations(max(self.limits.max_it - self.offset, 1))
        self.done = (
            begin.resumed
            and (self.offset > 0 or self.first_iteration == 0)
            and self.limits.max_it <= self.first_iteration
        )
        tao.setMonitor(self._monitor)

    @property
    def exact(self) -> bool:
        """Whether a restart goes on to the last bit (solvers of ours), or from the parameters only (PETSc's)."""
        return self.solver is not None

    @property
    def output(self) -> str | None:
        """The run file that is written."""
        return self.checkpoints.output

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
        if len(self.history) and iteration == self.history.last("iteration"):
            return  # where a solver that begins afresh begins; PETSc's ntr reports a trial that it refuses so, too
        columns = {}
        if iteration % self.error_interval == 0:
            columns = dict(self.measure(self.objective.parameters(self.x)))
        work, levels = self.objective.work, self.solver.spent if self.solver is not None else ()
        columns |= {**dict(zip(WORK_OF_LEVELS, levels, strict=False)), **self.more()}
        self.history.append(
            iteration=iteration, time=now, loss=f, gradient_norm=gnorm, step=step,
            work=work.total, work_critical=work.critical, **columns,
        )  # fmt: skip
        self.x.copy(self.last)
        work.settle()
        self.progress.show(self.history)
        self.board.show(self.history)
        if self.moving is not None and iteration > 0 and iteration % self.moving.interval == 0:
            self.moving.move(self.objective.parameters(self.x))
            work.settle()  # the state has the new samples
        self.reason = self._limit(now)
        if self.reason:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)
        elif self.checkpoints.due(iteration, now):
            self._checkpoint(iteration, now)

    def _checkpoint(self, iteration: int, now: float) -> None:
        """Write the run file; where that fails, end the run or pass over this checkpoint. Collective."""
        try:
            self.save()
        except RunFileError as error:
            if self.keep_going:
                self.checkpoints.written = iteration, now
                if self.comm.rank == 0:
                    self.progress.note(str(error))
            else:
                self.reason, self.failure = "the run file cannot be written", str(error)
                self.tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)

    def _clock(self) -> float:
        """Seconds since the start, earlier runs included: rank 0's, so that all ranks decide alike."""
        return float(self.comm.bcast(self.before + time.perf_counter() - self.started))

    def _limit(self, now: float) -> str:
        if self.objective.stop is not None and self.comm.allreduce(self.objective.stop.requested, MPI.LOR):
            return SIGNAL
        return self.limits.reached(self.history, self.objective.work.total, now)

    def save(self, stopped: str = "") -> None:
        """Write the run file as of the last complete iteration, and why that was the last one. Collective."""
        self.checkpoints.write(self.last, self.history, not self.done, stopped, self.measured)
        self.board.flush()

    def execute(self) -> bool:
        """Run to the end, a limit or a signal, and write the run file; False if the run broke down.

        Where the run file has all iterations and the solver would begin afresh, nothing is done.

        Raises
        ------
        InputError
            If the loss is not finite where the run starts, or the solver refuses what it is given.
        """
        self.started = time.perf_counter()
        if self.done:
            self.reason = "max_it is reached"
            if self.output != self.checkpoints.source:  # else the file stays what it is
                self._end()
            return True
        with agreed(self.comm):
            self.board.open(self.history)
        self.progress = Progress(self.mode, self.shown, self.first_iteration, self.limits.max_it)
        try:
            self._solve()
        except Exception as error:
            for kind in (NonFiniteError, InputError):
                ours = cause(error, kind)
                if ours is not None:
                    raise InputError(str(ours)) from error
            if cause(error, Interrupted) is None:
                if self.solver is None and isinstance(error, PETSc.Error) and error.__cause__ is None:
                    text = words_of(error)
                    raise InputError(f"PETSc's {self.tao.getType()} cannot go on here: {text}") from error
                raise
            self.reason = SIGNAL
        finally:
            self.board.close()
            if self.board.failure:
                self.progress.note(self.board.failure)
            self.progress.close()
        reason = self.tao.getConvergedReason()
        ended = self.solver.reason if self.solver is not None else ""
        self.reason = self.reason or ended or limits.in_words(reason)
        in_haste = self.reason == SIGNAL  # the file first
        if not in_haste:
            self._measure()
        if not self.failure:
            self._end()
        if in_haste:
            self._measure()
        return bool(reason != PETSc.TAO.ConvergedReason.DIVERGED_NAN)

    def _measure(self) -> None:
        """Measure what the last row of the history has not, if there is one. Collective."""
        if len(self.history) and self.history.last("iteration") % self.error_interval:
            self.measured = dict(self.measure(self.objective.parameters(self.last)))

    def _end(self) -> None:
        """Write the run file for the last time. Collective."""
        try:
            self.save("" if self.reason in (SIGNAL, limits.NOT_FINITE) else self.reason)
        except RunFileError as error:
            self.failure = str(error)

    def _solve(self) -> None:
        """Solve; PETSc's own solvers, which know nothing of samples that change, begin afresh with each objective."""
        if self.moving is None or self.solver is not None:
            self.tao.solve()
            return
        going = True
        while going:
            end = min(self.limits.max_it, (self.offset // self.moving.interval + 1) * self.moving.interval)
            self.tao.setMaximumIterations(max(end - self.offset, 1))
            self.tao.solve()
            going = self.tao.getConvergedReason() == PETSc.TAO.ConvergedReason.DIVERGED_MAXITS
            going = going and end < self.limits.max_it
            if going:
                self.offset = self.first_iteration = end

    def summary(self) -> str:
        """The last line of a run."""
        output = None if self.failure else self.output
        return progress.summary(self.history, self.measured, self.reason, self.shown, output)
