"""Kronecker factors of layers that are called in other ways."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hand_modules import INPUTS, LABELS, classifier, frozen, seeded, tied, tied_to_the_first, twice
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.problems.classification import ClassificationLoss, cross_entropy


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


@pytest.mark.parametrize(
    ("size", "dilation", "stride", "padding"),
    [
        ((3, 3, 3), 1, 1, 1), ((3, 3, 3), 1, 1, "same"), ((2, 1, 3), (2, 1, 1), 1, "same"), ((2, 3, 4), 1, 1, "valid"),
        ((1, 2, 2), (1, 1, 2), (3, 1, 2), 0), ((2, 2, 1), (1, 2, 1), (1, 2, 2), (0, 2, 1)),
    ],
)  # fmt: skip
def test_factors_of_convolutions_of_volumes(size: tuple[int, ...], dilation: Any, stride: Any, padding: Any) -> None:
    def make() -> nn.Module:
        convolution = nn.Conv3d(2, 3, size, padding=padding, dilation=dilation, stride=stride)
        return nn.Sequential(convolution, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3))

    module = seeded(make)
    inputs = torch.as_tensor(np.random.default_rng(1).standard_normal((4, 2, 4, 5, 6)))
    ((A, G), _), labels = statistics(module, inputs)
    z = module[0](inputs)
    (slope,) = torch.autograd.grad(cross_entropy(module[1:](z), labels).sum(), z)
    dilation, stride = np.broadcast_to(dilation, 3), np.broadcast_to(stride, 3)
    before = {"same": dilation * np.subtract(size, 1) // 2, "valid": 0}.get(padding, padding)
    calls = []
    for position in np.ndindex(*z.shape[2:]):
        patch = torch.zeros(4, 2, *size, dtype=torch.float64)
        for offset in np.ndindex(*size):
            place = np.multiply(stride, position) + np.multiply(dilation, offset) - before
            if (place >= 0).all() and (place < inputs.shape[2:]).all():
                patch[(..., *offset)] = inputs[(..., *place)]
        calls.append((with_one(patch.flatten(1)), slope[(..., *position)]))
    assert_factors((A, G), calls, 4)


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
