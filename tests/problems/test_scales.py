"""Scales: derivatives stay those of the user's coordinates, and what is found for problems in other units."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, PROBLEMS, Face, PDELoss, Term
from ddml.problems.pde import magnitudes
from ddml.problems.pde.scales import Scales, of_order_one, parsed

sys.path.insert(0, str(Path(__file__).parents[1] / "drivers"))
import scaled_problems

SETTINGS = SimpleNamespace(map_inputs="auto", balance_terms="auto")


def network_of(problem: PDE) -> TanhNetwork:
    network = TanhNetwork(len(problem.domain), 6, 2, len(problem.fields)).double()
    network.reset_parameters(torch.Generator().manual_seed(1))
    return network


def found(problem: PDE, **settings: str) -> tuple[Scales, list[magnitudes.Magnitude], list[str]]:
    chosen = SimpleNamespace(**{**vars(SETTINGS), **settings})
    return magnitudes.find(problem, network_of(problem), torch.float64, torch.device("cpu"), chosen)


class Mixed(PDE):
    """Second derivatives, a mixed one, two fields, a face, and lengths that are not of order 1."""

    domain = {"t": (100.0, 400.0), "x": (0.0, 0.02)}
    fields = ("u", "v")

    def factor(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (t - 100) * x, 1 + x**2

    def lift(self, t: Tensor, x: Tensor) -> Tensor:
        return 3 + torch.sin(t / 100)

    def residual(self, u: Any, v: Any, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return 100 * u.t - 1e-4 * u.xx + v, u.tx * v + v.tt * 1e4 - x

    def terms(self) -> list[Term]:
        return [Term(self.residual), Term(lambda u, v, t, x: u * v.x, Face(x=0.02))]


def dense(loss: PDELoss, scales: Scales, theta: Tensor) -> Tensor:
    """The loss by nothing but autograd of the network's formula."""
    problem, total = loss.problem, torch.zeros((), dtype=torch.float64)
    views = {name: theta[begin : begin + shape.numel()].view(shape) for name, (begin, shape) in loss.offsets.items()}
    ends = [scales.inputs.get(c, (-1.0, 1.0)) for c in problem.domain]
    for term, points in zip(problem.terms(), loss.sets, strict=True):
        t, x = (c.clone().requires_grad_() for c in points.coordinates)
        inputs = [(c - (a + b) / 2) * 2 / (b - a) for c, (a, b) in zip((t, x), ends, strict=True)]
        output = torch.func.functional_call(loss.network, views, (torch.stack(inputs, dim=1),))
        sizes = [scales.fields.get(f, 1.0) for f in problem.fields]

        def by(y: Tensor, c: Tensor) -> Tensor:
            return torch.autograd.grad(y.sum(), c, create_graph=True)[0]

        u, v = (
            problem.lift(t, x) + s * factor * output[:, f]
            for f, (s, factor) in enumerate(zip(sizes, problem.factor(t, x), strict=True))
        )
        fields = [Values(y, t=by(y, t), x=by(y, x), xx=by(by(y, x), x), tx=by(by(y, t), x), tt=by(by(y, t), t))
                  for y in (u, v)]  # fmt: skip
        pieces = term.residual(*fields, t, x)
        pieces = pieces if isinstance(pieces, tuple) else (pieces,)
        weight = term.weight * scales.terms.get(points.term, 1.0)
        total = total + weight * sum((p**2).mean() for p in pieces)
    return total


class Values:
    """A field's values, which stand for it in sums and products, and its derivatives."""

    def __init__(self, values: Tensor, **derivatives: Tensor) -> None:
        self.values = values
        vars(self).update(derivatives)

    def __radd__(self, other: Tensor) -> Tensor:
        return other + self.values

    def __rmul__(self, other: Tensor) -> Tensor:
        return other * self.values

    def __mul__(self, other: Tensor) -> Tensor:
        return self.values * other


@pytest.mark.parametrize("compiled", [True, False])
def test_derivatives_are_those_of_the_users_coordinates(compiled: bool) -> None:
    problem = Mixed()
    scales = Scales({"t": (100.0, 400.0), "x": (0.0, 0.02)}, {"u": 0.01, "v": 3.0}, {1: 1e-3})
    loss = PDELoss(problem, network_of(problem), 60, compiled=compiled, scales=scales)
    theta = loss.initial().requires_grad_()
    expected = dense(loss, scales, theta)
    (slope,) = torch.autograd.grad(expected, theta)
    gradient = torch.zeros_like(slope)
    value = loss.value_gradient(theta.detach(), gradient)
    assert value == pytest.approx(float(expected.detach()), rel=1e-11)
    assert torch.allclose(gradient, slope, rtol=1e-9, atol=1e-12 * float(slope.abs().max()))
    assert loss.value(theta.detach()) == pytest.approx(value, rel=1e-13)


def test_fields_are_scaled_where_they_are_looked_at() -> None:
    problem = scaled_problems.Bar()
    network = network_of(problem)
    theta = PDELoss(problem, network, 20).initial()
    points = np.linspace(0, 2, 7)[:, None]
    plain = PDELoss(problem, network, 20).fields(theta, points)
    scaled = PDELoss(problem, network, 20, scales=Scales(fields={"u": 1e-3})).fields(theta, points)
    assert scaled == pytest.approx(1e-3 * plain, rel=1e-14)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0, 1), True), ((-1, 1), True), ((0, 2), True), ((-3.2, 3.2), True), ((0, 3), False), ((0, 3600), False),
        ((0, 0.1), False), ((2, 3), False), ((-40, 40), False), ((-1e-9, 1e-9), False), ((1e9, 1e9 + 1), False),
    ],
)  # fmt: skip
def test_which_coordinates_are_of_order_one(interval: tuple[float, float], expected: bool) -> None:
    assert of_order_one(*interval) is expected


