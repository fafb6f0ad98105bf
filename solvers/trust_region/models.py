"""Models of the loss inside a trust region, and the steps that minimise them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.data.sample_sets import spread_rows
from ddml.errors import CollectiveError
from ddml.layout import Operator, ParameterLayout
from ddml.norms.kronecker import KroneckerNorm
from ddml.norms.norm import Norm
from ddml.objectives.composed import sampled
from ddml.objectives.objective import Objective
from ddml.options import preset
from solvers.owner import Owner

from .accuracy import Accuracy
from .secant_model import SecantModel

Rows = Callable[[], NDArray[np.int64] | None]


class Model(Owner, ABC):
    """Everything is collective on the objective's communicator.

    Attributes
    ----------
    learns : bool
        Whether it makes use of how the gradient changes; if not, y may always be None.
    """

    momentum = 0.0
    learns = True

    @abstractmethod
    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """Write a step of at most ``radius`` from x, where the gradient is g, to s: decrease predicted, its norm."""

    def observe(self, s: PETSc.Vec, y: PETSc.Vec | None) -> None:
        """The gradient changed by y over the last step s, which may have been rejected; None: it is not finite.

        The gradient that the step was made of is still what it was.
        """
        return

    def learn(self, s: PETSc.Vec, y: PETSc.Vec) -> None:
        """The gradient changes by y over s, whatever s is."""
        return

    def forget(self) -> None:
        """Start anew."""
        return

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the vectors are this object's."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, whose vectors are taken over."""
        return


