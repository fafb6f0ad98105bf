"""``solvers.minimise``: one entry from Python, for any module and criterion."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

import ddml
import solvers
from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PROBLEMS, PDELoss
from solvers import Minimisation, minimise


def module_loss(seed: int = 0) -> ddml.ModuleLoss:
    """A module of the reader's own."""
    torch.manual_seed(seed)
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return ddml.ModuleLoss(network, lambda y, t: (y - t).square().sum(1), x, torch.sin(3 * x))


@pytest.mark.parametrize("solver", ["tr", "lbfgs", "ssbroyden", "mspqn", "aspqn", "apts_weights", "lmvm", "bntr"])
def test_a_module_is_trained(comm: MPI.Comm, solver: str) -> None:
    loss = module_loss()
    before = loss.value(loss.initial())
    few = {"local_steps": 5} if solver in ("mspqn", "aspqn") else {}
    result = minimise(loss, solver, comm, few, iterations=5)
    assert result.loss < before
    assert result.iterations == 5 and result.success
    assert len(result.losses) == 6 and result.losses[0] == pytest.approx(before, rel=1e-12)
    assert result.loss == pytest.approx(loss.value(result.theta), rel=1e-12)
    gradient = torch.zeros_like(result.theta)
    loss.value_gradient(result.theta, gradient)
    assert result.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-8)
    assert result.work >= result.critical > 0
    assert comm.bcast(result.theta.numpy().tobytes()) == result.theta.numpy().tobytes()


def test_the_module_gets_what_was_found(comm: MPI.Comm) -> None:
    loss = module_loss()
    result = minimise(loss, "lbfgs", comm, iterations=20)
    loss.assign(result.theta)
    with torch.no_grad():
        found = float(loss.criterion(loss.module(loss.inputs), loss.targets).mean())
    assert found == pytest.approx(result.loss, rel=1e-12)
    again = minimise(loss, "lbfgs", comm, iterations=0)  # begins where the module is
    assert again.losses[0] == pytest.approx(result.loss, rel=1e-12)
    assert again.iterations == 0


def test_the_same_as_by_hand(comm: MPI.Comm, train: Callable[..., Any]) -> None:
    by_hand = train(module_loss(), "mspqn", 3, comm, blocks=8, local_steps=4)
    result = minimise(module_loss(), "mspqn", comm, {"local_steps": 4}, iterations=3, blocks=8)
    assert np.array_equal(result.losses, by_hand.losses)
    assert np.array_equal(result.theta.numpy(), by_hand.theta[-1])


