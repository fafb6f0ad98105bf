"""Networks for classification: their sizes, their costs against counted operations, what they refuse."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddml.errors import InputError
from ddml.losses.costs import forward_costs, suitable_batch
from ddml.losses.module import ModuleLoss
from ddml.losses.work import Besides
from ddml.networks.classifiers import OPTIONS, build_classifier, parse_widths
from ddml.problems.classification import cross_entropy

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def built(shape: tuple[int, ...], classes: int = 10, **settings: Any) -> tuple[nn.Module, str]:
    values = {o.name: o.default for o in OPTIONS} | {"seed": 0, "dtype": "float64"} | settings
    return build_classifier(SimpleNamespace(**values), shape, classes)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def loss_of(module: nn.Module, shape: tuple[int, ...], count: int = 6, batch: int = 4) -> ModuleLoss:
    g = torch.Generator().manual_seed(1)
    inputs = torch.rand(count, *shape, generator=g, dtype=torch.float64)
    return ModuleLoss(module, cross_entropy, inputs, torch.arange(count) % 10, batch)


def test_networks_of_the_slides_have_their_sizes() -> None:
    mlp, words = built(MNIST)
    assert (size(mlp), words) == (26_506, "mlp 784-32-32-10")
    assert size(built(CIFAR, network="cnn")[0]) == 62_006
    assert size(built((7,), 3, widths="")[0]) == 24
    assert built((7,), 3, widths="")[1] == "mlp 7-3"


@pytest.mark.parametrize("network", ["mlp", "cnn", "vgg", "resnet", "residual", "euler", "euler_cnn"])
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (1, 17, 20)])
def test_outputs_and_seeds(network: str, shape: tuple[int, ...]) -> None:
    first, again, other = (built(shape, 7, network=network, seed=s, dtype="float32")[0] for s in (3, 3, 4))
    x = torch.rand(5, *shape)
    assert first(x).shape == (5, 7)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert torch.allclose(first(x)[2:3], first(x[2:3]), atol=1e-6)
    double = built(shape, 7, network=network, seed=3)[0]
    assert torch.allclose(double(x.double()).float(), first(x), atol=1e-5)


def test_residual_blocks_begin_as_the_identity_and_have_gradients() -> None:
    network = built(CIFAR, network="residual")[0]
    assert torch.equal(network[2](torch.ones(1, 16, 4, 4).double()), torch.ones(1, 16, 4, 4))
    loss = loss_of(network, CIFAR)
    gradient = torch.zeros(loss.size, dtype=torch.float64)
    loss.value_gradient(loss.initial(), gradient)
    assert len(loss.layers) == 7
    for layer in loss.layers:
        assert max(float(gradient[loss.parameters[k].range].abs().max()) for k in layer) > 0


def test_costs_are_parameters_times_positions() -> None:
    cnn = loss_of(built(CIFAR, network="cnn")[0], CIFAR)
    assert cnn.costs == (456 * 28 * 28, 2416 * 10 * 10, 48_120, 10_164, 850)
    mlp = loss_of(built(MNIST)[0], MNIST)
    assert mlp.costs == (25_120, 1_056, 330)
    strided = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(96, 10)).double()
    assert loss_of(strided, (4, 9, 9)).costs == ((4 // 2 * 9 + 1) * 6 * 16, 970)


def test_batches_suit_the_widest_layer() -> None:
    for network, shape, expected in (("mlp", MNIST, 2**21 // 784), ("mlp", (64,), 4096), ("cnn", CIFAR, 2**21 // 4704)):
        module = built(shape, network=network)[0]
        assert suitable_batch(module, torch.zeros(2, *shape, dtype=torch.float64)) == expected
        assert not any(part._forward_hooks for part in module.modules())


class Tree(nn.Module):
    """A module with a scale of its own, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(12, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.twice(torch.tanh(self.twice(self.first(x)))))


def test_costs_of_any_module() -> None:
    tree = Tree().double()
    costs = forward_costs(tree, torch.rand(5, 12, dtype=torch.float64))
    assert costs == {"first": 104, "twice": 2 * (64 + 8), "last": 90, "": 10}
    loss = loss_of(tree, (12,))
    names = [loss.parameters[layer[0]].name for layer in loss.layers]
    assert dict(zip(names, loss.costs, strict=True)) == {
        "scale": 10, "first.weight": 104, "twice.weight": 144, "last.weight": 90,
    }  # fmt: skip
    assert not tree._forward_hooks


