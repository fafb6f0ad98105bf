"""Networks of PDEs with frozen, tied and unused parameters."""

import math
from collections.abc import Callable

import pytest
import torch
from hand_modules import (
    assert_derivatives,
    numbers,
    pieces,
)
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.restricted import RestrictedLoss
from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss


class Tied(nn.Module):
    """Frozen first, then tied, a layer under two names, one that is not used, and of two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.nothing, self.last = nn.Linear(2, 2), nn.Linear(4, 1)
        self.first.requires_grad_(False)
        self.third.weight = self.second.weight
        self.last.double()
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.third(x)))


def burgers_by_hand(loss: PDELoss, field: Callable[[Tensor], Tensor]) -> Tensor:
    """The residual of Burgers' equation over the root of the number of points."""
    problem = loss.problem
    points = problem.points(problem.terms()[0], 11)[0][:, 0]
    t, x = (torch.tensor(column, requires_grad=True) for column in points.T)

    def d(values: Tensor, by: Tensor) -> Tensor:
        return torch.autograd.grad(values.sum(), by, create_graph=True)[0]

    u = problem.lift(t, x) + problem.factor(t, x) * field(torch.stack(problem.embed(t, x), dim=1))[:, 0]
    u_x = d(u, x)
    return (d(u, t) + u * u_x - 0.01 / math.pi * d(u_x, x)) / 11**0.5


def test_networks_of_pdes_have_frozen_tied_and_unused_parameters_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Tied()
    loss = PDELoss(Burgers(), module, 11)
    W, w = module.first.weight.clone(), module.first.bias.clone()
    assert [p.name for p in loss.parameters][:3] == ["second.weight", "second.bias", "third.bias"]

    def residual(theta: Tensor) -> Tensor:
        A, a, b, _, _, V, d = pieces(theta, (4, 4), (4,), (4,), (2, 2), (2,), (1, 4), (1,))
        return burgers_by_hand(
            loss, lambda x: torch.tanh(torch.tanh(torch.tanh(x @ W.T + w) @ A.T + a) @ A.T + b) @ V.T + d
        )

    theta = numbers(loss.size, 1)
    J = torch.autograd.functional.jacobian(residual, theta)
    assert_derivatives(loss, lambda y: (residual(y) ** 2).sum(), 2 * J.T @ J, theta)
    assert torch.allclose(loss.jacobian(theta), J, rtol=1e-10, atol=1e-13)
    for layer in range(len(loss.layers)):
        ranges = [loss.parameters[k].range for k in loss.layers[layer]]
        chosen = torch.cat([torch.arange(r.start, r.stop) for r in ranges])
        restricted = RestrictedLoss(loss, ranges)
        restricted.freeze(theta)

        def inside(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            return (residual(theta.index_put((chosen,), x)) ** 2).sum()

        assert_derivatives(restricted, inside, 2 * J[:, chosen].T @ J[:, chosen], theta[chosen])
    assert torch.equal(module.first.weight, W)
    assert torch.equal(module.first.bias, w)


@pytest.mark.parametrize("freeze", ["maps.0.weight", "maps.1.bias", "slopes.0", "maps.3.weight"])
def test_a_tanh_network_may_be_frozen_in_parts(freeze: str) -> None:
    """Its derivatives are those entries of the whole network's that are left."""

    def make() -> TanhNetwork:
        network = TanhNetwork(2, 4, 2, 1, residual=True, adaptive=True).double()
        network.reset_parameters(torch.Generator().manual_seed(3))
        return network

    whole, network = PDELoss(Burgers(), make(), 11), make()
    network.get_parameter(freeze).requires_grad_(False)
    loss = PDELoss(Burgers(), network, 11)
    chosen = torch.cat([torch.arange(p.range.start, p.range.stop) for p in whole.parameters if p.name != freeze])
    theta = whole.initial().index_put((chosen,), numbers(len(chosen), 4))
    v = torch.zeros(whole.size).double().index_put((chosen,), numbers(len(chosen), 5))
    assert loss.value(theta[chosen]) == pytest.approx(whole.value(theta), rel=1e-12)
    for method, arguments in (("value_gradient", []), ("hessian_product", [v]), ("gauss_newton_product", [v])):
        expected, found = torch.zeros(whole.size).double(), torch.zeros(loss.size).double()
        getattr(whole, method)(theta, *arguments, expected)
        getattr(loss, method)(theta[chosen], *(a[chosen] for a in arguments), found)
        assert torch.allclose(found, expected[chosen], rtol=1e-9, atol=1e-11)


def test_networks_of_pdes_that_cannot_be_trained_are_refused_in_words() -> None:
    for network, words in (
        (nn.Linear(2, 1).requires_grad_(False), "no parameters to train: all have requires_grad False"),
        (nn.Linear(3, 1), r"fails on inputs \(3, 2\) of torch.float64: RuntimeError: mat1 and mat2"),
    ):
        with pytest.raises(InputError, match=words):
            PDELoss(Burgers(), network, 11)
