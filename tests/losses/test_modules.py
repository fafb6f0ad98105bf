"""Frozen, tied, unused and mixed parameters of torch modules, layers called in other ways, samples that are NaN."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.networks.tanh import TanhNetwork
from ddml.norms.build import modular_norm
from ddml.problems import Burgers, PDELoss
from ddml.problems.classification import ClassificationLoss, cross_entropy

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
    if name == "named":
        W, b, V, d = pieces(theta, (4, 5), (4,), (3, 4), (3,))
        return torch.tanh(x @ W.T + b) @ V.T + d
    W, b, A, a, V, d = pieces(theta, (5, 5), (5,), (5, 5), (5,), (3, 5), (3,))
    h = x + torch.tanh(x @ W.T + b)
    return (h + torch.tanh(h @ A.T + a)) @ V.T + d


MODULES: dict[str, Callable[[], nn.Module]] = {
    "frozen": frozen, "tied": tied, "tied to the first": tied_to_the_first, "twice": twice, "unused": unused,
    "skip": skip, "named": lambda: Named(4),
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


@modules
def test_derivatives_are_those_by_hand_also_in_subdomains(name: str) -> None:
    module = seeded(MODULES[name])
    original = copy.deepcopy(module)
    loss = classifier(module)
    theta = numbers(loss.size, 1)

    def outputs(theta: Tensor) -> Tensor:
        return by_hand(name, theta, original)

    def function(theta: Tensor) -> Tensor:
        return cross_entropy(outputs(theta), LABELS).mean()

    def curvature(theta: Tensor) -> Tensor:
        J, p = torch.autograd.functional.jacobian(outputs, theta), outputs(theta).softmax(dim=1)
        return torch.einsum("skn,skl,slm->nm", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J) / len(p)

    assert_derivatives(loss, function, curvature(theta), theta)
    subdomains = [[i] for i in range(len(loss.layers))] + [[i, i + 1] for i in range(len(loss.layers) - 1)]
    for layers in subdomains:
        ranges = sorted((loss.parameters[k].range for i in layers for k in loss.layers[i]), key=lambda r: r.start)
        chosen = torch.cat([torch.arange(r.start, r.stop) for r in ranges])
        restricted = RestrictedLoss(loss, ranges)
        restricted.freeze(theta)
        for seed in (5, 6):  # behind one prefix
            full = theta.clone()
            full[chosen] = numbers(len(chosen), seed)

            def inside(x: Tensor, chosen: Tensor = chosen) -> Tensor:
                return function(theta.index_put((chosen,), x))

            assert_derivatives(restricted, inside, curvature(full)[chosen][:, chosen], full[chosen])
    for (_, parameter), (_, before) in zip(module.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(parameter, before)


def test_theta_begins_at_the_trained_parameters_and_has_no_others() -> None:
    module = seeded(frozen)
    loss = classifier(module)
    assert [p.name for p in loss.parameters] == ["2.bias", "4.weight", "4.bias"]
    assert [len(layer) for layer in loss.layers] == [1, 2]
    expected = torch.cat([module[2].bias, module[4].weight.reshape(-1), module[4].bias])
    assert torch.equal(loss.initial(), expected.detach())
    assert [p.requires_grad for p in module.parameters()] == [False, False, False, True, True, True]


SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("tr", {}),
    ("tr", {"norm": "kfac"}),
    ("lbfgs", {}),
    ("apts_weights", {"window": 1, "norm": "infinity"}),
    ("mspqn", {"decomposition": "layers"}),
    ("apts_data", {"subdomains": 2, "norm": "infinity"}),
    ("lmvm", {}),
]


@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        (name, solver, settings)
        for name in ("frozen", "tied", "unused")
        for solver, settings in SOLVERS
        if (name, settings) != ("tied", {"norm": "kfac"})  # refused, see below
    ],
)
def test_training_moves_what_is_trained_only(
    comm: MPI.Comm, train: Any, name: str, solver: str, settings: dict[str, Any]
) -> None:
    module = seeded(MODULES[name])
    before = copy.deepcopy(module)
    loss = classifier(module)
    run = train(loss, solver, 4, blocks=4, **settings)
    assert run.losses[-1] < run.losses[0] - 1e-3
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    theta = torch.as_tensor(run.theta[-1])
    expected = cross_entropy(by_hand(name, theta, before), LABELS).mean()
    assert run.losses[-1] == pytest.approx(float(expected), rel=1e-12)
    idle = [p.range for p in loss.parameters if "nothing" in p.name or "unused" in p.name]
    for r in idle:
        assert torch.equal(theta[r], loss.initial()[r])


# Modular norms ------------------------------------------------------------------------------------------------------


def rms(matrix: Tensor) -> float:
    """The operator norm from RMS to RMS."""
    return float(torch.linalg.matrix_norm(matrix, 2)) * math.sqrt(matrix.shape[1] / matrix.shape[0])


def test_frozen_parameters_have_no_part_in_the_modular_norm() -> None:
    loss = classifier(seeded(frozen))
    theta = numbers(loss.size, 2)
    b, V, c = pieces(theta, (4,), (3, 4), (3,))
    expected = 2 * max(rms(b[:, None]), rms(torch.column_stack([V, c])))
    assert modular_norm(loss).norm(theta) == pytest.approx(expected, rel=1e-12)
    weighted = (1 + 3) * max(rms(b[:, None]), rms(torch.column_stack([V, c])) / 3)
    assert modular_norm(loss, [1, 3]).norm(theta) == pytest.approx(weighted, rel=1e-12)
    with pytest.raises(InputError, match=r"2 masses are needed.* 2 Linear, 4 Linear; got"):
        modular_norm(loss, [1, 1, 1])


def test_a_tied_weight_is_in_the_norm_once_with_its_first_layer() -> None:
    loss = classifier(seeded(tied))
    theta = numbers(loss.size, 2)
    W, b, A, a, c, V, d = pieces(theta, (4, 5), (4,), (4, 4), (4,), (4,), (3, 4), (3,))
    blocks = [torch.column_stack([W, b]), torch.column_stack([A, a]), c[:, None], torch.column_stack([V, d])]
    assert modular_norm(loss).norm(theta) == pytest.approx(4 * max(map(rms, blocks)), rel=1e-12)


# K-FAC --------------------------------------------------------------------------------------------------------------


class OnSequences(nn.Module):
    """A layer at each of four places of a sequence, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)).mean(dim=1))


