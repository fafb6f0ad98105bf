"""``solvers.Minimizer``: the solvers behind the interface of ``torch.optim``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch_runs import Run, X, Y, mean_square, network

import ddml
import solvers
from solvers import Minimizer

SINGLE = ("lbfgs", "ssbfgs", "ssbroyden", "tr", "gradient", "adagrad")
DIVIDED = ("mspqn", "mspqn_dense", "aspqn", "apts_weights", "napts", "asadagrad")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "tolerance"), [("lbfgs", 1e-12), ("ssbfgs", 1e-11), ("gradient", 1e-12), ("adagrad", 1e-12), ("tr", 1e-7)]
)
def test_iterates_are_those_of_minimise_on_any_number_of_ranks(comm: MPI.Comm, name: str, tolerance: float) -> None:
    run = Run(name, comm, max_iter=1)
    losses = run.steps(12)
    loss = ddml.ModuleLoss(network(), lambda y, t: (y - t).square().sum(1), X, Y)
    result = solvers.minimise(loss, name, comm, iterations=12)
    assert losses == pytest.approx(list(result.losses[:-1]), rel=tolerance)
    assert run.optimizer.loss == pytest.approx(result.loss, rel=tolerance)
    assert (run.theta - result.theta).norm() <= tolerance * result.theta.norm()
    assert run.optimizer.reason == "DIVERGED_MAXITS"
    assert comm.bcast(run.theta.numpy().tobytes()) == run.theta.numpy().tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*SINGLE, *DIVIDED])
def test_losses_are_the_same_on_any_number_of_ranks(comm: MPI.Comm, name: str) -> None:
    # few steps of the trust regions, whose polar factors are found to a tolerance that rounding shifts
    count, tolerance = (3, 1e-7) if name in ("tr", "apts_weights", "napts") else (4, 1e-10)
    alone = on_one_rank(lambda one: Run(name, one, max_iter=1).steps(count))
    assert Run(name, comm, max_iter=1).steps(count) == pytest.approx(alone, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*SINGLE, *DIVIDED])
def test_steps_and_states_are_exact(comm: MPI.Comm, name: str, dtype: torch.dtype) -> None:
    whole, stepped, first = (Run(name, comm, dtype, max_iter=k) for k in (6, 2, 2))
    whole.steps(1)
    stepped.steps(3)
    first.steps(1)
    again = Run(name, comm, dtype, max_iter=20).loaded(first.saved())
    assert again.optimizer.param_groups[0]["max_iter"] == 2
    losses = again.steps(2)
    assert torch.equal(whole.theta, stepped.theta)
    assert torch.equal(stepped.theta, again.theta)
    assert whole.optimizer.loss == stepped.optimizer.loss == again.optimizer.loss < losses[0]
    for run in (whole, stepped, first, again):
        run.optimizer.destroy()


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["lbfgs", "ssbfgs", "tr", "mspqn"])
def test_a_state_goes_on_on_any_number_of_ranks(comm: MPI.Comm, name: str) -> None:
    alone = Run(name, MPI.COMM_SELF, max_iter=2)
    alone.steps(2)
    together = Run(name, comm).loaded(alone.saved())
    back = Run(name, MPI.COMM_SELF).loaded(together.saved())
    expected = alone.steps(2)
    assert together.steps(2) == pytest.approx(expected, rel=1e-9 if name != "tr" else 1e-7)
    assert back.steps(2) == expected


def test_a_state_before_the_first_step(comm: MPI.Comm) -> None:
    fresh = Run("lbfgs", comm)
    again = Run("lbfgs", comm).loaded(fresh.saved())
    assert fresh.steps(1) == again.steps(1)
    assert torch.equal(fresh.theta, again.theta)


def test_what_was_learnt_stays_where_the_samples_change(comm: MPI.Comm) -> None:
    run, afresh = Run("ssbfgs", comm, max_iter=5), Run("ssbfgs", comm, max_iter=5)
    run.steps(3)
    afresh.network.load_state_dict(run.network.state_dict())

    def other(one: Run) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = (one.network(X[one.rows]) - Y[one.rows] - 0.01).square().sum(1).mean()
            loss.backward()  # the step has zeroed the gradients
            return loss

        return closure

    begun = [float(one.optimizer.step(other(one))) for one in (run, afresh)]
    assert begun[0] == pytest.approx(begun[1], rel=1e-12)
    assert run.optimizer.loss < afresh.optimizer.loss < begun[0]


def test_parameters_that_somebody_changes_are_where_the_next_step_begins(comm: MPI.Comm) -> None:
    run = Run("lbfgs", comm, max_iter=2)
    run.steps(2)
    with torch.no_grad():
        run.network[0].weight.mul_(0.5)
    expected = float(mean_square(run.network, slice(0, 60)).detach())
    assert run.steps(1) == [pytest.approx(expected, rel=1e-12)]
    assert run.optimizer.loss < expected


def test_ranks_begin_with_the_parameters_and_the_buffers_of_the_first(comm: MPI.Comm) -> None:
    torch.manual_seed(comm.rank)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[1].running_mean.fill_(float(comm.rank + 1))
    module[2].weight.requires_grad_(False)
    Minimizer(module, "lbfgs", comm)
    for name, tensor in module.state_dict().items():
        assert torch.equal(torch.from_numpy(comm.bcast(tensor.numpy())), tensor), name
    assert module[1].running_mean.tolist() == [1, 1]


def test_some_parameters_only_frozen_tied_and_unused_ones(comm: MPI.Comm) -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "unused": nn.Linear(2, 2)}).double()
    module["b"].weight = module["a"].weight
    module["b"].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for params in (module, module.named_parameters(), list(module.parameters()), [{"params": module.parameters()}]):
        optimizer = Minimizer(params, "lbfgs", comm, max_iter=2)
        assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 12

        def closure() -> Tensor:
            loss = (module["b"](module["a"](torch.ones(1, 2).double())) - 3).square().sum()
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) > optimizer.loss
    after = dict(module.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved == {"a.weight", "a.bias"}


def test_sparse_gradients_and_a_number_for_a_loss(comm: MPI.Comm) -> None:
    table = nn.Embedding(5, 2, sparse=True).double()
    optimizer = Minimizer(table, "lbfgs", comm, max_iter=30)

    def closure() -> float:
        loss = (table(torch.tensor([1, 3])) - 1).square().mean()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert torch.allclose(table.weight[[1, 3]], torch.ones(2, 2).double())


class Copies(TorchDispatchMode):
    """Counts what is copied, converted or joined."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "_to_copy", "clone", "cat", "add_", "zero_", "zeros"):
            self.entries += found.numel()
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameters_are_copied_once_each_way_a_call(dtype: torch.dtype) -> None:
    run = Run("lbfgs", MPI.COMM_SELF, dtype, max_iter=6)
    run.steps(1)
    size, calls = len(run.theta), run.optimizer.calls

    def closure() -> Tensor:
        with mode_off():
            return run.closure()

    with Copies() as copies:
        mode_off = torch.utils._python_dispatch._disable_current_modes
        run.optimizer.step(closure)
    calls = run.optimizer.calls - calls
    compared = size if dtype == torch.float32 else 0  # whether somebody has changed them, in their precision
    assert calls >= 7
    assert copies.entries == 2 * size * calls + size + compared  # and what was found at the end


