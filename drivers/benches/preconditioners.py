"""Section preconditioners: conjugate gradients on Gauss-Newton systems."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from ddml import options
from ddml.objectives.linearisation import Linearisation
from ddml.layout import ParameterLayout
from ddml.objectives.residual import ResidualObjective
from solvers.gauss_newton.gauss_newton import PRECONDITIONERS
from solvers.gauss_newton.preconditioners import NormalEquations

from .tools import loss_of, medians, minimise

# networks, errors down to which they are trained, and lambda of the systems there (our choice)
STATES = (
    ("klein_gordon", 20, 4, 8e-3, 3e-4),
    ("klein_gordon", 20, 4, 9e-5, 3e-6),
    ("burgers", 20, 8, 9e-4, 1e-5),
)


SYSTEMS: dict[str, dict[str, Any]] = {
    "none": PRECONDITIONERS["none"],
    "diagonal": PRECONDITIONERS["jacobi"],
    "additive, single layers": {**PRECONDITIONERS["schwarz"], "window": 1, "coarse": "none"},
    "additive, single layers, neurons": {**PRECONDITIONERS["schwarz"], "window": 1},
    "additive, pairs of layers": {**PRECONDITIONERS["schwarz"], "coarse": "none"},
    "additive, pairs of layers, neurons": PRECONDITIONERS["schwarz"],
    "multiplicative, pairs of layers": {**PRECONDITIONERS["multiplicative"], "coarse": "none"},
    "Nystrom, rank 300": PRECONDITIONERS["nystrom"],
    "Cholesky": PRECONDITIONERS["cholesky"],
}


LIMIT = 600  # iterations


def preconditioners(settings: Any) -> None:
    """Conjugate gradients on Gauss-Newton systems: iterations until the energy norm of the error has fallen."""
    print("\n## Gauss-Newton systems, 4,032 points\n")
    print("| system | preconditioner | iterations to 1e-1 | to 1e-2 | build (ms) | apply (ms) | product (ms) |")
    print("|---|---|---|---|---|---|---|")
    for problem, width, depth, error, damping in STATES:
        loss = loss_of(problem, "mlp", width, depth, 4032)
        theta = minimise(loss, "ssbroyden", 1e9, 10**6, {}, target=error).theta
        objective = ResidualObjective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF))
        x = objective.layout.vector()
        x.array[:] = theta.numpy()
        equations = NormalEquations(objective)
        equations.move(Linearisation(objective, x, True))
        equations.damping = damping
        J = np.concatenate([equations.at.transposed(i).numpy() for i in range(len(objective.parts))], axis=1).T
        A = J.T @ J + damping * np.eye(len(theta))
        right = -J.T @ np.concatenate([r.numpy() for r in equations.at.residual])
        exact = np.linalg.solve(A, right)
        for name, chosen in SYSTEMS.items():
            counts, times = conjugate_gradients(equations, chosen, right, exact, A)
            found = " | ".join(str(c) if c is not None else f"> {LIMIT}" for c in counts)
            label = f"{problem} {width}x{depth}, error {error:g}, lambda {damping:g}"
            print(f"| {label} | {name} | {found} | " + " | ".join(f"{t:.1f}" for t in times) + " |", flush=True)


def conjugate_gradients(
    equations: NormalEquations, chosen: dict[str, Any], right: Any, exact: Any, A: Any
) -> tuple[list[int | None], list[float]]:
    """Iterations to an energy error of 1e-1 and 1e-2; milliseconds to build, to apply, to multiply."""
    matrix = equations.matrix()
    b, y = matrix.createVecs()
    b.array[:] = right
    ksp, prefix = PETSc.KSP().create(MPI.COMM_SELF), f"bench{time.perf_counter_ns()}_"
    ksp.setOptionsPrefix(prefix)
    ksp.setOperators(matrix)
    ksp.setType("cg")
    with options.preset(**{prefix + k: v for k, v in chosen.items()}):
        ksp.setFromOptions()
    start = time.perf_counter()
    ksp.setUp()
    times = [1e3 * (time.perf_counter() - start)]
    errors: list[float] = []

    def enough(ksp: PETSc.KSP, iteration: int, norm: float) -> bool:
        e = ksp.buildSolution().array_r - exact
        errors.append(float(np.sqrt(max(e @ A @ e, 0) / (exact @ A @ exact))))
        return errors[-1] < 1e-2 or iteration == LIMIT

    ksp.setConvergenceTest(enough)
    ksp.setTolerances(max_it=LIMIT + 1)
    ksp.solve(b, y)
    times += medians(3, lambda: ksp.pc.apply(b, y), lambda: matrix.mult(b, y))
    return [next((i for i, e in enumerate(errors) if e < level), None) for level in (1e-1, 1e-2)], times
