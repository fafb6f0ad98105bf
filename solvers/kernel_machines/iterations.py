"""Solvers of a kernel machine's system that a run can watch, stop and restart: what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import numpy as np
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.system import KernelSystem

from ..owner import Owner

FOUND = "the residual is below the tolerance"
NO_GAIN = "no digit is gained any more: what is left is rounding"
RTOL = 1e-6  # of the residual, by default, as of fit_kernel


class KernelIterations(Owner, ABC):
    r"""Python context of a TAO object whose solution is the coefficients of a kernel machine.

    An iteration moves alpha and the residual :math:`Y - A \alpha`, which is minus the gradient of J. It ends where the
    residual, computed anew in float64, is small enough. The next iteration needs alpha, the vectors :attr:`saved` and
    what :meth:`inner_state` gives: runs restart to the last bit.

    Parameters
    ----------
    system
        What is solved.
    rtol
        For the norm of the residual over that of Y.

    Attributes
    ----------
    saved : tuple of str
        Names of the vectors that are part of :meth:`state`; ``left`` is the residual.
    size, scale : float
        Its norm, as far as the method knows, and what that is compared with: the norm of Y.
    disagreement : float
        Of what subdomains have left on overlaps, relative to alpha; NaN where that has no meaning.
    reason : str
        Why there is no further iteration; nothing while there is one.
    """

    saved: tuple[str, ...] = ("left",)

    def __init__(self, system: KernelSystem, rtol: float = RTOL) -> None:
        if not rtol >= 0:
            raise InputError(f"the tolerance of the residual must be 0 or more, got {rtol}")
        self.system, self.operator, self.rtol = system, system.operator, rtol
        self.notes: list[str] = []
        self.spent: list[float] = []
        self.reason = ""
        self.iteration, self.resumes = 0, False
        self.size, self.scale, self.disagreement = system.scale, system.scale, float("nan")
        self.vectors: dict[str, PETSc.Vec] = {}

    def setUp(self, tao: PETSc.TAO) -> None:
        """Read options and make vectors: whatever is wrong is to be known before :meth:`solve` builds. Collective."""
        with self.building():
            self.vectors = {name: self.own(self.system.vector()) for name in self.saved}
            self.configure()

    def configure(self) -> None:
        """Read the method's options. Collective."""
        return

    def prepare(self) -> None:
        """Build what the method needs, and charge it. Collective."""
        return

    @abstractmethod
    def begin(self, x: PETSc.Vec) -> None:
        """Begin at x, the residual there is known. Collective."""

    @abstractmethod
    def iterate(self, x: PETSc.Vec) -> float:
        """Move x and the residual; the length of the step. Collective."""

    def inner_state(self) -> dict[str, Any]:
        """What an iteration needs besides vectors."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`inner_state` gave."""
        return

    def mine(self, name: str) -> Array:
        """This rank's rows of a vector, to be read."""
        return self.operator.layout.matrix(self.vectors[name])

    def write(self, name: str, rows: Array) -> None:
        """Write this rank's rows of a vector."""
        with self.vectors[name] as array:
            array[:] = rows.ravel()

    def renewed(self, x: PETSc.Vec) -> float:
        """Compute the residual of x anew, in float64; its norm. Collective."""
        alpha = self.operator.layout.matrix(x)
        if self.vectors["left"].comm.tompi4py().allreduce(bool(alpha.any())):
            self.write("left", self.operator.residual(self.system.rows, alpha))
            self.system.charge_product()
        else:
            self.write("left", self.system.rows)
        return float(self.vectors["left"].norm())

    @property
    def small(self) -> bool:
        """Whether the residual is small enough."""
        return self.size <= self.rtol * self.scale

    def value(self, x: PETSc.Vec) -> float:
        """What is minimised, at x, whose residual is known. Collective."""
        return self.system.value(self.operator.layout.matrix(x), self.mine("left"))

    def columns(self) -> dict[str, float]:
        """What a history is to have of the last iteration besides the functional."""
        return {
            "residual": self.size / self.scale,
            "disagreement": self.disagreement,
            "communication": self.system.received,
        }

    def solve(self, tao: PETSc.TAO) -> None:
        """Iterate. Collective."""
        x = tao.getSolution()
        if not self.reason:  # of a solve that has come to its end
            with self.system.work.unpaid() if self.resumes else nullcontext():
                self.prepare()
        if self.resumes:
            tao.setIterationNumber(self.iteration)
            self.resumes, going = False, tao.getMaximumIterations() > self.iteration
        else:
            self.iteration, self.reason = 0, ""
            self.size = self.renewed(x)
            self.begin(x)
            if self.small and not self.reason:
                self.reason = FOUND
            going = self._report(tao, x, 0.0)
        while going and not self.reason:
            step = self.iterate(x)
            self.iteration += 1
            going = self._report(tao, x, step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            done = PETSc.TAO.ConvergedReason
            tao.setConvergedReason(done.CONVERGED_USER if self.reason else done.DIVERGED_MAXITS)

    def _report(self, tao: PETSc.TAO, x: PETSc.Vec, step: float) -> bool:
        value = self.value(x)
        if not np.isfinite(value):
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_NAN)
        tao.setIterationNumber(self.iteration)
        tao.monitor(its=self.iteration, f=value, res=self.size, cnorm=0.0, step=step)
        going = PETSc.TAO.ConvergedReason.CONTINUE_ITERATING
        if tao.getConvergedReason() == going:
            tao.checkConverged()
        return bool(tao.getConvergedReason() == going)

    def state(self) -> dict[str, Any]:
        """What the next iteration needs besides the coefficients, as after the last complete one. Collective."""
        return {
            "iteration": self.iteration, "size": self.size, "disagreement": self.disagreement, "reason": self.reason,
            "received": self.system.received, "vectors": dict(self.vectors),
            "domain": self.operator.layout.domain.state(), **self.inner_state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Make the next :meth:`solve` go on from a :meth:`state`, whose vectors are taken over. Collective.

        Where the tolerance has become smaller a solve that had come to its end goes on.
        """
        for name, vec in self.vectors.items():
            state["vectors"][name].copy(vec)
        self.take_state(state)
        for vec in state["vectors"].values():
            vec.destroy()
        self.iteration, self.size, self.disagreement = state["iteration"], state["size"], state["disagreement"]
        self.system.received = state["received"]
        self.reason = state["reason"] if self.finished else ""
        self.resumes = True

    @property
    def finished(self) -> bool:
        """Whether both the residual, and what else is asked for, are small enough."""
        return self.small

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """Print what is solved, and how. Collective."""
        viewer.printfASCII(f"  {type(self).__name__}: residual below {self.rtol:g}\n  {self.operator}\n")