def statistics(module: nn.Module, inputs: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """A and G of each layer, and the labels that they are drawn for."""
    loss = ClassificationLoss(module, TensorSamples(inputs, LABELS[: len(inputs)]), 3, 3)
    draws = torch.rand(len(inputs), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert len(loss.kronecker_layers()) == len(loss.layers)
    with torch.no_grad():
        chances = module(inputs).softmax(dim=1).cumsum(dim=1)
    return loss.kronecker_statistics(loss.initial(), draws), (chances < draws[:, None]).sum(dim=1)


def assert_factors(found: tuple[Tensor, Tensor], calls: list[tuple[Tensor, Tensor]], samples: int) -> None:
    """Loops over positions (inputs (P, N, i) and slopes (P, N, o)): A summed over them, G the mean."""
    A, G = (torch.zeros_like(factor) for factor in found)
    for a, gamma in calls:
        for n in range(samples):
            A += torch.outer(a[n], a[n]) / samples
            G += torch.outer(gamma[n], gamma[n]) / (samples * len(calls))
    assert torch.allclose(found[0], A, rtol=1e-11, atol=1e-15)
    assert torch.allclose(found[1], G, rtol=1e-11, atol=1e-15)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1).detach()


def test_factors_of_a_layer_on_sequences_count_a_place_once() -> None:
    module = seeded(OnSequences)
    inputs = torch.as_tensor(np.random.default_rng(1).standard_normal((6, 4, 3)))
    (inner, _), labels = statistics(module, inputs)
    z = module.inner(inputs)
    (slope,) = torch.autograd.grad(cross_entropy(module.outer(torch.tanh(z).mean(dim=1)), labels).sum(), z)
    assert_factors(inner, [(with_one(inputs[:, t]), slope[:, t]) for t in range(4)], 6)


def test_factors_of_a_module_that_is_called_twice_are_of_both_calls() -> None:
    module = seeded(twice)
    (_, shared, _), labels = statistics(module, INPUTS)
    x = module[0](INPUTS)
    first = module[1](x)
    y = torch.tanh(first)
    second = module[1](y)
    slopes = torch.autograd.grad(cross_entropy(module[4](second), labels).sum(), [first, second])
    assert_factors(shared, [(with_one(x), slopes[0]), (with_one(y), slopes[1])], len(INPUTS))


@pytest.mark.parametrize(("size", "dilation"), [((3, 3), (1, 1)), ((2, 4), (1, 1)), ((2, 3), (2, 1))])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_factors_of_convolutions_that_pad_by_name(
    size: tuple[int, int], dilation: tuple[int, int], padding: str
) -> None:
    def make() -> nn.Module:
        convolution = nn.Conv2d(2, 3, size, padding=padding, dilation=dilation)
        return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))

    module = seeded(make)
    inputs = torch.as_tensor(np.random.default_rng(1).standard_normal((5, 2, 5, 6)))
    ((A, G), _), labels = statistics(module, inputs)
    z = module[0](inputs)
    (slope,) = torch.autograd.grad(cross_entropy(module[1:](z), labels).sum(), z)
    reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    before = [r // 2 if padding == "same" else 0 for r in reach]
    patches = []
    for i in range(z.shape[2]):
        for j in range(z.shape[3]):
            patch = torch.zeros(5, 2, *size, dtype=torch.float64)
            for k in range(size[0]):
                for m in range(size[1]):
                    row, column = i + dilation[0] * k - before[0], j + dilation[1] * m - before[1]
                    if 0 <= row < 5 and 0 <= column < 6:
                        patch[:, :, k, m] = inputs[:, :, row, column]
            patches.append((with_one(patch.flatten(1)), slope[:, :, i, j]))
    assert_factors((A, G), patches, 5)


def test_factors_of_partly_frozen_layers_are_those_of_what_is_trained() -> None:
    module = seeded(frozen)
    (bias, last), labels = statistics(module, INPUTS)
    z = module[2](torch.tanh(module[0](INPUTS)))
    y = torch.tanh(z)
    out = module[4](y)
    slopes = torch.autograd.grad(cross_entropy(out, labels).sum(), [z, out])
    assert_factors(bias, [(torch.ones(30, 1, dtype=torch.float64), slopes[0])], 30)
    assert_factors(last, [(with_one(y), slopes[1])], 30)


class Decoder(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(5, 3, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encode(x)) @ self.encode.weight)


class Constant(nn.Module):
    """Calls a layer on something else than samples."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.shift = nn.Linear(5, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + self.shift(x.new_ones(1, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tied, "no weights tied between layers, 4.weight is that of 2.weight"),
        (tied_to_the_first, "no weights tied between layers, 2.weight is that of 0.weight"),
        (Decoder, "layer encode is used otherwise"),
        (Constant, "layer shift is used otherwise"),
    ],
)
def test_what_kfac_does_not_see_is_refused_in_words(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(InputError, match=f"{words}.* choose another -norm"):
        classifier(seeded(make)).kronecker_layers()


# Refused ------------------------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    network[1].float()
    return network


def all_frozen() -> nn.Module:
    return nn.Linear(5, 3).double().requires_grad_(False)


class Aside(nn.Module):
    """Has parameters that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mixed, r"0.weight is of torch.float64, 1.weight of torch.float32"),
        (all_frozen, "no parameters to train: all have requires_grad False"),
        (lambda: nn.Identity(), "no parameters to train: it has none at all"),
        (Aside, "outputs do not depend on any parameter that is trained"),
        (lambda: nn.Linear(4, 3).double(), r"fails on inputs \(8, 5\) of torch.float64: RuntimeError: mat1 and mat2"),
        (lambda: nn.LazyLinear(3), "parameter weight has no shape yet"),
        (lambda: nn.Linear(5, 3).to(torch.complex128), "parameter weight is of torch.complex128: only real"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused_in_words(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModuleLoss(make(), cross_entropy, INPUTS, LABELS)


@pytest.mark.parametrize(("bad", "said"), [(math.nan, "NaN"), (math.inf, "infinity")])
@pytest.mark.parametrize("row", [0, 5])
def test_a_sample_that_is_not_finite_is_named(bad: float, said: str, row: int) -> None:
    inputs = INPUTS.clone()
    inputs[row, 2] = bad
    with pytest.raises(InputError, match=f"^sample {row} has {said} in its inputs$"):
        ModuleLoss(seeded(lambda: nn.Linear(5, 3)), cross_entropy, inputs, LABELS)


def test_outputs_and_criteria_that_are_not_finite_are_named() -> None:
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt()

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(dim=1) / (targets - 2)

    with pytest.raises(InputError, match=r"^sample 0 has finite inputs, but NaN in the network's outputs$"):
        ModuleLoss(seeded(lambda: Root(5, 3)), cross_entropy, INPUTS, LABELS)
    with pytest.raises(InputError, match=r"^sample 2 has finite outputs, but the criterion gives infinity$"):
        ModuleLoss(seeded(lambda: nn.Linear(5, 3)), criterion, INPUTS, LABELS)


def test_samples_behind_the_first_are_named_when_the_loss_is_not_finite() -> None:
    inputs, labels = INPUTS.repeat(2, 1), LABELS.repeat(2)
    inputs[44, 2] = math.nan
    loss = ModuleLoss(seeded(tied), cross_entropy, inputs, labels, batch=10)
    assert math.isnan(loss.value(loss.initial()))
    assert loss.explain(loss.initial()) == "sample 44 has NaN in its inputs"
    assert loss.explain(loss.initial() * math.nan) == "the parameters are NaN or infinite"


# Networks of PDE problems -------------------------------------------------------------------------------------------


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
