"""Krylov methods on a kernel machine's system, iteration by iteration, as a run wants them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines.system import KernelSystem
from ddml.options import understood

from ..owner import Closed
from .fit import krylov
from .iterations import FOUND, NO_GAIN, RTOL, KernelIterations
from .preconditioner import ChargedPreconditioner

CYCLE = 30  # iterations of PETSc's method between two residuals that are computed anew, as its GMRES restarts


class KrylovIterations(KernelIterations):
    r"""What methods with a KSP object share: the preconditioner, and PETSc's options of both.

    Parameters
    ----------
    system
        What is solved.
    rtol
        See :class:`KernelIterations`; PETSc's ``-ksp_rtol`` comes in its place.
    preconditioner
        As of :func:`solvers.fit_kernel`.
    prefix
        Of the options.
    """

    def __init__(
        self, system: KernelSystem, rtol: float = RTOL, preconditioner: str = "schwarz", prefix: str = ""
    ) -> None:
        super().__init__(system, rtol)
        self.preconditioner, self.prefix = preconditioner, prefix

    def configure(self) -> None:
        """See :meth:`KernelIterations.configure`."""
        stack = ExitStack()
        options = {"ksp_rtol": self.rtol}
        opened = krylov(self.operator, self.system.columns, self.preconditioner, self.prefix, options)
        self.ksp: PETSc.KSP = stack.enter_context(opened)
        self.own(Closed(stack))
        self.rtol = self.ksp.getTolerances()[0]
        pc = self.ksp.getPC()
        self.context: ChargedPreconditioner | None = pc.getPythonContext() if pc.getType() == "python" else None

    def prepare(self) -> None:
        """See :meth:`KernelIterations.prepare`."""
        with understood():
            self.ksp.setUp()
        if self.context is not None:
            self.system.charge(self.context.set_up_operations())

    def charge_application(self, count: int = 1) -> None:
        """Count applications of the preconditioner."""
        if self.context is not None:
            columns = self.system.columns
            once, received = self.context.operations(columns), self.context.received(columns)
            for _ in range(count):
                self.system.charge(once, received=received)

    @property
    def kind(self) -> str:
        """PETSc's name of the method."""
        return str(self.ksp.getType())


class ConjugateGradients(KrylovIterations):
    """Preconditioned conjugate gradients whose state can be written: PETSc's own cg keeps its to itself.

    The recursion of the residual is believed until it says that the tolerance is reached; the residual is computed
    anew then, and where it is larger, what is left is solved for from there.
    """

    saved = ("left", "direction")

    def configure(self) -> None:
        """See :meth:`KernelIterations.configure`."""
        super().configure()
        self.image = self.own(self.system.vector())

    def begin(self, x: PETSc.Vec) -> None:
        """See :meth:`KernelIterations.begin`."""
        self.base, self.product = self.size, 0.0
        self.ksp.monitor(0, self.size)

    def _turn(self) -> None:
        """The next direction, from the residual."""
        left, direction = self.vectors["left"], self.vectors["direction"]
        image = left
        if self.context is not None:
            image = self.image
            with image as array:
                array[:] = self.context.solve(self.mine("left")).ravel()
            self.charge_application()
        product = left.dot(image)
        direction.aypx(product / self.product if self.product else 0.0, image)
        self.product = product

    def iterate(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.iterate`."""
        left, direction = self.vectors["left"], self.vectors["direction"]
        if not self.product:
            self._turn()
        with self.image as array:
            array[:] = self.operator.multiply(self.mine("direction")).ravel()
        self.system.charge_product()
        curvature = direction.dot(self.image)
        if not curvature > 0:
            raise InputError(
                f"K + lambda I, or its preconditioner, is not positive definite (a curvature is {curvature:.1e}): use "
                "a larger lambda, another kernel, or -ksp_type gmres"
            )
        step = self.product / curvature
        x.axpy(step, direction)
        left.axpy(-step, self.image)
        self.size = left.norm()
        if self.small:
            self.size = self.renewed(x)
            if self.small:
                self.reason = FOUND
            elif self.size > self.base / 2:
                self.reason = NO_GAIN
            else:
                self.base, self.product = self.size, 0.0
        elif not self.reason:
            self._turn()
        self.ksp.monitor(self.iteration + 1, self.size)
        return float(step)

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`KernelIterations.inner_state`."""
        return {"base": self.base, "product": self.product}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`KernelIterations.take_state`."""
        self.base, self.product = float(state["base"]), float(state["product"])
        if state["reason"]:  # the tolerance has become smaller, or nothing is left to do
            self.base, self.product = state["size"], 0.0


class KrylovCycles(KrylovIterations):
    """Any of PETSc's Krylov methods, a cycle of some of its iterations an iteration of the run.

    Behind each cycle the residual is computed anew and what is left is solved for, so that the coefficients are all
    that the next one needs. ``-ksp_max_it`` says how many iterations a cycle has.
    """

    def configure(self) -> None:
        """See :meth:`KernelIterations.configure`."""
        super().configure()
        asked = PETSc.Options().hasName(f"{self.prefix}ksp_max_it")
        self.cycle = self.ksp.getTolerances()[3] if asked else CYCLE
        self.y = self.own(self.system.vector())

    def begin(self, x: PETSc.Vec) -> None:
        """See :meth:`KernelIterations.begin`."""
        return

    def iterate(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.iterate`."""
        self.ksp.setTolerances(rtol=min(self.rtol * self.system.scale / self.size, 1.0), max_it=self.cycle)
        with understood():
            self.ksp.solve(self.vectors["left"], self.y)
        count = self.ksp.getIterationNumber()
        for _ in range(count):
            self.system.charge_product()
        self.charge_application(count)
        x.axpy(1.0, self.y)
        before, self.size = self.size, self.renewed(x)
        if self.small:
            self.reason = FOUND
        elif self.size > before * (1 - 1e-3):  # our choice
            self.reason = f"a cycle of {count} iterations of {self.kind} gained nothing"
        return float(self.y.norm())
