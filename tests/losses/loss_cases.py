"""Losses of every kind, and their values by plain torch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddml.losses.decayed import DecayedLoss
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, Burgers, Face, Interior, KleinGordon, PDELoss, Periodic, Points, Term

DIGITS, LABELS = (torch.as_tensor(a[:90]) for a in load_digits(return_X_y=True))


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Branches(nn.Module):
    """A module of no sequential structure."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(64, 3), nn.Linear(64, 3), nn.Linear(3, 10)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.left(x)) * self.scale + torch.sigmoid(self.right(x)))


def sequential() -> nn.Module:
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), block, nn.Sigmoid(), nn.Linear(6, 10))


def digits(make: Callable[[], nn.Module], batch: int = 32) -> ModuleLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
    return ModuleLoss(module, per_sample, DIGITS / 16, LABELS, batch)


def decayed(make: Callable[[], nn.Module], decay: float) -> DecayedLoss:
    plain = digits(make)
    return DecayedLoss(plain.module, per_sample, plain.inputs, plain.targets, decay, plain.batch)


# Problems with every kind of term -----------------------------------------------------------------------------------


class SoftWave(PDE):
    """A wave with a soft initial state, a periodic wall, measured points and an unknown speed; plain u = N."""

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    coefficients = {"speed": 0.7}

    def terms(self) -> list[Term]:
        places = np.array([[0.1, 0.2], [0.5, -0.4], [0.9, 0.9]])
        return [
            Term(lambda u, t, x, speed: u.tt - speed**2 * u.xx, Interior(), name="wave"),
            Term(lambda u, t, x, speed: (u - torch.sin(x), u.t), Face(t=0.0, count=7), weight=10.0, name="start"),
            Term(lambda u, t, x, speed: (u - u.opposite, u.x - u.opposite.x), Periodic("x", 5), weight=2.0),
            Term(lambda u, t, x, speed, seen: u - seen, Points(places, seen=[0.1, -0.2, 0.3]), weight=3.0),
        ]


