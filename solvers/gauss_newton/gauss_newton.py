"""Gauss-Newton methods: damped, with geodesic acceleration, by preconditioned conjugate gradients or in dual form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from petsc4py import PETSc
from scipy import linalg
from torch import Tensor

from ddml.errors import CollectiveError, InputError
from ddml.linalg.small import cholesky
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.residual import ResidualObjective
from ddml.options import Option, preset
from ddml.parallel import words_of
from ddml.states import vectors_in
from solvers.base import Solver
from solvers.line_search import SearchResult

from .preconditioners import Array, NormalEquations, Preconditioner

# our choices: step of the finite difference, steps tried in an iteration, ratio of decreases that one must exceed
DIFFERENCE, TRIES, ACCEPTED = 0.1, 30, 1e-4

PRECONDITIONERS: dict[str, dict[str, Any]] = {
    "nystrom": {"pc_type": "python", "pc_python_type": "solvers.NystromPC"},
    "schwarz": {"pc_type": "python", "pc_python_type": "solvers.SchwarzPC"},
    "multiplicative": {"pc_type": "python", "pc_python_type": "solvers.SchwarzPC", "sweep": "multiplicative"},
    "cholesky": {"pc_type": "python", "pc_python_type": "solvers.SchwarzPC", "coarse": "none",
                 "decomposition": "layers", "subdomains": 1},
    "jacobi": {"pc_type": "jacobi"},
    "none": {"pc_type": "none"},
}  # fmt: skip


class GaussNewton(Solver):
    r"""Levenberg-Marquardt method with geodesic acceleration (Transtrum, Sethna 2012) for losses |r|^2.

    .. math:: (J^T J + \lambda I) v = -J^T r, \quad (J^T J + \lambda I) a = -J^T r_{vv},
              \quad \theta_+ = \theta + v + a / 2,

    with r_vv the second derivative of r along v, by a finite difference. A step with
    2 |a| / |v| > 0.75 is refused, as is one whose decrease of the loss is less than 1e-4 of that of the
    linear model. lambda follows that ratio (Nielsen 1999); it begins as a fraction of the largest
    diagonal entry of J^T J.

    The systems are solved by PETSc's KSP under the prefix gn_: conjugate gradients until the
    preconditioned residual's natural norm, close to the error's energy norm, has fallen to a tenth (our
    choice). A preconditioner is used until a system takes twice as many iterations, and five, as the
    first with it (our choice). With fewer residuals than parameters the dual form solves
    (J J^T + lambda I) u = -r by a dense Cholesky factorisation on rank 0, v = J^T u.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("form", "auto", "Systems in the parameters, or in the residuals; auto takes the smaller.",
               choices=("auto", "primal", "dual")),
        Option("preconditioner", "nystrom", "Short for PETSc's options -gn_pc_type ..., which come first.",
               choices=tuple(PRECONDITIONERS)),
        Option("jacobian", "assembled", "Whether the rows of J are stored; without, a product is a pass through the "
               "network.",
               choices=("assembled", "free")),
        Option("damping", 1e-3, "First lambda over the largest diagonal entry of J^T J.", above=0.0),
        Option("acceleration", True, "Whether the step is corrected to second order."),
        Option("acceleration_limit", 0.75, "Largest 2 |a| / |v|.", above=0.0),
    )  # fmt: skip

    work_vectors = ("v", "a", "trial", "trial_g", "rhs")
    moves_points = 5

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective.

        Raises
        ------
        InputError
            If the loss is no sum of squares.
        """
        super().setFromOptions(tao)
        objective = tao.getAppCtx()
        if not isinstance(objective, ResidualObjective):
            raise InputError("solver gauss_newton needs a loss that is a sum of squared residuals")
        objective.check_squares()

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make the work vectors, the matrix and the KSP, which reads its options. Collective."""
        super().prepare(tao)
        self.objective: ResidualObjective
        self.equations = NormalEquations(self.objective)
        self.matrix = self.own(self.equations.matrix())
        self.ksp = self.own(PETSc.KSP().create(self.objective.comm))
        prefix = f"{self.prefix}gn_"
        self.ksp.setOptionsPrefix(prefix)
        self.ksp.setOperators(self.matrix)
        chosen: dict[str, Any] = {"ksp_type": "cg", "ksp_norm_type": "natural", "ksp_rtol": 0.1, "ksp_max_it": 300}
        chosen |= PRECONDITIONERS[self.settings.preconditioner]
        with preset(**{prefix + name: value for name, value in chosen.items()}):
            self.ksp.setFromOptions()
        context = self.ksp.pc.getPythonContext() if self.ksp.pc.getType() == "python" else None
        self.preconditioner: Preconditioner | None = context
        self.whole_iterations = True
        self.damping, self.growth = 0.0, 2.0
        self.dual = False
        self.gram: Array | None = None
        self.factor: Array | None = None
        self.limit = -1  # CG iterations beyond which the preconditioner is built anew; -1: at once

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.damping, self.growth, self.limit = 0.0, 2.0, -1

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        lagged = self.limit >= 0 and self.preconditioner is not None
        return {
            "damping": self.damping,
            "growth": self.growth,
            "limit": self.limit if lagged else -1,
            "kind": self.preconditioner.kind() if lagged and self.preconditioner else None,
            "preconditioner": self.preconditioner.state() if lagged and self.preconditioner else None,
        }

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        self.damping, self.growth, self.limit = state["damping"], state["growth"], state["limit"]
        if state["preconditioner"] is None:
            return
        if self.preconditioner is not None and self.preconditioner.kind() == state["kind"]:
            self.preconditioner.restore(self.objective, state["preconditioner"])
            return
        self.limit = -1  # other options: it is built anew
        for vec in vectors_in(state["preconditioner"], "preconditioner", self.g).values():
            vec.destroy()

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`."""
        if not math.isfinite(self.g.norm()):  # as it may be at new points
            return SearchResult(self.f, 0.0, False)
        v, a, trial, trial_g = (self.vectors[name] for name in ("v", "a", "trial", "trial_g"))
        self.equations.move(None)  # gives the memory of the rows back before there are new ones
        at = Linearisation(self.objective, x, self.settings.jacobian == "assembled")
        self.equations.move(at)
        if self.damping == 0:
            at.diagonal(v)
            self.damping = self.settings.damping * v.max()[1]
        form = self.settings.form
        self.dual = form == "dual" or (form == "auto" and at.count < at.size)
        self.gram = at.dual_gram() if self.dual else None
        for _ in range(TRIES):
            self._damp()
            self._solve(at, at.residual, v)
            images = at.product(self.objective.layout.gather(v, device=at.device))
            pairs = zip(at.residual, images, strict=True)
            predicted = -at.total([float(2 * r @ w + w @ w) for r, w in pairs])
            bent = predicted > 0 and self.settings.acceleration and self._accelerate(at, x, images)
            if predicted > 0 and (not bent or 2 * a.norm() <= self.settings.acceleration_limit * v.norm()):
                trial.waxpy(1.0, x, v)
                if bent:
                    trial.axpy(0.5, a)
                value = self.objective.value_gradient(trial, trial_g)
                ratio = (self.f - value) / predicted
                if math.isfinite(value) and ratio > ACCEPTED and math.isfinite(trial_g.norm()):
                    trial.copy(x)
                    trial_g.copy(self.g)
                    self.damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
                    self.growth = 2.0
                    return SearchResult(value, 1.0, True)
            self.damping *= self.growth
            self.growth *= 2
        return SearchResult(self.f, 0.0, False)

    def _accelerate(self, at: Linearisation, x: PETSc.Vec, images: list[Tensor]) -> bool:
        """Find a for v, whose images under J are given; whether it exists."""
        v, a, trial = (self.vectors[name] for name in ("v", "a", "trial"))
        trial.waxpy(DIFFERENCE, v, x)
        there = at.residual_at(trial)
        triples = zip(there, at.residual, images, strict=True)
        self._solve(at, [2 / DIFFERENCE * ((t - r) / DIFFERENCE - w) for t, r, w in triples], a)
        return math.isfinite(a.norm())

    def _damp(self) -> None:
        """Take over lambda."""
        self.equations.damping = self.damping
        self.matrix.assemble()  # tells PETSc that it has changed
        if self.dual:
            self.factor = None if self.gram is None else cholesky(self.gram, self.damping)
        elif self.limit >= 0 and self.preconditioner is not None and not self.preconditioner.restored:
            self.preconditioner.damp(self.damping)

    def _solve(self, at: Linearisation, w: list[Tensor], solution: PETSc.Vec) -> None:
        """Solve (J^T J + lambda I) s = -J^T w."""
        if self.dual:
            at.transpose_product(self._dual(w), solution)
            solution.scale(-1.0)
            return
        rhs = self.vectors["rhs"]
        at.transpose_product(w, rhs)
        rhs.scale(-1.0)
        self.ksp.pc.setReusePreconditioner(self.limit >= 0)
        if self.limit < 0:
            self.matrix.assemble()  # lest PETSc takes the preconditioner for one of this matrix
        try:
            self.ksp.solve(rhs, solution)
        except PETSc.Error as error:
            if error.__cause__ is not None:
                raise
            reason = words_of(error)
            raise CollectiveError(f"PETSc cannot solve with these -{self.prefix}gn_ options: {reason}") from error
        iterations = self.ksp.getIterationNumber()
        if self.limit < 0 and self.preconditioner is not None and self.preconditioner.keeps:
            self.limit = 2 * iterations + 5
        elif iterations > self.limit:
            self.limit = -1

    def _dual(self, w: list[Tensor]) -> list[Tensor]:
        """(J J^T + lambda I)^-1 w."""
        comm = self.objective.comm
        gathered = comm.gather([piece.numpy() for piece in w])
        pieces = None
        if gathered is not None:
            assert self.factor is not None
            whole = np.concatenate([piece for rank in gathered for piece in rank])
            found = linalg.cho_solve((self.factor, True), whole, check_finite=False)
            edges = iter(np.split(found, np.cumsum([len(piece) for rank in gathered for piece in rank])[:-1]))
            pieces = [[next(edges) for _ in rank] for rank in gathered]
        return [torch.from_numpy(np.ascontiguousarray(piece)) for piece in comm.scatter(pieces)]
