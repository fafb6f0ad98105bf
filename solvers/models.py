"""Models of the loss inside a trust region, and the steps that minimise them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import CollectiveError
from ddml.norms import Norm
from ddml.objective import Objective
from ddml.options import preset
from ddml.residual import ResidualObjective

from .secant_model import SecantModel


class Model(ABC):
    """Everything is collective on the objective's communicator."""

    @abstractmethod
    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """Write a step of at most ``radius`` from x, where the gradient is g, to s: decrease predicted, its norm."""

    def observe(self, s: PETSc.Vec, y: PETSc.Vec | None) -> None:
        """The gradient changed by y over the last step s, which may have been rejected; None: it is not finite."""
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

    def destroy(self) -> None:
        """Destroy PETSc objects."""
        return


class FirstOrder(Model):
    r"""Steepest descent in a norm with Nesterov's momentum mu.

    .. math:: m \leftarrow \mu m + (1 - \mu) g, \quad d = \mu m + (1 - \mu) g, \quad s = -\Delta\, D(d)

    with D the duality map; the decrease predicted is -<g, s>. Where that is not positive m and d are replaced by g. m
    moves with every trial, so that one that was rejected is followed by one closer to -D(g) (our choice).
    """

    def __init__(self, norm: Norm, momentum: float, like: PETSc.Vec) -> None:
        self.norm, self.momentum = norm, momentum
        self.m, self.next_m, self.d = (like.duplicate() for _ in range(3))
        self.forget()

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        mu = self.momentum
        g.copy(self.next_m)
        if mu > 0:
            self.next_m.axpby(mu, 1 - mu, self.m)
            self.next_m.copy(self.d)
            self.d.axpby(1 - mu, mu, g)
            self.norm.steepest(self.d, s)
        slope = float(g.dot(s)) if mu > 0 else 0.0
        if not slope > 0:
            g.copy(self.next_m)
            slope = self.norm.steepest(g, s)
        s.scale(-radius)
        return radius * slope, radius if slope > 0 else 0.0

    def observe(self, s: PETSc.Vec, y: PETSc.Vec | None) -> None:
        """See :meth:`Model.observe`."""
        self.next_m.copy(self.m)

    def forget(self) -> None:
        """See :meth:`Model.forget`."""
        self.m.set(0.0)

    def state(self) -> dict[str, Any]:
        """See :meth:`Model.state`."""
        return {"momentum": self.m}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Model.restore`."""
        state["momentum"].copy(self.m)
        state["momentum"].destroy()

    def destroy(self) -> None:
        """See :meth:`Model.destroy`."""
        for vec in (self.m, self.next_m, self.d):
            vec.destroy()


class Secant(Model):
    """g.s + s.Bs / 2 in the 2-norm with B from secant pairs, solved exactly; with the pairs of rejected steps."""

    def __init__(self, kind: str, memory: int, comm: MPI.Comm) -> None:
        self.pairs, self.comm = SecantModel(memory, kind), comm

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        decrease, _ = self.pairs.matrix(self.comm, g).solve(g, radius, s)
        return decrease, float(s.norm())

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

    def destroy(self) -> None:
        """See :meth:`Model.destroy`."""
        self.pairs.clear()


class Products(Model):
    """g.s + s.Hs / 2 in the 2-norm by PETSc's KSP, which needs products H v only.

    ``stcg`` (Steihaug 1983), ``nash`` or ``gltr`` (Gould, Lucidi, Roma, Toint 1999), under the prefix ``tr_``.

    Parameters
    ----------
    objective
        Gives the products.
    matrix
        H; its Python context has ``move(x)``. Destroyed with this object.
    prefix
        Of the options.
    """

    def __init__(self, objective: Objective, matrix: PETSc.Mat, prefix: str) -> None:
        self.matrix, self.prefix = matrix, f"{prefix}tr_"
        self.ksp = PETSc.KSP().create(objective.comm)
        self.ksp.setOptionsPrefix(self.prefix)
        self.ksp.setOperators(matrix)
        self.ksp.getPC().setType("none")
        self.rhs = matrix.createVecRight()
        self._options(0.0)

    def _options(self, radius: float) -> None:
        # PETSc offers the radius as an option only; accuracy and limit are our choice
        own = {"ksp_type": "stcg", "ksp_rtol": 0.1, "ksp_max_it": 20}
        name = f"{self.prefix}ksp_cg_radius"
        PETSc.Options().setValue(name, repr(radius))
        with preset(**{self.prefix + key: value for key, value in own.items()}):
            self.ksp.setFromOptions()
        PETSc.Options().delValue(name)

    def step(self, x: PETSc.Vec, g: PETSc.Vec, radius: float, s: PETSc.Vec) -> tuple[float, float]:
        """See :meth:`Model.step`."""
        self.matrix.getPythonContext().move(x)
        self._options(radius)
        g.copy(self.rhs)
        self.rhs.scale(-1.0)
        self.ksp.solve(self.rhs, s)
        return -float(self.ksp.getCGObjectiveValue()), float(s.norm())

    def destroy(self) -> None:
        """See :meth:`Model.destroy`."""
        for thing in (self.ksp, self.matrix, self.rhs):
            thing.destroy()


class _GaussNewtonProducts:
    """Python context of 2 J^T J, the Gauss-Newton matrix of |r|^2, at a point."""

    def __init__(self, objective: ResidualObjective) -> None:
        self.objective = objective
        self.point = objective.layout.vector()
        self.image: PETSc.Vec | None = None

    def move(self, x: PETSc.Vec) -> None:
        """Make x the point; the number of residuals may have changed with the objective."""
        x.copy(self.point)
        if self.image is not None:
            self.image.destroy()
        self.image = self.objective.residual_vector()

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        self.objective.jacobian_product(self.point, x, self.image)
        self.objective.jacobian_transpose_product(self.point, self.image, y)
        y.scale(2.0)

    def destroy(self, mat: PETSc.Mat) -> None:
        """Destroy the vectors."""
        self.point.destroy()
        if self.image is not None:
            self.image.destroy()


def products(objective: Objective, kind: str, prefix: str) -> Products:
    """The model with the Hessian (``hessian``) or the Gauss-Newton matrix (``gauss_newton``).

    Raises
    ------
    CollectiveError
        If the objective has no residuals.
    """
    if kind == "hessian":
        return Products(objective, objective.hessian(), prefix)
    if not isinstance(objective, ResidualObjective):
        raise CollectiveError(
            f"option -{prefix}model gauss_newton needs a loss that is a sum of squares of residuals; use hessian"
        )
    local = int(objective.layout.counts[objective.comm.rank])
    sizes = (local, objective.size), (local, objective.size)
    mat = PETSc.Mat().createPython(sizes, _GaussNewtonProducts(objective), comm=objective.comm)
    mat.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    mat.setUp()
    return Products(objective, mat, prefix)
