"""Residuals that the kernels run, against torch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddml.networks.fused import FusedJets
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, PROBLEMS, Interior, PDELoss, Points, Term
from ddml.problems.program import NotElementwise, Program

PARTS = {
    "arithmetic": lambda u, t, x: 2 - u.t + u * u.x / (3 + t) - 0.1 * u.xx + (-u) * x,
    "powers": lambda u, t, x: u**2 + u.x**3 - u**4 + (2 + u) ** 1.5 + u.t**0 + u.x**1,
    "functions": lambda u, t, x: torch.sin(u) * torch.cos(u.x) + torch.exp(-u) - torch.tanh(u.t) + torch.sinh(u.xx),
    "more functions": lambda u, t, x: torch.log(3 + u) + torch.sqrt(1 + u * u) + torch.cosh(u) + torch.abs(u.x),
    "choices": lambda u, t, x: torch.where(x > 0, u.x, u.t) + (t > 0.5) * u + torch.sign(u) * u.xx + torch.relu(u.x),
    "of points": lambda u, t, x: u.xx + torch.sin(math.pi * x) * torch.exp(-t) * u - torch.tensor(0.5) * x.abs(),
    "reciprocal": lambda u, t, x: 1 / (2 + u**2) - u.t.reciprocal() * 1e-3 + torch.square(u),
    "lists of points": lambda u, t, x: u.t - torch.stack((t, x)).square().sum(0) * u + torch.stack([x, x * t])[1],
    "a constant": lambda u, t, x: u.t + torch.ones_like(x) - torch.full_like(t, 0.25),
}


class Problem(PDE):
    """Hard conditions and a residual to be set."""

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def lift(self, t: Tensor, x: Tensor) -> Tensor:
        return x * torch.cos(t)

    def factor(self, t: Tensor, x: Tensor) -> Tensor:
        return t * (1 - x**2)

    def residual(self, u: Any, t: Tensor, x: Tensor) -> Any:
        return self.function(u, t, x)


class Inverse(PDE):
    """Two fields, two trainable coefficients, several pieces, data, and a term that the kernels do not know."""

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    fields = ("u", "v")
    coefficients = {"nu": 0.3, "kappa": -0.7}

    def terms(self) -> list[Term]:
        rng = np.random.default_rng(0)
        places = rng.uniform(0, 1, (30, 2))
        return [
            Term(self.system, Interior()),
            Term(self.measured, Points(places, value=np.sin(places[:, 0])), 2.5),
            Term(self.mean, Interior(20), 0.1),
        ]

    def system(self, u: Any, v: Any, t: Tensor, x: Tensor, nu: Tensor, kappa: Tensor) -> Any:
        return u.t - nu * u.xx + v * u.x, v.x + kappa**2 * u - nu

    def measured(self, u: Any, v: Any, t: Tensor, x: Tensor, value: Tensor, nu: Tensor, kappa: Tensor) -> Tensor:
        return u - value

    def mean(self, u: Any, v: Any, t: Tensor, x: Tensor, nu: Tensor, kappa: Tensor) -> Tensor:
        return v - torch.cumsum(t, 0) * 0 - t.sort().values * 0 + torch.erf(u.value) * 0.1


def network(outputs: int = 1, residual: bool = False) -> TanhNetwork:
    made = TanhNetwork(2, 9, 3, outputs, residual, residual)
    made.reset_parameters(torch.Generator().manual_seed(1))
    return made


def both(problem: PDE, points: int = 137, dtype: torch.dtype = torch.float64, **kind: Any) -> tuple[Any, Any]:
    """The loss as it comes, and with all terms in torch."""
    compiled = PDELoss(problem, network(len(problem.fields), **kind), points, dtype)
    plain = compiled._with(compiled.sets)
    plain.programs = {}
    plain.evaluator = FusedJets(plain.network, plain.offsets, plain.indices)
    return compiled, plain


def assert_equal_losses(compiled: Any, plain: Any, tolerance: float, **arguments: Any) -> None:
    theta = compiled.initial() + 0.1 * torch.cos(torch.arange(compiled.size, dtype=compiled.dtype))
    values, gradients = [], []
    for loss in (compiled, plain):
        gradients.append(torch.zeros_like(theta))
        kept = loss.prefix(theta, arguments["first"]) if arguments else None
        active = frozenset([arguments["first"]]) if arguments else None
        values.append(loss.value_gradient(theta, gradients[-1], kept, active))
        assert loss.value(theta, kept) == pytest.approx(values[-1], rel=1e-12 if tolerance < 1e-9 else 1e-5)
    assert values[0] == pytest.approx(values[1], rel=tolerance)
    assert float((gradients[0] - gradients[1]).abs().max()) <= tolerance * float(gradients[1].abs().max())


@pytest.mark.parametrize("name", PARTS)
def test_compiled_residuals_are_those_of_torch(name: str) -> None:
    compiled, plain = both(Problem(PARTS[name]))
    assert list(compiled.programs) == [0]
    assert_equal_losses(compiled, plain, 1e-12)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("residual", [False, True])
def test_the_built_in_problems_are_compiled(problem: str, residual: bool) -> None:
    compiled, plain = both(PROBLEMS[problem](), residual=residual)
    assert list(compiled.programs) == [0]
    assert_equal_losses(compiled, plain, 1e-12)
    for first in (1, 2):
        assert_equal_losses(compiled, plain, 1e-12, first=first)


def test_in_single_precision() -> None:
    compiled, plain = both(PROBLEMS["burgers"](), dtype=torch.float32)
    assert list(compiled.programs) == [0]
    assert_equal_losses(compiled, plain, 1e-4)


def test_systems_coefficients_and_data_are_compiled_and_other_terms_stay_in_torch() -> None:
    compiled, plain = both(Inverse())
    assert sorted(compiled.programs) == [0, 1]
    assert_equal_losses(compiled, plain, 1e-12)
    assert_equal_losses(compiled.part(20, 150), plain.part(20, 150), 1e-12)
    rows = torch.arange(0, compiled.count, 3)
    assert_equal_losses(compiled.sampled(rows), plain.sampled(rows), 1e-12)


def looks_at_values(u: Any, t: Tensor, x: Tensor) -> Tensor:
    return u.t if float(u.value[0]) > 1e9 else u.x


@pytest.mark.parametrize(
    "function",
    [
        looks_at_values,
        lambda u, t, x: u.t - u.value.mean(),
        lambda u, t, x: u.t * torch.linspace(0, 1, len(t)),
        lambda u, t, x: torch.stack((u.x, u.t)).sum(0),
        lambda u, t, x: torch.clamp(u.x, min=u.t),
    ],
)
def test_what_is_not_elementwise_stays_in_torch(function: Callable[..., Any]) -> None:
    compiled, plain = both(Problem(function), 10)
    assert compiled.programs == {}
    assert_equal_losses(compiled, plain, 1e-12)


def test_a_problem_can_keep_its_residuals_in_torch() -> None:
    problem = Problem(PARTS["arithmetic"])
    problem.compiled = False
    assert PDELoss(problem, network(), 10).programs == {}


def test_a_residual_without_fields_is_no_program() -> None:
    with pytest.raises(NotElementwise, match="does not depend on the fields"):
        Program(lambda fixed, leaves, scalars: [fixed[0]], [torch.rand(3)], [(0, 0)], 0)


def test_nan_in_a_residual_is_nan_in_the_loss() -> None:
    compiled, _ = both(Problem(lambda u, t, x: torch.log(u - 5)))
    theta = compiled.initial()
    assert math.isnan(compiled.value(theta))
    assert math.isnan(compiled.value_gradient(theta, torch.zeros_like(theta)))
