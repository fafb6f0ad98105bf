"""Networks of all tiles, and the coarse net or the fusion behind them, as one network of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddml.data.scaling import Scaling
from ddml.errors import InputError

from .fusions import FUSIONS, LINKS, chances, joined, linked


class Cuts(Protocol):
    """What cuts samples into tiles, see :class:`ddml.decomposition.tiles.Tiles`.

    Attributes
    ----------
    shapes : list of tuple of int
        Of the tiles.
    """

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]: ...

    def __len__(self) -> int: ...

    def cut(self, values: Any, tile: int) -> Any:
        """A tile of samples."""


class Coherent(nn.Module):
    """A network for each tile, side by side, and the coarse net behind them (Klawonn, Lanser, Weber, arXiv 2408.14442).

    Its parameters are those of the networks, one after the other in the order of the tiles, and then those of the
    coarse net. In the modular norm the networks are side by side, and the outputs of all of them move as far as those
    of the one that moves farthest: none has less of the radius because there are others (our choice).

    Parameters
    ----------
    nets
        Of the tiles: each maps samples (B, C, ...) of its tile to logits (B, K).
    coarse
        Maps what the link makes of all logits, (B, N K), to one number for each class, (B, K).
    tiles
        Of the samples, as many.
    link
        One of :data:`ddml.networks.fusions.LINKS`.
    scalings
        Of each tile, where the samples are given as they are stored.

    Attributes
    ----------
    nets : ModuleList
    coarse : Module
    shapes : list of tuple of int
        Of the tiles.
    learnt : list of Parameter
        Those that the networks do not hold fixed themselves.

    Raises
    ------
    InputError
        Other numbers of networks, tiles or scalings; a link that there is not; a parameter in two networks.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        coarse: nn.Module,
        tiles: Cuts,
        link: str = "probabilities",
        scalings: Sequence[Scaling] | None = None,
    ) -> None:
        super().__init__()
        if link not in LINKS:
            raise InputError(f"the link must be one of {', '.join(LINKS)}, got '{link}'")
        if len(nets) != len(tiles):
            raise InputError(f"{len(tiles)} tiles need as many networks, got {len(nets)}")
        if scalings is not None and len(scalings) != len(tiles):
            raise InputError(f"{len(tiles)} tiles need as many scalings, got {len(scalings)}")
        held = [id(p) for part in (*nets, coarse) for p in part.parameters()]
        if len(held) != len(set(held)):
            raise InputError("a parameter is in two of the networks of a coherent net: each must have its own")
        self.nets, self.coarse = nn.ModuleList(nets), coarse
        self.tiles, self.link, self.scalings = tiles, link, scalings
        self.shapes = tiles.shapes
        self.learnt = [p for p in self.parameters() if p.requires_grad]

    @property
    def modular_scale(self) -> float:
        """Layers on the longest way from a tile to the classes over all layers, see :mod:`ddml.norms.modular`."""
        local, behind = [_trained_layers(net) for net in self.nets], _trained_layers(self.coarse)
        return (max(local) + behind) / max(sum(local) + behind, 1)

    def tile(self, images: Tensor, tile: int) -> Tensor:
        """What the network of a tile is given of samples (B, C, ...)."""
        found: Tensor = self.tiles.cut(images, tile)
        return found if self.scalings is None else self.scalings[tile].apply(found.clone())

    def linked(self, logits: Tensor) -> Tensor:
        """What the coarse net is given of logits (..., K)."""
        return linked(logits, self.link)

    def forward(self, images: Tensor) -> Tensor:
        """The outputs (B, K) for samples (B, C, ...)."""
        logits = torch.stack([net(self.tile(images, i)) for i, net in enumerate(self.nets)])
        outputs: Tensor = self.coarse(joined(logits, self.link))
        return outputs


class Fused(nn.Module):
    """A network for each tile, side by side, and a fusion without training behind them.

    Parameters
    ----------
    nets
        Of the tiles: each maps samples (B, C, ...) of its tile to logits (B, K).
    tiles
        Of the samples, as many.
    fusion
        One of :data:`ddml.networks.fusions.FUSIONS`.

    Raises
    ------
    InputError
        Another number of networks than of tiles; a fusion that there is not.
    """

    def __init__(self, nets: Sequence[nn.Module], tiles: Cuts, fusion: str) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise InputError(f"the fusion must be one of {', '.join(FUSIONS)}, got '{fusion}'")
        if len(nets) != len(tiles):
            raise InputError(f"{len(tiles)} tiles need as many networks, got {len(nets)}")
        self.nets, self.tiles, self.fusion = nn.ModuleList(nets), tiles, fusion

    def forward(self, images: Tensor) -> Tensor:
        """The logarithms (B, K) of :func:`ddml.networks.fusions.chances`, float64, for samples (B, C, ...)."""
        logits = torch.stack([net(self.tiles.cut(images, i)) for i, net in enumerate(self.nets)])
        found = chances(logits, self.fusion)
        return found.clamp(min=torch.finfo(found.dtype).tiny).log()  # finite


def _trained_layers(module: nn.Module) -> int:
    return sum(any(p.requires_grad for p in part.parameters(recurse=False)) for part in module.modules())
