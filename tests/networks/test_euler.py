"""Euler networks: what they compute, how they begin, and what a coarser one is."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddml.data.sample_sets import TensorSamples
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.losses.work import Besides
from ddml.networks.classifiers import OPTIONS, build_classifier
from ddml.networks.depth import coarsened
from ddml.networks.euler import EulerNetwork, euler, euler_cnn
from ddml.networks.tanh import TanhNetwork
from ddml.problems.classification import ClassificationLoss


def built(shape: tuple[int, ...], **settings: Any) -> tuple[Any, str]:
    values = {o.name: o.default for o in OPTIONS} | {"seed": 0, "dtype": "float64"} | settings
    return build_classifier(SimpleNamespace(**values), shape, 10)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def loss_of(network: nn.Module, shape: tuple[int, ...], count: int = 7) -> ClassificationLoss:
    inputs = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ClassificationLoss(network.double(), TensorSamples(inputs, torch.arange(count) % 10), 10, 4)


def test_options_choose_sizes() -> None:
    network, words = built((1, 28, 28), network="euler")
    assert (size(network), words) == (25_120 + 16 * 1_056 + 330, "euler 1x28x28-32x16-10, T = 1")
    network, words = built((7,), network="euler", blocks=3, width=4, horizon=2.5)
    assert (size(network), words) == (32 + 3 * 20 + 50, "euler 7-4x3-10, T = 2.5")
    network, words = built((1, 28, 28), network="euler", image_refinement=2)
    assert (size(network), words) == (42_346, "euler 1x28x28-32x16-10, T = 1, images coarser by 2")
    plain, _ = built((1, 28, 28), network="euler")
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), plain.parameters(), strict=True))
    assert [size(network.coarsened(k)) for k in (2, 16)] == [14 * 14 * 32 + 32 + 8448 + 330, 6272 + 32 + 1056 + 330]
    network, words = built((3, 32, 32), network="euler_cnn", blocks=2)
    assert (size(network), words) == (16 * 109 + 2 * 16 * 145 + 2_570, "euler_cnn 3x32x32-16x2-10, T = 1")
    for shape in ((4,), (3, 8)):
        with pytest.raises(InputError, match=r"needs images \(C, H, W\)"):
            built(shape, network="euler_cnn")
    with pytest.raises(InputError, match="-horizon must be a number, got inf"):
        built((7,), network="euler", horizon=math.inf)
    with pytest.raises(InputError, match="-blocks must be 1 or more"):
        next(o for o in OPTIONS if o.name == "blocks").parse("0")
    with pytest.raises(InputError, match="-horizon must be more than 0"):
        next(o for o in OPTIONS if o.name == "horizon").parse("0")


@pytest.mark.parametrize(
    ("shape", "inside"),
    [((1, 28, 28), (7, 7)), ((3, 32, 32), (8, 8)), ((1, 17, 20), (8, 10)), ((1, 8, 8), (8, 8)), ((2, 1, 3), (1, 3))],
)
def test_images_get_smaller_once(shape: tuple[int, ...], inside: tuple[int, ...]) -> None:
    network = euler_cnn(shape, 10, 2, 4, 1.0)
    x = torch.rand(5, *shape)
    opened = network.open(x)
    assert opened.shape == (5, 4, *inside)
    assert network.block1(opened).shape == opened.shape
    assert network(x).shape == (5, 10)
    every = torch.rand(1, *shape, requires_grad=True)
    assert (torch.autograd.grad(network.open(every).square().sum(), every)[0] != 0).all()  # no pixel is left out


def test_weights_begin_with_the_variance_of_one_over_inputs() -> None:
    for network in (euler((400,), 10, 4, 60, 1.0), euler_cnn((3, 32, 32), 10, 4, 60, 1.0)):
        blocks = [network[i].layer.weight for i in range(1, 5)]
        assert not any(torch.equal(blocks[0], other) for other in blocks[1:])
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                assert not p.any()
            else:
                inputs = p[0].numel()
                assert float(p.detach().var()) * inputs == pytest.approx(1, abs=8 * math.sqrt(2 / p.numel()))
                assert float(p.detach().mean()) == pytest.approx(0, abs=5 / math.sqrt(inputs * p.numel()))


def test_what_enters_a_block_can_be_kept() -> None:
    for network, shape in ((euler((6,), 10, 5, 4, 1.0), (6,)), (euler_cnn((2, 5, 5), 10, 5, 4, 1.0), (2, 5, 5))):
        loss = loss_of(network, shape)
        theta = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        assert [loss.parameters[layer[0]].name.partition(".")[0] for layer in loss.layers] == [
            "open", *(f"block{i}" for i in range(5)), "close",
        ]  # fmt: skip
        value = loss.value(theta)
        for first in range(1, 7):
            assert loss.value(theta, loss.prefix(theta, first)) == pytest.approx(value, rel=1e-13)
        assert len(Subdomains.by_layers(loss, 3)) == 3
        assert len(Subdomains.windows(loss, 4, 1)) == 4


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_a_coarser_network_has_the_means_of_its_blocks(factor: int) -> None:
    fine = euler((6,), 10, 6, 4, 1.5).double().eval()
    coarse = fine.coarsened(factor)
    assert not coarse.training and coarse.blocks == 6 // factor
    assert coarse.gain == pytest.approx(factor**-0.5)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(coarse.open.layer, name), getattr(fine.open.layer, name))
        assert torch.equal(getattr(coarse.close.layer, name), getattr(fine.close.layer, name))
        for i in range(coarse.blocks):
            block = getattr(coarse, f"block{i}")
            assert block.step == pytest.approx(1.5 * factor / 6)
            mean = sum(getattr(getattr(fine, f"block{i * factor + k}").layer, name) for k in range(factor)) / factor
            assert torch.allclose(block.gain * getattr(block.layer, name), mean, rtol=1e-14, atol=1e-16)
    if factor == 6:
        twice = fine.coarsened(2).coarsened(3)
        assert torch.allclose(twice.block0.layer.weight, coarse.block0.layer.weight, rtol=1e-13)
        assert twice.gain == pytest.approx(coarse.gain, rel=1e-14)


def test_equal_blocks_of_a_small_step_are_nearly_one_of_a_large_one() -> None:
    """y + h tanh(z), twice, against y + 2 h tanh(z): they differ by O(h^2)."""
    for fine in (euler((6,), 10, 2, 4, 1e-3).double(), TanhNetwork(6, 4, 2, 10, True, True).double()):
        layers = [fine.block0.layer, fine.block1.layer] if isinstance(fine, EulerNetwork) else list(fine.maps[1:3])
        layers[1].load_state_dict(layers[0].state_dict())
        if isinstance(fine, TanhNetwork):  # tanh(z) small in place of h
            fine.reset_parameters(torch.Generator().manual_seed(0))
            with torch.no_grad():
                layers[0].weight.mul_(1e-3)
            layers[1].load_state_dict(layers[0].state_dict())
        x = torch.rand(9, 6, dtype=torch.float64)
        difference = (fine(x) - fine.coarsened(2)(x)).detach()
        assert 0 < float(difference.abs().max()) < 1e-5


def test_a_tanh_network_of_other_depth_has_its_form() -> None:
    fine = TanhNetwork(2, 5, 6, 1, residual=True, adaptive=True).double()
    coarse = fine.coarsened(3)
    alike = TanhNetwork(2, 5, 2, 1, residual=True, adaptive=True)
    assert coarse.stages == alike.stages and coarse.layers == alike.layers
    assert coarse.maps[0].weight.dtype == torch.float64
    mean = (fine.maps[4].weight + fine.maps[5].weight + fine.maps[6].weight) / 3
    assert torch.allclose(coarse.maps[2].weight, 3 * mean)
    assert torch.allclose(coarse.maps[0].weight, fine.maps[0].weight / 3)
    assert torch.allclose(coarse.maps[3].weight, 3 * fine.maps[7].weight)
    plain = TanhNetwork(2, 5, 6, 1, residual=True)
    assert len(plain.coarsened(2).slopes) == 0


def test_what_has_no_coarser_network_says_so() -> None:
    for network, factor, match in (
        (euler((6,), 10, 6, 4, 1.0), 4, "depth of 6 is not divisible by 4"),
        (euler((6,), 10, 1, 4, 1.0), 2, "depth of 1 is not divisible by 2"),
        (euler((6,), 10, 6, 4, 1.0), 1, "factor of 2 or more"),
        (TanhNetwork(2, 5, 6, 1), 2, "plain MLP"),
        (nn.Sequential(nn.Linear(2, 2)), 2, "nor has any Sequential"),
        (None, 2, "loss without a network"),
    ):
        with pytest.raises(InputError, match=match):
            coarsened(network, factor)


@pytest.mark.parametrize("shape", [(6,), (2, 8, 8)])
def test_shares_of_a_coarse_gradient_are_operations_that_torch_counts(shape: tuple[int, ...]) -> None:
    """Of products with weights, which are all that torch counts."""
    make = euler if len(shape) == 1 else euler_cnn
    network, counts, charged = make(shape, 10, 8, 5, 1.0), [], []
    for module in (network, network.coarsened(2), network.coarsened(4)):
        loss = loss_of(module, shape)
        theta, gradient = loss.initial(), torch.zeros(loss.size, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            loss.value_gradient(theta, gradient)
        counts.append(counter.get_total_flops())
        loss.besides = Besides()
        charged.append(loss.charges.operations)
    for number in (1, 2):
        assert charged[number] / charged[0] == pytest.approx(counts[number] / counts[0], rel=0.05)