class FirstOrder(Model):
    r"""Steepest descent in a norm with Nesterov's momentum mu.

    .. math:: m \leftarrow \mu m + (1 - \mu) g, \quad d = \mu m + (1 - \mu) g, \quad s = -\Delta\, D(d)

    with D the duality map; the decrease predicted is -<g, s>. Where that is not positive m and d are replaced by g. m
    moves with every trial, so that one that was rejected is followed by one closer to -D(g) (our choice).

    It keeps one vector, m.
    """

    learns = False

    def __init__(self, norm: Norm, momentum: float, like: PETSc.Vec) -> None:
        self.norm, self.momentum = norm, momentum
        self.m = self.own(like.duplicate())
        self._last: tuple[float, PETSc.Vec] | None = None  # mu of the last step, 0 where m was replaced, and its g
        self.forget()

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        slope = self.direction(g, s)
        s.scale(-radius)
        return radius * slope, radius if slope > 0 else 0.0

    def direction(
        self, g: PETSc.Vec, s: PETSc.Vec, meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> float:
        """Write D(d) to s, which is 0 or of norm 1: <g, s>. Collective.

        While the duality map is computed g is not touched, and the context ``meanwhile`` is entered.
        """
        mu = self.momentum
        slope = 0.0
        g.copy(s)
        if mu > 0:
            s.axpby(mu, 1 - mu, self.m)
            s.axpby(1 - mu, mu, g)
            with meanwhile():
                self.norm.steepest(s, s)
            slope = float(g.dot(s))
        self._last = (mu if slope > 0 else 0.0), g
        if not slope > 0:
            g.copy(s)
            with meanwhile():
                slope = self.norm.steepest(s, s)
        return slope

    def observe(self, s: PETSc.Vec, y: PETSc.Vec | None) -> None:
        """See :meth:`Model.observe`."""
        if self._last is not None:
            mu, g = self._last
            self.m.axpby(1 - mu, mu, g)

    def forget(self) -> None:
        """See :meth:`Model.forget`."""
        self.m.set(0.0)
        self._last = None

    def state(self) -> dict[str, Any]:
        """See :meth:`Model.state`."""
        return {"momentum": self.m}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Model.restore`."""
        state["momentum"].copy(self.m)
        state["momentum"].destroy()


class Secant(Model):
    """g.s + s.Bs / 2 with B from secant pairs, those of rejected steps too, solved exactly in a norm from a product.

    In the 2-norm, or, in the coordinates of a :class:`ddml.norms.kronecker.KroneckerNorm`, in that one, where B is I
    before the first pair and gamma stays 1.
    """

    def __init__(self, kind: str, memory: int, layout: ParameterLayout, norm: Norm) -> None:
        self.metric = norm if isinstance(norm, KroneckerNorm) else None
        self.pairs = self.own(SecantModel(memory, kind, layout, self.metric))

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        matrix = self.pairs.matrix()
        if self.metric is None:
            decrease, _ = matrix.solve(g, radius, s)
            return decrease, float(s.norm())
        slope = g.duplicate()
        self.metric.covector(g, slope)
        decrease, _ = matrix.solve(slope, radius, s)
        length = float(s.norm())
        s.copy(slope)
        self.metric.vector(slope, s)
        slope.destroy()
        return decrease, length

    def observe(self, s: PETSc.Vec, y: PETSc.Vec | None) -> None:
        """See :meth:`Model.observe`."""
        if y is not None:
            self.learn(s, y)

    def learn(self, s: PETSc.Vec, y: PETSc.Vec) -> None:
        """See :meth:`Model.learn`."""
        self.pairs.update(s, y)

    def forget(self) -> None:
        """See :meth:`Model.forget`."""
        self.pairs.clear()

    def state(self) -> dict[str, Any]:
        """See :meth:`Model.state`."""
        return self.pairs.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Model.restore`."""
        self.pairs.restore(state)


class Products(Model):
    """g.s + s.Hs / 2 with the Hessian or the Gauss-Newton matrix by PETSc's KSP, which needs products H v only.

    ``stcg`` (Steihaug 1983), ``nash`` or ``gltr`` (Gould, Lucidi, Roma, Toint 1999), under the prefix ``tr_``. In the
    2-norm, or in that of a :class:`ddml.norms.kronecker.KroneckerNorm`, whose matrix is then the preconditioner: KSP's
    radius is in its norm.

    Parameters
    ----------
    objective
        Gives the products.
    kind
        ``hessian`` or ``gauss_newton``.
    rows
        Gives the numbers of the samples on which H is measured at the next step; None: all of them.
    prefix
        Of the options.
    norm
        The 2-norm or a KroneckerNorm.
    rule
        One of :data:`solvers.trust_region.accuracy.RULES`, for what the options of KSP leave open.

    Raises
    ------
    CollectiveError
        If the loss has no such products.
    """

    learns = False

    def __init__(
        self, objective: Objective, kind: str, rows: Rows, prefix: str, norm: Norm, rule: str = "fixed"
    ) -> None:
        if kind == "gauss_newton" and not objective.loss.gauss_newton:
            raise CollectiveError(
                f"option -{prefix}model gauss_newton needs a loss that is convex in a network's outputs, one tensor, "
                "as a sum of squares of residuals is; use hessian"
            )
        if kind == "hessian" and not objective.loss.hessian:
            raise CollectiveError(f"option -{prefix}model hessian needs Hessian products, which this loss has not")
        self.rhs = self.own(objective.layout.vector())
        self.matrix = self.own(_Curvature(objective, kind, rows).matrix())
        self.norm = norm
        self.accuracy = Accuracy(rule)
        self.prefix = f"{prefix}tr_"
        self.ksp = self.own(PETSc.KSP().create(objective.comm))
        self.ksp.setOptionsPrefix(self.prefix)
        self.ksp.setOperators(self.matrix)
        pc = self.ksp.getPC()
        if isinstance(norm, KroneckerNorm):
            pc.setType("python")
            pc.setPythonContext(_Metric(norm))
        else:
            pc.setType("none")
        self._options(0.0, 0.0)

    def _options(self, radius: float, norm: float) -> None:
        # PETSc offers the radius as an option only
        own = {"ksp_type": "stcg", "ksp_cg_dtype": "preconditioned", **self.accuracy.options(norm)}
        name = f"{self.prefix}ksp_cg_radius"
        PETSc.Options().setValue(name, repr(radius))
        with preset(**{self.prefix + key: value for key, value in own.items()}):
            self.ksp.setFromOptions()
        PETSc.Options().delValue(name)

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        self.matrix.getPythonContext().move(x)
        self._options(radius, float(g.norm()) if self.accuracy.relative else 0.0)
        g.copy(self.rhs)
        self.rhs.scale(-1.0)
        self.ksp.solve(self.rhs, s)
        return -float(self.ksp.getCGObjectiveValue()), self.norm(s)

    def forget(self) -> None:
        """See :meth:`Model.forget`."""
        self.accuracy.first = 0.0

    def state(self) -> dict[str, Any]:
        """See :meth:`Model.state`."""
        return {"first_norm": self.accuracy.first} if self.accuracy.relative else {}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Model.restore`; behind a run with another rule |g_0| is that of the next gradient."""
        self.accuracy.first = float(state.get("first_norm", 0.0))


def spread(objective: Objective, fraction: float) -> Rows:
    """About this fraction of an objective's samples, at equal distances: others when its loss is replaced."""
    known: list[tuple[int, NDArray[np.int64]]] = []

    def rows() -> NDArray[np.int64] | None:
        if fraction >= 1:
            return None
        if not known or known[0][0] != objective.version:
            known[:] = [(objective.version, spread_rows(objective.loss.count, fraction, objective.version))]
        return known[0][1]

    return rows


class _Curvature(Operator, Owner):
    """Python context of a Hessian or Gauss-Newton matrix at a point, on a part of the samples."""

    def __init__(self, objective: Objective, kind: str, rows: Rows) -> None:
        super().__init__(objective.layout)
        self.objective, self.kind, self.choose = objective, kind, rows
        self.point = self.own(objective.layout.vector())
        self.part, self.version = objective, objective.version
        self.rows: NDArray[np.int64] | None = None

    def move(self, x: PETSc.Vec) -> None:
        """Make x the point."""
        x.copy(self.point)
        objective, rows = self.objective, self.choose()
        if rows is None:
            self.part = objective
        elif rows is not self.rows or self.version != objective.version:
            self.part = sampled(objective, rows)
        self.rows, self.version = rows, objective.version

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        multiply = self.part.hessian_product if self.kind == "hessian" else self.part.gauss_newton_product
        multiply(self.point, x, y)


class _Metric:
    """Python context of a preconditioner: the inverse of a norm's matrix."""

    def __init__(self, norm: KroneckerNorm) -> None:
        self.norm = norm

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write M^-1 x to y."""
        self.norm.inverse(x, y)
