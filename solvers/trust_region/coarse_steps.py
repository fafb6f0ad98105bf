"""Several steps of a trust-region method on some of the samples, as one step of the method on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petsc4py import PETSc

from ddml.objectives.composed import sampled, shifted
from ddml.objectives.objective import Objective

from .models import Model, Products, Rows
from .radius import BOUNDARY, SMALLEST, TrustRadius

LITTLE = 0.01  # our choice: it ends when less than this part of the radius is left


class CoarseSteps(Model):
    r"""Minimise the consistent coarse objective by Newton steps that stay in the trust region.

    .. math:: h(\theta) = L_1(\theta) + \langle g - \nabla L_1(\theta_0), \theta - \theta_0 \rangle

    with L_1 the loss on the samples of the products and g the gradient of the whole one at theta_0, where the gradient
    of h is g, too. Each step is one of :class:`solvers.trust_region.models.Products` at the point so far, accepted or
    not by h in a radius of its own, which begins as the whole one. The decrease predicted is that of h. Where no step
    decreases h in a hundredth of the radius, and where the samples are all of them, so that h is the loss itself, it
    is a step of the products: their model is then judged.

    Parameters
    ----------
    objective
        The whole one.
    products
        Newton steps; this object's from now on.
    rows
        Those of the products.
    controller
        Makes the controller of a coarse solve.
    steps
        Accepted ones at most, 1 or more.
    """

    learns = False

    def __init__(
        self, objective: Objective, products: Products, rows: Rows, controller: Callable[[], TrustRadius], steps: int
    ) -> None:
        self.objective, self.products, self.rows = objective, self.own(products), rows
        self.controller, self.steps = controller, steps
        self.start, self.dg, self.z, self.zg, self.p, self.trial, self.trial_g = (
            self.own(objective.layout.vector()) for _ in range(7)
        )
        self.coarse = objective
        self._of: tuple[Any, int] = None, -1  # rows and version of what the coarse objective was made of

    def _renew(self, rows: Any) -> None:
        """Make the coarse objective anew where its samples are others."""
        if self._of[0] is not rows or self._of[1] != self.objective.version:
            self._of = rows, self.objective.version
            self.coarse = shifted(sampled(self.objective, rows), self.dg, self.start)

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`solvers.trust_region.models.Model.step`."""
        rows = self.rows()
        if rows is None or radius <= SMALLEST:
            return self.products.step(x, g, radius, s)
        self._renew(rows)
        x.copy(self.start)
        self.dg.set(0.0)
        first = value = self.coarse.value_gradient(x, self.zg)
        self.dg.waxpy(-1.0, self.zg, g)
        x.copy(self.z)
        g.copy(self.zg)
        inner, done, length = self.controller(), 0, 0.0
        inner.begin(first)
        inner.value = radius
        while done < self.steps:
            delta = min(inner.value, radius - length)
            if not delta > LITTLE * radius:
                break
            predicted, size = self.products.step(self.z, self.zg, delta, self.p)
            self.trial.waxpy(1.0, self.p, self.z)
            last = done + 1 == self.steps
            found = self.coarse.value(self.trial) if last else self.coarse.value_gradient(self.trial, self.trial_g)
            if inner.judge(found, predicted, size >= BOUNDARY * delta, size=size):
                done, value = done + 1, found
                self.trial.copy(self.z)
                self.trial_g.copy(self.zg)
                s.waxpy(-1.0, x, self.z)
                length = self.products.norm(s)
        if done == 0:
            return self.products.step(x, g, inner.value, s)
        return first - value, length

    def forget(self) -> None:
        """See :meth:`solvers.trust_region.models.Model.forget`."""
        self.products.forget()

    def state(self) -> dict[str, Any]:
        """See :meth:`solvers.trust_region.models.Model.state`."""
        return self.products.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.trust_region.models.Model.restore`."""
        self.products.restore(state)
