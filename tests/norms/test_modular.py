"""The modular norm: formulas of the paper, singular value decompositions, and maximisation by brute force."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.norms.build import modular_norm
from ddml.norms.modular import Block, ModularNorm
from ddml.norms.structure import Atom, Composition, Concatenation, modular
from ddml.parameters import parameter_table


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.GroupNorm(2, 6), nn.Flatten(),
        nn.Linear(54, 5),
    )  # fmt: skip


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), Residual(8), nn.Linear(8, 2))


CASES = [(make, "unfolded") for make in (chain, convolutional, tokens)] + [(convolutional, "slices")]
each = pytest.mark.parametrize(("make", "convolution"), CASES)


def norm_of(network: nn.Module, masses: list[float] | None = None, convolution: str = "unfolded") -> ModularNorm:
    table = parameter_table([(name, p.shape) for name, p in network.named_parameters()])
    return ModularNorm(table[-1].range.stop, tuple(modular(network, table, masses, convolution).blocks()))


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def named(network: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    views, end = {}, 0
    for name, p in network.named_parameters():
        views[name] = theta[end : end + p.numel()].view(p.shape)
        end += p.numel()
    return views


def rms_operator(W: Tensor) -> float:
    return math.sqrt(W.shape[1] / W.shape[0]) * float(torch.linalg.matrix_norm(W, 2))


def test_of_a_chain_is_that_of_the_measured_results() -> None:
    network = chain()
    norm, theta = norm_of(network), vector(70)
    w = named(network, theta)
    layers = [torch.column_stack([w["0.weight"], w["0.bias"]]), w["2.weight"], torch.column_stack([w["4.weight"], w["4.bias"]])]  # fmt: skip  # noqa: E501
    assert norm.norm(theta) == pytest.approx(3 * max(map(rms_operator, layers)), rel=1e-13)
    dual = named(network, norm.dualize(theta))
    for name, W in zip(("0", "2", "4"), layers, strict=True):
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        expected = math.sqrt(W.shape[0] / W.shape[1]) / 3 * U @ V
        found = [dual[f"{name}.weight"]] + ([dual[f"{name}.bias"][:, None]] if f"{name}.bias" in dual else [])
        assert (torch.hstack(found) - expected).abs().max() < 1e-12


def test_convolutions_and_embeddings() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, (2, 3)))
    theta = vector(76)
    w = named(network, theta)
    W, b = w["0.weight"], w["0.bias"][:, None]
    assert norm_of(network).norm(theta) == pytest.approx(rms_operator(torch.hstack([W.flatten(1), b])), rel=1e-13)
    slices = [W[:, :, i, j] for i in range(2) for j in range(3)]
    expected = 7 * max(map(rms_operator, [*slices, b]))
    assert norm_of(network, convolution="slices").norm(theta) == pytest.approx(expected, rel=1e-13)
    no_bias = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    theta = vector(108)
    W = theta.view(4, 3, 3, 3)
    expected = 9 * max(rms_operator(W[:, :, i, j]) for i in range(3) for j in range(3))
    norm = norm_of(no_bias, convolution="slices")
    assert norm.norm(theta) == pytest.approx(expected, rel=1e-13)
    U, _, V = torch.linalg.svd(W[:, :, 1, 2])
    dual = norm.dualize(theta).view(4, 3, 3, 3)[:, :, 1, 2]
    assert (dual - math.sqrt(4 / 3) / 9 * U[:, :3] @ V).abs().max() < 1e-12
    embedding = nn.Embedding(5, 4)
    theta = vector(20)
    theta[4:8] = 0
    norm = norm_of(embedding)
    assert norm.norm(theta) == pytest.approx(float(theta.view(5, 4).pow(2).mean(dim=1).sqrt().max()), rel=1e-13)
    lengths = norm.dualize(theta).view(5, 4).pow(2).mean(dim=1).sqrt()
    assert lengths == pytest.approx([1, 0, 1, 1, 1], rel=1e-13)


def test_the_smaller_norm_of_a_convolution_bounds_what_its_output_changes_by() -> None:
    layer = nn.Conv2d(3, 5, 3).double()
    image = vector(3 * 64).view(1, 3, 8, 8)
    image /= image.pow(2).mean(dim=1).sqrt().max()
    theta = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
    change = layer(image).detach().pow(2).mean(dim=1).sqrt().max()
    small, large = norm_of(layer).norm(theta), norm_of(layer, convolution="slices").norm(theta)
    assert float(change) <= math.sqrt(2) * small  # the constant input of the bias is not counted in the image
    assert float(change) <= large
    assert small <= large


@each
def test_duality(make: Any, convolution: str) -> None:
    network = make()
    norm = norm_of(network, None, convolution)
    for seed in range(3):
        g = vector(norm.size, seed)
        direction, dual = norm.dualize(g), norm.dual_norm(g)
        assert norm.norm(direction) == pytest.approx(1, rel=1e-12)
        assert float(g @ direction) == pytest.approx(dual, rel=1e-12)
        tries = [vector(norm.size, 100 + k) + 2 * direction * norm.norm(vector(norm.size, 100 + k)) for k in range(50)]
        assert max(float(g @ t) / norm.norm(t) for t in tries) <= dual * (1 + 1e-12)
        assert norm.dual_norm(3 * g) == pytest.approx(3 * dual, rel=1e-12)


@each
def test_the_dual_norm_is_the_sum_of_those_of_the_blocks(make: Any, convolution: str) -> None:
    norm = norm_of(make(), None, convolution)
    g = vector(norm.size)
    total = 0.0
    for block in norm.blocks:
        matrix = g[torch.as_tensor(block.entries)]
        own = matrix.norm(dim=1).sum() if block.by_rows else torch.linalg.matrix_norm(matrix, "nuc")
        total += float(own) / block.scale
    assert norm.dual_norm(g) == pytest.approx(total, rel=1e-12)
    assert sorted(k for b in norm.blocks for k in b.entries.ravel()) == list(range(norm.size))


def layer(first: int, size: int, mass: float, sensitivity: float) -> Atom:
    entries = torch.arange(first, first + size).view(1, -1).numpy()
    return Atom(mass, (Block.of(entries, 1.0),), sensitivity)


def test_composition_and_concatenation_as_in_the_paper() -> None:
    """Definitions 6 and 7, equations 11 and 12, on vectors with the 2-norm."""
    one, two, three = layer(0, 3, 2.0, 0.5), layer(3, 4, 1.0, 3.0), layer(7, 2, 5.0, 0.25)
    g = vector(9)
    parts = g[:3], g[3:7], g[7:]
    duals = [p / p.norm() for p in parts]
    a, b, c = (float(p.norm()) for p in parts)

    def of(module: Any) -> ModularNorm:
        return ModularNorm(9, tuple(module.blocks()))

    pair = Composition([one, two])
    assert (pair.mass, pair.sensitivity) == (3.0, 1.5)
    assert of(pair).norm(g) == pytest.approx(max(3 * 3 / 2 * a, 3 / 1 * b))
    assert of(pair).dualize(g) == pytest.approx(torch.cat([duals[0] / 3 * 2 / 3, duals[1] / 3, torch.zeros(2)]))
    beside = Concatenation([one, two])
    assert (beside.mass, beside.sensitivity) == (3.0, 3.5)
    assert of(beside).norm(g) == pytest.approx(max(3 / 2 * a, 3 / 1 * b))
    assert of(beside).dualize(g) == pytest.approx(torch.cat([duals[0] * 2 / 3, duals[1] / 3, torch.zeros(2)]))
    # a module of three is one of two, whichever are joined first
    for whole in (Composition([pair, three]), Composition([one, Composition([two, three])]), Composition([one, two, three])):  # fmt: skip  # noqa: E501
        assert (whole.mass, whole.sensitivity) == (8.0, 0.375)
        assert of(whole).norm(g) == pytest.approx(max(0.25 * 3 * 8 / 2 * a, 0.25 * 8 * b, 8 / 5 * c))
    nested = Composition([beside, three])
    assert nested.sensitivity == pytest.approx(3.5 * 0.25)
    assert of(nested).norm(g) == pytest.approx(max(0.25 * 8 / 3 * 3 / 2 * a, 0.25 * 8 / 3 * 3 * b, 8 / 5 * c))


def test_masses() -> None:
    network = chain()
    g, norm = vector(70), norm_of(network, [1.0, 0.0, 3.0])
    assert [b.scale for b in norm.blocks] == pytest.approx([4 * math.sqrt(8 / 4), 0, 4 / 3 * math.sqrt(6 / 3)])
    assert (norm.dualize(g)[32:52] == 0).all()
    assert float(g @ norm.dualize(g)) == pytest.approx(norm.dual_norm(g))
    for masses in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(InputError, match="3 masses are needed, not negative"):
            norm_of(network, masses)


def test_modules_that_are_no_chain() -> None:
    network = tokens()
    scales = [b.scale for b in norm_of(network).blocks]
    assert scales == pytest.approx([4 * 0.5, 4 * math.sqrt(9 / 8), 4, 4 * math.sqrt(9 / 2)])
    network[2].sensitivity = 2.0
    assert norm_of(network).blocks[0].scale == pytest.approx(4)
    with pytest.raises(InputError, match="no modular norm for layer 1 of class LSTM"):
        norm_of(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    with pytest.raises(InputError, match="unfolded, slices"):
        norm_of(chain(), None, "flat")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert sorted(k for b in norm_of(tied).blocks for k in b.entries.ravel()) == list(range(15))


def test_restricted_to_subdomains() -> None:
    network = chain().double()
    loss = ModuleLoss(
        network, nn.CrossEntropyLoss(reduction="none"), vector(70).view(10, 7), torch.arange(10) % 3,
    )  # fmt: skip
    whole, theta = modular_norm(loss), vector(70)
    for ranges in ([slice(0, 32)], [slice(0, 28), slice(52, 67)], [slice(28, 32)], [slice(7, 14)]):
        part = modular_norm(RestrictedLoss(loss, ranges))
        inside = torch.cat([theta[r] for r in ranges])
        extended = torch.zeros(70, dtype=torch.float64)
        for r in ranges:
            extended[r] = theta[r]
        assert part.norm(inside) == pytest.approx(whole.norm(extended), rel=1e-13)
        g = inside.clone()
        assert float(g @ part.dualize(g)) == pytest.approx(whole.dual_norm(extended), rel=1e-12)
    with pytest.raises(InputError, match="cuts a tensor"):
        modular_norm(RestrictedLoss(loss, [slice(3, 12)]))


def test_a_loss_without_modules_says_so(sum_over_rows: Any) -> None:
    loss = sum_over_rows(lambda theta, rows: rows @ theta, torch.ones(3, 2), [2], torch.zeros(2))
    with pytest.raises(InputError, match="choose -norm 2 or infinity"):
        modular_norm(loss)


def test_where_any_matrix_is() -> None:
    """Rows, columns and steps of all kinds, and places without any order."""
    rng = np.random.default_rng(0)
    whole = np.arange(240).reshape(12, 20)
    cases = [
        whole, whole.T, whole[::2, ::-3], whole[[0, 1, 2, 5, 6, 11]][:, [0, 1, 2, 9, 10, 3]], whole[:1], whole[:, :1],
        np.hstack([whole[:, 1:].copy(), whole[:, :1] + 300]), np.arange(12)[:, None] * np.arange(1, 21) + 7,
        rng.permutation(240).reshape(12, 20), np.array([[5]]),
    ]  # fmt: skip
    theta = torch.as_tensor(rng.standard_normal(600))
    for entries in cases:
        block = Block.of(entries, 1.0)
        assert np.array_equal(block.entries, entries)
        assert torch.equal(block.read(theta[1:]), theta[1:][torch.as_tensor(entries.copy())])
        assert block.largest(theta) == float(theta[torch.as_tensor(entries.copy())].abs().max())
    block, target = Block.of(cases[3], 1.0), torch.zeros(240, dtype=torch.float64)
    block.write(block.read(theta), target)
    expected = torch.zeros(240, dtype=torch.float64)
    expected[cases[3].ravel()] = theta[cases[3].ravel()]
    assert torch.equal(target, expected)
    assert block.inner(theta, block.read(theta).float()) == pytest.approx(float((expected**2).sum()), rel=1e-6)
    places = torch.as_tensor(cases[3].ravel())
    assert all(((a <= places) & (places < b)).any() for a, b in block.spans)
    assert sum(int(((a <= places) & (places < b)).sum()) for a, b in block.spans) >= len(places)
    behind = block.moved(lambda offset: offset + 7)
    assert torch.equal(behind.read(torch.cat([theta[:7], theta])), block.read(theta))
    assert len(Block.of(np.hstack([whole[:, 1:], whole[:, :1] + 300]), 1.0).tiles) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_large_matrices_are_within_the_tolerance(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    loss = ModuleLoss(network, lambda y, t: ((y - t) ** 2).sum(1), torch.zeros(2, 60).double(), torch.zeros(2, 4))
    exact = modular_norm(loss)
    near = ModularNorm(loss.size, exact.blocks, exact.eps, torch.empty(0, dtype=dtype), 0.05, 20)
    assert [near.large(block) for block in near.blocks] == [True, True, False]
    draw = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-100, 1e100):
        g = scale * torch.randn(loss.size, dtype=torch.float64, generator=draw)
        g[: 60 * 40] *= torch.logspace(0, -9, 60 * 40)
        direction = near.dualize(g)
        shares = [float((block.read(g) * block.read(direction)).sum()) for block in near.blocks]
        best = [float((block.read(g) * block.read(exact.dualize(g))).sum()) for block in near.blocks]
        assert all(0.95 * b <= s <= (1 + 1e-6) * b for s, b in zip(shares, best, strict=True))
        assert near.dual_norm(g) == pytest.approx(sum(shares), rel=1e-12)
        assert exact.norm(direction) == pytest.approx(1, abs=0.01)
        assert (1 - 1e-5) * exact.norm(g) <= near.norm(g) <= 1.0501 * exact.norm(g)
        g[7] = math.nan
        assert near.dualize(g).isnan().any()
        assert not math.isfinite(near.norm(g))
    g = torch.zeros(loss.size, dtype=torch.float64)
    assert near.norm(g) == 0
    assert (near.dualize(g) == 0).all()
    finest = ModularNorm(loss.size, exact.blocks, exact.eps, torch.empty(0, dtype=dtype), 0.009, 20)
    g = torch.randn(loss.size, dtype=torch.float64, generator=draw)
    assert torch.equal(finest.dualize(g), exact.dualize(g))