@pytest.mark.parametrize("name", PROBLEMS)
def test_our_problems_stay_as_they_are(name: str) -> None:
    scales, sizes, notes = found(PROBLEMS[name]())
    assert str(scales) == "none"
    assert notes == []
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "inputs", "fields", "weights"),
    [
        ("Rod", "tx", {}, {}),
        ("RodOfTerms", "tx", {"u": 1e3}, {0: 1e3, 1: 1e-5, 2: 1e-5, 3: 1e-5}),
        ("People", "t", {"u": 1e8}, {0: 1e-16}),
        ("Bar", "", {"u": 1e-7}, {0: 1e-10}),
        ("Said", "", {"u": 1e-6}, {0: 1e-10}),
        ("Measured", "t", {"u": 1e-4}, {}),
        ("OwnEmbed", "", {}, {}),
        ("Weighed", "tx", {"u": 1e3}, {}),
        ("OnlyMeasured", "", {}, {}),
        ("SmallLift", "", {}, {0: 1e-10}),
    ],
)
def test_what_is_scaled(name: str, inputs: str, fields: dict[str, float], weights: dict[int, float]) -> None:
    problem = getattr(scaled_problems, name)()
    scales, sizes, _ = found(problem)
    assert "".join(scales.inputs) == inputs
    assert set(scales.fields) == set(fields) and set(scales.terms) == set(weights)
    ratios = [scales.fields[f] / s for f, s in fields.items()] + [scales.terms[i] / w for i, w in weights.items()]
    assert all(1 / 300 < ratio < 300 for ratio in ratios)  # as the first network may be
    assert str(parsed(str(scales), problem)) == str(scales)
    if weights:
        assert all(1e-2 < m.loss < 1e2 for m in sizes)


def test_parts_of_a_residual_are_their_shares() -> None:
    """Of a linear residual: the shares and the rest are what it is the sum of."""
    problem = scaled_problems.Rod()
    scales, (size,), _ = found(problem)
    loss = PDELoss(problem, network_of(problem), magnitudes.POINTS, scales=scales)
    assert size.residual == pytest.approx(loss.value(loss.initial()) ** 0.5, rel=1e-12)
    assert set(size.parts) == {"u.t", "u.xx"}
    assert size.rest < 1e-12 * size.residual
    assert abs(size.parts["u.xx"] - size.parts["u.t"]) <= size.residual <= size.parts["u.xx"] + size.parts["u.t"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Unmatched", "in term residual, u.xx is"),
        ("OwnEmbed", "input 0 of the network is from 7.03125 to 3592.97: let embed give -1 to 1"),
        ("Weighed", "term residual is 1e-13 of term start in the loss"),
    ],
)
def test_what_stays_out_of_scale_is_noted(name: str, expected: str) -> None:
    _, _, notes = found(getattr(scaled_problems, name)())
    assert len(notes) == 1
    assert notes[0].startswith(expected)


def test_options_switch_scaling_off_and_on() -> None:
    problem = scaled_problems.RodOfTerms()
    scales, _, notes = found(problem, map_inputs="never", balance_terms="never")
    assert not scales.inputs and not scales.terms
    assert any("-map_inputs auto maps it" in note for note in notes)
    assert set(found(PROBLEMS["burgers"](), map_inputs="always")[0].inputs) == {"t", "x"}
    assert set(found(scaled_problems.Weighed(), balance_terms="always")[0].terms) == {0, 1, 2, 3}
    with pytest.raises(InputError, match="embed says what the network is given"):
        found(scaled_problems.OwnEmbed(), map_inputs="always")


@pytest.mark.parametrize("scale", [{"v": 1.0}, {"u": 0.0}, {"u": -1.0}, {"u": float("inf")}, {"u": "1"}])
def test_sizes_of_fields_that_cannot_be_are_refused(scale: dict[str, Any]) -> None:
    problem = scaled_problems.Bar()
    problem.scale = scale
    with pytest.raises(InputError, match=r"Bar.scale\['[uv]'\] must be of a field, finite and above 0"):
        problem.check()


def test_scales_of_terms_that_there_are_not_are_refused() -> None:
    problem = scaled_problems.Bar()
    with pytest.raises(InputError, match=r"the scales are of terms \[1\], where there are 1 terms"):
        PDELoss(problem, network_of(problem), 20, scales=parsed('{"terms":{"1":2}}', problem))


def test_more_scales_than_an_option_takes_are_refused() -> None:
    class Many(scaled_problems.RodOfTerms):
        def terms(self) -> list[Term]:
            equation, start, *_ = super().terms()
            return [equation, *[start] * 150]

    with pytest.raises(InputError, match="the scales of 151 terms do not fit a run file: give weights"):
        found(Many())
    assert not found(Many(), balance_terms="never")[0].terms


@pytest.mark.parametrize("text", ["all", "{}x", "[1]", '{"fields":{"w":2}}', '{"inputs":{"x":[1,1]}}', '{"sizes":{}}'])
def test_scales_that_are_none_of_the_problem_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="option -scales must be none, or what another run has found"):
        parsed(text, scaled_problems.Bar())
