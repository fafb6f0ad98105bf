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
from .line_search import SearchResult

_TINY = 1e-300
# our choices: repairs of H of late after which it is given up; weight of the past in the trial step, and its limits;
# ratio of Rayleigh quotients below which single precision is given up
WORN = 5.0
MEMORY, TRIALS = 0.7, (0.1, 1.0)
SPREAD = 1e-5


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
    ranks, n^2 / 2P numbers each.

    Our choices: The first trial step is not 1 but where the slopes at the ends of the last steps put the
    minimum along the line, a geometric mean between 0.1 and 1: H is too long by about two on PINNs, and
    most searches end at their first trial. H begins as the identity. Where rounding has made p no descent
    direction, the least multiple of the identity that makes it one is added to H; where that has been
    done five times of late, or no step along p decreases the loss, H is the identity again.

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

    work_vectors = ("direction", "s", "q", "y", "product")
    saved = ("direction", "s", "q")  # of the update that H still waits for
    moves_points = 250
    measures_error = 10

    def setUp(self, tao: PETSc.TAO) -> None:
        """Make the matrix and the work vectors. Collective."""
        super().setUp(tao)
        self.matrix = SymmetricMatrix(
            self.objective.comm, self.objective.size, self.objective.blocks or self.objective.comm.size,
            self.settings.matrix_dtype,
        )  # fmt: skip
        self.whole_iterations = True
        self.pending: tuple[float, ...] | None = None  # keep, and the factors of s s^T, s q^T, q q^T
        self.fresh, self.trial, self.wear = True, 1.0, 0.0  # wear: repairs of late
        self.quotients = math.inf, 0.0  # smallest and largest Rayleigh quotient of H since it was the identity
        self.written: PETSc.Vec | None = None  # what the last call of kept gave

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        if self.vectors and self.written is not None:
            self.written.destroy()
        super().destroy(tao)

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self._reset()

    def kept(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.kept`."""
        if not self.settings.keep_matrix:
            return {"matrix": None}
        if self.written is not None:
            self.written.destroy()
        self.written = self.matrix.save()
        return {
            "fresh": self.fresh,
            "trial": self.trial,
            "wear": self.wear,
            "quotients": list(self.quotients),
            "dtype": str(self.matrix.values.dtype),
            "matrix": self.written,
            "pending": None if self.pending is None else list(self.pending),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.restore`."""
        if state["matrix"] is None:
            self._reset()
            return
        self.fresh, self.trial, self.wear = state["fresh"], state["trial"], state["wear"]
        self.quotients = tuple(state["quotients"])
        self.pending = None if state["pending"] is None else tuple(state["pending"])
        if state["dtype"] != str(self.matrix.values.dtype):
            self.matrix.double()
        self.matrix.load(state["matrix"])
        state["matrix"].destroy()

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; H stays."""
        super().renew(x)
        self._multiply(self.g, self.vectors["direction"])
        self.pending = None
        self.vectors["direction"].scale(-1.0)

    def _reset(self) -> None:
        """Make H the identity and the direction that of steepest descent."""
        self.matrix.identity()
        self.pending, self.fresh, self.quotients, self.wear = None, True, (math.inf, 0.0), 0.0
        self.vectors["accepted_g"].copy(self.vectors["direction"])
        self.vectors["direction"].scale(-1.0)

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        g, direction = self.g, self.vectors["direction"]
        slope = g.dot(direction)
        if self.matrix.values.dtype == np.float32:
            quotient = -slope / max(g.dot(g), _TINY)
            self.quotients = min(self.quotients[0], quotient), max(self.quotients[1], quotient)
            if not self.quotients[0] > SPREAD * self.quotients[1]:
                self.matrix.double()
        self.wear *= 0.9
        if slope >= 0 and self.wear < WORN:
            slope = self._repair(slope)
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
            self._update(result.step)
        return result

    def _repair(self, slope: float) -> float:
        """Make p a descent direction by a multiple of the identity in H; the new slope."""
        self.wear += 1
        g, direction = self.g, self.vectors["direction"]
        squares = max(g.dot(g), _TINY)
        keep = 1.0 if self.pending is None else self.pending[0]
        amount = 2 * slope / squares
        self.matrix.shift(amount / keep)
        direction.axpy(-amount, g)
        return slope - amount * squares

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
        root, r = sigma ** (1 / (1 - max(n, 2))), min(1.0, 1 / b)  # n = 1 has no such power
        tau = min(r * root, sigma) if theta <= 0 else r * min(root, 1 / theta)
        return Scaling(tau, (1 - theta) / (1 + a * theta))
