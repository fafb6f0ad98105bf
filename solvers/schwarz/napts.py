"""A non-monotone APTS with coarse directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.options import Option, with_defaults
from solvers.line_search import SearchResult
from solvers.trust_region.subproblem import diagonal_step

from .apts import APTSWeights

# directions whose part outside the span of the others is less than this of their length add nothing (our choice)
DEPENDENT = 1e-8


def small_step(
    slopes: NDArray[np.float64], curvature: NDArray[np.float64], gram: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.float64], float]:
    r"""The c (k,) that minimises slopes.c + c.curvature c / 2 with c.gram c <= radius^2, and the decrease.

    For steps W c with gram W^T W, in an orthonormal basis of the span of W without its negligible directions.
    """
    size = np.sqrt(np.diag(gram))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    values, vectors = np.linalg.eigh(gram * np.outer(scale, scale))
    kept = values > DEPENDENT**2 * max(float(values[-1]), 0.0)
    basis = scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])
    eigenvalues, U = np.linalg.eigh(basis.T @ ((curvature + curvature.T) / 2) @ basis)
    basis = basis @ U
    v, _, decrease = diagonal_step(eigenvalues, basis.T @ slopes, radius)
    return basis @ v, decrease


class Displacements:
    """The last m displacements p of the whole network, and the changes y of the gradient over them.

    Attributes
    ----------
    P, Y : list of PETSc.Vec
        The oldest first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.P: list[PETSc.Vec] = []
        self.Y: list[PETSc.Vec] = []

    def add(self, points: tuple[PETSc.Vec, PETSc.Vec], gradients: tuple[PETSc.Vec, PETSc.Vec]) -> None:
        """Store the differences of two points and of the gradients there, and forget the oldest beyond m."""
        while len(self.P) >= self.count:
            self.P.pop(0).destroy()
            self.Y.pop(0).destroy()
        for vectors, (now, before) in ((self.P, points), (self.Y, gradients)):
            vectors.append(now.copy())
            vectors[-1].axpy(-1.0, before)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the vectors are this object's."""
        return {"P": list(self.P), "Y": list(self.Y)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the vectors of a :meth:`state`."""
        self.destroy()
        self.P, self.Y = list(state["P"]), list(state["Y"])

    def destroy(self) -> None:
        """Forget everything."""
        for vec in (*self.P, *self.Y):
            vec.destroy()
        self.P, self.Y = [], []


class NAPTS(APTSWeights):
    r"""Non-monotone APTS in the weights with coarse directions (arXiv 2605.14860).

    As :class:`solvers.schwarz.apts.APTSWeights`, with two changes. Trials are judged against the largest of the last
    M + 1 losses. And the sum s of the corrections is replaced by the best combination W c of s and of the last
    displacements of the whole network, p_1, ..., p_m: the coarse space, which joins what the subdomains do on their
    own. It stands in the place of APTS's global steps, which take one evaluation each and are mostly rejected, as the
    radius suits corrections of several steps: only where a correction is refused do global steps follow. The
    paper's coarse space is not known to us; this one is our choice, as it costs no evaluation: along the p_i the
    changes y_i of the gradient are known, and along s the curvature within the subdomains is, from what the local
    solves found. c minimises

    .. math:: g^T W c + \tfrac12 c^T K c, \quad \|W c\|_2 \le \frac{\delta}{\|s\|} \|s\|_2

    with :math:`K_{ij} \approx w_i^T \nabla^2 L\, w_j`: p_i.y_j and s.y_j, made symmetric, and
    K_ss = 2 (-g.s - decrease that s promises). It is a trust-region problem with m + 1 unknowns, solved exactly; steps
    longer than delta in the norm of the method are shortened. The gradient of the next iteration measures what c
    has done.

    With nonmonotone and coarse_directions 0 this is APTS in the weights.
    """

    options: ClassVar[Sequence[Option]] = (
        *with_defaults(APTSWeights.options, nonmonotone=5),
        Option("coarse_directions", 1, "Last displacements m of the whole network that corrections are combined with, "
               "in the place of global steps.", minimum=0),
    )  # fmt: skip
    work_vectors = (*APTSWeights.work_vectors, "start_x", "start_g", "own")

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().prepare(tao)
        self.displacements = self.own(Displacements(self.settings.coarse_directions))

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        super().begin()
        self.displacements.destroy()

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {**super().inner_state(), "coarse": self.displacements.state()}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        super().take_state(state)
        self.displacements.restore(state["coarse"])

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        if self.settings.coarse_directions == 0:
            return super().iterate(x)
        start_x, start_g = self.vectors["start_x"], self.vectors["start_g"]
        x.copy(start_x)
        self.g.copy(start_g)
        result = super().iterate(x)
        if result.step > 0:
            self.displacements.add((x, start_x), (self.g, start_g))
        return result

    def _global_steps(self, x: PETSc.Vec, moved: float) -> SearchResult:
        if moved == 0 or self.settings.coarse_directions == 0:
            return super()._global_steps(x, moved)
        self.norm.aged(x)
        return SearchResult(self.f, moved, True)

    def _correction(self, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        predicted = super()._correction(x, delta, s)
        P, Y = self.displacements.P, self.displacements.Y
        if not (P and predicted > 0):
            return predicted
        own = self.vectors["own"]
        s.copy(own)
        W = [own, *P]
        slopes = np.asarray(self.g.mDot(W))
        gram = np.array([np.asarray(w.mDot(W)) for w in W])
        K = np.empty_like(gram)
        K[0, 0] = 2 * (-slopes[0] - predicted)
        K[:, 1:] = np.array([np.asarray(y.mDot(W)) for y in Y]).T
        K[1:, 0] = K[0, 1:]
        c, decrease = small_step(slopes, K, gram, float(np.sqrt(gram[0, 0])) * delta / self.norm(own))
        s.set(0.0)
        s.maxpy(c, W)
        return decrease
