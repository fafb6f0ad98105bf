"""Jets of networks and their gradients against nested automatic differentiation and finite differences."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddml import kernels
from ddml.jets.build import build_evaluator
from ddml.jets.compiled import CompiledJets
from ddml.jets.evaluator import Index, closure
from ddml.jets.fused import FusedJets
from ddml.jets.nested import NestedJets
from ddml.jets.taylor import TaylorJets, partitions, tanh_jets, tanh_polynomial
from ddml.networks.tanh import TanhNetwork

# inputs, width, depth, outputs, residual, adaptive, derivatives
CASES = [
    (1, 1, 1, 1, False, False, [(0,)]),
    (1, 5, 2, 1, False, True, [(0, 0)]),
    (1, 3, 3, 2, True, False, [(0, 0)]),
    (2, 20, 8, 1, True, True, [(0,), (1, 1)]),
    (2, 20, 4, 1, False, False, [(0, 0), (1, 1)]),
    (2, 7, 5, 3, True, True, [(0, 1)]),
    (2, 64, 1, 1, True, True, [(0, 0), (0, 1), (1, 1)]),
    (2, 64, 2, 2, False, True, [(0,), (1,)]),
    (2, 4, 3, 1, True, False, []),
    (3, 1, 8, 3, True, True, [(0, 1), (1, 2), (2, 2)]),
    (3, 9, 2, 2, False, False, [(0, 0), (1, 1), (2, 2)]),
    (3, 6, 3, 1, True, True, [(0, 2), (1,)]),
    (3, 8, 4, 2, True, True, [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]),
    (2, 128, 2, 1, False, False, [(0,), (1, 1)]),
    (3, 33, 12, 4, True, True, [(0, 0), (1, 1), (2,)]),
]
HIGH = [
    (1, 5, 3, 1, True, True, [(0, 0, 0, 0)]),
    (2, 6, 2, 2, False, True, [(0, 0, 1)]),
    (2, 4, 3, 1, True, False, [(0, 0, 1, 1), (1, 1, 1)]),
    (3, 4, 2, 1, True, True, [(0, 1, 2)]),
]


class Case:
    """A random network with all its parameters away from their initial values, and points."""

    def __init__(self, case: Any, points: int = 11, dtype: torch.dtype = torch.float64) -> None:
        inputs, width, depth, outputs, residual, adaptive, derivatives = case
        generator = torch.Generator().manual_seed(width * 100 + depth)
        self.network = TanhNetwork(inputs, width, depth, outputs, residual, adaptive).double()
        self.network.reset_parameters(generator)
        pieces, self.offsets, begin = [], {}, 0
        for name, p in self.network.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            pieces.append((p.detach().double() + (0.01 if p.dim() == 0 else 0.1) * noise).reshape(-1))
            self.offsets[name] = begin, p.shape
            begin += p.numel()
        self.theta = torch.cat(pieces).to(dtype)
        self.network.to(dtype)
        self.indices = closure(derivatives)
        self.points = torch.randn(points, inputs, generator=generator, dtype=torch.float64).to(dtype)
        shape = len(self.indices), points, outputs
        self.weights = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.inputs = coordinate_jets(self.points, self.indices)

    def evaluate(self, kind: Any) -> tuple[Tensor, Tensor]:
        """Jets and the gradient of their product with the weights."""
        made, gradient = kind(self.network, self.offsets, self.indices), torch.zeros_like(self.theta)
        made.bind(self.theta, gradient)
        jets = made.forward(self.inputs).clone()
        made.backward(self.weights)
        made.finish()
        return jets, gradient

    def independent(self) -> tuple[Tensor, Tensor]:
        """The same, written out with torch.autograd.grad and one forward pass of the torch module."""
        theta = self.theta.clone().requires_grad_()
        parameters = {n: theta[b : b + s.numel()].view(s) for n, (b, s) in self.offsets.items()}
        x = self.points.clone().requires_grad_()
        value = torch.func.functional_call(self.network, parameters, (x,))
        jets = []
        for index in self.indices:
            columns = []
            for column in value.T:
                for coordinate in index:
                    column = torch.autograd.grad(column.sum(), x, create_graph=True)[0][:, coordinate]
                columns.append(column)
            jets.append(torch.stack(columns, dim=1))
        stacked = torch.stack(jets)
        return stacked.detach(), torch.autograd.grad((stacked * self.weights).sum(), theta)[0]


def coordinate_jets(points: Tensor, indices: tuple[Index, ...]) -> Tensor:
    jets = torch.zeros(len(indices), *points.shape, dtype=points.dtype)
    jets[0] = points
    for k, index in enumerate(indices):
        if len(index) == 1:
            jets[k, :, index[0]] = 1
    return jets


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def assert_gradient_of(c: Case, gradient: Tensor, full: Tensor, stages: Sequence[int]) -> None:
    """The gradient is the full one in these stages and zero elsewhere."""
    expected = torch.zeros_like(full)
    for stage in (c.network.stages[i] for i in stages):
        for name in filter(None, (stage.weight, stage.bias, stage.slope)):
            begin, shape = c.offsets[name]
            expected[begin : begin + shape.numel()] = full[begin : begin + shape.numel()]
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets, NestedJets])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_jets_and_gradients_are_those_of_nested_autograd(case: Any, kind: Any) -> None:
    c = Case(case)
    (jets, gradient), (expected, expected_gradient) = c.evaluate(kind), c.independent()
    for k in range(len(c.indices)):
        assert_close(jets[k], expected[k], 1e-12)
    assert_close(gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("kind", [TaylorJets, NestedJets])
@pytest.mark.parametrize("case", HIGH, ids=str)
def test_derivatives_of_order_three_and_four(case: Any, kind: Any) -> None:
    c = Case(case, points=5)
    (jets, gradient), (expected, expected_gradient) = c.evaluate(kind), c.independent()
    for k in range(len(c.indices)):
        assert_close(jets[k], expected[k], 1e-11)
    assert_close(gradient, expected_gradient, 1e-11)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets])
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_single_precision_agrees_with_double(case: Any, kind: Any) -> None:
    c = Case(case, dtype=torch.float32)
    (jets, gradient), (expected, expected_gradient) = c.evaluate(kind), Case(case).independent()
    assert jets.dtype == gradient.dtype == torch.float32
    assert_close(jets.double(), expected, 2e-4)
    assert_close(gradient.double(), expected_gradient, 2e-4)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets])
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_jets_are_limits_of_finite_differences(case: Any, kind: Any) -> None:
    c, h = Case(case, points=4), 1e-4
    jets = c.evaluate(kind)[0]

    def network(shift: Tensor) -> Tensor:
        parameters = {n: c.theta[b : b + s.numel()].view(s) for n, (b, s) in c.offsets.items()}
        return torch.func.functional_call(c.network, parameters, (c.points + shift,)).detach()

    for k, index in enumerate(c.indices):
        total = torch.zeros_like(jets[0])
        for signs in itertools.product([1, -1], repeat=len(index)):
            shift = torch.zeros(c.points.shape[1], dtype=torch.float64)
            for sign, coordinate in zip(signs, index, strict=True):
                shift[coordinate] += sign * h
            total += math.prod(signs) * network(shift)
        assert_close(jets[k], total / (2 * h) ** len(index), 1e-5)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets])
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_gradients_are_limits_of_finite_differences(case: Any, kind: Any) -> None:
    c, h = Case(case), 1e-5
    gradient = c.evaluate(kind)[1]
    direction = torch.randn(c.theta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        made = kind(c.network, c.offsets, c.indices)
        made.bind(c.theta + sign * h * direction)
        ends.append(float((made.forward(c.inputs) * c.weights).sum()))
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float(gradient @ direction), rel=1e-6)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets])
@pytest.mark.parametrize("active", [[0], [2], [1, 3], [4], [5], [0, 5]])
@pytest.mark.parametrize(
    "case", [(2, 6, 4, 2, True, True, [(0,), (0, 1), (1, 1)]), (2, 6, 5, 1, False, True, [(1, 1)])]
)
def test_gradients_of_active_stages_are_those_of_all_stages(case: Any, active: list[int], kind: Any) -> None:
    c = Case(case)
    full = c.evaluate(kind)[1]
    made, gradient = kind(c.network, c.offsets, c.indices), torch.zeros_like(c.theta)
    made.bind(c.theta, gradient, active)
    made.forward(c.inputs)
    made.backward(c.weights)
    made.finish()
    assert_gradient_of(c, gradient, full, active)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_going_on_from_a_prefix_gives_the_same_bits(case: Any, kind: Any) -> None:
    c = Case(case)
    made = kind(c.network, c.offsets, c.indices)
    made.bind(c.theta)
    whole = made.forward(c.inputs).clone()
    for first in range(len(c.network.stages)):
        entering = made.prefix(c.inputs, first)
        made.forward(c.inputs.flip(1))  # a prefix outlives the evaluator's buffers
        assert torch.equal(made.forward(entering, first), whole)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_gradients_behind_a_prefix_are_those_of_the_whole_network(first: int, kind: Any) -> None:
    c = Case((2, 6, 4, 2, True, True, [(0,), (1, 1)]))
    full = c.evaluate(kind)[1]
    made, gradient = kind(c.network, c.offsets, c.indices), torch.zeros_like(c.theta)
    made.bind(c.theta)
    entering = made.prefix(c.inputs, first)
    made.bind(c.theta, gradient, range(first, len(c.network.stages)))
    made.forward(entering, first)
    made.backward(c.weights)
    made.finish()
    assert_gradient_of(c, gradient, full, range(first, len(c.network.stages)))


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets, TaylorJets])
def test_chunks_of_different_sizes_go_through_one_evaluator(kind: Any) -> None:
    c = Case((2, 9, 3, 2, True, True, [(0,), (0, 1), (1, 1)]), points=23)
    jets, gradient = c.evaluate(kind)
    made, pieces, total = kind(c.network, c.offsets, c.indices), [], torch.zeros_like(c.theta)
    made.bind(c.theta, total)
    for a, b in itertools.pairwise([0, 7, 14, 15, 22, 23]):
        pieces.append(made.forward(c.inputs[:, a:b].contiguous()).clone())
        made.backward(c.weights[:, a:b])
    made.finish()
    assert_close(torch.cat(pieces, dim=1), jets, 1e-13)
    assert_close(total, gradient, 1e-12)


@pytest.mark.parametrize("kind", [CompiledJets, FusedJets])
def test_an_evaluator_can_be_bound_again(kind: Any) -> None:
    c = Case((2, 9, 3, 1, True, True, [(1, 1)]))
    made, results = kind(c.network, c.offsets, c.indices), []
    for theta in (c.theta, 2 * c.theta, c.theta):
        gradient = torch.zeros_like(theta)
        made.bind(theta, gradient)
        jets = made.forward(c.inputs).clone()
        made.backward(c.weights)
        made.finish()
        results.append((jets, gradient))
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])
    assert not torch.allclose(results[0][1], results[1][1])


JACOBIANS = [
    *itertools.product(CASES, [CompiledJets, FusedJets, TaylorJets]),
    *itertools.product(CASES[:3] + CASES[5:6] + CASES[8:13], [NestedJets]),  # slow: the small networks
]


@pytest.mark.parametrize(("case", "kind"), JACOBIANS, ids=str)
def test_jacobians_in_rows_and_in_a_direction(case: Any, kind: Any) -> None:
    c = Case(case)
    made = kind(c.network, c.offsets, c.indices)
    made.bind(c.theta)
    made.forward(c.inputs)
    rows = made.rows(c.weights)
    direction = torch.randn(len(c.theta), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tangent = made.tangent(direction, c.inputs)

    def jets(theta: Tensor) -> Tensor:
        return TaylorJets(c.network, c.offsets, c.indices).jets(theta, c.inputs)

    expected, expected_tangent = torch.func.jvp(jets, (c.theta,), (direction,))
    assert_close(made.forward(c.inputs), expected, 1e-12)
    for k in range(len(c.indices)):
        assert_close(tangent[k], expected_tangent[k], 1e-12)
    assert_close(rows, torch.func.jacrev(lambda t: (jets(t) * c.weights).sum((0, 2)))(c.theta), 1e-12)
    assert_close(rows.sum(0), c.evaluate(FusedJets)[1], 1e-12)


@pytest.mark.parametrize("level", kernels.usable())
def test_the_kernels_of_every_instruction_set_agree(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need not agree to the last bit: without fused multiply-add numbers round differently."""
    monkeypatch.setattr(kernels, "usable", lambda: [level])
    kernels.library.cache_clear()
    try:
        for case in CASES[3:]:
            c = Case(case)
            assert repr(CompiledJets(c.network, c.offsets, c.indices)) == f"CompiledJets ({level})"
            for got, expected in zip(c.evaluate(CompiledJets), c.evaluate(FusedJets), strict=True):
                assert_close(got, expected, 1e-12)
    finally:
        kernels.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_compiled_tanh_has_a_small_relative_error(dtype: torch.dtype) -> None:
    """A network of one neuron with weight 1 and linear output 1 is tanh itself."""
    network = TanhNetwork(1, 1, 1, 1).to(dtype)
    offsets = {name: (k, p.shape) for k, (name, p) in enumerate(network.named_parameters())}
    made = CompiledJets(network, offsets, ((),))
    made.bind(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype))
    x = torch.cat((torch.linspace(-25, 25, 100_001, dtype=dtype), torch.logspace(-300, 1, 5000, dtype=dtype)))
    x = torch.cat((x, torch.tensor([0.0, math.inf, -math.inf], dtype=dtype)))
    got = made.forward(x[None, :, None])[0, :, 0]
    expected = torch.tanh(x.double())
    error = (got.double() - expected).abs() / expected.abs().clamp(min=torch.finfo(dtype).tiny)
    assert float(error.max()) < 4 * torch.finfo(dtype).eps
    assert torch.isnan(made.forward(torch.full((1, 3, 1), math.nan, dtype=dtype))).all()


