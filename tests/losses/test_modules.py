"""Frozen, tied, unused and mixed parameters of torch modules."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hand_modules import (
    LABELS,
    MODULES,
    assert_derivatives,
    by_hand,
    classifier,
    frozen,
    modules,
    numbers,
    pieces,
    seeded,
    tied,
)
from mpi4py import MPI
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.norms.build import modular_norm
from ddml.problems.classification import cross_entropy


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
    run = train(loss, solver, 2, blocks=4, **settings)
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


def test_attention_has_second_derivatives() -> None:
    module = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True))
    inputs = torch.as_tensor(np.random.default_rng(2).standard_normal((7, 3, 4)))

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum((1, 2))

    loss = ModuleLoss(module, criterion, inputs, inputs.sin())
    theta, direction = loss.initial(), numbers(loss.size, 3)

    def gradient(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        loss.value_gradient(x, found)
        return found

    product, curved = torch.zeros_like(theta), torch.zeros_like(theta)
    loss.hessian_product(theta, direction, product)
    step = 1e-6 * direction
    torch.testing.assert_close(product, (gradient(theta + step) - gradient(theta - step)) / 2e-6, rtol=1e-6, atol=1e-6)
    loss.gauss_newton_product(theta, direction, curved)
    outputs = [torch.cat([o.flatten() for o, _ in loss.outputs(theta + t * step)]) for t in (1, -1)]
    change = (outputs[0] - outputs[1]) / 2e-6
    assert float(direction @ curved) == pytest.approx(2 * float(change @ change) / 7, rel=1e-6)
