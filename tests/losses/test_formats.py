"""Weights of convolutions have their channels last where that is faster; nobody notices but by the time."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.losses.branch import Branch
from ddml.losses.modules import formats, laid_out
from ddml.networks.families import resnet, vgg
from ddml.parameters import parameter_table
from ddml.problems.classification import ClassificationLoss

SHAPES = ((1, 9, 8), (3, 8, 6), (2, 4, 8, 6))
IDS = ("one channel", "three channels", "volumes")


class Large(ClassificationLoss):
    """One that saves memory whatever its size is."""

    large_from: ClassVar[int] = 0


class Seen(nn.Module):
    """Keeps what passes through it."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


def made(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: type = ClassificationLoss
) -> ClassificationLoss:
    torch.manual_seed(0)
    network = (vgg if len(shape) == 4 else resnet)(shape, 3, 4, 2).network().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():  # also those that begin at zero
            parameter += 0.1 * torch.randn(parameter.shape)
    loss: ClassificationLoss = kind(
        network, TensorSamples(torch.rand(14, *shape).to(dtype), torch.arange(14) % 3), 3, 4
    )
    return loss


def gradient_of(loss: ClassificationLoss, theta: Tensor, start: float = 0.0) -> tuple[float, Tensor]:
    gradient = torch.full_like(theta, start)
    return float(loss.value_gradient(theta, gradient)), gradient


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_values_and_derivatives_are_those_of_any_order(shape: tuple[int, ...]) -> None:
    loss, exact = made(shape), made(shape, torch.float64)
    theta = loss.initial()
    value, gradient = gradient_of(loss, theta)
    right, slope = gradient_of(exact, theta.double())
    assert value == pytest.approx(right, rel=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)
    direction = torch.linspace(-1, 1, len(theta))
    found, expected = torch.zeros_like(theta), torch.zeros_like(slope)
    loss.gauss_newton_product(theta, direction, found)
    exact.gauss_newton_product(theta.double(), direction.double(), expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    at = theta.clone().requires_grad_()
    through = torch.autograd.grad(torch.stack(list(loss.terms(at))).sum(), at)[0]
    torch.testing.assert_close(through, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_the_same_bits_in_little_memory(shape: tuple[int, ...]) -> None:
    small, large = made(shape), made(shape, kind=Large)
    for start in (0.0, 0.3):
        (value, gradient), (same, equal) = (gradient_of(loss, small.initial(), start) for loss in (small, large))
        assert value == same
        if start == 0:
            assert torch.equal(gradient, equal)
        else:  # added to what is there
            torch.testing.assert_close(equal, gradient)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_convolution_gives_has_the_order_that_is_fast(dtype: torch.dtype, last: bool, channels: int) -> None:
    network = nn.Sequential(nn.Conv2d(channels, 4, 3), Seen(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    inputs = torch.rand(5, channels, 6, 6, dtype=dtype)
    table = parameter_table([(name, p.shape) for name, p in network.named_parameters()])
    branch = Branch(network, {id(p): k for k, p in enumerate(network.parameters())}, table, inputs, "it")
    module = branch.at(torch.cat([p.detach().reshape(-1) for p in network.parameters()]))
    module(inputs)
    kept = module[1].last
    assert kept.is_contiguous(memory_format=torch.channels_last) == last
    assert kept.is_contiguous() != last


def test_only_convolutions_have_another_order() -> None:
    network = resnet((1, 8, 8), 3, 4, 2).network()
    weights = {id(p) for p in network.parameters() if p.ndim == 4}
    assert formats(network).keys() == weights
    assert not formats(network.double())
    values = torch.arange(72.0)
    assert laid_out(values, (72,), None).data_ptr() == values.data_ptr()
    assert torch.equal(laid_out(values, (8, 1, 3, 3), torch.channels_last), values.view(8, 1, 3, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_groups_are_normalised_behind_what_needs_no_gradient(frozen: bool) -> None:
    """Where channels are last, torch 2.13 ends with a segmentation fault."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))
    network[0].requires_grad_(not frozen)
    loss = ClassificationLoss(network, TensorSamples(torch.rand(9, 2, 6, 6), torch.arange(9) % 3), 3)
    theta, layer = loss.initial(), len(loss.layers) - 2  # that of the groups
    _, whole = gradient_of(loss, theta)
    part = torch.zeros_like(theta)
    loss.value_gradient(theta, part, loss.prefix(theta, layer), frozenset({layer}))
    place = loss.parameters[loss.layers[layer][0]].range
    torch.testing.assert_close(part[place], whole[place])
    assert float(whole[place].abs().min()) > 0