def test_the_fastest_evaluator_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TanhNetwork(1, 2, 1, 1)
    sizes = {n: (0, p.shape) for n, p in network.named_parameters()}
    assert type(build_evaluator(network, sizes, closure([(0, 0)]))) is CompiledJets
    assert type(build_evaluator(network, sizes, closure([(0, 0, 0)]))) is TaylorJets
    assert type(build_evaluator(torch.nn.Linear(1, 1), sizes, closure([(0, 0)]))) is NestedJets
    for kind in (CompiledJets, FusedJets):
        with pytest.raises(ValueError, match="second order"):
            kind(network, sizes, closure([(0, 0, 0)]))
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert type(build_evaluator(network, sizes, closure([(0, 0)]))) is FusedJets
    with pytest.raises(ValueError, match="not built"):
        CompiledJets(network, sizes, closure([(0, 0)]))


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([], [()]),
        ([(1,)], [(), (1,)]),
        ([(1, 0)], [(), (0,), (1,), (0, 1)]),
        ([(0, 0), (1,)], [(), (0,), (1,), (0, 0)]),
        ([(0, 0, 1)], [(), (0,), (1,), (0, 0), (0, 1), (0, 0, 1)]),
    ],
)
def test_closure_lists_all_parts_by_order(indices: list[Index], expected: list[Index]) -> None:
    assert closure(indices) == tuple(expected)


