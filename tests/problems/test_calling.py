"""What functions of a problem are given, what they may give, and in which words the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, Face, PDELoss, Periodic, Points, Term
from ddml.problems.pde import calling
from ddml.problems.pde.accuracy import reference

FUNCTIONS = ("embed", "lift", "factor", "residual", "wall", "measured")
PLACES = np.random.default_rng(0).uniform([0.0, -1.0], [1.0, 1.0], (7, 2))


class Plain(PDE):
    """Every function of its own; ``changed`` has what one of them gives, from what it should."""

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}

    def __init__(self, function: str = "", change: Callable[[Any], Any] = lambda value: value) -> None:
        self.function, self.change = function, change

    def given(self, function: str, value: Any) -> Any:
        return self.change(value) if function == self.function else value

    def embed(self, t: Tensor, x: Tensor) -> Any:
        return self.given("embed", (t, torch.sin(x)))

    def lift(self, t: Tensor, x: Tensor) -> Any:
        return self.given("lift", (x * x,))

    def factor(self, t: Tensor, x: Tensor) -> Any:
        return self.given("factor", (t * x,))

    def residual(self, u: Any, t: Tensor, x: Tensor, k: Any) -> Any:
        return self.given("residual", (u.t - k * u.xx, u * t))

    def wall(self, u: Any, t: Tensor, x: Tensor, k: Any) -> Any:
        return self.given("wall", (1.0 * u,))

    def measured(self, u: Any, t: Tensor, x: Tensor, k: Any, value: Tensor) -> Any:
        return self.given("measured", (u - value,))

    coefficients = {"k": 0.3}

    def terms(self) -> list[Term]:
        return [
            Term(self.residual),
            Term(self.wall, Face(x=1)),
            Term(self.measured, Points(PLACES, value=PLACES[:, 0])),
        ]


def loss_of(problem: PDE, dtype: torch.dtype = torch.float64, compiled: bool = True, points: int = 40) -> PDELoss:
    problem.check()
    network = TanhNetwork(calling.inputs(problem), 5, 2, len(problem.fields)).to(dtype)
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(problem, network, points, dtype, compiled=compiled)


def evaluated(loss: PDELoss) -> tuple[float, Tensor]:
    theta = loss.initial()
    gradient = torch.zeros_like(theta)
    return loss.value_gradient(theta, gradient), gradient


FORMS = {
    "a list": list,
    "columns (N, 1)": lambda parts: tuple(p[:, None] for p in parts),
    "strided columns": lambda parts: [torch.stack([p, p], dim=1)[:, 1:] for p in parts],
    "one tensor": lambda parts: parts[0],
}


@pytest.mark.parametrize(("form", "compiled"), [*((form, True) for form in FORMS), ("columns (N, 1)", False)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_give_tensors_in_any_form(function: str, form: str, compiled: bool) -> None:
    first = {"embed": lambda parts: parts[:1], "residual": lambda parts: parts[:1]}.get(function)
    change = first if form == "one tensor" and first else lambda parts: parts
    expected = loss_of(Plain(function, change), compiled=compiled)
    found = loss_of(Plain(function, FORMS[form]), compiled=compiled)
    assert [s.inputs.shape for s in found.sets] == [s.inputs.shape for s in expected.sets]
    value, gradient = evaluated(found)
    assert value == pytest.approx(evaluated(expected)[0], rel=1e-13)
    torch.testing.assert_close(gradient, evaluated(expected)[1], rtol=1e-11, atol=1e-13)


WRONG = {
    "nothing": (lambda parts: None, r"got None \(is there a return\?\)"),
    "an empty tuple": (lambda parts: (), "got an empty tuple"),
    "a number": (lambda parts: 1.5, "got the float 1.5"),
    "a sum": (lambda parts: parts[0].sum(), r"got \(\) of torch.float64"),
    "too few": (lambda parts: parts[0][:2], r"got \(2,\) of torch.float64"),
    "a row": (lambda parts: parts[0][None], r"got \(1, \d+\) of torch.float64"),
    "a table": (lambda parts: parts[0][:, None] * parts[0], r"got \((\d+), \1\) of torch.float64"),
    "a nested tuple": (lambda parts: (parts,), r"got tuple of 1: tuple of \d"),
    "single precision": (lambda parts: parts[0].float(), r"got \(\d+,\) of torch.float32"),
    "truth": (lambda parts: parts[0] > 0, r"got \(\d+,\) of torch.bool"),
    "integers": (lambda parts: parts[0].long(), r"got \(\d+,\) of torch.int64"),
    "an array": (lambda parts: parts[0].detach().numpy(), r"got \(\d+,\) of float64 \(NumPy\)"),
    "words": (lambda parts: "x", "got str"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_anything_else_is_refused_with_name_shape_and_what_came(function: str, what: str) -> None:
    change, got = WRONG[what]
    name = "term " if function in ("residual", "wall", "measured") else "Plain."
    with pytest.raises(InputError, match=rf"^{name}{function} must give .*\(\d+,\) of torch.float64.*{got}"):
        loss_of(Plain(function, change))


@pytest.mark.parametrize("function", ["lift", "factor"])
def test_two_tensors_for_one_field_are_refused(function: str) -> None:
    with pytest.raises(InputError, match=f"Plain.{function} must give .* one for all fields.*; got tuple of 2"):
        loss_of(Plain(function, lambda parts: parts * 2))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_double_precision_in_a_run_of_single_precision_is_rounded(function: str) -> None:
    expected = evaluated(loss_of(Plain(), torch.float32))
    found = evaluated(loss_of(Plain(function, lambda parts: [p.double() for p in parts]), torch.float32))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("function", ["embed", "lift", "factor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_with_the_point(function: str, bad: float) -> None:
    def change(parts: Any) -> Any:
        return [torch.where(torch.arange(len(p)) == 5, bad, p) for p in parts]

    with pytest.raises(InputError, match=rf"Plain.{function} is not finite at t = 0.1375, x = -0.25"):
        loss_of(Plain(function, change))


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ({"residual": lambda self, u, x, t: u.t}, r"term .* takes \(u, x, t\), but it is given \(u, t, x\)"),
        ({"lift": lambda self, x, t: x}, r"Other.lift takes \(x, t\), but it is given \(t, x\)"),
        ({"factor": lambda self, t: t}, r"Other.factor takes \(t\), but it is given \(t, x\)"),
        ({"embed": lambda self, t, x, y: t}, r"Other.embed takes \(t, x, y\), but it is given \(t, x\)"),
        ({"residual": lambda self, t, u, x: u.t}, r"term .* takes \(t, u, x\), but it is given \(u, t, x\)"),
        ({"residual": lambda self, u, t, x, k: u.t}, r"term .* takes \(u, t, x, k\), but it is given \(u, t, x\)"),
        ({"lift": lambda self, t, x: 1 / 0}, "lift.* raised ZeroDivisionError"),
        ({"residual": lambda self, u, t, x: u.y}, r"term .*u\.y: no such derivative"),
        ({"residual": lambda self, u, t, x: u.value.detach()}, "term .* depends on no field and no coefficient"),
        ({"residual": lambda self, u, t, x: t * x}, "term .* depends on no field and no coefficient"),
        (
            {"residual": lambda self, u, t, x: torch.autograd.grad(u.value.sum(), x)[0]},
            "term .* differentiates by autograd: derivatives of fields are u.t",
        ),
        (
            {"residual": lambda self, u, t, x: torch.autograd.grad(u.value.sum(), x.requires_grad_())[0]},
            "term .* differentiates by autograd: derivatives of fields are u.t",
        ),
        ({"terms": lambda self: None}, "Other.terms must return a list of Term; got NoneType"),
        ({"terms": lambda self: Term(self.residual)}, "Other.terms must return a list of Term; got Term"),
        ({"fields": "uv"}, r"Other.fields must be a tuple of names, as in \('u',\); got 'uv'"),
        ({"fields": None}, "Other.fields must be a tuple of names"),
        ({"fields": (1, 2)}, "Other.fields must be a tuple of names"),
        ({"coefficients": ["k"]}, "Other.coefficients must map names to numbers"),
        ({"residual": lambda self, u, t, x: u.t if u else u.x}, "term .* u is not true or false"),
        ({"residual": lambda self, u, t, x: exit(3)}, "term .* raised SystemExit: 3"),
        ({"fields": ("u", "u")}, "Other.fields must be different"),
        ({"coefficients": {"k": float("nan")}}, r"Other.coefficients\['k'\] must be a number, finite"),
        ({"domain": {"t": ("0", "1")}}, r"Other.domain\['t'\] must be \(low, high\)"),
        ({"domain": {0: (0, 1)}}, "a coordinate is one letter"),
    ],
)
def test_arguments_and_declarations_are_refused_by_name(functions: dict[str, Any], expected: str) -> None:
    stated = {"domain": {"t": (0, 1), "x": (0, 1)}, "residual": lambda self, u, t, x: u.t, **functions}
    with pytest.raises(InputError, match=expected) as refused:
        loss_of(type("Other", (PDE,), stated)())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "noise", [lambda x: torch.randn_like(x), lambda x: torch.as_tensor(np.random.default_rng().uniform(size=len(x)))]
)
def test_chance_in_a_residual_is_noted(noise: Callable[[Tensor], Tensor]) -> None:
    loss = loss_of(Plain("residual", lambda parts: [p + noise(p) for p in parts]))
    assert loss.notes == ["term residual gives other values when it is called again: chance, or a state?"]
    assert loss_of(Plain("residual", lambda parts: [p * torch.nan for p in parts])).notes == []


def test_fields_are_compared_by_their_values() -> None:
    def written(residual: Callable[..., Any]) -> tuple[float, Tensor]:
        stated = {"domain": {"t": (0, 1), "x": (0, 1)}, "residual": residual}
        return evaluated(loss_of(type("Compared", (PDE,), stated)()))

    value, gradient = written(lambda self, u, t, x: abs(u) * (u > 0) + u.t * (u >= x) - (u < t) * u.x + (u <= 0.1) * u)
    expected = written(
        lambda self, u, t, x: (
            u.value.abs() * (u.value > 0) + u.t * (u.value >= x) - (u.value < t) * u.x + (u.value <= 0.1) * u.value
        )
    )
    assert value == pytest.approx(expected[0], rel=1e-13)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-11, atol=1e-13)


class Lambdas(PDE):
    """Arguments of other names than the domain's, defaults and stars are a user's own affair."""

    domain = {"t": (0, 1), "x": (0, 1)}

    def terms(self) -> list[Term]:
        return [Term(lambda w, *p: w.t), Term(lambda u, a, b, nu=0.1: u.t - nu * u.xx)]


def test_other_names_of_arguments_are_taken() -> None:
    assert loss_of(Lambdas()).count == 80


class Wave(PDE):
    """A system, written with complex numbers or without."""

    domain = {"x": (0.0, 1.0)}
    fields = ("a", "b")

    def __init__(self, form: str) -> None:
        self.form = form

    def residual(self, a: Any, b: Any, x: Tensor) -> Any:
        real, imaginary = a.xx + 4 * a * x, b.xx + 4 * b * x
        return {
            "real": (real, imaginary),
            "complex": torch.complex(real, imaginary),
            "a product": (real + 1j * imaginary,),
            "a column": [(1j * (imaginary * -1j * 1j + real * -1j))[:, None]],
        }[self.form]


@pytest.mark.parametrize("form", ["complex", "a product", "a column"])
def test_a_complex_residual_is_its_real_and_imaginary_part(form: str) -> None:
    expected, found = loss_of(Wave("real")), loss_of(Wave(form))
    assert found.in_torch == {0: "complex numbers"}
    value, gradient = evaluated(found)
    assert value == pytest.approx(evaluated(expected)[0], rel=1e-13)
    torch.testing.assert_close(gradient, evaluated(expected)[1], rtol=1e-11, atol=1e-13)
    assert found.residual(found.initial()).shape == expected.residual(expected.initial()).shape
    torch.testing.assert_close(
        found.jacobian(found.initial()).abs().sum(), expected.jacobian(found.initial()).abs().sum()
    )


class Writes(Plain):
    """A residual that writes wherever it can."""

    compiled = False

    def residual(self, u: Any, t: Tensor, x: Tensor, k: Any) -> Any:
        result = u.t - k * u.xx, u * t
        k.data *= 2
        t.numpy()[:] = 7
        x.data.zero_()
        return result

    def measured(self, u: Any, t: Tensor, x: Tensor, k: Any, value: Tensor) -> Any:
        result = u - value
        value.data += 1
        return (result,)


def test_what_residuals_write_reaches_nothing() -> None:
    loss, expected = loss_of(Writes()), loss_of(Plain())
    theta, gradient = loss.initial(), torch.zeros(loss.size, dtype=torch.float64)
    before = theta.clone()
    for _ in range(3):
        assert loss.value_gradient(theta, gradient) == pytest.approx(evaluated(expected)[0], rel=1e-12)
        assert loss.value(theta) == pytest.approx(expected.value(theta), rel=1e-12)
        assert torch.allclose(loss.residual(theta), expected.residual(theta), rtol=1e-12)
        assert torch.equal(theta, before)


def test_points_do_not_change_with_the_arrays_that_they_were_made_of() -> None:
    places, values = np.full((3, 1), 0.5), np.arange(3.0)
    points = Points(places, value=values)
    places[:], values[:] = 9.0, 9.0
    np.testing.assert_array_equal(points.coordinates, np.full((3, 1), 0.5))
    np.testing.assert_array_equal(points.data["value"], np.arange(3.0))


def test_a_derivative_that_was_not_asked_for_at_the_start_is_refused_by_name() -> None:
    class Later(Wave):
        compiled, calls = False, 0

        def residual(self, a: Any, b: Any, x: Tensor) -> Any:
            self.calls += 1
            return a.x + (b.xxx if self.calls > 3 else b.x)

    loss = loss_of(Later("real"))
    with pytest.raises(InputError, match="term residual: asks for a derivative xxx now and did not at the start"):
        for _ in range(4):
            loss.value(loss.initial())


@pytest.mark.parametrize(
    ("embed", "width"),
    [
        (lambda x: 2 * x - 1, 1),
        (lambda x: [x], 1),
        (lambda x: (torch.cos(x), torch.sin(x), x[:, None]), 3),
        (lambda x: tuple(x**k for k in range(1, 8)), 7),
    ],
)
def test_the_inputs_of_the_network_are_those_that_embed_gives(embed: Callable[[Tensor], Any], width: int) -> None:
    class Embedded(PDE):
        domain = {"x": (0, 1)}

        def embed(self, x: Tensor) -> Any:
            return embed(x)

        def residual(self, u: Any, x: Tensor) -> Any:
            return u.xx + u

    problem = Embedded()
    assert calling.inputs(problem) == width
    compiled, plain = loss_of(problem), loss_of(problem, compiled=False)
    assert evaluated(compiled)[0] == pytest.approx(evaluated(plain)[0], rel=1e-12)
    assert compiled.fields(compiled.initial(), np.array([[0.3], [0.6]])).shape == (2, 1)
    with pytest.raises(InputError, match=rf"the network fails on inputs \(3, {width}\)"):
        PDELoss(problem, TanhNetwork(width + 1, 5, 2, 1), 40)


@pytest.mark.parametrize("outputs", [2, 3])
def test_a_network_of_other_outputs_is_refused(outputs: int) -> None:
    for network in (
        TanhNetwork(2, 5, 2, outputs),
        nn.Linear(2, outputs),
        nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)),
    ):
        with pytest.raises(InputError, match=r"the network must give \(3, 1\), a column for each field"):
            PDELoss(Plain(), network, 40)
    with pytest.raises(InputError, match=r"the network must give \(3, 1\)"):
        loss_of(Plain()).of_module(nn.Linear(2, outputs))


class Pairs(PDE):
    domain = {"t": (0, 1), "x": (0, 2)}

    def terms(self) -> list[Term]:
        return [Term(lambda u, t, x: (u - u.opposite)[:, None], Periodic("x", 20)), Term(lambda u, t, x: [u.t])]


def test_pairs_may_give_columns_too() -> None:
    assert [len(s) for s in loss_of(Pairs()).sets] == [20, 40]


@pytest.mark.parametrize(
    "function",
    [
        lambda t, x: [t * x],
        lambda t, x: (t * x)[:, None],
        lambda t, x: (t.numpy() * x.numpy())[:, None],
        lambda t, x: t.mul_(x),
        lambda t, x: (np.multiply(t.numpy(), x.numpy(), out=x.numpy()), x.neg_())[0] * -1,
    ],
)
def test_exact_may_give_what_the_others_may(function: Callable[[Tensor, Tensor], Any]) -> None:
    class Known(Pairs):
        def exact(self, t: Tensor, x: Tensor) -> Any:
            return function(t, x)

    points, values = reference(Known(), 50)
    assert values is not None
    np.testing.assert_allclose(values[:, 0], points[:, 0] * points[:, 1], rtol=1e-14)
