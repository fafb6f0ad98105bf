"""Self-scaled quasi-Newton methods with a dense inverse Hessian, distributed over the ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from petsc4py import PETSc

from ddml.options import Option
from ddml.symmetric import Change, SymmetricMatrix

from .base import Solver
from .line_search import LineSearch, SearchResult

_TINY = 1e-300
SPREAD = 1e-5  # of Rayleigh quotients, below which single precision is given up


class Scaling(NamedTuple):
    """How an update scales: H+ = (H - q q^T / y.q + phi (y.q) v v^T) / tau + rho s s^T."""

    tau: float
    phi: float


class SelfScaled(Solver):
    r"""Quasi-Newton method with a dense inverse Hessian H that scales itself.

    With p = -H g a step s = t p by a strong-Wolfe search, y the change of the gradient, q = H y,
    rho = 1 / s.y and v = rho s - q / y.q

    .. math:: H_+ = (H - q q^T / y.q + \phi (y.q) v v^T) / \tau + \rho s s^T.

    As p = -H g, q = H g_+ + p: each iteration multiplies H by g_+ and nothing else, and the same pass
    over its memory applies the update of the iteration before. The lower triangle of H lies on all
    ranks, n^2 / 2P numbers each. H begins as the identity and does so again (our choice) where p is
    no descent direction or no step along it decreases the loss.

    In single precision (``-matrix_dtype float32``) the small eigenvalues of H drown in the rounding of
    the large ones once they are 1e7 apart. The Rayleigh quotients g.Hg / g.g tell how far that is: when
    they have spread by 1e5, or p is no descent direction, H is stored in double precision from then on
    (our choice).
    """

    options: ClassVar[Sequence[Option]] = (
        Option("matrix_dtype", "float64", "Precision in which H is stored.", choices=("float64", "float32")),
        Option("keep_matrix", True, "Whether a checkpoint holds H; without it a restart begins with the identity."),
        Option("curvature_skip", 0.0, "No update where s.y is at most this.", minimum=0.0),
    )  # fmt: skip

    def setUp(self, tao: PETSc.TAO) -> None:
        """Make the matrix and the work vectors. Collective."""
        super().setUp(tao)
        x = tao.getSolution()
        self.search = LineSearch(self.objective, self.prefix)
        self.matrix = SymmetricMatrix(
            self.objective.comm, x.getSize(), self.objective.blocks or self.objective.comm.size,
            self.settings.matrix_dtype,
        )  # fmt: skip
        # accepted_g, direction (-H g), s and q (of the update that H still waits for): as of the last whole iteration
        names = ("g", "accepted_g", "direction", "s", "q", "y", "product")
        self.vectors = {name: x.duplicate() for name in names}
        self.pending: tuple[float, float, float, float] | None = None  # keep, and the factors of s s^T, s q^T, q q^T
        self.f, self.iteration, self.fresh = 0.0, 0, True
        self.quotients = math.inf, 0.0  # smallest and largest Rayleigh quotient of H since it was the identity
        self.saved: PETSc.Vec | None = None  # what the last call of state gave

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        if not hasattr(self, "vectors"):
            return
        self.search.destroy()
        for vec in self.vectors.values():
            vec.destroy()
        if self.saved is not None:
            self.saved.destroy()

    def state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.state`."""
        kept: dict[str, Any] = {"iteration": self.iteration, "f": self.f, "accepted_g": self.vectors["accepted_g"]}
        if self.settings.keep_matrix:
            if self.saved is not None:
                self.saved.destroy()
            self.saved = self.matrix.save()
            kept |= {
                "fresh": self.fresh, "quotients": list(self.quotients), "dtype": str(self.matrix.values.dtype), "matrix": self.saved,
                "pending": None if self.pending is None else list(self.pending),
                **{name: self.vectors[name] for name in ("direction", "s", "q")},
            }  # fmt: skip
        return kept

    def _start(self, tao: PETSc.TAO) -> bool:
        """Begin at the initial point, or where :meth:`resume` says; True to go on."""
        g, accepted = self.vectors["g"], self.vectors["accepted_g"]
        if self._resume is None:
            self.iteration = 0
            self.f = self.objective.value_gradient(tao.getSolution(), g)
            g.copy(accepted)
            self._reset()
            return self.report(tao, 0, self.f, g.norm(), 0.0)
        state, self._resume = self._resume, None
        self.iteration, self.f = state["iteration"], state["f"]
        vectors = {name: value for name, value in state.items() if isinstance(value, PETSc.Vec)}
        vectors["accepted_g"].copy(accepted)
        accepted.copy(g)
        if "matrix" in state:
            self.fresh, self.quotients, pending = state["fresh"], tuple(state["quotients"]), state["pending"]
            self.pending = None if pending is None else tuple(pending)
            if state["dtype"] != str(self.matrix.values.dtype):
                self.matrix.double()
            self.matrix.load(vectors["matrix"])
            for name in ("direction", "s", "q"):
                vectors[name].copy(self.vectors[name])
        else:
            self._reset()
        for vec in vectors.values():
            vec.destroy()
        tao.setIterationNumber(self.iteration)
        return tao.getMaximumIterations() > self.iteration

    def solve(self, tao: PETSc.TAO) -> None:
        """See :meth:`solvers.base.Solver.solve`."""
        x = tao.getSolution()
        going = self._start(tao)
        while going:
            result = self._iterate(x)
            if not result.success:
                tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE)
                return
            going = self.report(tao, self.iteration, self.f, self.vectors["g"].norm(), result.step)
        if tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONTINUE_ITERATING:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)

    def _reset(self) -> None:
        """Make H the identity and the direction that of steepest descent."""
        self.matrix.identity()
        self.pending, self.fresh, self.quotients = None, True, (math.inf, 0.0)
        self.vectors["accepted_g"].copy(self.vectors["direction"])
        self.vectors["direction"].scale(-1.0)

    def _iterate(self, x: PETSc.Vec) -> SearchResult:
        g, direction, accepted = (self.vectors[name] for name in ("g", "direction", "accepted_g"))
        slope = g.dot(direction)
        if self.matrix.values.dtype == np.float32:
            quotient = -slope / g.dot(g)
            self.quotients = min(self.quotients[0], quotient), max(self.quotients[1], quotient)
            if not self.quotients[0] > SPREAD * self.quotients[1]:
                self.matrix.double()
        if not slope < 0:  # also where it is not a number
            self._reset()
        result = self.search(x, self.f, g, direction, self._first(g))
        if not result.success and not self.fresh:
            self._reset()
            result = self.search(x, self.f, g, direction, self._first(g))
        if not result.success:
            return result
        self._update(result.step)
        self.f = result.value
        g.copy(accepted)
        self.iteration += 1
        return result

    def _first(self, g: PETSc.Vec) -> float:
        """The first trial step."""
        return min(1.0, 1 / g.norm()) if self.fresh else 1.0

    def _update(self, step: float) -> None:
        """From the step along the direction and the gradient there to the next direction."""
        g, accepted, direction, s, q, y, product = (
            self.vectors[name] for name in ("g", "accepted_g", "direction", "s", "q", "y", "product")
        )
        self._multiply(g, product)
        slope = step * accepted.dot(direction)
        y.waxpy(-1.0, accepted, g)
        direction.copy(s)
        s.scale(step)
        q.waxpy(1.0, direction, product)
        product.copy(direction)
        sy, yq = s.dot(y), y.dot(q)
        self.pending = None
        if sy > self.settings.curvature_skip and yq > 0:
            rho = 1 / sy
            tau, phi = self.scaling(rho * yq, -step * rho * slope, g.getSize())
            ss, sq, qq = yq * phi * rho**2 / tau + rho, -phi * rho / tau, (phi - 1) / (tau * yq)
            self.pending = 1 / tau, ss, sq, qq
            sg, qg = s.dot(g), q.dot(g)
            direction.scale(1 / tau)
            direction.maxpy([ss * sg + sq * qg, sq * sg + qq * qg], [s, q])
            self.fresh = False
        direction.scale(-1.0)

    def _multiply(self, g: PETSc.Vec, product: PETSc.Vec) -> None:
        """H g, after the update that H waits for."""
        layout = self.objective.layout
        if self.pending is None:
            rows = self.matrix.multiply(layout.gather(g).numpy())
        else:
            keep, ss, sq, qq = self.pending
            s, q = layout.gather(self.vectors["s"]).numpy().copy(), layout.gather(self.vectors["q"]).numpy().copy()
            change = Change(keep, s, q, ss * s + sq * q, sq * s + qq * q)
            rows = self.matrix.multiply(layout.gather(g).numpy(), change)
        layout.reduce_rows(rows, np.diff(self.matrix.shares).tolist(), product)

    @abstractmethod
    def scaling(self, h: float, b: float, n: int) -> Scaling:
        """Tau and phi from h = y.Hy / s.y, b = s.Bs / s.y with B the inverse of H, and the dimension n."""


class SSBFGS(SelfScaled):
    """Self-scaled BFGS: tau = min(1, 1 / b), phi = 1 (Al-Baali; Urban, Stefanou, Pons 2025)."""

    def scaling(self, h: float, b: float, n: int) -> Scaling:
        """See :meth:`SelfScaled.scaling`."""
        return Scaling(min(1.0, 1 / b), 1.0)


class SSBroyden(SelfScaled):
    """Self-scaled Broyden method SSBroyden2 (Al-Baali; Urban, Stefanou, Pons 2025)."""

    def scaling(self, h: float, b: float, n: int) -> Scaling:
        """See :meth:`SelfScaled.scaling`."""
        a = max(b * h - 1, _TINY)
        c = max(min(1.0, h * (1 - math.sqrt(a / (1 + a)))), _TINY)
        theta = max((c - 1) / a, min(1 / c, (1 - b) / b))
        sigma = 1 + theta * a
        root, r = sigma ** (1 / (1 - n)), min(1.0, 1 / b)
        tau = min(r * root, sigma) if theta <= 0 else r * min(root, 1 / theta)
        return Scaling(tau, (1 - theta) / (1 + a * theta))
