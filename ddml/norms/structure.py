"""The modular structure of a torch module: masses, sensitivities and blocks, see :mod:`ddml.norms.modular`."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ddml.errors import InputError
from ddml.parameters import Parameter

from .modular import Block, Tile

CONVOLUTIONS = ("unfolded", "slices")


class Module(ABC):
    """Mass, sensitivity, and the blocks that the norm is a maximum over."""

    mass: float
    sensitivity: float

    @abstractmethod
    def blocks(self, factor: float = 1.0) -> Iterator[Block]:
        """Blocks of ``factor`` times the module's norm."""


@dataclass(frozen=True)
class Atom(Module):
    """A layer; a bond is one without mass and blocks."""

    mass: float
    own: tuple[Block, ...] = ()
    sensitivity: float = 1.0

    def blocks(self, factor: float = 1.0) -> Iterator[Block]:
        """See :meth:`Module.blocks`."""
        return (replace(block, scale=factor * block.scale) for block in self.own)


class Composition(Module):
    """Modules that data pass one after another, in this order (Bernstein, Newhouse 2024, Definition 6)."""

    def __init__(self, parts: Sequence[Module]) -> None:
        self.parts = tuple(parts)
        self.mass = math.fsum(p.mass for p in parts)
        self.sensitivity = math.prod(p.sensitivity for p in parts)

    def blocks(self, factor: float = 1.0) -> Iterator[Block]:
        """See :meth:`Module.blocks`."""
        for i, part in enumerate(self.parts):
            behind = math.prod(p.sensitivity for p in self.parts[i + 1 :])
            yield from part.blocks(factor * behind * self.mass / part.mass if part.mass > 0 else 0.0)


class Concatenation(Module):
    """Modules side by side (Bernstein, Newhouse 2024, Definition 7)."""

    def __init__(self, parts: Sequence[Module], sensitivity: float | None = None) -> None:
        self.parts = tuple(parts)
        self.mass = math.fsum(p.mass for p in parts)
        self.sensitivity = math.fsum(p.sensitivity for p in parts) if sensitivity is None else sensitivity

    def blocks(self, factor: float = 1.0) -> Iterator[Block]:
        """See :meth:`Module.blocks`."""
        for part in self.parts:
            yield from part.blocks(factor * self.mass / part.mass if part.mass > 0 else 0.0)


def modular(
    network: nn.Module,
    parameters: Sequence[Parameter],
    masses: Sequence[float] | None = None,
    convolution: str = "unfolded",
) -> Module:
    """The modular structure of a torch module.

    Parameters
    ----------
    network
        An ``nn.Sequential``, or any other module whose parameters belong to layers of the kinds above.
    parameters
        Where the parameters of that module, by their names, are in theta.
    masses
        Of the layers with weights, in the order of ``network.modules()``; default: 1 each, or an equal share of the
        ``modular_mass`` of a module around them.
    convolution
        The norm of convolutions, ``unfolded`` or ``slices``.

    Raises
    ------
    InputError
        Parameters of other modules; masses that are not as many as layers, negative, or all zero.
    """
    return _Builder(network, parameters, masses, convolution).whole