class TwoFields(PDE):
    """Two coupled fields in space-time with a lift and a factor each, and a periodic embedding of x."""

    domain = {"t": (0.0, 2.0), "x": (0.0, 1.0)}
    fields = ("u", "v")
    coefficients = {"rate": 0.3, "decay": -0.2}

    def lift(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(2 * math.pi * x) * torch.cos(t), t * x

    def factor(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return t * torch.exp(x), t**2

    def embed(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return t, torch.sin(2 * math.pi * x), torch.cos(2 * math.pi * x)

    def residual(self, u: Any, v: Any, t: Tensor, x: Tensor, rate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        return u.t - rate * u.xx + u * v, v.tx + decay * torch.sin(u) * v.x


def pde(problem: PDE, points: int = 30, chunk: int = 1024, adaptive: bool = True, depth: int = 3) -> PDELoss:
    probe = [torch.zeros(1)] * len(problem.domain)
    inputs, outputs = len(problem.embed(*probe)), len(problem.fields)
    network = TanhNetwork(inputs, 6, depth, outputs, residual=adaptive, adaptive=adaptive).double()
    network.reset_parameters(torch.Generator().manual_seed(3))
    return PDELoss(problem, network, points, chunk=chunk)


def d(values: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), by, create_graph=True)[0]


def plain_fields(loss: PDELoss, theta: Tensor, *coordinates: Tensor) -> list[Tensor]:
    """lift + factor * network(embed(coordinates)) by the torch module."""
    parameters = {p.name: theta[p.range].view(p.shape) for p in loss.parameters if "coefficients" not in p.name}
    problem = loss.problem
    output = torch.func.functional_call(loss.network, parameters, (torch.stack(problem.embed(*coordinates), dim=1),))
    lift, factor = problem.lift(*coordinates), problem.factor(*coordinates)
    lifts, factors = (v if isinstance(v, tuple) else (v,) * output.shape[1] for v in (lift, factor))
    return [a + b * column for a, b, column in zip(lifts, factors, output.T, strict=True)]


def leaves(points: np.ndarray) -> list[Tensor]:
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in points.T]


def plain_burgers(loss: PDELoss, theta: Tensor) -> Tensor:
    t, x = leaves(loss.problem.points(Term(lambda: None), 30)[0][:, 0])
    (u,) = plain_fields(loss, theta, t, x)
    u_x = d(u, x)
    return torch.mean((d(u, t) + u * u_x - 0.01 / math.pi * d(u_x, x)) ** 2)


def plain_klein_gordon(loss: PDELoss, theta: Tensor) -> Tensor:
    t, x = leaves(loss.problem.points(Term(lambda: None), 30)[0][:, 0])
    (u,) = plain_fields(loss, theta, t, x)
    r = d(d(u, t), t) - d(d(u, x), x) + u**2 + x * torch.cos(t) - x**2 * torch.cos(t) ** 2
    return torch.mean(r**2)


def plain_wave(loss: PDELoss, theta: Tensor) -> Tensor:
    speed = theta[-1]
    inside, start, wall, seen = (loss.problem.points(term, 30)[0] for term in loss.problem.terms())
    t, x = leaves(inside[:, 0])
    (u,) = plain_fields(loss, theta, t, x)
    total = torch.mean((d(d(u, t), t) - speed**2 * d(d(u, x), x)) ** 2)
    t, x = leaves(start[:, 0])
    assert float(t.detach().abs().max()) == 0
    (u,) = plain_fields(loss, theta, t, x)
    total = total + 10 * torch.mean((u - torch.sin(x)) ** 2 + d(u, t) ** 2)
    t, x = leaves(wall[:, 0])
    s, y = leaves(wall[:, 1])
    assert torch.equal(t, s)
    assert (x[0].item(), y[0].item()) == (-1.0, 1.0)
    (u,), (w,) = plain_fields(loss, theta, t, x), plain_fields(loss, theta, s, y)
    total = total + 2 * torch.mean((u - w) ** 2 + (d(u, x) - d(w, y)) ** 2)
    t, x = leaves(seen[:, 0])
    (u,) = plain_fields(loss, theta, t, x)
    return total + 3 * torch.mean((u - torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)) ** 2)


def plain_two_fields(loss: PDELoss, theta: Tensor) -> Tensor:
    rate, decay = theta[-2:]
    t, x = leaves(loss.problem.points(Term(lambda: None), 30)[0][:, 0])
    u, v = plain_fields(loss, theta, t, x)
    first = d(u, t) - rate * d(d(u, x), x) + u * v
    second = d(d(v, t), x) + decay * torch.sin(u) * d(v, x)
    return torch.mean(first**2 + second**2)


def plain_module(loss: ModuleLoss, theta: Tensor) -> Tensor:
    parameters = {p.name: theta[p.range].view(p.shape) for p in loss.parameters}
    outputs = torch.func.functional_call(loss.module, parameters, (DIGITS / 16,))
    return nn.functional.cross_entropy(outputs, LABELS)


def plain_decayed(loss: DecayedLoss, theta: Tensor) -> Tensor:
    weights = [theta[p.range] for p in loss.parameters if not p.name.endswith(("bias", "scale"))]
    return plain_module(loss, theta) + loss.decay / 2 * torch.cat(weights).square().sum()


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "sequential": (lambda: digits(sequential), plain_module),
    "one batch": (lambda: digits(sequential, 1000), plain_module),
    "branches": (lambda: digits(Branches), plain_module),
    "decayed": (lambda: decayed(sequential, 0.3), plain_decayed),
    "decayed branches": (lambda: decayed(Branches, 2.0), plain_decayed),
    "burgers": (lambda: pde(Burgers()), plain_burgers),
    "burgers, mlp, chunks": (lambda: pde(Burgers(), chunk=7, adaptive=False), plain_burgers),
    "klein gordon": (lambda: pde(KleinGordon()), plain_klein_gordon),
    "soft wave": (lambda: pde(SoftWave(), chunk=11), plain_wave),
    "two fields": (lambda: pde(TwoFields()), plain_two_fields),
    "two fields, mlp": (lambda: pde(TwoFields(), adaptive=False, chunk=13), plain_two_fields),
}


cases = pytest.mark.parametrize("name", CASES)


def point(loss: Loss, seed: int = 0) -> Tensor:
    """A parameter vector away from the initial one."""
    noise = torch.randn(loss.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return loss.initial() + 0.05 * noise


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def gradient_of(loss: Loss, theta: Tensor, **arguments: Any) -> tuple[float, Tensor]:
    gradient = torch.zeros(loss.size, dtype=torch.float64)
    return loss.value_gradient(theta, gradient, **arguments), gradient


def product_of(loss: Loss, theta: Tensor, direction: Tensor) -> Tensor:
    product = torch.zeros(loss.size, dtype=torch.float64)
    loss.hessian_product(theta, direction, product)
    return product
