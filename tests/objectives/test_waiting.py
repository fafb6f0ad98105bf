"""Without a GPU, on torch's ``meta`` device: nothing mixes devices, and how often the process waits for the device.

The numbers stand in docs/gpu.md.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn
from waiting import Waiting

from ddml.data.sample_sets import TensorSamples
from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.layout import ParameterLayout
from ddml.linalg import polar
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.losses.residual import ResidualLoss
from ddml.networks.tanh import TanhNetwork
from ddml.norms.build import modular_norm
from ddml.norms.kronecker import KroneckerNorm
from ddml.objectives.composed import sampled
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import restricted
from ddml.problems import PDE, Burgers, KleinGordon, PDELoss
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.problems.pde import collocation, magnitudes
from ddml.problems.pde.accuracy import SolutionError
from solvers import Minimisation

META, COMM = torch.device("meta"), MPI.COMM_SELF


class Dispersion(PDE):
    """A third derivative, which no hand-written jet has."""

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    coefficients = {"speed": 0.5}

    def residual(self, u: Any, t: Tensor, x: Tensor, speed: Tensor) -> Tensor:
        return u.t + speed * u.x + u.xxx


def tanh(adaptive: bool = False, width: int = 4, depth: int = 2) -> TanhNetwork:
    network = TanhNetwork(2, width, depth, 1, residual=adaptive, adaptive=adaptive).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return network


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def classifier(module: nn.Module, count: int) -> ClassificationLoss:
    samples = TensorSamples(torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64))
    on = TensorSamples(samples.inputs.to(META), samples.targets.to(META))
    return ClassificationLoss(module.to(META), on, 10)


def regression(count: int) -> ModuleLoss:
    x = torch.zeros(count, 2, dtype=torch.float64, device=META)
    return ModuleLoss(plain().to(META), lambda y, t: (y - t).square().sum(1), x, x[:, :1])


MAKE: dict[str, Callable[[int], Loss]] = {
    "burgers": lambda n: PDELoss(Burgers(), tanh(), n, device=META),
    "klein_gordon, slopes": lambda n: PDELoss(KleinGordon(), tanh(True), n, device=META),
    "a third derivative": lambda n: PDELoss(Dispersion(), tanh(), n, device=META),
    "burgers, any module": lambda n: PDELoss(Burgers(), plain(), n, device=META),
    "regression": regression,
    "classifier": lambda n: classifier(dense(), n),
    "images": lambda n: classifier(images(), n),
}
CUT = ("burgers", "burgers, any module", "classifier")  # also in blocks
SQUARES = tuple(list(MAKE)[:4])


@pytest.fixture(autouse=True)
def device() -> Iterator[Waiting]:
    with Waiting() as mode:
        yield mode


@cache
def loss_of(name: str, count: int = 12) -> Loss:
    return MAKE[name](count)


class Case(SimpleNamespace):
    """An objective of a loss on one rank, with vectors."""

    def __init__(self, loss: Loss, blocks: int | None) -> None:
        kind = ResidualObjective if isinstance(loss, ResidualLoss) else Objective
        layout = ParameterLayout(loss.parameters, COMM)
        super().__init__(loss=loss, blocks=blocks, layout=layout, objective=kind(loss, layout, blocks=blocks or 0))
        self.x, self.v, self.g = (layout.vector() for _ in range(3))
        if kind is ResidualObjective:
            self.r = self.objective.residual_vector()


def in_subdomains(case: Case, call: Callable[[Any, Any, Any], object], device: Waiting) -> None:
    """The largest count over the subdomains, behind the freeze."""
    decomposition = Decomposition(Subdomains.by_layers(case.loss, 2), case.layout, False)
    found = {}
    for s, local in restricted(case.objective, decomposition).items():
        y, h = local.layout.vector(), local.layout.vector()
        local.freeze(case.objective.parameters(case.x))
        local.value(y)
        device.clear()
        call(local, y, h)
        found[s] = device.total
        for vec in (y, h):
            vec.destroy()
        local.destroy()
    decomposition.destroy()
    assert len(set(found.values())) == 1, found


# what is done with an objective, and how often it waits
EVALUATIONS: dict[str, tuple[Callable[[Case, Waiting], object], int]] = {
    "the loss": (lambda c, _: c.objective.value(c.x), 1),
    "loss and gradient": (lambda c, _: c.objective.value_gradient(c.x, c.g), 2),
    "loss and gradient in less memory": (lambda c, _: c.objective.value_compact(c.x), 2),
    "of a third of the samples": (
        lambda c, _: sampled(c.objective, np.arange(0, c.loss.count, 3)).value_gradient(c.x, c.g), 2),
    "Hessian product": (lambda c, _: c.objective.hessian_product(c.x, c.v, c.g), 1),
    "Gauss-Newton product": (lambda c, _: c.objective.gauss_newton_product(c.x, c.v, c.g), 1),
    "loss and gradient of a subdomain": (lambda c, d: in_subdomains(c, lambda o, y, h: o.value_gradient(y, h), d), 2),
    "Gauss-Newton product of a subdomain": (
        lambda c, d: in_subdomains(c, lambda o, y, h: o.gauss_newton_product(y, y, h), d), 1),
    "initial parameters": (lambda c, _: c.objective.initial(c.x), 1),
}  # fmt: skip
OF_SQUARES: dict[str, tuple[Callable[[Case, Waiting], object], int]] = {
    "residual": (lambda c, _: c.objective.residual(c.x, c.r), 1),
    "Jacobian product": (lambda c, _: c.objective.jacobian_product(c.x, c.v, c.r), 1),
    "transposed Jacobian product": (lambda c, _: c.objective.jacobian_transpose_product(c.x, c.r, c.g), 1),
    "quadratic model in two directions": (lambda c, _: c.objective.linear_model(c.x, [c.v, c.g]), 1),
}


@pytest.mark.parametrize("what", EVALUATIONS)
@pytest.mark.parametrize(("name", "blocks"), [*((name, 0) for name in MAKE), *((name, 3) for name in CUT)])
def test_an_evaluation_waits_as_often_as_is_said_whatever_the_blocks(
    name: str, what: str, blocks: int, device: Waiting
) -> None:
    case = Case(loss_of(name), blocks)
    do, waits = EVALUATIONS[what]
    device.clear()
    do(case, device)
    assert device.total == waits, device.waits


@pytest.mark.parametrize("what", OF_SQUARES)
@pytest.mark.parametrize(("name", "blocks"), [*((name, 0) for name in SQUARES), ("burgers, any module", 3)])
def test_products_with_a_jacobian_wait_once(name: str, what: str, blocks: int, device: Waiting) -> None:
    case = Case(loss_of(name), blocks)
    do, waits = OF_SQUARES[what]
    device.clear()
    do(case, device)
    assert device.total == waits, device.waits


@pytest.mark.parametrize("name", SQUARES)
def test_gauss_newtons_rows_come_to_the_host_once(name: str, device: Waiting) -> None:
    case = Case(loss_of(name), 0)
    device.clear()
    linearised = Linearisation(case.objective, case.x, True)
    assert device.total == 2, device.waits  # the residual and the rows
    # from here on all is on the host: dense local matrices, too
    w = linearised.product(torch.ones(case.loss.size, dtype=torch.float64))
    linearised.transpose_product(w, case.g)
    linearised.diagonal(case.g)
    linearised.dual_gram()
    linearised.gram_product(np.ones((case.loss.size, 2)))
    decomposition = Decomposition(Subdomains.by_layers(case.loss, 2), case.layout, False)
    blocks = linearised.gram_blocks(decomposition)
    assert all(np.isfinite(block).all() for block in blocks.values())
    assert device.total == 2, device.waits
    decomposition.destroy()


@pytest.mark.parametrize("name", SQUARES)
def test_products_without_rows_wait_once(name: str, device: Waiting) -> None:
    case = Case(loss_of(name), 0)
    linearised = Linearisation(case.objective, case.x, False)
    for product in (
        lambda: linearised.product(torch.ones(case.loss.size, dtype=torch.float64)),
        lambda: linearised.transpose_product(linearised.residual, case.g),
        lambda: linearised.residual_at(case.x),
    ):
        device.clear()
        product()
        assert device.total == 1, device.waits


@pytest.mark.parametrize("name", ["classifier", "images"])
@pytest.mark.parametrize("blocks", [0, 3])
def test_kfac_factors_come_to_the_host_once_a_block(name: str, blocks: int) -> None:
    with Waiting(0.0) as device:  # which the check of the layers finds small enough
        case = Case(loss_of(name), blocks)
        norm = KroneckerNorm(case.objective, 1.0)
        device.clear()
        norm.refresh(case.x)
        assert device.total == max(blocks, 1), device.waits
        device.clear()
        assert np.isfinite(norm(case.v)) and device.total == 0


@pytest.mark.parametrize("blocks", [0, 3])
def test_what_is_measured_beside_waits_once(blocks: int, device: Waiting) -> None:
    case = Case(loss_of("classifier"), blocks)
    measured = TestSet(case.loss, case.loss.samples, COMM, blocks)
    device.clear()
    measured(case.objective.parameters(case.x))
    assert device.total == 1, device.waits
    case = Case(loss_of("burgers"), blocks)
    measured = collocation.FreshLoss(case.loss, COMM, 20, 0, blocks)
    device.clear()
    measured(case.objective.parameters(case.x))
    assert device.total == 1, device.waits
    device.clear()
    collocation.residual_size(case.loss, 0, np.full((5, 2), 0.3), case.objective.parameters(case.x))
    assert device.total == 1, device.waits


def test_errors_and_magnitudes_mix_no_devices(device: Waiting) -> None:
    case = Case(loss_of("burgers"), 0)
    error = SolutionError(case.loss, COMM, 50)
    device.clear()
    error(case.objective.parameters(case.x))
    assert device.total == 1, device.waits
    settings = SimpleNamespace(map_inputs="auto", balance_terms="auto")
    magnitudes.find(Burgers(), tanh(), torch.float64, META, settings)


def test_large_directions_and_norms_wait_as_often_as_products_are_judged(device: Waiting) -> None:
    layers = nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 280), nn.Tanh(), nn.Linear(280, 10)
    loss = classifier(nn.Sequential(nn.Flatten(), *layers), 8)
    norm, g = modular_norm(loss), torch.ones(loss.size, dtype=torch.float64)
    device.clear()
    direction = norm.dualize(g)
    assert direction.device.type == "cpu" and torch.isfinite(direction).all()
    large = sum(norm.large(block) for block in norm.blocks)
    assert large == 1
    assert device.waits.pop("ddml/norms/modular.py:dualize_blocks") == large  # it comes to the host
    assert device.total <= 2 + 10, device.waits  # and two numbers, and one a growing step
    device.clear()
    norm.norm(g)
    assert device.total <= 10, device.waits  # one a squaring
    device.clear()
    assert polar.near_factor(torch.ones(600, 700, device=META), 0.05) is not None
    assert device.total <= 2 + 10, device.waits  # not one for each 256 rows


@pytest.mark.parametrize("name", MAKE)
def test_by_default_operations_are_those_of_one_pass(name: str, device: Waiting) -> None:
    counts = []
    for count in (12, 3000):
        made = Minimisation(loss_of(name, count), "lbfgs", COMM)
        g = made.x.duplicate()
        device.clear()
        made.objective.value_gradient(made.x, g)
        counts.append(device.operations)
        assert device.total == 2
        made.destroy()
    assert counts[0] == counts[1]


def test_what_mixes_devices_is_found(device: Waiting) -> None:
    here, there = torch.ones(3), torch.ones(3, device=META)
    for mixed in (lambda: here + there, lambda: there @ here, lambda: torch.cat([here, there]), there.numpy):
        with pytest.raises(RuntimeError, match=r"mixes devices|on a device"):
            mixed()


def test_what_waits_is_counted(device: Waiting) -> None:
    there, here = torch.ones(3, device=META), torch.zeros(3)
    waiting: list[Callable[[], object]] = [
        lambda: float(there.sum()), lambda: there.sum().item(), there.tolist, there.cpu, lambda: there.to("cpu"),
        lambda: there.to(device="cpu", dtype=torch.float64), lambda: there.to(here), lambda: here.copy_(there),
        lambda: bool(there.any()), lambda: torch.allclose(there, there), lambda: torch.equal(there, there),
        lambda: torch.nonzero(there), lambda: int(there.sum()),
    ]  # fmt: skip
    for number, wait in enumerate(waiting):
        wait()
        assert device.total == number + 1
