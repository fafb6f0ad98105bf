"""Cross entropy and accuracy on any number of ranks against plain torch on one."""

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.data import files
from ddml.data.data_set import DataSet
from ddml.data.scaling import Samples, Scaling
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.problems.classification import ClassificationLoss, TestSet, cross_entropy

CPU = torch.device("cpu")


def network(dtype: torch.dtype = torch.float64, outputs: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, outputs)).to(dtype)


def samples_of(dataset: DataSet, comm: MPI.Comm, dtype: torch.dtype = torch.float64) -> tuple[Samples, Samples]:
    scaling = Scaling(dataset, "unit", comm)
    return tuple(
        Samples(x, y, scaling, dtype, CPU)
        for x, y in ((dataset.inputs, dataset.labels), (dataset.test_inputs, dataset.test_labels))
    )


@pytest.mark.ranks
@pytest.mark.parametrize("blocks", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_gradient_and_accuracy_are_those_of_plain_torch(comm: MPI.Comm, blocks: int, dtype: torch.dtype) -> None:
    digits, module = files.load("digits", comm), network(dtype)
    train, test = samples_of(digits, comm, dtype)
    loss = ClassificationLoss(module, train, 10, batch=100)
    objective = Objective(loss, ParameterLayout(loss.parameters, comm), blocks=blocks)
    x = objective.layout.vector()
    objective.initial(x)
    g = x.duplicate()
    value = objective.value_gradient(x, g)
    images = torch.from_numpy(digits.inputs).to(dtype) / 16
    expected = nn.functional.cross_entropy(module(images), torch.from_numpy(digits.labels))
    gradient = torch.cat([p.detach().reshape(-1) for p in torch.autograd.grad(expected, list(module.parameters()))])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert value == pytest.approx(float(expected.detach()), rel=tolerance)
    assert objective.value(x) == pytest.approx(value, rel=tolerance)
    found = objective.layout.gather(g).numpy()
    np.testing.assert_allclose(found, gradient.double().numpy(), atol=tolerance * float(gradient.abs().max()))

    measured = TestSet(loss, test, comm, blocks)(objective.parameters(x))
    outputs = module(torch.from_numpy(digits.test_inputs).to(dtype) / 16)
    targets = torch.from_numpy(digits.test_labels)
    assert measured["accuracy"] == float((outputs.argmax(1) == targets).sum()) / 360
    assert measured["test_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(outputs, targets).detach()), rel=tolerance
    )
    if blocks:
        alone = TestSet(loss, test, MPI.COMM_SELF, blocks)(objective.parameters(x))
        assert alone == measured
    digits.free()


@pytest.mark.parametrize("shape", [(99, 10), (100, 2), (100, 10), (1250, 15), (1250, 16), (200, 3, 4)])
def test_cross_entropy_is_that_of_torch_and_has_its_derivatives(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = (20 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)

    def known(values: Tensor) -> list[Tensor]:
        slope = torch.autograd.grad(values.square().sum(), outputs, create_graph=True)[0]
        return [values.detach(), slope.detach(), *torch.autograd.grad(slope, outputs, direction)]

    expected = known(nn.functional.cross_entropy(outputs, targets, reduction="none"))
    for found, right in zip(known(cross_entropy(outputs, targets)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13 * float(right.abs().max()))


def test_a_rank_makes_inputs_of_its_share_only(comm: MPI.Comm) -> None:
    digits = files.load("digits", comm)
    loss = ClassificationLoss(network(), samples_of(digits, comm)[0], 10)
    objective = Objective(loss, ParameterLayout(loss.parameters, comm))
    x = objective.layout.vector()
    objective.initial(x)
    rows = torch.arange(0, 1437, 3)
    objective.replace(loss.sampled(rows))
    objective.value(x)
    assert "inputs" not in vars(loss.samples)
    assert "inputs" not in vars(objective.loss.samples)
    assert sum(len(p.samples.inputs) for p in objective.parts) <= -(-len(rows) // comm.size)
    digits.free()


def test_outputs_that_are_not_finite_are_wrong(comm: MPI.Comm) -> None:
    x = np.arange(8.0).reshape(4, 2)
    dataset = DataSet(x, [0, 1, 0, 1], x, [0, 0, 0, 0])
    train, test = samples_of(dataset, comm)
    loss = ClassificationLoss(nn.Linear(2, 2).double(), train, 2)
    theta = torch.tensor([0.0, 0, 0, 0, 1, 0], dtype=torch.float64)  # class 0 for all
    measure = TestSet(loss, test, comm)
    assert measure(theta)["accuracy"] == 1
    assert np.isnan(measure(theta * float("nan"))["test_loss"])
    assert measure(theta * float("nan"))["accuracy"] == 0


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.line(x), x


class Rare(nn.Module):
    """Its outputs change now and then only."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls = nn.Linear(2, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.line(x) + (self.calls % 6 == 0) * torch.arange(3.0)


def test_networks_of_other_outputs_are_refused(comm: MPI.Comm) -> None:
    x = np.arange(8.0).reshape(4, 2)
    train, _ = samples_of(DataSet(x, [0, 1, 2, 0], x, [0, 0, 0, 0]), comm)
    for module, match in (
        (nn.Linear(2, 2), r"to \(2, 3\), it gives \(2, 2\)"),
        (Two(), "it gives tuple"),
    ):
        with pytest.raises(InputError, match=match):
            ClassificationLoss(module.double(), train, 3)
    for module in (nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), Rare()):
        with pytest.raises(InputError, match="dropout"):
            ClassificationLoss(module.double(), train, 3)
