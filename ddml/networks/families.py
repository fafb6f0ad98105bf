"""Families of convolutional networks for images and volumes, of any width and depth.

The same function makes a network of images (C, H, W) and one of volumes (C, D, H, W). All are deterministic, as a loss
needs it: no batch statistics, also not in the residual blocks, and no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddml.errors import InputError

CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
MAXIMA: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Residual(nn.Module):
    """x + F(relu(C(x))) with two convolutions C and F, of ``kernel`` pixels along each axis, that keep the size.

    Initialised as Fixup does without normalisation (Zhang, Dauphin, Ma 2019): F is zero, so that the block begins as
    the identity, and C is He's, times ``scale``.
    """

    def __init__(self, channels: int, scale: float, kernel: int = 3, axes: int = 2) -> None:
        super().__init__()
        self.first = CONVOLUTIONS[axes](channels, channels, kernel, padding=kernel // 2)
        self.second = CONVOLUTIONS[axes](channels, channels, kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        with torch.no_grad():
            self.first.weight *= scale
        for tensor in (self.first.bias, self.second.weight, self.second.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """The block's value, of the shape of x (B, C, ...)."""
        return x + self.second(torch.relu(self.first(x)))


@dataclass(frozen=True)
class Plan:
    """A network before it is made: stages of a convolution, a maximum and ReLU, and linear layers with ReLU between.

    Attributes
    ----------
    channels : tuple of int
        Of the samples, and behind each stage.
    window, padding : int
        Pixels of a convolution along each axis, and zeros on each side.
    pooled : tuple of tuple of int
        Pixels of each maximum along each axis.
    neurons : tuple of int
        Numbers that enter the first linear layer, and behind each.
    residual : bool
        Whether a :class:`Residual` block and ReLU stand behind each stage.
    """

    channels: tuple[int, ...]
    window: int
    padding: int
    pooled: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]
    residual: bool = False

    @property
    def parameters(self) -> int:
        """How many there are."""
        axes = len(self.pooled[0])
        found = sum((self.window**axes * a + 1) * b for a, b in pairwise(self.channels))
        if self.residual:
            found += sum(2 * (3**axes * c + 1) * c for c in self.channels[1:])
        return found + sum((a + 1) * b for a, b in pairwise(self.neurons))

    def network(self) -> nn.Sequential:
        """The network, with numbers drawn by torch."""
        axes, layers = len(self.pooled[0]), list[nn.Module]()
        for (inputs, outputs), pooled in zip(pairwise(self.channels), self.pooled, strict=True):
            layers += [CONVOLUTIONS[axes](inputs, outputs, self.window, padding=self.padding)]
            layers += [MAXIMA[axes](pooled), nn.ReLU()]  # the same in the other order, but on fewer numbers
            if self.residual:  # Fixup's L^(-1 / (2m - 2)) for L branches, one a stage, of m = 2 layers
                layers += [Residual(outputs, len(self.pooled) ** -0.5, axes=axes), nn.ReLU()]
        layers += [nn.Flatten()]
        for inputs, outputs in pairwise(self.neurons):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def cnn(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Plan:
    """LeNet with ReLU and maxima, and its likes of other widths and depths.

    Each stage is a convolution of 5 pixels along each axis without padding, pooled by 2; the channels, ``width`` of
    them first, grow by 8/3. Behind are 20 and 14 times ``width`` neurons, and the classes. With the width 6 and the
    depth 2 that is LeNet: 6 and 16 channels, 120 and 84 neurons; 3 x 32 x 32 pixels and 10 classes make 62,006
    parameters. The rule for other widths and depths is our choice.

    Raises
    ------
    InputError
        A width or depth below 1; samples that are no images or volumes, or too small for so many stages.
    """
    _check(shape, "cnn", width, depth)
    least = 1
    for _ in range(min(depth, 64)):  # nothing has more pixels
        least = 2 * least + 4
    axes, sides = len(shape) - 1, list(shape[1:])
    if min(sides) < least:
        words = " x ".join([str(least)] * axes)
        raise InputError(f"network 'cnn' of {depth} stages needs at least {words} pixels; the samples are {shape}")
    for _ in range(depth):
        sides = [(side - 4) // 2 for side in sides]
    grown = [(2 * width * 8**i + 3**i) // (2 * 3**i) for i in range(depth)]  # the nearest integers
    neurons = grown[-1] * math.prod(sides), 20 * width, 14 * width, classes
    return Plan((shape[0], *grown), 5, 0, ((2,) * axes,) * depth, neurons)


def vgg(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Plan:
    """Convolutions of 3 pixels along each axis that keep the size, each pooled by 2, as VGG begins, and two layers.

    Stage i has ``width`` times 2^i channels, and the layer before the classes 8 times ``width`` neurons. An axis that
    has come to fewer than 4 pixels is not pooled further, and each stage must pool one. One convolution a stage, these
    numbers and this rule are our choice.

    Raises
    ------
    InputError
        As for :func:`cnn`.
    """
    return _halving("vgg", shape, classes, width, depth)


def resnet(shape: tuple[int, ...], classes: int, width: int, depth: int) -> Plan:
    """The network of :func:`vgg` with a :class:`Residual` block and ReLU behind each pooling, our choice."""
    return replace(_halving("resnet", shape, classes, width, depth), residual=True)


def _halving(name: str, shape: tuple[int, ...], classes: int, width: int, depth: int) -> Plan:
    _check(shape, name, width, depth)
    sides, pooled = shape[1:], list[tuple[int, ...]]()
    for stage in range(depth):
        pooled.append(tuple(2 if side >= 4 else 1 for side in sides))
        if max(pooled[-1]) == 1:
            remedy = f"it has room for -depth {stage}" if stage else "at least one axis of 4 pixels is needed"
            raise InputError(f"network '{name}' of {depth} stages is too deep for samples {shape}: {remedy}")
        sides = tuple(side // p for side, p in zip(sides, pooled[-1], strict=True))
    channels = [width << stage for stage in range(depth)]
    neurons = channels[-1] * math.prod(sides), 8 * width, classes
    return Plan((shape[0], *channels), 3, 1, tuple(pooled), neurons)


def _check(shape: tuple[int, ...], name: str, width: int, depth: int) -> None:
    for what, number in (("width", width), ("depth", depth)):
        if number < 1:
            raise InputError(f"network '{name}' needs a {what} of 1 or more, got {number}")
    if len(shape) not in (3, 4):
        raise InputError(f"network '{name}' needs images (C, H, W) or volumes (C, D, H, W); the samples are {shape}")


class Family(NamedTuple):
    """Networks of one kind.

    Attributes
    ----------
    plan
        ``plan(shape, classes, width, depth)`` is one of them.
    width, volume_width, depth : int
        By default, of images and of volumes.
    """

    plan: Callable[[tuple[int, ...], int, int, int], Plan]
    width: int
    volume_width: int
    depth: int

    def sizes(self, shape: Sequence[int], width: int | None, depth: int | None) -> tuple[int, int]:
        """Width and depth for samples of a shape, those given or those by default."""
        return width or (self.volume_width if len(shape) == 4 else self.width), depth or self.depth

    def make(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> nn.Sequential:
        """The network."""
        return self.plan(shape, classes, width, depth).network()


# the first is LeNet's; the others are our choice: what an evaluation may cost
FAMILIES = {"cnn": Family(cnn, 6, 6, 2), "vgg": Family(vgg, 16, 8, 3), "resnet": Family(resnet, 16, 8, 3)}
