"""Residuals that the kernels run, against torch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddml.data.sequences import hammersley
from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, PROBLEMS, Interior, PDELoss, Points, Term
from ddml.problems.pde.program import NotElementwise, Program
from ddml.problems.pde.tracing import rows_to_trace

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
    return compiled, PDELoss(problem, compiled.network, points, dtype, compiled=False)


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


def jump(t: Any) -> Any:
    """0.1, and 2 from t = 1/2 on, in numpy."""
    return np.where(np.asarray(t) > 0.5, 2.0, 0.1)


def looked_up(t: Tensor) -> Tensor:
    """The same from a table of torch."""
    return TABLE[torch.bucketize(t.contiguous(), TABLE_AT)]


TABLE_AT, TABLE = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.1, 2.0], dtype=torch.float64)
KEPT = torch.linspace(0, 1, 2000, dtype=torch.float64)


def branch(t: Tensor) -> float:
    return 2.0 if t.max() > 0.5 else 0.1


def in_a_list(t: Tensor) -> Tensor:
    return torch.tensor([2.0 if v > 0.5 else 0.1 for v in t.tolist()], dtype=torch.float64)


# coefficients that torch cannot differentiate or trace, and why
FOREIGN = {
    "numpy": (lambda t: torch.from_numpy(np.where(t.numpy() > 0.5, 2.0, 0.1)), "values read by numpy"),
    "a numpy function": (lambda t: torch.as_tensor(jump(t)), "values read by __array__"),
    "interpolation": (
        lambda t: torch.as_tensor(np.interp(t.numpy(), [0.0, 0.4, 0.6, 1.0], [0.1, 0.1, 2.0, 2.0])),
        "values read by numpy",
    ),
    "a list": (in_a_list, "values read by tolist"),
    "a table of torch": (looked_up, "a tensor from elsewhere"),
    "a kept tensor": (lambda t: KEPT[: len(t)], "a tensor from elsewhere"),
    "a branch": (branch, "values read by __bool__"),
    "a number of numpy": (lambda t: float(jump(t).mean()), "values read by __array__"),
    "a number of torch": (lambda t: torch.tensor(t.max().item()), "values read by item"),
    "a number as a float": (lambda t: float(t.mean()), "values read by __float__"),
    "detached": (lambda t: torch.from_numpy(t.detach().numpy() * 2), "values read by numpy"),
    "a change in place": (lambda t: t.mul_(2), "a change in place"),
    "a change of an entry": (lambda t: torch.zeros_like(t).index_fill_(0, torch.tensor([0]), 1.0), "a change in place"),
    "different numbers": (lambda t: torch.linspace(0, 1, len(t), dtype=t.dtype), "different numbers from linspace"),
    "the number of points": (lambda t: 1.0 / len(t), "other values than in torch on points that were not traced"),
    "a tensor of it": (
        lambda t: torch.full_like(t, len(t)), "other values than in torch on points that were not traced"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_residual_computes_outside_torch_is_not_frozen(name: str) -> None:
    """Hammersley points stand in the order of t: a coefficient that is frozen has its value near t = 0."""
    coefficient, reason = FOREIGN[name]
    loss = PDELoss(Problem(lambda u, t, x: u.t - coefficient(t) * u.xx), network(), 2000)
    assert loss.programs == {}
    assert loss.in_torch == {0: reason}
    expected = Problem(lambda u, t, x: u.t - coefficient(t) * u.xx)
    expected.compiled = False
    by_torch = PDELoss(expected, network(), 2000)
    assert by_torch.in_torch == {0: "compiled = False"}
    assert_equal_losses(loss, by_torch, 1e-12)


@pytest.mark.parametrize("name", ["numpy", "a numpy function", "a list", "a table of torch"])
def test_a_jump_outside_torch_is_that_of_torch_itself(name: str) -> None:
    """Against the same coefficient in elementwise torch, which the kernels run."""
    loss = PDELoss(Problem(lambda u, t, x: u.t - FOREIGN[name][0](t) * u.xx), network(), 2000)
    compiled = PDELoss(Problem(lambda u, t, x: u.t - (0.1 + 1.9 * (t > 0.5).to(t)) * u.xx), network(), 2000)
    assert list(compiled.programs) == [0]
    assert compiled.in_torch == {}
    assert_equal_losses(compiled, loss, 1e-12)


K0, K1 = torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.3])
NUMBERS = {
    "a number": lambda u, t, x: u.t - 0.3 * u.xx,
    "a number of numpy": lambda u, t, x: u.t - np.float64(0.3) * u.xx + np.sin(0.5) * t,
    "a tensor of no dimension": lambda u, t, x: u.t - K0 * u.xx + K0 * t,
    "a tensor of one number": lambda u, t, x: u.t - K1 * u.xx * torch.tensor([2.0]) + t * K1,
    "a new tensor": lambda u, t, x: u.t - torch.tensor(0.3) * torch.sqrt(K0) * u.xx,
    "a full tensor": lambda u, t, x: u.t - torch.full((len(t),), 0.3) * u.xx,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("points", [1, 7, 137])
def test_numbers_from_elsewhere_are_compiled(name: str, points: int) -> None:
    compiled, plain = both(Problem(NUMBERS[name]), points)
    assert list(compiled.programs) == [0]
    assert_equal_losses(compiled, plain, 1e-12)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("chance", "reason"),
    [
        (torch.rand_like, "random numbers"),
        (lambda t: torch.randn(()), "random numbers"),
        (lambda t: torch.randn(1), "random numbers"),
        (lambda t: RNG.random(), "other values than in torch on points that were not traced"),
    ],
)
def test_random_numbers_stay_in_torch(chance: Callable[[Tensor], Any], reason: str) -> None:
    loss = PDELoss(Problem(lambda u, t, x: u.t - chance(t)), network(), 100)
    assert loss.in_torch == {0: reason}


def test_one_point_is_no_constant() -> None:
    """A tensor for the only point has one number, as a constant has."""
    loss = PDELoss(Problem(lambda u, t, x: u.t - torch.from_numpy(np.sin(t.numpy())) * u.xx), network(), 1)
    assert loss.in_torch == {0: "values read by numpy"}


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 79, 80, 81, 1000, 16384, 65536])
def test_points_of_the_trace_and_of_the_check(count: int) -> None:
    traced, checked = rows_to_trace(count)
    assert len(traced) == 16
    assert len(checked) == (64 if count >= 80 else count)
    assert ((traced >= 0) & (traced < count)).all()
    assert ((checked >= 0) & (checked < count)).all()
    assert len(np.unique(checked)) == len(checked)
    if count >= 80:
        assert not np.isin(traced, checked).any()
        points = hammersley(count, [(0.0, 1.0), (0.0, 1.0)])[checked]
        for coordinate in points.T:  # no quarter of either coordinate is left out
            assert np.histogram(coordinate, 4, (0, 1))[0].min() >= 6


def test_arguments_changed_in_place_are_those_of_every_evaluation() -> None:
    """x -= 0.5 means x - 0.5, in every evaluation."""

    def shifts(u: Any, t: Tensor, x: Tensor, value: Tensor) -> Tensor:
        x -= 0.5
        value *= 2.0
        t.numpy()[:] += 1.0
        return u.x - torch.cos(math.pi * x) - value * t

    def means(u: Any, t: Tensor, x: Tensor, value: Tensor) -> Tensor:
        return u.x - torch.cos(math.pi * (x - 0.5)) - 2 * value * (t + 1)

    class WithData(Problem):
        def terms(self) -> list[Term]:
            places = np.random.default_rng(0).uniform(0, 1, (300, 2))
            return [Term(self.function, Points(places, value=places[:, 0]))]

    loss, expected = PDELoss(WithData(shifts), network(), 10), PDELoss(WithData(means), network(), 10)
    assert loss.in_torch == {0: "a change in place"}
    assert expected.in_torch == {}
    for _ in range(3):
        assert_equal_losses(loss, expected, 1e-12)
    theta = loss.initial()
    assert torch.allclose(loss.residual(theta), expected.residual(theta), rtol=1e-12)
    assert torch.equal(loss.sets[0].coordinates, expected.sets[0].coordinates)


@pytest.mark.parametrize("change", ["field", "coefficient"])
def test_fields_and_coefficients_changed_in_place_are_refused(change: str) -> None:
    class Changed(Inverse):
        def system(self, u: Any, v: Any, t: Tensor, x: Tensor, nu: Tensor, kappa: Tensor) -> Tensor:
            changed = u.xx if change == "field" else nu
            changed *= 2.0
            return u.t - nu * u.xx

    with pytest.raises(InputError, match="term system changes a field, a derivative or a coefficient in place"):
        PDELoss(Changed(), network(2), 50)


def looks_at_values(u: Any, t: Tensor, x: Tensor) -> Tensor:
    return u.t if float(u.value.detach()[0]) > 1e9 else u.x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (looks_at_values, "values read by __float__"),
        (lambda u, t, x: u.t - u.value.mean(), "operation mean"),
        (lambda u, t, x: u.t * torch.linspace(0, 1, len(t)), "different numbers from linspace"),
        (lambda u, t, x: torch.stack((u.x, u.t)).sum(0), "operation sum"),
        (lambda u, t, x: torch.clamp(u.x, min=u.t), "operation clamp"),
    ],
)
def test_what_is_not_elementwise_stays_in_torch(function: Callable[..., Any], reason: str) -> None:
    compiled, plain = both(Problem(function), 10)
    assert compiled.programs == {}
    assert compiled.in_torch == {0: reason}
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
