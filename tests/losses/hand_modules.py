"""Torch modules with frozen, tied and unused parameters, and their outputs by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.losses.loss import Loss
from ddml.problems.classification import ClassificationLoss

INPUTS = torch.as_tensor(np.random.default_rng(0).standard_normal((30, 5)))


LABELS = torch.as_tensor(np.random.default_rng(1).integers(3, size=30))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def frozen() -> nn.Module:
    """The first layer, and the weight of the second, are."""
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    network[0].requires_grad_(False)
    network[2].weight.requires_grad_(False)
    return network


def tied() -> nn.Module:
    """The third layer has the weight of the second, and a bias of its own."""
    network = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    network[4].weight = network[2].weight
    return network


def tied_to_the_first() -> nn.Module:
    """And nothing of its own in the layer that is tied: its number is passed over."""
    network = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    network[2].weight = network[0].weight
    return network


def twice() -> nn.Module:
    """One module, called twice."""
    shared = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(5, 4), shared, nn.Tanh(), shared, nn.Linear(4, 3))


class Idle(nn.Module):
    """Half of it is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class Unused(nn.Module):
    """A layer of a kind of its own, that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def unused() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), Unused(), Idle(), nn.Linear(4, 3))


class Skip(nn.Sequential):
    """Children with a connection around them: no chain, although it is a Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        for child in list(self)[:-1]:
            x = x + torch.tanh(child(x))
        return self[-1](x)


def skip() -> nn.Module:
    return Skip(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))


class Named(nn.Sequential):
    """A chain with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


class Preactivated(nn.Module):
    """Its activation overwrites what enters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.activation, self.linear = nn.LeakyReLU(0.3, inplace=True), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(self.activation(x))
        return found


def preactivated() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Flatten(), Preactivated(4, 4), Preactivated(4, 3))


def hooked() -> nn.Module:
    """What leaves is scaled by no child."""
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    network.register_forward_hook(lambda _, __, outputs: 3 * outputs)
    return network


def pieces(theta: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    sizes = [math.prod(s) for s in shapes]
    assert len(theta) == sum(sizes)
    return [p.view(s) for p, s in zip(theta.split(sizes), shapes, strict=True)]


def by_hand(name: str, theta: Tensor, module: nn.Module) -> Tensor:
    """The outputs as matrix products; frozen parameters are read from a copy of the module."""
    x = INPUTS
    if name == "frozen":
        b, V, c = pieces(theta, (4,), (3, 4), (3,))
        fixed = {n: p.detach() for n, p in module.named_parameters()}
        h = torch.tanh(x @ fixed["0.weight"].T + fixed["0.bias"])
        return torch.tanh(h @ fixed["2.weight"].T + b) @ V.T + c
    if name == "tied":
        W, b, A, a, c, V, d = pieces(theta, (4, 5), (4,), (4, 4), (4,), (4,), (3, 4), (3,))
        return torch.tanh(torch.tanh(torch.tanh(x @ W.T + b) @ A.T + a) @ A.T + c) @ V.T + d
    if name == "tied to the first":
        W, b, V, d = pieces(theta, (5, 5), (5,), (3, 5), (3,))
        return torch.tanh(torch.tanh(x @ W.T + b) @ W.T) @ V.T + d
    if name == "twice":
        W, b, A, a, V, d = pieces(theta, (4, 5), (4,), (4, 4), (4,), (3, 4), (3,))
        return (torch.tanh((x @ W.T + b) @ A.T + a) @ A.T + a) @ V.T + d
    if name == "unused":
        W, b, _, _, A, a, _, _, V, d = pieces(
            theta, (4, 5), (4,), (2, 2), (2,), (4, 4), (4,), (2, 3), (2,), (3, 4), (3,)
        )
        return torch.tanh(torch.tanh(x @ W.T + b) @ A.T + a) @ V.T + d
    if name == "preactivated":
        W, b, A, a, V, d = pieces(theta, (4, 5), (4,), (4, 4), (4,), (3, 4), (3,))
        h = nn.functional.leaky_relu(x @ W.T + b, 0.3) @ A.T + a
        return nn.functional.leaky_relu(h, 0.3) @ V.T + d
    if name == "hooked":
        W, b, V, d = pieces(theta, (4, 5), (4,), (3, 4), (3,))
        return 3 * (torch.tanh(x @ W.T + b) @ V.T + d)
    if name == "named":
        W, b, V, d = pieces(theta, (4, 5), (4,), (3, 4), (3,))
        return torch.tanh(x @ W.T + b) @ V.T + d
    W, b, A, a, V, d = pieces(theta, (5, 5), (5,), (5, 5), (5,), (3, 5), (3,))
    h = x + torch.tanh(x @ W.T + b)
    return (h + torch.tanh(h @ A.T + a)) @ V.T + d


MODULES: dict[str, Callable[[], nn.Module]] = {
    "frozen": frozen, "tied": tied, "tied to the first": tied_to_the_first, "twice": twice, "unused": unused,
    "skip": skip, "named": lambda: Named(4), "preactivated": preactivated, "hooked": hooked,
}  # fmt: skip


modules = pytest.mark.parametrize("name", MODULES)


def classifier(module: nn.Module) -> ClassificationLoss:
    return ClassificationLoss(module, TensorSamples(INPUTS, LABELS), 3, 11)


def numbers(size: int, seed: int) -> Tensor:
    return torch.as_tensor(0.7 * np.random.default_rng(seed).standard_normal(size))


def assert_derivatives(loss: Loss, function: Callable[[Tensor], Tensor], curvature: Tensor, x: Tensor) -> None:
    """Value, gradient, Hessian and Gauss-Newton products at x against dense ones."""
    n = len(x)
    v, gradient, product = numbers(n, 8), torch.zeros(n).double(), torch.zeros(n).double()
    expected = torch.autograd.functional.jacobian(function, x)
    assert loss.value(x) == pytest.approx(float(function(x).detach()), rel=1e-12)
    assert loss.value_gradient(x, gradient) == pytest.approx(float(function(x).detach()), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-13)
    loss.hessian_product(x, v, product)
    assert torch.allclose(product, torch.autograd.functional.hessian(function, x) @ v, rtol=1e-9, atol=1e-12)
    product.zero_()
    loss.gauss_newton_product(x, v, product)
    assert torch.allclose(product, curvature @ v, rtol=1e-9, atol=1e-12)
