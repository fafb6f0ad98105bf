r"""The system :math:`A \alpha = Y` of a kernel machine as what a run works on: targets, work, who asks to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from petsc4py import PETSc

from ddml.losses.work import WorkCounter
from ddml.parallel import StopRequest
from ddml.parameters import Parameter, parameter_table

from .cuts import Array
from .functional import regularised
from .operator import KernelOperator


@dataclass(frozen=True)
class Operations:
    """Multiply-adds: of all subdomains, and along the critical path if each is on a process of its own."""

    total: float = 0.0
    critical: float = 0.0

    @classmethod
    def side_by_side(cls, each: Sequence[float]) -> Operations:
        """What subdomains do at the same time."""
        return cls(sum(each), max(each, default=0.0))

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.total + other.total, self.critical + other.critical)


@dataclass(frozen=True)
class Coefficients:
    """The coefficients as a table of parameters: ``alpha`` (n, k), in the order of the domain.

    Attributes
    ----------
    parameters : tuple of Parameter
    """

    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return self.parameters[0].size


class KernelSystem:
    r""":math:`(K + \mu I) \alpha = Y`, what has been spent on it, and the vectors that it is solved with. Collective.

    The work unit is one product of A with as many columns as Y has, by multiply-adds: where K is not kept those of
    distances count, too. The critical path is that of one process a subdomain; work does not depend on the ranks.

    Parameters
    ----------
    operator
        K + mu I.
    targets
        Y (n, k), by sample, the same on all ranks.
    stop
        Knows of signals.

    Attributes
    ----------
    rows : ndarray
        This rank's rows of Y.
    scale : float
        The norm of Y, all columns together; 1 if that is 0.
    work : WorkCounter
    received : float
        Numbers that subdomains have been sent, if each is on a process of its own.
    """

    def __init__(self, operator: KernelOperator, targets: Array, stop: StopRequest | None = None) -> None:
        self.operator, self.stop = operator, stop
        self.comm, self.work, self.received = operator.layout.comm, WorkCounter(), 0.0
        self.columns = targets.shape[1]
        self.rows = targets[operator.layout.rows]
        self.scale = float(np.sqrt(np.trace(operator.layout.inner(self.rows, self.rows)))) or 1.0
        self.layout = Coefficients(parameter_table([("alpha", targets.shape)]))
        domain = operator.layout.domain
        self.largest = max(map(len, domain.cores)) / domain.size

    @property
    def loss(self) -> KernelSystem:
        """Who explains a functional that is not finite."""
        return self

    def explain(self, theta: torch.Tensor) -> str:
        """Why the functional is not finite at coefficients (n k,)."""
        return "a coefficient is not finite" if not torch.isfinite(theta).all() else "a product with the kernel is not"

    def vector(self) -> PETSc.Vec:
        """A new zero vector of coefficients; the caller destroys it. Collective."""
        return self.operator.layout.vector(self.columns)

    def parameters(self, x: PETSc.Vec) -> torch.Tensor:
        """The coefficients (n k,), in the order of the domain, on every rank. Collective."""
        return torch.from_numpy(self.operator.layout.everywhere(self.operator.layout.matrix(x)).flatten())

    def by_sample(self, theta: torch.Tensor) -> Array:
        """The coefficients (n, k) by sample, of what :meth:`parameters` gave."""
        found: Array = theta.numpy().reshape(self.operator.layout.size, self.columns)[self.operator.layout.places]
        return found

    def value(self, alpha: Array, residual: Array) -> float:
        r"""The functional :math:`(\|Y - K \alpha\|^2 + \mu \langle \alpha, K \alpha \rangle) / n`; rows. Collective."""
        return regularised(self.operator, self.rows, alpha, residual) / self.operator.layout.size

    @property
    def unit(self) -> float:
        """Multiply-adds of a product with all columns."""
        return self.product(self.columns).total

    def product(self, columns: int) -> Operations:
        """Of a product of A with so many columns."""
        n, d = self.operator.samples.shape
        total = n * n * (columns + (0.0 if self.operator.keeps else d))
        return Operations(total, total * self.largest)

    def charge(self, spent: Operations, products: int = 0, received: float = 0.0) -> None:
        """Count operations, whole products and numbers received among what has been spent."""
        other = WorkCounter(spent.total / self.unit, spent.critical / self.unit, products=products)
        self.work.add_parallel([other])
        self.received += received

    def charge_product(self) -> None:
        """Count a product with all columns, for which each subdomain gets the coefficients of all others."""
        n, p = self.operator.layout.size, len(self.operator.layout.domain)
        self.charge(self.product(self.columns), 1, float((p - 1) * n * self.columns))
