"""Runs within a run of phases: of a local network, and of the coherent net."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from mpi4py import MPI
from torch import Tensor

from ddml.errors import InputError, RunFileError
from ddml.runs import run_file
from ddml.runs.limits import SIGNAL
from ddml.runs.run import Run
from ddml.sampling.batches import Batches


class InnerRun(Run):
    """A run with a file of its own, which it goes on from if that is there; its errors are for a user.

    Everything is collective on the ranks of the training.

    Parameters
    ----------
    made
        Loss and solver.
    moving
        Their batches.
    limits
        Of the run, which are left as they are.
    files
        The run file that is written and the one that it goes on from, if there are any.
    attributes, measure
        See :class:`ddml.runs.run.Run`.
    tests
        How many samples are measured.
    again
        Whether it goes on where it had come to its end, as options are others now.

    Raises
    ------
    InputError
        See :class:`ddml.runs.run.Run`.
    """

    def __init__(
        self,
        made: training.Training,
        moving: Batches | None,
        limits: Any,
        files: tuple[str | None, str | None],
        attributes: Mapping[str, Any],
        measure: Callable[[Tensor], Mapping[str, float]],
        tests: int,
        again: bool,
    ) -> None:
        output, before = files
        own = SimpleNamespace(**vars(limits) | {"output": output, "restart": before, "overwrite": True})
        if not own.error_interval:
            interval = moving.interval if moving is not None else 1
            between = 10 * tests / 3  # a test sample costs a third of a training sample
            own.error_interval = interval * math.ceil(between / (interval * made.objective.loss.count))
        super().__init__(
            made.objective, made.tao, made.x, own, attributes, measure, moving, "accuracy", solver=made.context,
            same_samples=made.start.restart.same_samples,
        )  # fmt: skip
        self.ended = "" if before is None or again else ended(before, made.comm)
        self.done = self.done or bool(self.ended)

    @property
    def gained(self) -> bool:
        """Whether it has gone any further."""
        return len(self.history) > 0 and self.history.last("iteration") > self.first_iteration

    def to_its_end(self) -> bool:
        """Run; False where a signal has stopped it.

        Raises
        ------
        InputError
            A loss that is not finite; a run file that cannot be written.
        """
        finished = self.execute()
        if self.failure:
            raise RunFileError(self.failure)
        if self.reason == SIGNAL:
            return False
        if not finished:
            raise InputError(f"{self.reason} behind iteration {self.history.last('iteration'):.0f}")
        self.reason = self.ended or self.reason
        return True

    def destroy(self) -> None:
        """Destroy what PETSc has of it."""
        self.last.destroy()


def ended(path: str, comm: MPI.Comm) -> str:
    """Why the training of a network had come to its end when its run file was written; nothing if it had not."""
    return str(run_file.inspect(path, comm).attributes.get("stopped", ""))