def set_partitions(items: list[int]) -> list[list[list[int]]]:
    """All partitions of a list of places, by putting the last place into each block of those of the rest."""
    if not items:
        return [[]]
    found = []
    for rest in set_partitions(items[:-1]):
        found.append([*rest, [items[-1]]])
        found += [[*rest[:i], [*rest[i], items[-1]], *rest[i + 1 :]] for i in range(len(rest))]
    return found


@pytest.mark.parametrize("index", [(0,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 0, 1, 1), (0, 0, 0, 0)])
def test_partitions_count_all_set_partitions(index: Index) -> None:
    counted: dict[Any, int] = {}
    for blocks in set_partitions(list(range(len(index)))):
        key = tuple(sorted(tuple(index[i] for i in block) for block in blocks))
        counted[key] = counted.get(key, 0) + 1
    assert dict(partitions(index)) == counted
    assert sum(counted.values()) == [1, 1, 2, 5, 15][len(index)]


@pytest.mark.parametrize("order", range(7))
def test_tanh_polynomials_are_derivatives_of_tanh(order: int) -> None:
    """Against Cauchy's integral over a circle around the point, inside the strip without poles."""
    for z in (-1.3, 0.0, 0.4, 2.0):
        angles = 2 * np.pi * np.arange(256) / 256
        around = np.tanh(z + np.exp(1j * angles))
        expected = math.factorial(order) * np.mean(around * np.exp(-1j * order * angles)).real
        value = np.polynomial.polynomial.polyval(np.tanh(z), tanh_polynomial(order))
        assert value == pytest.approx(expected, rel=1e-11, abs=1e-11 * math.factorial(order))


def test_jets_of_tanh_along_a_line_are_its_taylor_coefficients() -> None:
    indices = closure([(0, 0, 0, 0)])
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, 6))
    jets = tanh_jets(torch.as_tensor(z), indices).numpy()
    radius, angles = 0.3, 2 * np.pi * np.arange(128) / 128
    shifts = radius * np.exp(1j * angles)
    for point in range(6):
        path = sum(z[k, point] * shifts**k / math.factorial(k) for k in range(5))
        for k in range(5):
            expected = math.factorial(k) * np.mean(np.tanh(path) * shifts ** (-k)).real
            assert jets[k, point] == pytest.approx(expected, rel=1e-9, abs=1e-9)