class _Builder:
    """Walks through a torch module."""

    def __init__(
        self, network: nn.Module, parameters: Sequence[Parameter], masses: Sequence[float] | None, convolution: str
    ) -> None:
        if convolution not in CONVOLUTIONS:
            raise InputError(f"the norm of convolutions must be one of {', '.join(CONVOLUTIONS)}, got '{convolution}'")
        self.convolution = convolution
        named = dict(network.named_parameters())
        self.places = {id(named[p.name]): p for p in parameters if p.name in named}
        self.names = {id(m): name or type(m).__name__ for name, m in network.named_modules()}
        layers = [m for m in network.modules() if self._weighted(m)]
        self.masses = {id(m): 1.0 for m in layers}
        self.scales = {id(m): 1.0 for m in layers}
        for module in network.modules():
            inside = [m for m in module.modules() if self._weighted(m)]
            for m in inside:
                if hasattr(module, "modular_mass"):
                    self.masses[id(m)] = float(getattr(module, "modular_mass", 1.0)) / len(inside)
                self.scales[id(m)] *= float(getattr(module, "modular_scale", 1.0))
        if masses is not None:
            if len(masses) != len(layers) or min(masses) < 0 or not sum(masses) > 0:
                kinds = ", ".join(f"{self.names[id(m)]} {type(m).__name__}" for m in layers)
                raise InputError(
                    f"{len(layers)} masses are needed, not negative and not all zero, for the layers {kinds}; "
                    f"got {list(masses)}"
                )
            self.masses = dict(zip(map(id, layers), masses, strict=True))
        self.taken: set[int] = set()
        self.whole = self._module(network)

    def _weighted(self, module: nn.Module) -> bool:
        return any(self._known(p) for p in module.parameters(recurse=False))

    def _known(self, tensor: nn.Parameter) -> bool:
        """Whether it is not frozen."""
        return tensor.requires_grad or id(tensor) in self.places

    def _module(self, module: nn.Module) -> Module:
        if isinstance(module, nn.Sequential):
            return Composition([self._module(child) for child in module])
        sensitivity = float(getattr(module, "sensitivity", 1.0))
        layers = [self._layer(m) for m in module.modules() if self._weighted(m)]
        if len(layers) == 1 and self._weighted(module):
            return layers[0]
        return Concatenation(layers, sensitivity) if layers else Atom(0.0, (), sensitivity)

    def _layer(self, layer: nn.Module) -> Module:
        tensors = [(name, p) for name, p in layer.named_parameters(recurse=False) if self._known(p)]
        own = {name: self._place(p) for name, p in tensors if id(p) not in self.taken}
        self.taken |= {id(p) for p in layer.parameters(recurse=False)}
        weight, bias = own.pop("weight", None), own.pop("bias", None)
        column = [] if bias is None else [_column(bias)]
        blocks: list[Block] | None = None
        norms = nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm
        if own:
            pass
        elif isinstance(layer, nn.Embedding):
            blocks = [] if weight is None else [_block([_rows(weight)], weight.shape[1] ** -0.5, True)]
        elif isinstance(layer, nn.Linear):
            matrix = [] if weight is None else [_rows(weight)]
            blocks = _operators([[*matrix, *column]] if matrix or column else [])
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            blocks = self._convolution(weight, bias, layer.groups)
        elif isinstance(layer, norms):
            blocks = [] if weight is None else [_block([_column(weight)], 2.0, True)]
            blocks += _operators([column] if column else [], 2.0)
        if blocks is None:
            raise InputError(
                f"there is no modular norm for layer {self.names[id(layer)]} of class {type(layer).__name__}, with "
                f"parameters {', '.join(n for n, _ in layer.named_parameters(recurse=False))}: choose another norm"
            )
        scale = self.scales[id(layer)]
        return Atom(self.masses[id(layer)], tuple(replace(block, scale=scale * block.scale) for block in blocks))

    def _place(self, tensor: Tensor) -> Parameter:
        place = self.places.get(id(tensor))
        if place is None:
            raise InputError("the network has parameters that the loss does not know")
        return place

    def _convolution(self, weight: Parameter | None, bias: Parameter | None, groups: int) -> list[Block]:
        column = [] if bias is None else [_column(bias)]
        if weight is None:
            return _operators([column] if column else [])
        out, channels, width = weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[1:])
        if self.convolution == "unfolded":
            return _operators(
                [
                    [
                        Tile((0, 0), (out, width), (width, 1), weight.offset + g * out * width),
                        *([] if bias is None else [Tile((0, 0), (out, 1), (1, 1), bias.offset + g * out)]),
                    ]
                    for g in range(groups)
                ]
            )
        size = width // channels
        slices = [
            [Tile((0, 0), (out, channels), (width, size), weight.offset + g * out * width + k)]
            for g in range(groups)
            for k in range(size)
        ]
        count = size + len(column)
        return _operators(slices, count) + _operators([column] if column else [], count)


def _rows(place: Parameter) -> Tile:
    """A tensor as a matrix of its first dimension and all others."""
    columns = place.size // place.shape[0]
    return Tile((0, 0), (place.shape[0], columns), (columns, 1), place.offset)


def _column(place: Parameter) -> Tile:
    """A tensor as a matrix of one column."""
    return Tile((0, 0), (place.size, 1), (1, 1), place.offset)


def _block(parts: Sequence[Tile], scale: float, by_rows: bool = False) -> Block:
    """A block of matrices beside each other."""
    ends = list(itertools.accumulate((part.shape[1] for part in parts), initial=0))
    shifted = tuple(replace(part, corner=(0, begin)) for part, begin in zip(parts, ends[:-1], strict=True))
    return Block(shifted, (parts[0].shape[0], ends[-1]), scale, by_rows)


def _operators(matrices: Sequence[Sequence[Tile]], factor: float = 1.0) -> list[Block]:
    """Blocks with ``factor`` times the operator norm from RMS to RMS."""
    made = [_block(parts, factor) for parts in matrices]
    return [replace(block, scale=factor * math.sqrt(block.shape[1] / block.shape[0])) for block in made]
