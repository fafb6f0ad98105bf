"""Kronecker factors and Gauss-Newton products of classifiers against plain autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.losses import kronecker
from ddml.problems.classification import ClassificationLoss, cross_entropy


def make_loss(network: nn.Module, shape: tuple[int, ...], samples: int = 7, batch: int = 3) -> ClassificationLoss:
    rng = np.random.default_rng(0)
    inputs, targets = torch.as_tensor(rng.standard_normal((samples, *shape))), torch.arange(samples) % 4
    return ClassificationLoss(network.double(), TensorSamples(inputs, targets), 4, batch)


def linear(batch: int = 3) -> ClassificationLoss:
    torch.manual_seed(1)
    return make_loss(
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Linear(3, 4)),
        (5,),
        batch=batch,
    )


def convolutional() -> ClassificationLoss:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 2, dilation=2, bias=False),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return make_loss(network, (2, 7, 7))


def drawn_labels(loss: ClassificationLoss, draws: Tensor) -> Tensor:
    """The label of each sample is the first one at which the sum of the chances exceeds its draw."""
    with torch.no_grad():
        chances = loss.module(loss.inputs).softmax(dim=1).numpy()
    return torch.tensor([int(np.searchsorted(np.cumsum(p), float(u))) for p, u in zip(chances, draws, strict=True)])


def test_factors_of_single_samples_are_exact_for_linear_layers() -> None:
    """The gradient of a sample by a weight is gamma a^T: its outer product is the Kronecker product of theirs."""
    loss, draws = linear(), torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, theta = drawn_labels(loss, draws), loss.initial()
    sums = None
    for i in range(loss.count):
        part = loss.part(i, i + 1)
        found = part.kronecker_statistics(theta, draws[i : i + 1])
        value = cross_entropy(loss.module(loss.inputs[i : i + 1]), labels[i : i + 1]).sum()
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(loss.module.parameters()))])
        for layer, (A, G) in zip(loss.kronecker_layers(), found, strict=True):
            g = flat[torch.from_numpy(layer.entries.ravel())]
            expected = torch.outer(g, g) * loss.weight**2  # both factors have the weight
            assert torch.allclose(torch.kron(G, A), expected, rtol=1e-12, atol=1e-18)
        sums = found if sums is None else [(A + C, G + D) for (A, G), (C, D) in zip(sums, found, strict=True)]
    whole = loss.kronecker_statistics(theta, draws)
    for pair, expected_pair in zip(whole, sums or [], strict=True):
        for factor, expected in zip(pair, expected_pair, strict=True):
            assert torch.allclose(factor, expected, rtol=1e-12)


def test_factors_of_convolutions_by_loops_over_patches() -> None:
    loss, draws = convolutional(), torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, theta = drawn_labels(loss, draws), loss.initial()
    first, second = loss.module[0], loss.module[2]
    x = loss.inputs
    middle = first(x)
    after = second(torch.relu(middle))
    value = cross_entropy(loss.module[4](after.flatten(1)), labels).sum()
    slopes = torch.autograd.grad(value, [middle, after])
    found = loss.kronecker_statistics(theta, draws)
    cases = ((x, slopes[0], 3, 2, 1, 1, True), (torch.relu(middle).detach(), slopes[1], 2, 1, 0, 2, False))
    for (inputs, slope, size, stride, padding, dilation, bias), (A, G) in zip(cases, found, strict=False):
        padded = nn.functional.pad(inputs, (padding,) * 4)
        rows, columns = slope.shape[2:]
        expected_A, expected_G = torch.zeros_like(A), torch.zeros_like(G)
        for n in range(loss.count):
            for i in range(rows):
                for j in range(columns):
                    reach = dilation * (size - 1) + 1
                    top, left = stride * i, stride * j
                    patch = padded[n, :, top : top + reach : dilation, left : left + reach : dilation].reshape(-1)
                    patch = torch.cat([patch, patch.new_ones(1)]) if bias else patch
                    expected_A += torch.outer(patch, patch) / loss.count
                    expected_G += torch.outer(slope[n, :, i, j], slope[n, :, i, j]) / (loss.count * rows * columns)
        assert torch.allclose(A, expected_A, rtol=1e-12, atol=1e-15)
        assert torch.allclose(G, expected_G, rtol=1e-12, atol=1e-15)


def test_labels_are_drawn_from_the_networks_distribution() -> None:
    """With many draws G of the last layer is that of the softmax, diag(p) - p p^T."""
    loss = linear(batch=10_000).part(0, 1)
    many = loss.on(TensorSamples(loss.inputs.expand(40_000, -1), loss.targets.expand(40_000)))
    draws = torch.rand(40_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    G = many.kronecker_statistics(loss.initial(), draws)[-1][1]
    with torch.no_grad():
        p = loss.module(loss.inputs)[0].softmax(dim=0)
    assert torch.allclose(G, torch.diag(p) - torch.outer(p, p), atol=0.01)


@pytest.mark.parametrize("make", [linear, convolutional])
def test_gauss_newton_products_are_those_of_dense_matrices(make: object) -> None:
    loss = make()  # type: ignore[operator]
    theta = loss.initial()

    def outputs(parameters: Tensor) -> Tensor:
        views = {p.name: parameters[p.range].view(p.shape) for p in loss.parameters}
        return torch.func.functional_call(loss.module, views, (loss.inputs,))

    J = torch.func.jacrev(outputs)(theta)  # (B, K, n)
    p = outputs(theta).detach().softmax(dim=1)
    expected = torch.zeros(loss.size, loss.size, dtype=torch.float64)
    for rows, chances in zip(J, p, strict=True):
        expected += rows.T @ (torch.diag(chances) - torch.outer(chances, chances)) @ rows / loss.count
    for part in (loss, loss.part(0, 7)):
        products = torch.zeros_like(expected)
        for product, unit in zip(products, torch.eye(loss.size, dtype=torch.float64), strict=True):
            part.gauss_newton_product(theta, unit, product)
        assert torch.allclose(products, expected, rtol=1e-11, atol=1e-14)
    assert loss.gauss_newton


def test_layers_without_factors_are_refused() -> None:
    for layer, name in ((nn.LayerNorm(5), "0.weight"), (nn.Conv1d(5, 5, 1), "0.weight")):
        network = nn.Sequential(layer, nn.Linear(5, 4))
        table = linear().parameters
        with pytest.raises(InputError, match=f"parameter {name} is of none"):
            kronecker.layers(network, [type(table[0])(n, tuple(p.shape), 0) for n, p in network.named_parameters()])