def counted(call: Callable[[], object]) -> int:
    """Operations of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("network", "shape", "tolerance"),
    [
        ("mlp", MNIST, 1e-3),
        ("cnn", CIFAR, 1e-3),
        ("vgg", CIFAR, 1e-3),
        ("vgg", (1, 8, 16, 12), 1e-3),
        ("euler", MNIST, 1e-3),
        ("euler_cnn", MNIST, 1e-3),
        ("residual", CIFAR, 0.05),  # adjoints inside a block are not charged
    ],
)
def test_passes_are_counted_operations(network: str, shape: tuple[int, ...], tolerance: float) -> None:
    """Of products with weights, which are all that torch counts."""
    loss = loss_of(built(shape, network=network)[0], shape)
    loss.besides = Besides()
    theta, gradient = loss.initial(), torch.zeros(loss.size, dtype=torch.float64)
    whole = counted(lambda: loss.value_gradient(theta, gradient))

    def close(call: Callable[[], object], units: float, slack: float = 0.03) -> bool:
        return counted(call) / whole == pytest.approx(units, rel=slack, abs=tolerance)

    assert close(lambda: loss.value(theta), loss.charges.evaluation(gradient=False))
    for first in range(len(loss.layers)):
        kept = loss.prefix(theta, first)
        assert (kept is None) == (not loss.keeps(first))
        assert close(lambda first=first: loss.prefix(theta, first), loss.charges.prefix(first))
        for active in (frozenset([first]), frozenset(range(first, len(loss.layers)))):
            arguments = theta, gradient, kept, active
            assert close(
                lambda arguments=arguments: loss.value_gradient(*arguments), loss.charges.evaluation(first, active)
            )
            direction = torch.zeros_like(theta)
            for k in (k for i in active for k in loss.layers[i]):
                direction[loss.parameters[k].range] = 1.0
            product = theta, direction, gradient, kept, active
            units = loss.charges.gauss_newton(first, active)
            if network == "mlp":  # torch's second derivatives of convolutions take up to half as much again
                assert close(lambda product=product: loss.gauss_newton_product(*product), units)
    if network == "mlp":
        assert close(lambda: loss.hessian_product(theta, theta, gradient), loss.charges.hessian())


def test_stages_may_have_names() -> None:
    from collections import OrderedDict

    layers = OrderedDict(one=nn.Linear(12, 8), bend=nn.Tanh(), two=nn.Linear(8, 10))
    loss = loss_of(nn.Sequential(layers).double(), (12,))
    theta = loss.initial()
    assert [loss.keeps(i) for i in range(2)] == [False, True]
    assert loss.value(theta, loss.prefix(theta, 1)) == pytest.approx(loss.value(theta), rel=1e-14)


def test_the_users_module_is_left_alone() -> None:
    module = built(MNIST)[0]
    loss = loss_of(module, MNIST)
    before = loss.initial()
    gradient = torch.zeros(loss.size, dtype=torch.float64)
    loss.value_gradient(before + 1, gradient)
    loss.value(before + 2)
    assert torch.equal(loss.initial(), before)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in module.parameters()]), before)


USER = """
from torch import nn
def good(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
def fails(shape, classes): raise OSError("weights are missing")
def number(shape, classes): return 3
"""


def test_a_users_network_and_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    network, words = built((3, 2, 2), network=f"{file}:good")
    assert (size(network), words) == (130, f"{file}:good 3x2x2")
    for name, match in (
        (f"{file}:fails", "raised OSError: weights are missing"),
        (f"{file}:number", "must give a torch module"),
        ("transformer", "unknown network 'transformer'; there are mlp, cnn, vgg, resnet, residual"),
    ):
        with pytest.raises(InputError, match=match):
            built((3, 2, 2), network=name)
    with pytest.raises(InputError, match="at least 16 x 16 pixels"):
        built((1, 8, 8), network="cnn")
    with pytest.raises(InputError, match=r"images \(C, H, W\)"):
        built((64,), network="residual")
    for text in ("32,", "a", "0", "-3", "3.5"):
        with pytest.raises(InputError, match="-widths"):
            parse_widths(text)
    assert parse_widths("512, 256") == [512, 256]
