"""Small coherent nets of images and volumes, and their losses whole and in tiles."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples, mapped
from ddml.data.tiled import TiledSamples
from ddml.decomposition.tiles import Tiles
from ddml.losses.branched import BranchedLoss
from ddml.networks.coherent import Coherent
from ddml.networks.families import Residual
from ddml.problems.classification import ClassificationLoss, cross_entropy

CLASSES, COUNT = 3, 13


class Unlike(nn.Module):
    """A coarse net of no sequential structure."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(inputs, CLASSES), nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * torch.sigmoid(self.right(x))


def local(shape: tuple[int, ...], residual: bool = False) -> nn.Sequential:
    """Smooth, so that derivatives can be compared with differences."""
    axes = len(shape) - 1
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[axes](shape[0], 2, 3, padding=1)
    block = [Residual(2, 1.0, axes=axes), nn.Tanh()] if residual else []
    size = 2 * torch.Size(shape[1:]).numel()
    return nn.Sequential(
        convolution, nn.Tanh(), *block, nn.Flatten(), nn.Linear(size, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    )


def coarse(kind: str, inputs: int) -> nn.Module:
    if kind == "unlike":
        return Unlike(inputs)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, CLASSES))
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, CLASSES))


# shape of a sample, tiles, overlap, and the rest of what coherent() takes
CASES: dict[str, dict[str, Any]] = {
    "2x2, dense": {"shape": (1, 7, 6), "parts": 2, "overlap": 1},
    "2x2, linear, logits": {"shape": (1, 7, 6), "parts": 2, "kind": "linear", "link": "logits"},
    "1x3, linear": {"shape": (2, 5, 8), "parts": (1, 3), "kind": "linear", "link": "probabilities"},
    "volume, padded": {"shape": (1, 3, 4, 5), "parts": (2, 1, 2), "overlap": 1, "padded": True},
    "residual": {"shape": (1, 6, 6), "parts": (2, 1), "overlap": 2, "residual": True},
    "coarse net of another kind": {"shape": (1, 7, 6), "parts": (2, 2), "kind": "unlike"},
    "one tile": {"shape": (1, 4, 4), "parts": 1},
    "a frozen net": {"shape": (1, 7, 6), "parts": 2, "frozen": (1,)},
    "a frozen coarse net": {"shape": (1, 7, 6), "parts": 2, "still": True},
    "frozen nets": {"shape": (1, 7, 6), "parts": 2, "frozen": (0, 1, 2, 3)},
}


def coherent(
    shape: tuple[int, ...] = (1, 7, 6),
    parts: Any = 2,
    overlap: int = 0,
    kind: str = "dense",
    link: str = "log_probabilities",
    padded: bool = False,
    residual: bool = False,
    frozen: Collection[int] = (),
    still: bool = False,
) -> Coherent:
    tiles = Tiles(shape, parts, overlap, padded)
    with torch.random.fork_rng():
        torch.manual_seed(len(tiles))
        nets = [local(s, residual) for s in tiles.shapes]
        behind = coarse(kind, len(tiles) * CLASSES)
        for p in (p for net in (*nets, behind) for p in net.parameters()):
            p.data = torch.randn(p.shape, dtype=torch.float64) / p[0].numel() ** 0.5
    for i in frozen:
        nets[i].requires_grad_(False)
    behind.requires_grad_(not still)
    return Coherent(nets, behind, tiles, link)


def images(shape: tuple[int, ...], count: int = COUNT) -> TensorSamples:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return TensorSamples(inputs, torch.randint(CLASSES, (count,), generator=generator))


def in_tiles(module: Coherent, samples: TensorSamples, chosen: Collection[int] | None = None) -> TiledSamples:
    numbers = range(len(module.nets)) if chosen is None else chosen
    return TiledSamples({i: mapped(samples, partial(module.tile, tile=i)) for i in numbers}, samples.targets)


def losses(name: str, count: int = COUNT) -> tuple[ClassificationLoss, BranchedLoss]:
    """Of the same coherent net: of whole samples, and in tiles."""
    module = coherent(**CASES[name])
    samples = images(CASES[name]["shape"], count)
    return ClassificationLoss(module, samples, CLASSES, 5), BranchedLoss(
        module, cross_entropy, in_tiles(module, samples)
    )
