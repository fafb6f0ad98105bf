"""``solvers.Minimizer``: the solvers behind the interface of ``torch.optim``."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

import ddml
import solvers
from ddml.errors import InputError
from ddml.parallel import split
from solvers import Minimizer

X = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
Y = torch.sin(3 * X)
SHARES = {1: [0, 60], 2: [0, 13, 60], 3: [0, 50, 50, 60]}  # the second of three ranks has nothing
SINGLE = ("lbfgs", "ssbfgs", "ssbroyden", "tr", "gradient", "adagrad")
DIVIDED = ("mspqn", "mspqn_dense", "aspqn", "apts_weights", "napts", "asadagrad")
FEW = {"mspqn": 3, "aspqn": 3, "mspqn_dense": 3}  # local steps


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(dtype)


def mean_square(module: nn.Module, rows: slice) -> Tensor:
    dtype = next(module.parameters()).dtype
    return (module(X[rows].to(dtype)) - Y[rows].to(dtype)).square().sum(1).mean()


class Run:
    """A network, its optimizer and the closure on this rank's share."""

    def __init__(self, name: str, comm: MPI.Comm, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        edges = SHARES.get(comm.size) or split(len(X), comm.size)
        self.rows = slice(edges[comm.rank], edges[comm.rank + 1])
        self.network = network(dtype)
        if name in FEW:
            options = {"local_steps": FEW[name], **options}
        self.optimizer = Minimizer(self.network, name, comm, share=self.rows.stop - self.rows.start, **options)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = mean_square(self.network, self.rows)
        loss.backward()
        return loss

    def steps(self, count: int) -> list[float]:
        return [float(self.optimizer.step(self.closure)) for _ in range(count)]

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()]).clone()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save((self.network.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        return file

    def loaded(self, file: io.BytesIO) -> "Run":
        module, optimizer = torch.load(file)
        self.network.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        return self


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
    together, alone = Run(name, comm, max_iter=1), Run(name, MPI.COMM_SELF, max_iter=1)
    assert together.steps(count) == pytest.approx(alone.steps(count), rel=tolerance)


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
