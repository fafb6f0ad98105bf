"""Self-scaled quasi-Newton methods with a dense inverse Hessian, distributed over the ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.options import Option
from solvers.base import Solver
from solvers.line_search import SearchResult

from .inverse_hessian import FORMS, Factored, InverseHessian, Scaling, Symmetric

_TINY = 1e-300
# our choices: repairs of H of late after which it is given up; weight of the past in the trial step, and its limits;
# parameters up to which H may become a factor
WORN = 5.0
MEMORY, TRIALS = 0.7, (0.1, 1.0)
SMALL = 5_000


class SelfScaled(Solver):
    r"""Quasi-Newton method with a dense inverse Hessian H that scales itself.

    With p = -H g a step s = t p by a strong-Wolfe search, y the change of the gradient, q = H y,
    rho = 1 / s.y and v = rho s - q / y.q

    .. math:: H_+ = (H - q q^T / y.q + \phi (y.q) v v^T) / \tau + \rho s s^T.

    H is kept as a symmetric matrix or as a factor, on all ranks (:mod:`solvers.quasi_newton.inverse_hessian`): the
    factor holds curvatures that are twice as many orders of magnitude apart, and takes twice the memory
    and the time of a pass over it. ``-matrix_form auto`` begins with the matrix and goes over to its
    Cholesky factor where rounding has made p no descent direction (our choice).

    Our choices: The first trial step is not 1 but where the slopes at the ends of the last steps put the
    minimum along the line, a geometric mean between 0.1 and 1: H is too long by about two on PINNs, and
    most searches end at their first trial. H begins as the identity. Where rounding has made p no descent
    direction, H is repaired; where that has been done five times of late or cannot be done, or no step
    along p decreases the loss, H is the identity again.

    In single precision (``-matrix_dtype float32``) the small eigenvalues of H drown in the rounding of
    the large ones sooner. The Rayleigh quotients g.Hg / g.g tell how far apart they are: when they have
    spread too far, or p is no descent direction, H is stored in double precision from then on.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("matrix_form", "auto", "H is kept as a symmetric matrix, or as a factor of it, more accurate with twice "
               f"the memory; auto is symmetric until its rounding shows, then, up to {SMALL} parameters, factored.",
               choices=("auto", "symmetric", "factored")),
        Option("matrix_dtype", "float64", "Precision in which H is stored.", choices=("float64", "float32")),
        Option("keep_matrix", True, "Whether a checkpoint holds H; without it a restart begins with the identity."),
        Option("curvature_skip", 0.0, "No update where s.y is at most this.", minimum=0.0),
    )  # fmt: skip

    work_vectors = ("direction", "s", "q", "y", "product")
    saved = ("direction", "s", "q")  # of the update that H still waits for
    moves_points = 250
    measures_error = 10

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the matrix and the work vectors. Collective."""
        super().prepare(tao)
        form = self.settings.matrix_form
        self.form = "symmetric" if form == "auto" else form
        self.inverse = self._made(self.form, self.settings.matrix_dtype)
        self.needed = int(self.inverse.matrix.needed)
        self.whole_iterations = True
        self.fresh, self.trial, self.wear = True, 1.0, 0.0  # wear: repairs of late
        self.quotients = math.inf, 0.0  # smallest and largest Rayleigh quotient of H since it was the identity

    def _made(self, form: str, dtype: str) -> InverseHessian:
        return self.own(FORMS[form](self.objective, self.vectors, dtype))

    def _replace(self, form: str, inverse: InverseHessian) -> None:
        """Go over to another form of H."""
        self.release(self.inverse)
        self.form, self.inverse = form, inverse

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self._reset()

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        if not self.settings.keep_matrix:
            return {"matrix": None}
        return {
            "fresh": self.fresh,
            "trial": self.trial,
            "wear": self.wear,
            "quotients": list(self.quotients),
            "form": self.form,
            **self.inverse.state(),
        }

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        if state["matrix"] is None:
            self._reset()
            return
        self.fresh, self.trial, self.wear = state["fresh"], state["trial"], state["wear"]
        self.quotients = tuple(state["quotients"])
        form = state.get("form", "symmetric")  # older run files know no other
        if form != self.form:
            self._replace(form, self._made(form, state["dtype"]))
        self.inverse.restore(state)
        if self.settings.matrix_form == "factored":
            self.vectors["accepted_g"].copy(self.g)
            self._factor()

    def enlarged(self, state: dict[str, Any], places: NDArray[np.int64]) -> dict[str, Any]:
        """An :meth:`inner_state` of fewer parameters, which come to these places, increasing, as one of ours.

        Collective. H is the identity on the others; :meth:`resume` is to follow. The caller destroys the new vectors.
        """
        if state["matrix"] is None:
            return state
        other = self._made(state["form"], state["dtype"])
        found = other.enlarged(state, places)
        self.release(other)
        return found

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; H stays."""
        super().renew(x)
        self.inverse.renew()

    def resume(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.resume`; H stays."""
        self.inverse.renew()

    def _reset(self) -> None:
        """Make H the identity and the direction that of steepest descent."""
        self.inverse.reset()
        self.fresh, self.quotients, self.wear = True, (math.inf, 0.0), 0.0

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        g, direction = self.g, self.vectors["direction"]
        slope = g.dot(direction)
        matrix = self.inverse.matrix
        if matrix.values.dtype == np.float32:
            quotient = -slope / max(g.dot(g), _TINY)
            self.quotients = min(self.quotients[0], quotient), max(self.quotients[1], quotient)
            if not self.quotients[0] > self.inverse.spread * self.quotients[1]:
                matrix.double()
        self.wear *= 0.9
        if slope >= 0 and self.form == "symmetric" and self.settings.matrix_form == "auto" and g.getSize() <= SMALL:
            self._factor()
            slope = g.dot(direction)
        elif slope >= 0 and self.wear < WORN:
            self.wear += 1
            slope = self.inverse.repair(slope)
        if not slope < 0:  # also where it is not a number
            self._reset()
            slope = g.dot(direction)
        result = self.search(x, self.f, g, direction, self._first(g))
        if not result.success and not self.fresh:
            self._reset()
            slope = g.dot(self.vectors["direction"])
            result = self.search(x, self.f, g, direction, self._first(g))
        if result.success:
            self._learn(result.step, slope, g.dot(direction))
            if self.inverse.update(result.step, self.scaling, self.settings.curvature_skip):
                self.fresh = False
        return result

    def _factor(self) -> None:
        """Go over to the factor of H, if H is still a matrix, and to the direction that it gives."""
        worn = self.inverse
        if not isinstance(worn, Symmetric):
            return
        inverse = self.own(Factored(self.objective, self.vectors, "float64"))
        inverse.take(worn)
        self._replace("factored", inverse)

    def _first(self, g: PETSc.Vec) -> float:
        """The first trial step."""
        return 1 / max(g.norm(), 1.0) if self.fresh else self.trial

    def _learn(self, step: float, slope: float, end: float) -> None:
        """Follow where the slope along the direction vanishes, by its secant through both ends of the step."""
        if self.fresh:
            self.trial = 1.0
            return
        best = slope / (slope - end) if end > 0.9 * slope else 10.0
        self.trial = min(max(self.trial**MEMORY * (step * best) ** (1 - MEMORY), TRIALS[0]), TRIALS[1])

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
        root, r = sigma ** (1 / (1 - max(n, 2))), min(1.0, 1 / b)  # n = 1 has no such power
        tau = min(r * root, sigma) if theta <= 0 else r * min(root, 1 / theta)
        return Scaling(tau, (1 - theta) / (1 + a * theta))
