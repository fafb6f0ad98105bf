"""Local solvers that fail on some ranks only; the time of a fault goes to standard error."""

import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.objectives.consistent import ConsistentObjective
from ddml.options import Option
from solvers import LBFGS


class Faulty(LBFGS):
    """Fails in the solve number ``fault``, 0 for the set-up, on the group of the last rank or only there."""

    options: ClassVar[Sequence[Option]] = (
        *LBFGS.options,
        Option("fault", 0, "When."),
        Option("alone", False, "Whether the last rank only fails, not its group."),
        Option("kind", "input", "Of the exception.", choices=("input", "arithmetic", "memory")),
    )
    solves = 0

    def fail(self) -> None:
        last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
        if last if self.settings.alone else self.objective.comm.allreduce(last, MPI.LOR):
            print(f"fault {time.time()}", file=sys.stderr, flush=True)
            error = {"input": InputError, "arithmetic": FloatingPointError, "memory": MemoryError}[self.settings.kind]
            raise error("a local solver has had enough")

    def setUp(self, tao: PETSc.TAO) -> None:
        super().setUp(tao)
        if self.settings.fault == 0:
            self.fail()

    def begin(self) -> None:
        super().begin()
        self.solves += 1
        if self.solves == self.settings.fault:
            self.fail()


class CannotBeMade(LBFGS):
    """Raises in its constructor on the last rank."""

    def __new__(cls) -> Any:
        if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            print(f"fault {time.time()}", file=sys.stderr, flush=True)
            raise ZeroDivisionError("a local solver has had enough")
        return super().__new__(cls)


class EndsNowhere(LBFGS):
    """Leaves the second subdomain at points that are not numbers."""

    def iterate(self, x: PETSc.Vec) -> Any:
        result = super().iterate(x)
        here = self.objective
        if here.s == 1 if isinstance(here, ConsistentObjective) else here.loss.first == 1:
            x.set(float("nan"))
        return result
