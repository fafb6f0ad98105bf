"""Restrictions of restrictions by layers, against the whole loss."""

from collections.abc import Callable

import pytest
import torch
from loss_cases import Branches, close, digits, gradient_of, pde, point, product_of
from torch import Tensor, nn

from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.losses.residual import restricted_loss
from ddml.problems import Burgers


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 10))


MAKE: dict[str, Callable[[], Loss]] = {
    "perceptron": lambda: digits(perceptron),
    "burgers": lambda: pde(Burgers(), chunk=7, depth=4),
    "burgers, mlp": lambda: pde(Burgers(), adaptive=False, depth=4),
    "branches": lambda: digits(Branches),
}
nested = pytest.mark.parametrize("name", MAKE)


def places(ranges: tuple[slice, ...]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])


@nested
def test_the_layers_of_a_restricted_loss_are_the_active_ones_cut_to_its_ranges(name: str) -> None:
    loss = MAKE[name]()
    for domains in (Subdomains.windows(loss, len(loss.layers) - 1), Subdomains.by_tensors(loss, 2, 0, 3)):
        for ranges in domains.ranges:
            part, chosen = restricted_loss(loss, ranges), places(ranges)
            assert part.costs == tuple(loss.costs[i] for i in part.numbers)
            assert sorted(k for layer in part.layers for k in layer) == list(range(len(part.parameters)))
            for number, layer in zip(part.numbers, part.layers, strict=True):
                here = torch.cat([torch.arange(part.size)[part.parameters[k].range] for k in layer])
                there = torch.cat([torch.arange(loss.size)[loss.parameters[k].range] for k in loss.layers[number]])
                assert set(chosen[here].tolist()) == set(there.tolist()) & set(chosen.tolist())
            every = tuple(p.shape for p in loss.parameters)
            assert all(p.shape in every for p in part.parameters)  # whole tensors keep their shapes
    tensor = max(loss.parameters, key=lambda p: p.size)
    begin = tensor.offset
    cut = restricted_loss(loss, [slice(begin + 1, begin + 3), slice(begin + 4, loss.size)])
    assert [p.size for p in cut.parameters][:2] == [2, tensor.size - 4]
    assert cut.parameters[0].name == f"{tensor.name}[1:3]"
    depth = len(cut.layers)
    with pytest.raises(InputError, match=f"has {depth} layers: subdomains must be 1 to {depth}"):
        Subdomains.by_layers(cut, depth + 1)


@nested
@pytest.mark.parametrize("count", [2, 3])
def test_a_restriction_of_a_restriction_by_layers_is_the_whole_loss_with_the_rest_frozen(name: str, count: int) -> None:
    loss = MAKE[name]()
    outer = Subdomains.windows(loss, len(loss.layers) - 1).ranges[-1]
    middle = restricted_loss(loss, outer)
    domains = Subdomains.by_layers(middle, min(count, len(middle.layers)))
    inner = [restricted_loss(middle, ranges) for ranges in domains.ranges]
    for seed in range(3):
        if seed != 1:  # once the outer restriction is not frozen anew
            around = point(loss, 10 + seed)
            middle.freeze(around)
        if seed != 2:  # once the inner ones are not: what they keep is out of date all the same
            between = point(loss, 20 + seed)[places(outer)]
        for ranges, part in zip(domains.ranges, inner, strict=True):
            if seed != 2:
                part.freeze(between)
            chosen = places(outer)[places(ranges)]
            whole = around.clone()
            whole[places(outer)] = between
            x, v = point(loss, seed)[chosen], torch.zeros(loss.size, dtype=torch.float64)
            whole[chosen] = x
            v[chosen] = torch.linspace(-1, 1, len(x), dtype=torch.float64)
            value, gradient = gradient_of(loss, whole)
            assert part.value(x) == pytest.approx(value, rel=1e-12)
            found, slope = gradient_of(part, x)
            assert found == pytest.approx(value, rel=1e-12)
            assert close(slope, gradient[chosen], 1e-11)
            assert close(product_of(part, x, v[chosen]), product_of(loss, whole, v)[chosen], 1e-10)
            curved, expected = torch.zeros_like(x), torch.zeros_like(v)
            part.gauss_newton_product(x, v[chosen], curved)
            loss.gauss_newton_product(whole, v, expected)
            assert close(curved, expected[chosen], 1e-10)


@pytest.mark.parametrize("name", ["perceptron", "burgers"])
def test_what_is_charged_behind_two_prefixes(name: str) -> None:
    """Evaluations as those of the whole loss by the same layers; a prefix once behind every freeze it depends on."""
    loss = MAKE[name]()
    middle = restricted_loss(loss, Subdomains.of_layers(loss, [range(1, 4)]).ranges[0])
    domains = Subdomains.by_layers(middle, 3)
    for layer, ranges in enumerate(domains.ranges, 1):
        part = restricted_loss(middle, ranges)
        active = frozenset([layer])
        assert domains.costs[layer - 1] == loss.charges.evaluation(layer, active)
        assert part.charges.evaluation() == loss.charges.evaluation(layer, active)
        assert part.charges.evaluation(gradient=False) == loss.charges.evaluation(layer, active, False)
        assert part.charges.hessian() == loss.charges.hessian(layer, frozenset(range(layer, len(loss.layers))))
        assert part.charges.gauss_newton() == loss.charges.gauss_newton(layer, active)
        assert part.charges.operations == loss.charges.operations
        prefix = loss.charges.prefix(layer)
        assert prefix > 0
        middle.freeze(point(loss))
        part.freeze(middle.initial())
        assert (part.owed(), part.owed()) == (prefix, 0.0)
        part.freeze(middle.initial())  # what enters the first layer of both does not change
        assert part.owed() == (0.0 if layer == 1 else prefix)
        middle.freeze(point(loss, 1))
        assert (part.owed(), part.owed()) == (prefix, 0.0)
    whole = middle.charges.evaluation()
    assert whole == loss.charges.evaluation(1, frozenset({1, 2, 3}))
    middle.also = frozenset({4}) if len(loss.layers) > 4 else frozenset()
    assert middle.charges.evaluation(0, frozenset({0})) == loss.charges.evaluation(1, frozenset({1}))


@pytest.mark.parametrize("name", ["perceptron", "burgers"])
def test_a_restricted_loss_goes_on_from_what_is_kept_of_it(name: str) -> None:
    """What enters its second layer is of the parameters that it was kept at, whatever the first layer's are now."""
    loss = MAKE[name]()
    middle = restricted_loss(loss, Subdomains.of_layers(loss, [range(1, 4)]).ranges[0])
    middle.freeze(point(loss))
    first = places(Subdomains.of_layers(middle, [[0]]).ranges[0])
    before, x = middle.take(point(loss, 1)), middle.take(point(loss, 2))
    kept = middle.prefix(before, 1)
    mixed = x.clone()
    mixed[first] = before[first]
    behind = frozenset({1, 2})
    value, gradient = gradient_of(middle, x, kept=kept, active=behind)
    expected, whole = gradient_of(middle, mixed)
    assert value == pytest.approx(expected, rel=1e-13) == middle.value(x, kept)
    assert value != pytest.approx(middle.value(x), rel=1e-6)
    rest = places(Subdomains.of_layers(middle, [[1, 2]]).ranges[0])
    assert close(gradient[rest], whole[rest], 1e-12)
    assert float(sum(middle.terms(x, kept))) == pytest.approx(expected, rel=1e-13)
