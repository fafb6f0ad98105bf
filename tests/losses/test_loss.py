"""Losses on one process against plain torch: values, gradients, Hessian products, parts, restrictions, residuals."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.losses.restricted import RestrictedLoss
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


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "sequential": (lambda: digits(sequential), plain_module),
    "one batch": (lambda: digits(sequential, 1000), plain_module),
    "branches": (lambda: digits(Branches), plain_module),
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


@cases
def test_value_gradient_and_hessian_product_are_those_of_plain_torch(name: str) -> None:
    make, plain = CASES[name]
    loss = make()
    theta, direction = point(loss), point(loss, 1)
    leaf = theta.clone().requires_grad_()
    value = plain(loss, leaf)
    expected = torch.autograd.grad(value, leaf, create_graph=True)[0]
    value = value.detach()
    curvature = torch.autograd.grad(expected @ direction, leaf)[0]
    found, gradient = gradient_of(loss, theta)
    assert found == pytest.approx(float(value), rel=1e-12)
    assert loss.value(theta) == pytest.approx(float(value), rel=1e-12)
    assert sum(float(term) for term in loss.terms(theta)) == pytest.approx(float(value), rel=1e-12)
    assert close(gradient, expected.detach())
    assert close(product_of(loss, theta, direction), curvature, 1e-11)


@cases
def test_gradient_and_hessian_product_are_limits_of_finite_differences(name: str) -> None:
    loss, h = CASES[name][0](), 1e-5
    theta, direction = point(loss), torch.nn.functional.normalize(point(loss, 1), dim=0)
    ahead, behind = gradient_of(loss, theta + h * direction), gradient_of(loss, theta - h * direction)
    gradient = gradient_of(loss, theta)[1]
    slope = float(gradient @ direction)
    assert abs((ahead[0] - behind[0]) / (2 * h) - slope) <= 1e-6 * float(gradient.norm())
    assert close((ahead[1] - behind[1]) / (2 * h), product_of(loss, theta, direction), 1e-5)


@cases
def test_values_and_gradients_are_added_not_written(name: str) -> None:
    loss = CASES[name][0]()
    theta = point(loss)
    once = gradient_of(loss, theta)[1]
    twice = once.clone()
    loss.value_gradient(theta, twice)
    assert close(twice, 2 * once, 1e-13)
    assert torch.equal(loss.initial(), CASES[name][0]().initial())


@cases
@pytest.mark.parametrize("edges", [[0, 10], [5, 6, 7], [1, 20, 31]])
def test_parts_sum_to_the_whole(name: str, edges: list[int]) -> None:
    loss = CASES[name][0]()
    theta, direction = point(loss), point(loss, 1)
    bounds = sorted({0, loss.count, *edges})
    parts = [loss.part(a, b) for a, b in pairwise(bounds)]
    assert sum(p.count for p in parts) == loss.count
    value, gradient = gradient_of(loss, theta)
    results = [gradient_of(p, theta) for p in parts]
    assert sum(v for v, _ in results) == pytest.approx(value, rel=1e-12)
    assert sum(p.value(theta) for p in parts) == pytest.approx(value, rel=1e-12)
    assert close(sum(g for _, g in results), gradient)
    assert close(sum(product_of(p, theta, direction) for p in parts), product_of(loss, theta, direction), 1e-11)
    empty = loss.part(3, 3)
    assert empty.count == 0
    assert gradient_of(empty, theta)[0] == 0.0
    assert not gradient_of(empty, theta)[1].any()


@cases
def test_sampling_everything_is_the_whole_and_a_few_are_normalised_anew(name: str) -> None:
    loss = CASES[name][0]()
    theta = point(loss)
    order = torch.randperm(loss.count, generator=torch.Generator().manual_seed(0))
    value, gradient = gradient_of(loss, theta)
    again = gradient_of(loss.sampled(order), theta)
    assert again[0] == pytest.approx(value, rel=1e-12)
    assert close(again[1], gradient)
    rows = torch.tensor([2, 7, 11])  # samples of the first term
    part = sum(loss.part(int(r), int(r) + 1).value(theta) for r in rows)
    first = len(loss.sets[0]) if isinstance(loss, PDELoss) else loss.count
    assert loss.sampled(rows).value(theta) == pytest.approx(part * first / 3, rel=1e-12)


def test_a_sample_of_several_terms_is_normalised_term_by_term() -> None:
    loss = pde(SoftWave())
    theta = point(loss)
    rows = [0, 1, 30, 31, 32, 37, 44]  # 2 of 30 inside, 3 of 7 at the start, 1 of 5 pairs, 1 of 3 measurements
    scale = dict(zip(rows, [15, 15, 7 / 3, 7 / 3, 7 / 3, 5, 3], strict=True))
    expected = sum(scale[r] * loss.part(r, r + 1).value(theta) for r in rows)
    assert loss.sampled(torch.tensor(rows)).value(theta) == pytest.approx(expected, rel=1e-12)


# Restrictions -------------------------------------------------------------------------------------------------------


def ranges_of(loss: Loss, kind: str) -> list[slice]:
    depth, parameters = len(loss.layers), loss.parameters
    layers = {"first": [0], "last": [depth - 1], "middle": [depth // 2], "two": [0, depth - 1], "all": [*range(depth)]}
    if kind in layers:
        numbers = sorted(k for i in layers[kind] for k in loss.layers[i])
        return [parameters[k].range for k in numbers]
    return [parameters[1].range, parameters[len(parameters) // 2].range, parameters[-1].range]


@cases
@pytest.mark.parametrize("kind", ["first", "middle", "last", "two", "all", "tensors"])
def test_a_restricted_loss_is_the_whole_one_with_the_rest_frozen(name: str, kind: str) -> None:
    loss = CASES[name][0]()
    ranges = ranges_of(loss, kind)
    restricted = RestrictedLoss(loss, ranges)
    restricted.freeze(point(loss))
    chosen = torch.cat([torch.arange(r.start, r.stop) for r in ranges])
    assert torch.equal(restricted.initial(), point(loss)[chosen])
    for seed in (5, 6):  # the kept prefix serves several points
        full, direction = point(loss), torch.zeros(loss.size, dtype=torch.float64)
        full[chosen] = point(loss, seed)[chosen]
        direction[chosen] = point(loss, seed + 10)[chosen]
        value, gradient = gradient_of(loss, full)
        found, part = gradient_of(restricted, full[chosen])
        assert found == pytest.approx(value, rel=1e-13)
        assert restricted.value(full[chosen]) == pytest.approx(value, rel=1e-13)
        assert float((part - gradient[chosen]).abs().max()) <= 1e-12 * float(gradient.abs().max())
        expected = product_of(loss, full, direction)
        product = product_of(restricted, full[chosen], direction[chosen])
        assert float((product - expected[chosen]).abs().max()) <= 1e-11 * float(expected.abs().max())


@cases
def test_parts_and_samples_of_a_restricted_loss(name: str) -> None:
    loss = CASES[name][0]()
    ranges = ranges_of(loss, "last")
    theta = point(loss)
    whole = RestrictedLoss(loss, ranges)
    parts, sampled = [whole.part(0, 13), whole.part(13, loss.count)], whole.sampled(torch.tensor([1, 4]))
    for r in (whole, *parts, sampled):
        r.freeze(theta)
    x = whole.initial() + 0.1
    value, gradient = gradient_of(whole, x)
    results = [gradient_of(p, x) for p in parts]
    assert results[0][0] + results[1][0] == pytest.approx(value, rel=1e-12)
    assert close(results[0][1] + results[1][1], gradient)
    full = theta.clone()
    full[torch.cat([torch.arange(r.start, r.stop) for r in ranges])] = x
    assert sampled.value(x) == pytest.approx(loss.sampled(torch.tensor([1, 4])).value(full), rel=1e-13)


@pytest.mark.parametrize("name", ["sequential", "burgers", "soft wave", "two fields"])
def test_a_prefix_is_kept_and_goes_on_to_the_same_loss(name: str) -> None:
    loss = CASES[name][0]()
    theta, kept_layers = point(loss), 0
    for first in range(len(loss.layers)):
        kept = loss.prefix(theta, first)
        assert (kept is not None) == loss.keeps(first)
        kept_layers += kept is not None
        assert loss.value(theta, kept) == pytest.approx(loss.value(theta), rel=1e-14)
        active = frozenset(range(first, len(loss.layers)))
        behind = gradient_of(loss, theta, kept=kept, active=active)[1]
        expected = gradient_of(loss, theta)[1]
        for i in active:
            for k in loss.layers[i]:
                r = loss.parameters[k].range
                assert float((behind[r] - expected[r]).abs().max()) <= 1e-13 * float(expected.abs().max())
    assert kept_layers == len(loss.layers) - 1


def test_gradients_of_further_layers_come_along() -> None:
    loss = pde(Burgers(), depth=4)
    restricted = RestrictedLoss(loss, ranges_of(loss, "middle"))
    restricted.freeze(point(loss))
    restricted.also = frozenset([3])
    gradient_of(restricted, restricted.initial())
    expected = gradient_of(loss, point(loss))[1]
    last = [loss.parameters[k].range for k in loss.layers[3]]
    assert close(restricted.take(restricted.beside, last), restricted.take(expected, last), 1e-12)


# Refusals -----------------------------------------------------------------------------------------------------------


def module_with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), layer, nn.Linear(8, 10))


def test_dropout_is_refused_and_accepted_in_evaluation_mode() -> None:
    with pytest.raises(InputError, match="dropout"):
        digits(lambda: module_with(nn.Dropout(0.5)))
    assert digits(lambda: module_with(nn.Dropout(0.5)).eval()).count == 90


def test_a_criterion_of_one_number_is_refused() -> None:
    with pytest.raises(InputError, match="one loss per sample"):
        ModuleLoss(sequential().double(), nn.functional.cross_entropy, DIGITS / 16, LABELS)


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(InputError):
        digits(lambda: module_with(nn.BatchNorm1d(8)))


# Residuals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if isinstance(CASES[n][0](), PDELoss)])
def test_residuals_and_their_jacobian_are_the_dense_ones(name: str) -> None:
    loss = CASES[name][0]()
    theta, v = point(loss), point(loss, 1)
    r = loss.residual(theta)
    assert len(r) == loss.residual_count()
    assert float(r @ r) == pytest.approx(loss.value(theta), rel=1e-12)
    J = torch.autograd.functional.jacobian(lambda p: torch.cat(list(loss.residuals(p))), theta)
    w = torch.randn(len(r), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    product, transposed = loss.jacobian_product(theta, v), torch.zeros(loss.size, dtype=torch.float64)
    loss.jacobian_transpose_product(theta, w, transposed)
    assert close(product, J @ v)
    assert close(transposed, J.T @ w)
    assert float(product @ w) == pytest.approx(float(transposed @ v), rel=1e-10, abs=1e-12)
    assert close(2 * J.T @ r, gradient_of(loss, theta)[1], 1e-11)


def test_where_a_loss_is_not_finite_is_said() -> None:
    class Singular(Burgers):
        def residual(self, u: Any, t: Tensor, x: Tensor) -> Tensor:
            return u.t + torch.where((x > 0.2) & (t > 0.5), float("nan"), 0.0)

    loss = pde(Singular())
    assert math.isnan(loss.value(loss.initial()))
    said = loss.explain(loss.initial())
    assert "residual gives nan at t = " in said
    t, x = (float(part.split(" = ")[1]) for part in said.split(" at ")[1].split(", "))
    assert t > 0.5
    assert x > 0.2
