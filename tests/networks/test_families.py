"""Families of convolutional networks for images and volumes, against hand counts and a LeNet written down."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.losses.costs import multiplications
from ddml.networks.classifiers import OPTIONS, build_classifier
from ddml.networks.families import FAMILIES, Residual
from ddml.norms.build import modular_norm
from ddml.problems.classification import ClassificationLoss

IMAGE, VOLUME, FACE, SOLID = (1, 16, 18), (2, 16, 17, 20), (1, 96, 84), (1, 32, 32, 32)


def built(network: str, shape: tuple[int, ...], classes: int = 3, **settings: Any) -> tuple[nn.Module, str]:
    values = {o.name: o.default for o in OPTIONS} | {"seed": 0, "dtype": "float64", "network": network} | settings
    return build_classifier(SimpleNamespace(**values), shape, classes)


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def loss_of(network: str, shape: tuple[int, ...], **settings: Any) -> ClassificationLoss:
    inputs = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = built(network, shape, **settings)[0]
    return ClassificationLoss(module, TensorSamples(inputs, torch.arange(5) % 3), 3, 3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 20)])
def test_cnn_is_lenet_to_the_bit(shape: tuple[int, ...]) -> None:
    height, width = (((n - 4) // 2 - 4) // 2 for n in shape[1:])
    torch.manual_seed(3)
    lenet = nn.Sequential(
        nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 7),
    )  # fmt: skip
    network, words = built("cnn", shape, 7, seed=3, dtype="float32")
    assert words == f"cnn {'x'.join(map(str, shape))}"
    assert list(network.state_dict()) == list(lenet.state_dict())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in lenet.state_dict().items())
    x = torch.rand(4, *shape)
    assert torch.equal(network(x), lenet(x))
    same, words = built("cnn", shape, 7, seed=3, dtype="float32", width=6, depth=2)
    assert words.endswith("-6x2-7")
    assert torch.equal(same(x), lenet(x))


# parameters and multiplications, counted by hand; those of the tiles' networks stand in test_local.py
@pytest.mark.parametrize(
    ("network", "shape", "classes", "settings", "parameters", "products"),
    [
        ("vgg", FACE, 38, {}, 1_011_366, 20_728_576),
        ("resnet", FACE, 38, {}, 1_108_358, 48_155_392),
        ("vgg", (1, 192, 168), 38, {}, 4_157_094, 83_096_320),
        ("vgg", (3, 32, 32), 10, {}, 156_074, 2_934_016),
        ("vgg", SOLID, 10, {}, 149_338, 28_443_264),
        # 1 -> 3 channels of 12 x 10 and 2 -> 6 of 6 x 5, 6 * 3 * 2 = 36 numbers, 24 neurons
        ("vgg", (1, 12, 10), 5, {"width": 3, "depth": 2}, 30 + 168 + 888 + 125,
         27 * 120 + 162 * 30 + 36 * 24 + 24 * 5),
        # the block's two convolutions of 2 -> 2 channels at 2 x 3 x 3 (one of 5 pixels leaves 2, of 6 and 7 leave 3)
        ("resnet", (1, 5, 6, 7), 4, {"width": 2, "depth": 1}, 56 + 2 * 110 + (2 * 18 * 16 + 16) + 68,
         54 * 210 + 2 * 108 * 18 + 36 * 16 + 16 * 4),
        # LeNet of half the width: 3 and 8 channels, 60 and 42 neurons
        ("cnn", (1, 28, 28), 10, {"width": 3}, 78 + 608 + 7_740 + 2_562 + 430,
         75 * 576 + 600 * 64 + 128 * 60 + 60 * 42 + 42 * 10),
        # one stage of volumes: 5 of the first axis leave nothing to pool but one pixel of 6, 7 -> 1, 8 -> 2
        ("cnn", (1, 6, 7, 8), 2, {"width": 1, "depth": 1}, 126 + 60 + 294 + 30, 125 * 24 + 2 * 20 + 20 * 14 + 14 * 2),
        ("cnn", (1, 36, 36), 2, {"width": 1, "depth": 3}, 26 + 78 + 532 + 160 + 294 + 30,
         25 * 1024 + 75 * 144 + 525 * 4 + 7 * 20 + 20 * 14 + 14 * 2),
    ],
)  # fmt: skip
def test_parameters_and_multiplications_are_those_counted_by_hand(
    network: str, shape: tuple[int, ...], classes: int, settings: dict[str, int], parameters: int, products: int
) -> None:
    module = built(network, shape, classes, **settings)[0]
    inputs = torch.zeros(2, *shape, dtype=torch.float64)
    assert module(inputs).shape == (2, classes)
    assert (size(module), multiplications(module, inputs)) == (parameters, products)
    family = FAMILIES[network]
    sizes = family.sizes(shape, settings.get("width"), settings.get("depth"))
    assert family.plan(shape, classes, *sizes).parameters == parameters


@pytest.mark.parametrize("network", FAMILIES)
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_networks_are_deterministic_and_have_gradients(network: str, shape: tuple[int, ...]) -> None:
    module, words = built(network, shape, seed=2, width=2, depth=2)
    again, other = (built(network, shape, seed=seed, width=2, depth=2)[0] for seed in (2, 3))
    assert words == f"{network} {'x'.join(map(str, shape))}-2x2-3"
    x = torch.rand(5, *shape, dtype=torch.float64)
    assert torch.equal(module(x), again(x))
    assert not torch.equal(module(x), other(x))
    assert torch.allclose(module(x)[2:3], module(x[2:3]), atol=1e-12)
    module.train()  # no batch statistics and no dropout
    assert torch.equal(module(x), again(x))
    assert not list(module.buffers())
    loss = loss_of(network, shape, width=2, depth=2)
    theta, gradient = loss.initial(), torch.zeros(loss.size, dtype=torch.float64)
    loss.value_gradient(theta, gradient)
    for layer in loss.layers:
        assert max(float(gradient[loss.parameters[k].range].abs().max()) for k in layer) > 0


@pytest.mark.parametrize("network", FAMILIES)
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_derivatives_are_those_of_differences(network: str, shape: tuple[int, ...]) -> None:
    """Away from initial parameters, where residual blocks have a kink."""
    loss = loss_of(network, shape, width=2, depth=2)
    generator, eps = torch.Generator().manual_seed(4), 1e-7
    theta = loss.initial() + 0.1 * torch.randn(loss.size, generator=generator, dtype=torch.float64)
    gradient, ahead, behind, hessian, gauss_newton = torch.zeros(5, loss.size, dtype=torch.float64)
    loss.value_gradient(theta, gradient)
    direction = gradient / gradient.norm()
    slope = (
        loss.value_gradient(theta + eps * direction, ahead) - loss.value_gradient(theta - eps * direction, behind)
    ) / (2 * eps)
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-5)
    loss.hessian_product(theta, direction, hessian)
    assert torch.allclose(hessian, (ahead - behind) / (2 * eps), rtol=1e-4, atol=1e-5 * float(hessian.abs().max()))
    loss.gauss_newton_product(theta, direction, gauss_newton)
    assert float(gauss_newton @ direction) > 0


@pytest.mark.parametrize("axes", [2, 3])
def test_residual_blocks_begin_as_the_identity(axes: int) -> None:
    torch.manual_seed(0)
    block = Residual(3, 0.5, axes=axes)
    x = torch.rand(2, 3, *range(4, 4 + axes))
    assert torch.equal(block(x), x)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    convolution = {2: nn.functional.conv2d, 3: nn.functional.conv3d}[axes]
    inner = convolution(x, block.first.weight, block.first.bias, padding=1).clamp(min=0)
    assert torch.allclose(block(x), x + convolution(inner, block.second.weight, block.second.bias, padding=1))


@pytest.mark.parametrize("network", FAMILIES)
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_modular_norms_know_the_layers(network: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(network, shape, width=2, depth=2)
    for convolution in ("unfolded", "slices"):
        norm = modular_norm(loss, convolution=convolution)
        entries = sorted(int(e) for block in norm.blocks for e in block.entries.reshape(-1))
        assert entries == list(range(loss.size))
        g = torch.zeros(loss.size, dtype=torch.float64)
        loss.value_gradient(loss.initial(), g)
        direction = norm.dualize(g)
        assert norm.norm(direction) == pytest.approx(1, rel=1e-9)
        assert float(direction @ g) == pytest.approx(norm.dual_norm(g), rel=1e-9)


@pytest.mark.parametrize("network", FAMILIES)
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_kfac_knows_the_layers(network: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(network, shape, width=2, depth=2)
    layers = loss.kronecker_layers()  # it checks that their calls make the gradient
    assert sorted(int(e) for layer in layers for e in layer.entries.reshape(-1)) == list(range(loss.size))
    generator = torch.Generator().manual_seed(4)
    theta = loss.initial() + 0.1 * torch.randn(loss.size, generator=generator, dtype=torch.float64)
    for layer, (A, G) in zip(layers, loss.kronecker_statistics(theta, torch.rand(5, generator=generator)), strict=True):
        assert (len(A), len(G)) == layer.sizes
        assert float(A.trace()) > 0
        assert float(G.trace()) > 0
    assert loss.kronecker_charge() > 1


REFUSED = [
    ("vgg", (64,), {}, r"needs images \(C, H, W\) or volumes \(C, D, H, W\); the samples are \(64,\)"),
    ("resnet", (8, 8), {}, "needs images"),
    ("cnn", (1, 2, 3, 4, 5), {}, "needs images"),
    ("cnn", (1, 8, 8), {}, "'cnn' of 2 stages needs at least 16 x 16 pixels"),
    ("cnn", (1, 16, 16, 15), {}, "at least 16 x 16 x 16 pixels"),
    ("cnn", (1, 28, 28), {"depth": 3}, "'cnn' of 3 stages needs at least 36 x 36 pixels"),
    ("cnn", (1, 28, 28), {"depth": 2**62}, "needs at least"),
    ("vgg", (1, 8, 8), {}, r"'vgg' of 3 stages is too deep for samples \(1, 8, 8\): it has room for -depth 2"),
    ("vgg", (1, 28, 28), {"depth": 2**62}, "room for -depth 3"),
    ("resnet", (1, 3, 7, 3), {}, "room for -depth 1"),
    ("resnet", (1, 3, 3), {"depth": 1}, "at least one axis of 4 pixels is needed"),
    ("mlp", (1, 8, 8), {"width": 9}, "'mlp' takes no width: leave option -width out"),
    ("mlp", (1, 8, 8), {"depth": 2}, "'mlp' takes no depth"),
    ("residual", (1, 8, 8), {"width": 9}, "'residual' takes no width"),
    ("euler", (1, 8, 8), {"depth": 2}, "'euler' takes no depth"),
    ("residual", (1, 8, 8, 8), {}, "'residual' needs images"),
    ("vgg", (1, 8, 8), {"depth": 1, "width": 2**63 - 1}, "parameters or more: they do not fit into the memory"),
    ("resnet", (1, 8, 8, 8), {"depth": 2, "width": 10**8}, "do not fit into the memory"),
    ("cnn", (1, 16, 16), {"width": 10**8}, "do not fit into the memory"),
    ("euler", (1, 8, 8), {"width": 10**8}, "do not fit into the memory"),
    ("mlp", (1, 8, 8), {"widths": "99999999999999999999"}, "do not fit into the memory"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "shape", "settings", "expected"), REFUSED)
def test_what_does_not_fit_is_refused(
    network: str, shape: tuple[int, ...], settings: dict[str, int], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        built(network, shape, **settings)


def test_sizes_below_one_are_refused() -> None:
    for family in FAMILIES.values():
        for width, depth, what in ((0, 1, "a width of 1 or more, got 0"), (1, 0, "a depth of 1 or more, got 0")):
            with pytest.raises(InputError, match=what):
                family.plan(FACE, 3, width, depth)


USER = """
from torch import nn
def sized(shape, classes, width=4, depth=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width * depth), nn.Tanh(), nn.Linear(width * depth, classes))
def narrow(shape, classes, *, width): return nn.Sequential(nn.Flatten(), nn.Linear(12, width))
def other(width, depth): return nn.Sequential(nn.Flatten(), nn.Linear(12, depth))
class Made(nn.Sequential):
    def __init__(self, shape, classes, width=2): super().__init__(nn.Flatten(), nn.Linear(12, classes))
"""


def test_a_users_network_takes_width_and_depth_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    shape = (3, 2, 2)
    network, words = built(f"{file}:sized", shape)
    assert (size(network), words) == (13 * 4 + 5 * 3, f"{file}:sized 3x2x2")
    network, words = built(f"{file}:sized", shape, width=5, depth=2)
    assert (size(network), words) == (13 * 10 + 11 * 3, f"{file}:sized 3x2x2, width 5, depth 2")
    assert size(built(f"{file}:narrow", shape, width=3)[0]) == 39
    assert size(built(f"{file}:other", shape)[0]) == 39  # the first two are the shape and the classes
    assert size(built(f"{file}:Made", shape, width=3)[0]) == 39
    for name, settings, expected in (
        ("narrow", {}, "takes a width without a default: give option -width"),
        ("narrow", {"width": 3, "depth": 1}, "takes no depth: leave option -depth out, or give it an argument depth"),
        ("other", {"width": 3}, "takes no width"),
        ("Made", {"depth": 1}, "takes no depth"),
    ):
        with pytest.raises(InputError, match=expected):
            built(f"{file}:{name}", shape, **settings)
