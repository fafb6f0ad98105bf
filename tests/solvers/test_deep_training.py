"""Deep kernels trained by the solvers that there are: decrease, the same bits, restarts, inexact inner solves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from deep_cases import X, Y, evaluated, network, objective
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, named
from ddml.kernel_machines.features import decay
from ddml.objectives.deep import DeepKernelObjective
from solvers import KernelSchwarzPC, Minimisation, fit_kernel, minimise
from solvers.kernel_machines.inner import InnerSolver

SOLVERS = ("tr", "ssbroyden", "lbfgs", "gradient", "adagrad", "lmvm")


@pytest.mark.parametrize(
    ("solver", "kind"), [*((solver, "tikhonov") for solver in SOLVERS), ("tr", "held"), ("ssbroyden", "left")]
)
def test_solvers_lower_the_objective(comm: MPI.Comm, solver: str, kind: str) -> None:
    made = objective(kind, comm)
    found = minimise(made, solver, comm, iterations=8)
    assert found.losses[-1] < (0.67 if solver in ("tr", "ssbroyden") else 1.0) * found.losses[0]
    assert made.work.gradients >= 8


@pytest.mark.parametrize("solver", ["tr", "ssbroyden"])
def test_networks_are_trained(comm: MPI.Comm, solver: str) -> None:
    found = minimise(objective("tikhonov", comm, network(), decay(1e-4)), solver, comm, iterations=15)
    assert found.losses[-1] < 0.67 * found.losses[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("solver", "kind"), [("tr", "tikhonov"), ("ssbroyden", "tikhonov"), ("tr", "held")])
def test_runs_have_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, solver: str, kind: str) -> None:
    def trained(on: MPI.Comm) -> tuple[bytes, bytes, int]:
        made = objective(kind, on)
        found = minimise(made, solver, on, iterations=6)
        return found.losses.tobytes(), found.theta.numpy().tobytes(), made.functional.products

    assert trained(comm) == on_one_rank(trained)


def run(made: DeepKernelObjective, solver: str, last: int, kept: Any = None, at: int = -1) -> tuple[np.ndarray, Any]:
    """The losses of a run to an iteration, from what was kept of another one; what is to be kept at an iteration."""
    job = Minimisation(made, solver, made.comm)
    assert job.context is not None
    losses, saved = [], None

    def own(value: Any) -> Any:
        if isinstance(value, PETSc.Vec):
            return value.copy()
        if isinstance(value, dict):
            return {key: own(item) for key, item in value.items()}
        return [own(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)

    def watch(tao: PETSc.TAO) -> None:
        nonlocal saved
        losses.append(tao.getSolutionStatus()[1])
        if tao.getIterationNumber() == at:
            saved = job.x.array_r.copy(), own(job.context.state()), own(made.state())

    job.tao.setMonitor(watch)
    job.tao.setMaximumIterations(last)
    if kept is not None:
        job.x.array[:] = kept[0]
        job.context.restore(kept[1])
        made.restore(kept[2])
    job.tao.solve()
    job.destroy()
    return np.array(losses), saved


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("solver", "kind"), [("tr", "tikhonov"), ("tr", "held"), ("ssbroyden", "tikhonov"), ("ssbroyden", "left")]
)
def test_a_resumed_run_goes_on_to_the_last_bit_on_any_number_of_ranks(comm: MPI.Comm, solver: str, kind: str) -> None:
    made, again = objective(kind, comm), objective(kind, comm)
    whole, kept = run(made, solver, 9, at=4)
    rest, _ = run(again, solver, 9, kept)
    assert rest[-5:].tobytes() == whole[5:].tobytes()
    assert again.functional.products == made.functional.products
    assert again.functional.operations == made.functional.operations


def test_a_state_of_other_samples_is_refused(comm: MPI.Comm) -> None:
    made = objective("tikhonov", comm)
    evaluated(made)
    state = made.state()
    for change in ({"features": state["features"][:-1]}, {"system": state["system"] | {"source": np.ones((3, 2))}}):
        with pytest.raises(InputError, match="is not one of 150 samples"):
            objective("tikhonov", comm).restore(state | change)


def test_inexact_solves_take_fewer_products_to_the_same_value(comm: MPI.Comm) -> None:
    loose, exact = objective("tikhonov", comm), objective("tikhonov", comm, rtol=1e-8, least=1e-8)
    found, expected = (minimise(made, "ssbroyden", comm, iterations=12) for made in (loose, exact))
    assert found.losses[-1] == pytest.approx(expected.losses[-1], rel=0.02)
    assert loose.functional.products <= 0.5 * exact.functional.products
    assert loose.functional.system.builds < 12
    assert loose.functional.system.rtol < 1e-2


class Recorded(InnerSolver):
    """Notes first guesses, tolerances, and whether the preconditioner was built."""

    def __init__(self, name: str = "schwarz", **options: Any) -> None:
        super().__init__(name, **options)
        self.seen: list[tuple[bool, float, bool]] = []

    def __call__(self, operator: Any, Y: Any, start: Any, rtol: float, source: Any) -> Any:
        self.seen.append((start is not None, rtol, source is not None))
        return super().__call__(operator, Y, start, rtol, source)


def test_the_preconditioner_is_kept_until_iterations_have_grown(comm: MPI.Comm) -> None:
    inner = Recorded(coarse_rank=15)
    made = objective("tikhonov", comm, inner=inner)
    theta = made.loss.initial()
    for step in (0.0, 1e-3, 2e-3):
        evaluated(made, theta * (1 + step))
    assert [built for _, _, built in inner.seen] == [True, False, False]
    assert [guessed for guessed, _, _ in inner.seen] == [False, True, True]
    for turn in range(1, 6):  # features of which nothing is left of the old ones
        evaluated(made, theta.roll(7 * turn) * 3)
    assert any(built for _, _, built in inner.seen[3:])
    tolerances = [rtol for _, rtol, _ in inner.seen]
    assert tolerances[0] == 1e-2
    assert (np.diff(tolerances) <= 0).all()


class Careless(Recorded):
    """Solves nothing well unless the preconditioner is built."""

    def __call__(self, operator: Any, Y: Any, start: Any, rtol: float, source: Any) -> Any:
        return super().__call__(operator, Y, start, 0.9 if source is None else rtol, source)


def test_a_solve_that_failed_is_repeated_with_a_new_preconditioner(comm: MPI.Comm) -> None:
    inner = Careless(coarse_rank=15)
    made, plain = objective("tikhonov", comm, inner=inner), objective("tikhonov", comm, rtol=1e-10, least=1e-10)
    theta = made.loss.initial()
    evaluated(made, theta)
    value = evaluated(made, theta.roll(17) * 3)[0]
    assert [built for _, _, built in inner.seen] == [True, False, True]
    assert value == pytest.approx(evaluated(plain, theta.roll(17) * 3)[0], rel=0.01)


@pytest.mark.parametrize("name", ["nystrom", "none"])
def test_other_preconditioners_serve(comm: MPI.Comm, name: str) -> None:
    made = objective("tikhonov", comm, inner=InnerSolver(name), rtol=1e-10, least=1e-10)
    assert evaluated(made)[0] == pytest.approx(evaluated(objective("tikhonov", comm, rtol=1e-10, least=1e-10))[0])


def test_a_system_that_is_not_solved_is_refused(comm: MPI.Comm) -> None:
    made = objective("tikhonov", comm, inner=InnerSolver("none", ksp_max_it=2), rtol=1e-8, least=1e-8)
    with pytest.raises(InputError, match=r"the inner system is solved to .* only"):
        evaluated(made)


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("aspqn", {}, "no sum over samples"),
        ("apts_data", {}, "no sum over samples|all samples"),
        ("gauss_newton", {}, "least-squares|residuals"),
        ("newton", {}, "Hessian"),
        ("tr", {"model": "hessian"}, "Hessian"),
        ("tr", {"model": "gauss_newton"}, "gauss_newton"),
        ("tr", {"batch_size": 50}, "takes no batches"),
        ("adam", {"batch_size": 50}, "takes no batches"),
        ("tr", {"batch_size": 500}, "at most 150"),
    ],
)
def test_solvers_that_need_more_than_gradients_are_refused(
    comm: MPI.Comm, solver: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        minimise(objective("tikhonov", comm, network(), decay(1e-4)), solver, comm, options, iterations=3)


def test_an_unknown_preconditioner_is_refused() -> None:
    with pytest.raises(InputError, match="unknown preconditioner 'ilu'"):
        InnerSolver("ilu")


def test_the_remainder_of_a_fit_is_that_of_its_coefficients(comm: MPI.Comm) -> None:
    operator = KernelOperator(named("rbf", 2.0), X, 0.1, SampleLayout(SampleDomain.by_tree(X, 4), comm))
    found = fit_kernel(operator, Y, KernelSchwarzPC(), coarse_rank=10, ksp_rtol=1e-3)
    rows = operator.layout.rows
    assert np.allclose(found.remainder, operator.residual(Y[rows], found.coefficients[rows]), atol=1e-12)