def test_a_schedule_changes_the_rate_of_those_that_have_one(comm: MPI.Comm) -> None:
    run, half = Run("adagrad", comm, max_iter=1, lr=0.2), Run("adagrad", comm, max_iter=1, rate=0.1)
    schedule = LambdaLR(run.optimizer, lambda epoch: 0.5)
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert (run.steps(3), run.theta.tolist()) == (half.steps(3), half.theta.tolist())
    schedule.step()
    plain = Run("gradient", comm, max_iter=1, lr=0.1, line_search=False)
    start, _ = plain.theta, plain.steps(1)
    plain.optimizer.param_groups[0]["lr"] = 0.05
    once = plain.theta
    whole = mean_square(plain.network, slice(0, 60))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(whole, list(plain.network.parameters()))])
    plain.steps(1)
    assert torch.allclose(plain.theta, once - 0.05 * gradient, atol=1e-14)
    assert not torch.equal(start, once)


def test_a_constant_schedule_hooks_and_keywords_do_no_harm(comm: MPI.Comm) -> None:
    run, same, seen = Run("lbfgs", comm, max_iter=2), Run("lbfgs", comm, max_iter=2), []
    schedule = LambdaLR(run.optimizer, lambda epoch: 1.0)
    run.optimizer.register_step_post_hook(lambda *_: seen.append(run.optimizer.loss))
    for _ in range(3):
        run.optimizer.step(closure=run.closure)  # as Lightning calls it
        schedule.step()
    same.steps(3)
    assert torch.equal(run.theta, same.theta)
    assert len(seen) == 3 and seen[-1] == same.optimizer.loss


def test_a_step_ends_where_there_is_nothing_to_gain(comm: MPI.Comm) -> None:
    run = Run("lbfgs", comm, tao_gatol=1e-2, max_iter=500)
    run.steps(1)
    assert run.optimizer.reason == "CONVERGED_GATOL"
    before, calls = run.theta, run.optimizer.calls
    run.steps(1)
    assert torch.equal(run.theta, before)
    assert run.optimizer.calls - calls == (1 if run.optimizer.share else 0)
