"""Newton's method for kernel machines of other losses than the squared one, step by step, as a run wants it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from petsc4py import PETSc

from ddml.kernel_machines.system import KernelSystem
from ddml.options import understood

from ..owner import Closed
from .curved import CurvedOperator
from .fit import krylov, norm
from .iterations import FOUND, NO_GAIN, RTOL, KernelIterations
from .newton import checked, curved_preconditioner
from .point import LossPoint


class NewtonIterations(KernelIterations):
    r""":func:`solvers.fit_kernel_loss` as iterations: one is a step of Newton's method.

    The residual is :math:`-(\ell' + \mu \alpha)`, minus the gradient in the kernel's own metric, and is compared with
    that at zero; what is minimised is J over the number of samples.

    Parameters
    ----------
    system
        Its right-hand side is what the loss takes.
    loss
        One of :data:`ddml.kernel_machines.losses.LOSSES`.
    rtol
        See :class:`KernelIterations`; PETSc's ``-ksp_rtol`` comes in its place.
    preconditioner
        As of :func:`solvers.fit_kernel_loss`.
    prefix
        Of the options.

    Raises
    ------
    InputError
        A loss or preconditioner that there is not, or that do not go together; mu of 0.
    """

    saved = ("left", "outputs")

    def __init__(
        self, system: KernelSystem, loss: str, rtol: float = RTOL, preconditioner: str | None = None, prefix: str = ""
    ) -> None:
        super().__init__(system, rtol)
        self.loss, self.prefix = checked(loss, system.operator), prefix
        self.context = curved_preconditioner(preconditioner, self.loss, system.columns)
        self.point: LossPoint | None = None
        self.known: dict[str, Any] = {}  # of the point's outputs

    def configure(self) -> None:
        """See :meth:`KernelIterations.configure`."""
        self.curved, stack = CurvedOperator(self.operator), ExitStack()
        options = {"ksp_rtol": self.rtol}
        context = self.context or "none"
        self.ksp = stack.enter_context(krylov(self.curved, self.system.columns, context, self.prefix, options))
        self.own(Closed(stack))
        self.rtol, self.charged = self.ksp.getTolerances()[0], self.curved.products
        rows = self.system.rows
        self.scale = norm(self.curved, self.loss.slopes(rows, np.zeros_like(rows))) or 1.0
        if self.system.stop is not None:
            self.ksp.setMonitor(self._look)

    def _look(self, *_: Any) -> None:
        """Notice a request to stop within a step, before which nothing has changed. Collective."""
        assert self.system.stop is not None
        self.system.stop.check(self.system.comm)

    def prepare(self) -> None:
        """See :meth:`KernelIterations.prepare`."""
        with understood():
            self.ksp.setUp()
        if self.context is not None:
            self.system.charge(self.context.set_up_operations())

    def renewed(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.renewed`."""
        alpha = self.operator.layout.matrix(x).copy()
        anything = self.system.comm.allreduce(bool(alpha.any()))
        self.point = LossPoint(
            self.curved, self.loss, self.system.rows, alpha, None if anything else np.zeros_like(alpha)
        )
        self._take(x)
        return self.point.size

    def begin(self, x: PETSc.Vec) -> None:
        """See :meth:`KernelIterations.begin`."""
        self._judge()
        self._take(x)

    def iterate(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.iterate`."""
        if self.point is None:  # of a restart
            alpha, outputs = self.operator.layout.matrix(x).copy(), self.mine("outputs").copy()
            self.point = LossPoint(self.curved, self.loss, self.system.rows, alpha, outputs, **self.known)
            self._judge()
        step = None
        if not self.reason:
            step = self.point.advance(self.ksp, self.context, self.rtol * self.scale)
            self._charge_systems()
            if step is None or not step.gained:
                self.reason = NO_GAIN
        self._judge()
        self._take(x)
        return 0.0 if step is None else step.length

    def value(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.value`."""
        assert self.point is not None
        return self.point.value / self.operator.layout.size

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`KernelIterations.inner_state`."""
        if self.point is None:  # of a restart that has nothing to do
            return dict(self.known)
        return {"exact": self.point.exact, "before": self.point.before}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`KernelIterations.take_state`."""
        self.point = None
        self.known = {"exact": bool(state["exact"]), "before": float(state["before"])}

    def _charge_systems(self) -> None:
        """Charge what has preconditioned a step's system; its products are :meth:`_take`'s."""
        if self.context is None:
            return
        columns = self.system.columns
        once, received = self.context.operations(columns), self.context.received(columns)
        self.system.charge(self.context.renewal_operations())
        for _ in range(self.ksp.getIterationNumber()):
            self.system.charge(once, received=received)

    def _judge(self) -> None:
        """Find out whether there is a further step, and make outputs exact if not. Collective."""
        assert self.point is not None
        limit = self.rtol * self.scale
        if not self.reason and self.point.good(limit):
            self.reason = FOUND if self.point.size <= limit else NO_GAIN
        if self.reason and not self.point.exact:
            self.point.refresh()

    def _take(self, x: PETSc.Vec) -> None:
        """Take over the point, and charge its products. Collective."""
        point = self.point
        assert point is not None
        with x as array:
            array[:] = point.alpha.ravel()
        self.write("left", -point.r)
        self.write("outputs", point.F)
        self.size = point.size
        for _ in range((self.curved.products - self.charged) // self.system.columns):
            self.system.charge_product()
        self.charged = self.curved.products
