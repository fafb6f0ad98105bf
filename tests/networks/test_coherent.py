"""Coherent nets: what they compute, their loss with data parallelism, and their norm."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from ddml.data.data_set import DataSet
from ddml.data.sample_sets import TensorSamples
from ddml.data.scaling import Scaling
from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError
from ddml.networks.classifiers import mlp
from ddml.networks.coherent import Coherent, Fused
from ddml.networks.fusions import FUSIONS, LINKS
from ddml.norms.build import modular_norm
from ddml.problems.classification import ClassificationLoss
from solvers import minimise

K = 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def nets(shapes: list[tuple[int, ...]]) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [mlp(shape, K, [4]).double() for shape in shapes]


def link_by_hand(logits: np.ndarray, link: str) -> np.ndarray:
    if link == "logits":
        return logits
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = powers / powers.sum(axis=1, keepdims=True)
    return chances if link == "probabilities" else np.maximum(np.log(chances), -12.0)


def dense_by_hand(net: nn.Module, x: np.ndarray) -> np.ndarray:
    _, first, _, second = net
    hidden = np.maximum(x.reshape(len(x), -1) @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    return hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()


Cut = tuple[slice, ...]


def cuts(*axes: Sequence[tuple[int, int]]) -> list[Cut]:
    return list(product(*([slice(a, b) for a, b in axis] for axis in axes)))


# shape, tiles, overlap, and the pixels of each tile, by hand
CUTS: dict[str, tuple[tuple[int, ...], Any, int, list[Cut]]] = {
    "image": ((2, 4, 6), 2, 0, cuts([(0, 2), (2, 4)], [(0, 3), (3, 6)])),
    "overlap": ((1, 5, 7), (1, 3), 1, cuts([(0, 5)], [(0, 3), (1, 5), (3, 7)])),
    "volume": ((1, 3, 4, 2), (2, 1, 1), 1, cuts([(0, 3)], [(0, 3), (1, 4)], [(0, 2)])),
    "one": ((1, 4, 4), 1, 0, cuts([(0, 4)], [(0, 4)])),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", CUTS)
def test_outputs_are_those_by_hand(name: str, link: str) -> None:
    shape, parts, overlap, by_hand = CUTS[name]
    tiles = Tiles(shape, parts, overlap)
    module = Coherent(nets(tiles.shapes), mlp((len(by_hand) * K,), K, [5]).double(), tiles, link)
    x = numbers(6, *shape)
    features = [
        link_by_hand(dense_by_hand(net, x.numpy()[(..., *cut)]), link)
        for net, cut in zip(module.nets, by_hand, strict=True)
    ]
    expected = dense_by_hand(module.coarse, np.concatenate(features, axis=1))
    assert np.abs(module(x).detach().numpy() - expected).max() < 1e-13
    parts = [(f"nets.{i}.", net) for i, net in enumerate(module.nets)] + [("coarse.", module.coarse)]
    expected_names = [prefix + name for prefix, part in parts for name, _ in part.named_parameters()]
    assert [name for name, _ in module.named_parameters()] == expected_names


def test_stored_values_are_scaled_tile_by_tile() -> None:
    tiles = Tiles((2, 4, 6), (2, 3), 1)
    stored = np.random.default_rng(0).integers(0, 200, (9, 2, 4, 6)).astype(np.uint8)
    labels = np.arange(9) % K
    scalings = []
    for i in range(len(tiles)):
        part = tiles.cut(stored, i)
        pieces = DataSet(part, labels, part[:2], labels[:2], ("a", "b", "c"))
        scalings.append(Scaling(pieces, "standard", MPI.COMM_SELF))
    module = Coherent(nets(tiles.shapes), mlp((6 * K,), K, []).double(), tiles, scalings=scalings)
    x = torch.as_tensor(stored, dtype=torch.float64)
    kept = x.clone()
    for i in range(len(tiles)):
        found = module.tile(x, i)
        assert torch.allclose(found.mean(dim=(0, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(found.std(dim=(0, 2, 3), correction=0), torch.ones(2, dtype=torch.float64))
    module(x)
    assert torch.equal(x, kept)


def data(shape: tuple[int, ...], count: int = 24) -> TensorSamples:
    return TensorSamples(numbers(count, *shape, seed=5), torch.arange(count) % K)


def loss(parts: Any = 2, link: str = "log_probabilities", shape: tuple[int, ...] = (1, 6, 6)) -> ClassificationLoss:
    tiles = Tiles(shape, parts, 1 if parts != 1 else 0)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        coarse = mlp((len(tiles) * K,), K, [4]).double()
    return ClassificationLoss(Coherent(nets(tiles.shapes), coarse, tiles, link), data(shape), K)


def test_gradients_are_differences() -> None:
    made = loss((1, 2))
    theta = made.initial() + 0.1 * numbers(made.size, seed=3)
    gradient = torch.zeros(made.size, dtype=torch.float64)
    made.value_gradient(theta, gradient)
    for seed in range(4):
        direction = numbers(made.size, seed=10 + seed)
        ahead, back = (made.value(theta + step * direction) for step in (1e-6, -1e-6))
        assert abs((ahead - back) / 2e-6 - float(gradient @ direction)) < 1e-7


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("lbfgs", {}),
        ("tr", {}),
        ("tr", {"norm": "modular"}),
        ("tr", {"norm": "kfac", "model": "gauss_newton"}),
        ("tr", {"model": "hessian"}),
        ("apts_weights", {"subdomains": 2, "local_steps": 2}),
    ],
)
def test_solvers_train_it(solver: str, options: dict[str, Any]) -> None:
    made = loss()
    found = minimise(made, solver, MPI.COMM_SELF, options, iterations=12)
    assert found.loss < 0.97 * found.losses[0]


def test_networks_share_no_radius() -> None:
    """Each may move as far as if it were alone before the coarse net, in the norm of that chain."""
    made = loss((2, 3))
    module, norm = made.module, modular_norm(made)
    for i, net in enumerate(module.nets):
        chain = nn.Sequential(*net, *module.coarse)
        samples = TensorSamples(module.tile(made.inputs, i), made.targets)
        alone = modular_norm(ClassificationLoss(nn.Sequential(*net), samples, K))
        step = numbers(alone.size, seed=i)
        place = [p for p in made.parameters if p.name.startswith(f"nets.{i}.")]
        whole = torch.zeros(made.size, dtype=torch.float64)
        whole[place[0].offset : place[-1].range.stop] = step
        layers = sum(isinstance(part, nn.Linear) for part in chain)
        assert norm.norm(whole) == pytest.approx(alone.norm(step) * layers / 2, rel=1e-12)  # 2 layers in a net


def test_what_does_not_fit_is_refused() -> None:
    tiles = Tiles((1, 4, 4), 2)
    made, coarse = nets(tiles.shapes), mlp((4 * K,), K, [])
    for arguments, words in (
        ((made[:3], coarse, tiles), "4 tiles need as many networks, got 3"),
        ((made, coarse, tiles, "softmax"), "the link must be one of probabilities, log_probabilities, logits"),
        ((made, coarse, tiles, "logits", [None]), "4 tiles need as many scalings, got 1"),
        (([made[0]] * 4, coarse, tiles), "a parameter is in two of the networks"),
        (([*made[:3], coarse], coarse, tiles), "a parameter is in two of the networks"),
    ):
        with pytest.raises(InputError, match=words):
            Coherent(*arguments)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_without_training_are_modules_too(fusion: str) -> None:
    tiles = Tiles((1, 5, 6), (2, 3), 1)
    module = Fused(nets(tiles.shapes), tiles, fusion).float()
    images = numbers(9, 1, 5, 6).float()
    logits = torch.stack([net(tiles.cut(images, i)) for i, net in enumerate(module.nets)])
    outputs = module(images)
    assert outputs.argmax(dim=1).tolist() == FUSIONS[fusion](logits).tolist() and outputs.dtype == torch.float64
    np.testing.assert_allclose(outputs.detach().exp().sum(dim=1), 1, rtol=1e-14)
    with torch.no_grad():
        module.nets[0][-1].bias[0] += 2000.0  # all other classes of that network underflow
        assert module(images).isfinite().all()


def test_fusions_that_cannot_be_are_refused() -> None:
    tiles = Tiles((1, 4, 4), 2)
    made = nets(tiles.shapes)
    for arguments, expected in (
        ((made[:3], tiles, "average"), "4 tiles need as many networks, got 3"),
        ((made, tiles, "coarse"), "the fusion must be one of average, majority, got 'coarse'"),
    ):
        with pytest.raises(InputError, match=expected):
            Fused(*arguments)
