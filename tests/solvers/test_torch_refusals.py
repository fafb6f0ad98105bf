"""What ``solvers.Minimizer`` refuses, on all ranks in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch_runs import Run, mean_square, network

from ddml.errors import InputError
from solvers import Minimizer

BAD: dict[str, tuple[Callable[[Run], Any], str]] = {
    "nothing": (lambda run: None, "must return the loss, one real number; it returns a NoneType"),
    "a vector": (lambda run: torch.ones(3), r"it returns a Tensor of shape \(3,\)"),
    "an empty tensor": (lambda run: torch.ones(0), r"it returns a Tensor of shape \(0,\)"),
    "a complex number": (lambda run: torch.tensor(1j), "it returns a Tensor of shape"),
    "a text": (lambda run: "0.5", "it returns a str"),
    "no gradient": (lambda run: mean_square(run.network, slice(0, 9)), "leaves no gradient.* must call backward"),
    "a number only": (lambda run: 0.5, "leaves no gradient.* must call backward"),
    "an exception": (lambda run: 1 / 0, "the closure fails.*: ZeroDivisionError: division by zero"),
    "an exception of torch": (lambda run: torch.ones(2) @ torch.ones(3), "the closure fails.*: RuntimeError: "),
    "an exception of several lines": (lambda run: int("a\nb"), "the closure fails.*: ValueError: "),
}


@pytest.mark.parametrize("later", [0, 5])
@pytest.mark.parametrize("wrong", BAD)
def test_what_goes_wrong_in_one_closure_is_one_error_on_all_ranks(comm: MPI.Comm, wrong: str, later: int) -> None:
    bad, words = BAD[wrong]
    run, calls = Run("ssbfgs", comm, max_iter=3), 0
    last = comm.size - 1
    run.steps(1)
    before, expected = run.theta, float(mean_square(run.network, slice(0, 60)).detach())

    def closure() -> Any:
        nonlocal calls
        calls += 1
        return bad(run) if calls > later and comm.rank == last else run.closure()

    with pytest.raises(InputError, match=words) as error:
        for _ in range(4):
            before = run.theta
            run.optimizer.step(closure)
    text = str(error.value)
    assert "\n" not in text and comm.bcast(text) == text
    assert comm.size == 1 or f"on rank {last}" in text
    assert torch.equal(run.theta, before)
    assert run.steps(1)[0] <= expected * (1 + 1e-12)  # it goes on
    assert run.optimizer.loss < expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_where_a_step_begins_is_refused(comm: MPI.Comm, value: float) -> None:
    run = Run("lbfgs", comm)
    before = run.theta

    def closure() -> Tensor:
        loss = run.closure()
        return loss * value if comm.rank == 0 else loss

    with pytest.raises(InputError, match="not finite"):
        run.optimizer.step(closure)
    assert torch.equal(run.theta, before)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lbfg", {}, "unknown solver 'lbfg'"),
        ("newton", {}, "solver newton needs Hessian products"),
        ("gauss_newton", {}, "needs a loss that is a sum of squared residuals"),
        ("astrom", {}, "needs Hessian products"),
        ("tr", {"model": "hessian"}, "option -model hessian needs Hessian products"),
        ("tr", {"model": "gauss_newton"}, "option -model gauss_newton needs a loss"),
        ("tr", {"norm": "kfac"}, "no K-FAC norm"),
        ("mspqn", {"local_solver": "newton"}, "solver newton needs Hessian products"),
        ("apts_data", {}, "needs samples"),
        ("mlvr", {}, "needs samples"),
        ("svrg", {}, "needs samples"),
        ("rmtr", {}, "needs networks of several depths"),
        ("mladagrad", {}, "needs networks of several depths"),
        ("lmvm", {}, "PETSc's lmvm begins afresh"),
        ("lbfgs", {"memry": 3}, "unknown option memry of solver lbfgs"),
        ("lbfgs", {"memory": -3}, "option -memory must be 0 or more"),
        ("lbfgs", {"batch_size": 3}, "unknown option batch_size"),
        ("lbfgs", {"lr": 0.1}, "no learning rate"),
        ("gradient", {"lr": 0.1}, "no learning rate"),
        ("adagrad", {"lr": -0.1}, "option -rate must be more than 0"),
    ],
)
def test_solvers_and_options_that_do_not_go_are_refused(
    comm: MPI.Comm, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as error:
        Minimizer(network(), name, comm, **options)
    assert "\n" not in str(error.value) and "minimise" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (list, "lbfgs", "no parameters to train"),
        (lambda: [torch.ones(2)], "lbfgs", "none has requires_grad"),
        (lambda: ["weight"], "lbfgs", "parameter 0 must be a tensor that is a leaf, got str"),
        (lambda: [2 * torch.ones(2, requires_grad=True)], "lbfgs", "must be a tensor that is a leaf"),
        (lambda: nn.Tanh(), "lbfgs", "no parameters to train"),
        (lambda: [nn.Linear(2, 2).weight, nn.Linear(2, 2).double().weight], "lbfgs", "of one precision"),
        (lambda: [{"params": network().parameters(), "lr": 0.1}], "lbfgs", "parameter group 0 has lr"),
        (lambda: [{"params": [], "weight_decay": 0.1, "betas": (0, 1)}], "lbfgs", "has betas, weight_decay"),
        (lambda: network().parameters(), "mspqn", "mspqn needs to know the layers: pass the module"),
        (lambda: network().parameters(), "tr", "no modular norm"),
        (lambda: nn.LazyLinear(3), "lbfgs", "no shape yet"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused(
    comm: MPI.Comm, make: Callable[[], Any], name: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        Minimizer(make(), name, comm)


def test_a_module_that_sums_over_ranks_itself_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="pass the module within DistributedDataParallel"):
            Minimizer(nn.parallel.DistributedDataParallel(network()), "lbfgs", MPI.COMM_SELF)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_wrong_at_a_step_is_refused(comm: MPI.Comm) -> None:
    run = Run("lbfgs", comm)
    before, group = run.theta, run.optimizer.param_groups[0]
    for closure in (None, 3.0):
        with pytest.raises(InputError, match="needs a closure"):
            run.optimizer.step(closure)
    for name, value, words in (("max_iter", 0, "max_iter must"), ("max_iter", 2.5, "max_iter must"),
                               ("lr", -1.0, "rate must be"), ("lr", 0.5, "no learning rate")):  # fmt: skip
        kept, group[name] = group[name], value
        with pytest.raises(InputError, match=words):
            run.optimizer.step(run.closure)
        group[name] = kept
    for share, words in (
        (-1.0, "must be 0 or more samples"),
        (float("nan"), "must be 0"),
        ("many", "must be 0"),
        (0.0, "no rank has samples"),
    ):
        kept, run.optimizer.share = run.optimizer.share, share
        with pytest.raises(InputError, match=words):
            run.optimizer.step(run.closure)
        run.optimizer.share = kept
    with pytest.raises(InputError, match="cannot train more parameters later on"):
        run.optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert torch.equal(run.theta, before)
    assert run.steps(1)[0] > run.optimizer.loss


def test_states_of_something_else_are_refused_and_change_nothing(comm: MPI.Comm) -> None:
    run = Run("ssbfgs", comm, max_iter=2)
    run.steps(1)
    state, wrong = run.optimizer.state_dict(), []
    wrong.append((torch.optim.LBFGS(run.network.parameters()).state_dict(), "of no Minimizer"))
    wrong.append((Run("lbfgs", comm).optimizer.state_dict(), "of solver lbfgs, not ssbfgs"))
    wrong.append((Minimizer(nn.Linear(2, 2), "ssbfgs", comm).state_dict(), "of other parameters"))
    damaged = {**state["solver"], "state": {key: v for key, v in state["solver"]["state"].items() if key != "fresh"}}
    wrong.append(({**state, "solver": damaged}, "cannot be taken over"))
    wrong.append(({**state, "solver": {**state["solver"], "theta": 3.0}}, "cannot be taken over"))
    wrong.append(({**state, "param_groups": []}, "cannot be taken over"))
    other = Run("ssbfgs", comm, max_iter=2).loaded(run.saved())
    for found, words in wrong:
        with pytest.raises(InputError, match=words):
            run.optimizer.load_state_dict(found)
    assert run.steps(2) == other.steps(2)
    assert torch.equal(run.theta, other.theta)
