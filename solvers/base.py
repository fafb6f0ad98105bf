"""What all our TAO contexts share."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.objective import Objective
from ddml.options import Option, read

REASONS = {v: k for k, v in vars(PETSc.TAO.ConvergedReason).items() if not k.startswith("_")}


class Solver:
    """Python context of a TAO solver (``-tao_type python -tao_python_type solvers.<name>``).

    The objective must have been given with :meth:`ddml.objective.Objective.attach`. Options are
    read once, under the prefix of the TAO object.

    Attributes
    ----------
    options : tuple of Option
        What the solver reads.
    settings : namespace
        The values in force.
    """

    options: ClassVar[Sequence[Option]] = ()

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.prefix = ""
        self.objective: Objective
        self._resume: dict[str, Any] | None = None

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        self.prefix = tao.getOptionsPrefix() or ""
        self.settings = read(self.options, self.prefix)

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build what the solver needs. Collective."""
        self.objective = tao.getAppCtx()

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """Print the values in force. Collective."""
        viewer.printfASCII(f"  {type(self).__name__}\n")
        for name, value in vars(self.settings).items():
            viewer.printfASCII(f"    {self.prefix}{name}: {value}\n")

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise. Collective."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the next iteration needs besides the parameters, as it was after the last complete one."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Make the next :meth:`solve` go on from :meth:`state` instead of starting anew."""
        self._resume = state

    def report(self, tao: PETSc.TAO, iteration: int, f: float, residual: float, step: float) -> bool:
        """Set the iteration number, call the monitors, test convergence; True to go on. Collective."""
        tao.setIterationNumber(iteration)
        tao.monitor(its=iteration, f=f, res=residual, cnorm=0.0, step=step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            tao.checkConverged()
        return bool(tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING)
