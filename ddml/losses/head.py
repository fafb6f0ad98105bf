"""The net behind networks side by side: a coarse net of what a link makes of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branch import Branch
from .modules import is_chain


class Kept(NamedTuple):
    """What networks that do not move bring.

    Attributes
    ----------
    moving : tuple of int
        The others.
    inputs : Tensor
        To the sum that leaves the first coarse layer (B, h); or to its inputs (B, N K), where that layer moves, too.
    summed : bool
        Which of the two.
    """

    moving: tuple[int, ...]
    inputs: Tensor
    summed: bool


class Head(Branch):
    """A coarse net that maps (B, N K), the K numbers of each of N networks in turn, to outputs.

    Parameters
    ----------
    linked
        What it is given of a network's outputs (B, K), of the same shape.
    count, classes
        N and K.
    rest
        As for :class:`ddml.losses.branch.Branch`.

    Attributes
    ----------
    entrance : int
        Number of the child that is its first layer, if that is linear; -1 else.
    entered : bool
        Whether that layer is trained.
    """

    def __init__(self, linked: Callable[[Tensor], Tensor], count: int, classes: int, *rest: Any) -> None:
        super().__init__(*rest)
        self.linked, self.count, self.classes = linked, count, classes
        children = list(self.module.named_children()) if is_chain(self.module) else []
        first = next((k for k, (_, child) in enumerate(children) if not isinstance(child, nn.Flatten)), -1)
        self.entrance = first if first >= 0 and isinstance(children[first][1], nn.Linear) else -1
        self.entered = self.entrance >= 0 and children[first][0] in self.names

    @torch.no_grad()
    def keep(self, theta: Tensor, logits: Sequence[Tensor], moving: Collection[int], summed: bool) -> Kept:
        """What the networks that do not move bring, whose outputs (B, K) are these."""
        features = [torch.zeros_like(x) if i in moving else self.linked(x) for i, x in enumerate(logits)]
        inputs, summed = torch.cat(features, dim=1), summed and self.entrance >= 0
        if summed:
            inputs = self._first(self.at(theta))(inputs)
        return Kept(tuple(moving), inputs, summed)

    def behind(self, coarse: nn.Module, logits: Mapping[int, Tensor], kept: Kept | None = None) -> Tensor:
        """What the net, as :meth:`.Branch.at` gives it, makes of networks' outputs (B, K); others are kept."""
        features = {i: self.linked(found) for i, found in logits.items()}
        if kept is None or not kept.summed:
            brought = {} if kept is None else dict(enumerate(kept.inputs.split(self.classes, dim=1)))
            every = {**brought, **features}
            outputs: Tensor = coarse(torch.cat([every[i] for i in range(self.count)], dim=1))
            return outputs
        found, weight = kept.inputs, self._first(coarse).weight
        for i, values in features.items():
            found = found + values @ weight[:, i * self.classes : (i + 1) * self.classes].T
        for child in list(coarse.children())[self.entrance + 1 :]:
            found = child(found)
        return found

    def _first(self, coarse: nn.Module) -> nn.Linear:
        layer = list(coarse.children())[self.entrance]
        assert isinstance(layer, nn.Linear)
        return layer
