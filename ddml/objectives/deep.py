r"""Deep kernels by variable projection: features that are trained under a kernel machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.kernel_machines.features import FeatureLoss, Penalty
from ddml.kernel_machines.layout import UNIT
from ddml.kernel_machines.reduced import ReducedFunctional
from ddml.layout import ParameterLayout
from ddml.linalg.compact import Compact
from ddml.losses.loss import Loss
from ddml.losses.work import DOUBLE, FRESH, PASSED
from ddml.parallel import StopRequest, split
from ddml.summation import leaves

from .linear import LinearTerm, tilted
from .objective import Objective

Array = NDArray[np.float64]


class DeepKernelObjective(Objective):
    r"""A reduced functional of features :math:`\phi_\theta(x)`, and a penalty, as a function of theta.

    .. math:: L(\theta) = F(\phi_\theta(x_1), \ldots, \phi_\theta(x_n)) + P(\theta)

    F has a kernel machine on the features solved: what it keeps of one point is where its next solve begins. The
    gradient is that of F by the features, then one backward pass through phi over chunks of samples, summed in an order
    that does not depend on the number of ranks. A work unit is a product of K with all columns of Y; features, kernels
    and derivatives are charged the multiply-adds that they take over those of such a product, preconditioners nothing.
    ``work.products`` counts the products. It is for solvers that ask for values and gradients of all parameters.

    Parameters
    ----------
    loss
        phi and the samples.
    layout
        Of theta, on the functional's communicator.
    functional
        F.
    penalty
        P, of theta (p,); None: 0.
    stop
        See :class:`ddml.objectives.objective.Objective`.

    Raises
    ------
    InputError
        A functional of another number of samples or on other ranks.
    """

    loss: FeatureLoss

    def __init__(
        self,
        loss: FeatureLoss,
        layout: ParameterLayout,
        functional: ReducedFunctional,
        penalty: Penalty | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        if functional.count != loss.count:
            raise InputError(f"the functional is of {functional.count} samples, the feature map has {loss.count}")
        if functional.layout.comm.size != layout.comm.size:
            raise InputError("the functional and the parameters must be on the same ranks")
        super().__init__(loss, layout, stop, leaves(loss.count, UNIT))
        self.functional, self.penalty = functional, penalty
        start = loss.initial()
        self._own = [part for part in self.parts if isinstance(part, FeatureLoss)]
        self._kept = [part.prefix(start, 0) for part in self._own]
        self._edges = split(loss.count, self.parts.blocks)

    def features(self, theta: Tensor) -> Array:
        """(n, q), by sample, on every rank. Collective."""
        parts = [part.features(theta, kept).numpy() for part, kept in zip(self._own, self._kept, strict=True)]
        mine = np.concatenate([np.empty((0, self.loss.width)), *parts])
        whole = np.empty((self.loss.count, self.loss.width))
        ranges = np.array(self._edges)[self.parts.tree.edges]
        self.comm.Allgatherv(mine, [whole, np.diff(ranges) * self.loss.width])
        return whole

    def value(self, x: PETSc.Vec) -> float:
        """See :meth:`.Objective.value`."""
        with self._events["loss"]:
            theta = self._noticed(x)
            return tilted(self.linear, self._total(theta, self.features(theta)), x)

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`.Objective.value_gradient`."""
        with self._events["gradient"]:
            theta = self._noticed(x)
            features = self.features(theta)
            value = self._total(theta, features, gradient=True)
            if not np.isfinite(features).all():
                g.set(np.nan)
                return value
            before = self.functional.operations
            cotangents = torch.as_tensor(self.functional.derivative(features))
            self._charge(before)
            edges = self._edges[self.parts.tree.edges[self.comm.rank] :]

            def pull(number: int, row: Tensor) -> None:
                here = cotangents[edges[number] : edges[number + 1]]
                self._own[number].pull(theta, here, row, self._kept[number])

            self.parts.sum_rows(pull, g)
            if self.penalty is not None:
                begin, end = self.layout.ranges[self.comm.rank : self.comm.rank + 2]
                leaf = theta.detach().double().clone().requires_grad_()
                slope = torch.autograd.grad(self.penalty(leaf), leaf)[0]
                with g as array:
                    array += slope[begin:end].numpy()
            for term in self.linear:
                g.axpy(1.0, term.dg)
            return tilted(self.linear, value, x)

    def _noticed(self, x: PETSc.Vec) -> Tensor:
        """All parameters; a request to stop is noticed before anything changes."""
        self.sum_parts([0.0] * len(self.parts))
        return self.parameters(x)

    def _total(self, theta: Tensor, features: Array, gradient: bool = False) -> float:
        """F + P, charged; NaN where features are not finite."""
        passes = self.loss.charges.evaluation(gradient=gradient) * self.loss.charges.operations * self.loss.count
        before, products = self.functional.operations - passes, self.functional.products
        finite = bool(np.isfinite(features).all())
        value = self.functional.value(features) if finite else np.nan
        self._charge(before)
        columns = self.functional.columns
        self.work.add(
            0.0, losses=not gradient, gradients=gradient, products=(self.functional.products - products) // columns
        )
        return value if self.penalty is None else value + float(self.penalty(theta.detach().double()))

    def _charge(self, before: float) -> None:
        """Charge the operations of the functional since it had so many."""
        self.work.add((self.functional.operations - before) / self._unit)

    @property
    def _unit(self) -> float:
        """Multiply-adds of a product of K with all columns."""
        return float(self.functional.layout.size**2 * self.functional.columns)

    def compute(self, operations: float, numbers: float = 0.0, fresh: float = 0.0) -> None:
        """See :meth:`.Objective.compute`."""
        self.work.add((DOUBLE * operations + PASSED * numbers + FRESH * fresh) / self._unit)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, that evaluations go on to the last bit. Collective."""
        return self.functional.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, made at the end of an iteration of the solver. Collective.

        Raises
        ------
        InputError
            If it is of other samples.
        """
        self.functional.restore(state)

    def replace(
        self,
        loss: Loss,
        fraction: float | None = None,
        overlap: NDArray[np.int64] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """See :meth:`.Objective.replace`; a kernel machine is not of some of its samples.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError("a deep kernel is trained on all samples all the time: it takes no batches")

    def derived(
        self,
        loss: Loss,
        parts: Sequence[Loss] | None = None,
        fraction: float | None = None,
        terms: Sequence[LinearTerm] = (),
    ) -> Objective:
        """See :meth:`.Objective.derived`: with more linear terms only.

        Raises
        ------
        InputError
            If the loss is another one.
        """
        if loss is not self.loss:
            raise InputError("a deep kernel is trained on all samples: it is no objective of some of them")
        made = DeepKernelObjective(self.loss, self.layout, self.functional, self.penalty, self.stop)
        made.work, made.linear = self.work, (*self.linear, *terms)
        return made

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """See :meth:`.Objective.value_compact`; there is none."""
        raise InputError("a deep kernel has no solver that spares memory: use -norm 2")

    def hessian_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """See :meth:`.Objective.hessian_product`; there is none."""
        raise InputError("a deep kernel has no Hessian products: use a solver that asks for gradients only")

    def gauss_newton_product(self, x: PETSc.Vec, direction: PETSc.Vec, product: PETSc.Vec) -> None:
        """See :meth:`.Objective.gauss_newton_product`; there is none."""
        raise InputError("a deep kernel has no Gauss-Newton products: use a solver that asks for gradients only")
