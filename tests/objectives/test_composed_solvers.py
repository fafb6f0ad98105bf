"""Solvers on composed objectives."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compositions import burgers, classifier, numbers, put
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.composed import shifted
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from solvers import Minimisation


def minimise(
    objective: Objective, solver: str, start: Tensor, settings: dict[str, Any], prefix: str, iterations: int
) -> Any:
    """The losses and the final parameters of a few iterations."""
    database, x = PETSc.Options(), put(objective.layout, start)
    for key, value in settings.items():
        database.setValue(prefix + key, value)
    made = Minimisation(objective, solver, prefix=prefix)
    x.copy(made.x)
    made.tao.setMaximumIterations(iterations)
    losses: list[float] = []
    made.tao.setMonitor(lambda tao: losses.append(tao.getSolutionStatus()[1]))
    made.tao.solve()
    found = SimpleNamespace(losses=losses, theta=objective.layout.gather(made.x).numpy().copy())
    made.destroy()
    x.destroy()
    return found


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("aspqn", {"subdomains": 3, "decomposition": "layers"}),
        ("mspqn", {"subdomains": 3, "decomposition": "layers", "overlap": 1}),
        ("mspqn_dense", {"window": 2}),
        ("apts_weights", {"window": 2, "norm": "infinity"}),
        ("apts_data", {"subdomains": 2, "norm": "infinity"}),
    ],
)
def test_schwarz_methods_minimise_a_shifted_objective(
    comm: MPI.Comm, least_squares: Any, sum_over_rows: Any, prefix: str, solver: str, settings: dict[str, Any]
) -> None:
    """As they do a loss with the linear term written into each sample."""
    plain = least_squares([3, 2, 4], bend=0.1)
    slope, start = numbers(9, 5), plain.start + 0.1
    count, function = plain.count, plain.function

    def tilted(theta: Tensor, rows: Tensor) -> Tensor:
        return function(theta, rows) + slope @ (theta - start) / count

    written = sum_over_rows(tilted, plain.rows, [3, 2, 4], plain.start)
    layout = ParameterLayout(plain.parameters, comm)
    objective = shifted(Objective(plain, layout), put(layout, slope), put(layout, start))
    found = minimise(objective, solver, plain.start, settings, prefix, 2)
    expected = minimise(Objective(written, layout), solver, plain.start, settings, prefix, 2)
    assert found.losses == pytest.approx(expected.losses, rel=1e-8)
    assert found.theta == pytest.approx(expected.theta, rel=1e-6)
    assert found.losses[-1] < found.losses[0] - 0.1


@pytest.mark.parametrize("model", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_local_curvature_may_be_that_of_some_of_the_samples(
    comm: MPI.Comm, train: Any, solver: str, model: str
) -> None:
    """Halving the samples changes the local models a little; with all of them it is the method without the option."""
    loss, settings = classifier()[0], {"window": 1} if solver == "apts_weights" else {"subdomains": 2}
    runs = [
        train(loss, solver, 4, blocks=6, model=model, norm="2", **settings, **fraction)
        for fraction in ({"curvature_fraction": 0.5}, {"curvature_fraction": 1.0}, {})
    ]
    some, every, default = (run.losses for run in runs)
    assert np.array_equal(every, default)
    assert not np.array_equal(some, every)
    assert some[-1] < some[0] - 0.7 * (every[0] - every[-1])


def test_a_solver_of_squares_refuses_a_linear_term(comm: MPI.Comm, prefix: str) -> None:
    loss = burgers()[0]
    layout = ParameterLayout(loss.parameters, comm)
    objective = shifted(ResidualObjective(loss, layout), layout.vector(), layout.vector())
    with pytest.raises(InputError, match="an objective with a linear term is no sum of squared residuals"):
        minimise(objective, "gauss_newton", loss.initial(), {}, prefix, 1)


def test_gauss_newton_solves_in_subdomains(comm: MPI.Comm, prefix: str) -> None:
    """The local objectives of residuals have residuals."""
    loss = burgers()[0]
    layout = ParameterLayout(loss.parameters, comm)
    settings = {"local_solver": "gauss_newton", "decomposition": "layers", "subdomains": 2}
    losses = minimise(ResidualObjective(loss, layout, blocks=6), "aspqn", loss.initial(), settings, prefix, 2).losses
    assert losses[-1] < 0.5 * losses[0]