def test_sums_of_squares_of_a_problem(comm: MPI.Comm) -> None:
    network = TanhNetwork(2, 8, 2, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(PROBLEMS["klein_gordon"](), network, 100)
    result = minimise(loss, "gauss_newton", comm, {"preconditioner": "cholesky"}, iterations=3)
    assert result.loss < 0.8 * result.losses[0]


def test_batches(comm: MPI.Comm) -> None:
    def run(seed: int) -> Tensor:
        return minimise(module_loss(), "tr", comm, {"batch_size": 20}, iterations=8, seed=seed, blocks=4).theta

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    with pytest.raises(InputError, match="lmvm knows nothing of samples that change"):
        minimise(module_loss(), "lmvm", comm, {"batch_size": 20})


def test_start_tolerance_and_monitor(comm: MPI.Comm) -> None:
    loss, seen = module_loss(), []
    start = np.random.default_rng(0).standard_normal(loss.size) / 3
    result = minimise(loss, "lbfgs", comm, iterations=50, start=start, monitor=lambda *row: seen.append(row))
    assert seen[0][1] == pytest.approx(loss.value(torch.as_tensor(start)), rel=1e-12)
    assert [row[0] for row in seen] == list(range(len(result.losses)))
    coarse = minimise(loss, "lbfgs", comm, iterations=500, start=start, tolerance=0.1)
    assert coarse.reason == "CONVERGED_GATOL" and coarse.gradient_norm < 0.1
    stopped = minimise(loss, "lbfgs", comm, start=start, monitor=lambda number, *_: number == 3)
    assert (stopped.iterations, stopped.reason) == (3, "CONVERGED_USER")


@pytest.mark.parametrize(
    ("solver", "settings", "message"),
    [
        ("lbfg", {}, "unknown solver 'lbfg'"),
        ("lbfgs", {"memry": 3}, "unknown option memry of solver lbfgs"),
        ("lbfgs", {"memory": -3}, "memory must be"),
        ("lbfgs", {"batch_size": -1}, "batch_size must be 0 or more"),
        ("lbfgs", {"batch_size": 61}, "batch_size must be at most 60, the samples; got 61"),
    ],
)
def test_bad_input_is_refused(comm: MPI.Comm, solver: str, settings: dict[str, Any], message: str) -> None:
    before = set(PETSc.Options().getAll())
    with pytest.raises(InputError, match=message):
        minimise(module_loss(), solver, comm, settings)
    assert set(PETSc.Options().getAll()) == before


def test_options_are_named_as_they_were_given(comm: MPI.Comm) -> None:
    with pytest.raises(InputError, match=r"^option -coarse_samples must be less than"):
        minimise(module_loss(), "svrg", comm, {"coarse_samples": 1000})


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (lambda: (nn.Linear(1, 1),), {}, "must be a loss, .* got a Linear"),
        (lambda: (module_loss(), solvers.LBFGS), {}, "got the class LBFGS"),
        (lambda: (module_loss(), None), {}, "got a NoneType"),
        (lambda: (module_loss(),), {"iterations": -1}, "iterations must be an integer, 0 or more, got -1"),
        (lambda: (module_loss(),), {"iterations": 2.5}, "got 2.5"),
        (lambda: (module_loss(),), {"blocks": -1}, "blocks must be an integer"),
        (lambda: (module_loss().part(0, 0),), {}, "has no samples"),
    ],
)
def test_arguments_of_another_kind_are_refused(
    comm: MPI.Comm, arguments: Callable[[], tuple[Any, ...]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        minimise(*arguments(), comm=comm, **settings)


def test_an_iteration_says_what_came_of_it(comm: MPI.Comm) -> None:
    class Forgetful(solvers.Solver):
        def iterate(self, x: PETSc.Vec) -> Any:
            return None

    with pytest.raises(InputError, match="iterate of Forgetful must return a SearchResult"):
        minimise(module_loss(), Forgetful(), comm)


def given_to(rank: int, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a rank passes that has something of its own."""
    loss = module_loss()
    if what == "the losses of samples":
        loss.samples.targets[-1] += rank
    if what == "the number of samples":
        loss = loss.part(0, 60 - rank)
    solver = "ssbroyden" if what == "the solver" and rank else "lbfgs"
    options = {"tao_gatol": 1e-9 * (1 + rank)} if what == "options" else {}
    return (loss, solver), {"options": options, "iterations": 3 + rank if what == "iterations" else 3}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "what",
    ["the losses of samples", "the number of samples", "the solver", "options", "iterations"],
)
def test_ranks_that_were_given_different_things_say_so(comm: MPI.Comm, what: str) -> None:
    arguments, settings = given_to(comm.rank, what)
    if comm.size == 1:
        assert minimise(*arguments, comm=comm, **settings).success
        return
    with pytest.raises(InputError, match=f"differ in .*{what}"):
        minimise(*arguments, comm=comm, **settings)


@pytest.mark.ranks
def test_without_a_seed_all_begin_where_rank_0_does(comm: MPI.Comm) -> None:
    alone = minimise(module_loss(0), "lbfgs", MPI.COMM_SELF, iterations=5, blocks=4)
    loss = module_loss(comm.rank)
    result = minimise(loss, "lbfgs", comm, iterations=5, blocks=4)
    assert torch.equal(result.theta, alone.theta) and (result.losses == alone.losses).all()
    assert torch.equal(loss.initial(), module_loss(0).initial())


def test_what_is_not_finite_is_refused(comm: MPI.Comm) -> None:
    loss = module_loss()
    with pytest.raises(InputError, match="not finite at the initial parameters"):
        minimise(loss, "lbfgs", comm, start=np.full(loss.size, np.nan))
    with pytest.raises(InputError, match=f"the start must have {loss.size} parameters, got 3"):
        minimise(loss, "lbfgs", comm, start=[0.0, 1.0, 2.0])


def test_what_is_joined_can_be_had(comm: MPI.Comm) -> None:
    made = Minimisation(module_loss(), "tr", comm, fmin=0.5)
    made.tao.setMaximumIterations(30)
    made.tao.solve()
    assert made.tao.getConvergedReason() == PETSc.TAO.ConvergedReason.CONVERGED_MINF
    assert made.context is made.tao.getPythonContext()
    assert made.objective.value(made.x) < 0.5
    made.destroy()


def test_public_names() -> None:
    for package in (ddml, solvers):
        for name in package.__all__:
            assert getattr(package, name) is getattr(package, name) is not None
    assert callable(solvers.minimise) and callable(solvers.minimise)  # no module of that name stands before it
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ddml.nothing  # noqa: B018
