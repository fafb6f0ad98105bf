"""Losses against plain torch and finite differences."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from loss_cases import (
    CASES,
    DIGITS,
    LABELS,
    SoftWave,
    cases,
    close,
    digits,
    gradient_of,
    pde,
    point,
    product_of,
    sequential,
)
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.problems import Burgers, PDELoss


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
