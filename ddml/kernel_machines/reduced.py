r"""What is minimised over features (n, q): reduced functionals, and their derivatives by the features.

No graph of n^2 entries is made. A derivative is :math:`\sum_{ij} G_{ij}\, dk(\phi_i, \phi_j)` with G of low rank: each
rank has the rows of its samples, block by block, and as k is symmetric a row of the derivative takes nothing of others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.losses.work import ACTIVATION
from ddml.parallel import agreed, own

from .cuts import Array
from .gradients import SmoothKernel
from .inexact import InexactSystem
from .layout import SampleLayout

AT_ONCE = 512  # held-out samples that are treated together (our choice)


class ReducedFunctional(ABC):
    """A number of features (n, q), and its derivative by them. Collective on ``layout.comm``.

    What is known of the last features is kept: a value at the same ones again, and the derivative there, take no solve.

    Attributes
    ----------
    count : int
        n.
    columns : int
        k, the outputs.
    layout : SampleLayout
        Of the samples that the machine is trained on.
    operations : float
        Multiply-adds so far, of kernels, products and derivatives; building preconditioners is not among them. The same
        on any number of ranks.
    """

    count: int
    columns: int
    layout: SampleLayout

    def __init__(self) -> None:
        self.operations = 0.0
        self._last: tuple[Array, float] | None = None
        self._derivative: Array | None = None

    @property
    def products(self) -> int:
        """Columns that kernel matrices were multiplied with so far."""
        return 0

    def value(self, features: Array) -> float:
        """At features (n, q), by sample, the same on all ranks. Collective."""
        if self._last is None or not np.array_equal(self._last[0], features):
            before, self._last, self._derivative = self.products, None, None
            value = self._value(features)
            self._last = features.copy(), value
            n = self.layout.size
            self.operations += n**2 * (features.shape[1] + ACTIVATION + self.products - before)
        return self._last[1]

    def derivative(self, features: Array) -> Array:
        """By the features, (n, q), by sample, on every rank. Collective."""
        self.value(features)
        if self._derivative is None:
            self._derivative = self._cotangents(features)
            self.operations += self.layout.size**2 * (self.columns + 2 * features.shape[1] + ACTIVATION)
        return self._derivative

    @abstractmethod
    def _value(self, features: Array) -> float:
        """See :meth:`value`: of other features than the last ones."""

    @abstractmethod
    def _cotangents(self, features: Array) -> Array:
        """See :meth:`derivative`, of the last features."""

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, that values and derivatives go on to the last bit. Collective."""
        features, value = (None, None) if self._last is None else self._last
        return {"features": features, "value": value, "derivative": self._derivative, "operations": self.operations}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`. Collective.

        Raises
        ------
        InputError
            If it is of other samples.
        """
        features = state["features"]
        if features is not None and (np.ndim(features) != 2 or len(features) != self.count):
            raise InputError(f"the state of the deep kernel is not one of {self.count} samples")
        self._last = None if features is None else (features, state["value"])
        self._derivative, self.operations = state["derivative"], state["operations"]

    def _targets(self, Y: Any, count: int) -> Array:
        found = np.asarray(Y, dtype=np.float64)
        if found.ndim != 2 or len(found) != count or not found.shape[1] or not np.isfinite(found).all():
            raise InputError(f"Y must have a row of finite numbers for each of {count} samples, got {found.shape}")
        return found


def pulled(
    kernel: SmoothKernel, layout: SampleLayout, x: Tensor, y: Tensor, weights: Callable[[slice], Tensor]
) -> Array:
    r"""This rank's rows of :math:`\sum_j w_{ij} \partial_1 k(x_i, y_j)`, (n, q), unit by unit. Collective.

    Parameters
    ----------
    kernel
        k.
    layout
        Of x.
    x, y
        (n, q), by place, and (m, q).
    weights
        From places to rows of w, which may be overwritten.
    """
    rows = []
    with agreed(layout.comm):
        for unit in layout.units:
            places = slice(layout.edges[unit], layout.edges[unit + 1])
            rows.append(kernel.pull(x[places], y, weights(places)).numpy())
    return np.concatenate([np.empty((0, x.shape[1])), *rows])


class ReducedTikhonov(ReducedFunctional):
    r"""The minimum over alpha of the Tikhonov functional of kernel machines on features, over n.

    .. math:: F(\phi) = \frac1n \min_\alpha \|Y - K \alpha\|^2 + \mu \langle \alpha, K \alpha \rangle
        = \frac\mu n \mathrm{tr}(Y^T A^{-1} Y)

    (variable projection; Golub, Pereyra 1973). With :math:`r = Y - A \alpha` of an inexact alpha the value is the dual
    functional :math:`\mu (\langle \alpha, Y \rangle + \langle \alpha, r \rangle) / n`: a lower bound whose error is of
    second order, :math:`\|r\|^2 / n` at most, which is just what the primal functional at alpha lies above it. Its
    derivative at fixed alpha, :math:`-\frac\mu n \sum_{ij} \langle \alpha_i, \alpha_j \rangle\, dk(\phi_i, \phi_j)`, is
    the one that is given.

    Parameters
    ----------
    system
        Of the features.
    Y
        (n, k), by sample.

    Raises
    ------
    InputError
        Y of another shape or not finite.
    """

    def __init__(self, system: InexactSystem, Y: Any) -> None:
        super().__init__()
        self.system, self.layout, self.count = system, system.layout, system.layout.size
        self.Y = self._targets(Y, self.count)
        self.columns = self.Y.shape[1]
        self._scale = float(np.square(self.Y).sum()) / self.count

    @property
    def products(self) -> int:
        """See :attr:`ReducedFunctional.products`."""
        return self.system.products

    def _value(self, features: Array) -> float:
        layout, system = self.layout, self.system
        system.move(features)
        alpha, left = system.solve("alpha", self.Y)
        rows = layout.rows
        value = system.shift / self.count * float(np.trace(layout.inner(alpha[rows], self.Y[rows] + left)))
        system.progressed(value, self._scale)
        return value

    def _cotangents(self, features: Array) -> Array:
        layout, system = self.layout, self.system
        x = torch.as_tensor(features[layout.domain.order])
        x = x - x.mean(dim=0) if system.kernel.translates else x
        alpha = torch.as_tensor(self.coefficients[layout.domain.order])
        factor = -2 * system.shift / self.count
        rows = pulled(system.kernel, layout, x, x, lambda places: (alpha[places] @ alpha.T).mul_(factor))
        return layout.everywhere(rows)[layout.places]

    @property
    def coefficients(self) -> Array:
        """Alpha (n, k) at the last features."""
        return self.system.known("alpha")

    def state(self) -> dict[str, Any]:
        """See :meth:`ReducedFunctional.state`."""
        return super().state() | {"system": self.system.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`ReducedFunctional.restore`."""
        super().restore(state)
        self.system.restore(state["system"])


class HeldOut(ReducedFunctional):
    r"""The mean square of errors on held-out samples V of the machine on the other ones T.

    .. math:: F(\phi) = \frac1{|V|} \|Y_V - K_{VT} \alpha\|^2, \quad A_{TT} \alpha = Y_T

    The derivative is that of the adjoint: one more inner solve, :math:`A z = K_{TV} R` with the errors R. The value is
    the Lagrange function's, :math:`\|R\|^2 / |V| - 2 \langle z, r \rangle / |V|` with :math:`r = Y_T - A \alpha`: its
    error is of second order, and the derivative at fixed alpha and z is the one that is given.

    Parameters
    ----------
    system
        Of the features of T.
    Y
        (n, k), of all samples.
    training, held
        The numbers of T's samples and of V's, disjoint; together all n.

    Raises
    ------
    InputError
        Y of another shape or not finite; samples that are in both or in none; a system of another number of samples.
    """

    def __init__(self, system: InexactSystem, Y: Any, training: Any, held: Any) -> None:
        super().__init__()
        self.system, self.layout = system, system.layout
        self.training, self.held = np.asarray(training, np.int64).ravel(), np.asarray(held, np.int64).ravel()
        self.count = len(self.training) + len(self.held)
        if not len(self.held) or not np.array_equal(np.sort(np.r_[self.training, self.held]), np.arange(self.count)):
            raise InputError("each sample must be in the training part or be held out, and some of each kind")
        if len(self.training) != self.layout.size:
            raise InputError(f"the layout has {self.layout.size} samples, the training part {len(self.training)}")
        found = self._targets(Y, self.count)
        self.Y, self.Y_held = found[self.training], found[self.held]
        self.columns = found.shape[1]
        self._scale = float(np.square(self.Y_held).sum()) / len(self.held)

    @property
    def products(self) -> int:
        """See :attr:`ReducedFunctional.products`."""
        return self.system.products

    def _value(self, features: Array) -> float:
        layout, system = self.layout, self.system
        system.move(features[self.training])
        alpha, left = system.solve("alpha", self.Y)
        operator = system.operator
        errors = self.Y_held - operator.predict(alpha, features[self.held])
        points = operator.prepared(features[self.held])
        right = np.zeros_like(left)
        for part, some in zip(
            points.split(AT_ONCE), np.split(errors, range(AT_ONCE, len(errors), AT_ONCE)), strict=True
        ):
            right += layout.times(operator.columns(part), some)
        adjoint, _ = system.solve("adjoint", layout.everywhere(right)[layout.places])
        correction = 2 * float(np.trace(layout.inner(adjoint[layout.rows], left)))
        value = (float(np.square(errors).sum()) - correction) / len(self.held)
        system.progressed(value, self._scale)
        self.errors = errors
        self.operations += layout.size * len(errors) * (2 * features.shape[1] + 2 * ACTIVATION + 2 * self.columns)
        return value

    def _cotangents(self, features: Array) -> Array:
        layout, kernel, m = self.layout, self.system.kernel, len(self.held)
        order = self.training[layout.domain.order]
        x, y = torch.as_tensor(features[order]), torch.as_tensor(features[self.held])
        if kernel.translates:
            x, y = x - x.mean(dim=0), y - x.mean(dim=0)
        alpha, z = (torch.as_tensor(self.system.known(name)[layout.domain.order]) for name in ("alpha", "adjoint"))
        R = torch.as_tensor(self.errors)

        def inside(places: slice) -> Tensor:
            return (z[places] @ alpha.T).add_(alpha[places] @ z.T).mul_(2 / m)

        rows = pulled(kernel, layout, x, x, inside)
        rows += pulled(kernel, layout, x, y, lambda places: (alpha[places] @ R.T).mul_(-2 / m))
        found = np.empty_like(features)
        found[order] = layout.everywhere(rows)
        blocks = -(-m // AT_ONCE)
        with agreed(layout.comm):
            mine = [kernel.pull(y[b], x, (R[b] @ alpha.T).mul_(-2 / m)).numpy() for b in own(m, layout.comm, blocks)]
        found[self.held] = np.concatenate([part for here in layout.comm.allgather(mine) for part in here])
        return found

    def state(self) -> dict[str, Any]:
        """See :meth:`ReducedFunctional.state`."""
        errors = None if self._last is None else self.errors
        return super().state() | {"system": self.system.state(), "errors": errors}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`ReducedFunctional.restore`."""
        super().restore(state)
        self.system.restore(state["system"])
        if state["errors"] is not None:
            self.errors = state["errors"]
