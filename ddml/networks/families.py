"""Families of convolutional networks for images and volumes, of any width and depth.

The same function makes a network of images (C, H, W) and one of volumes (C, D, H, W). All are deterministic, as a loss
needs it: no batch statistics, also not in the residual blocks, and no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        if not self.first.weight.is_meta:  # where torch imports for seconds, to draw nothing
            nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        with torch.no_grad():
            self.first.weight *= scale
        for tensor in (self.first.bias, self.second.weight, self.second.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """The block's value, of the shape of x (B, C, ...)."""
        return x + self.second(torch.relu(self.first(x)))


def cnn(shape: tuple[int, ...], classes: int, width: int, depth: int) -> nn.Sequential:
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
        raise InputError(
            f"network 'cnn' of {depth} stages needs at least {' x '.join([str(least)] * axes)} pixels; the samples are "
            f"{shape}"
        )
    channels = [shape[0], *((2 * width * 8**i + 3**i) // (2 * 3**i) for i in range(depth))]  # the nearest integers
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [CONVOLUTIONS[axes](inputs, outputs, 5), nn.ReLU(), MAXIMA[axes](2)]
        sides = [(side - 4) // 2 for side in sides]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(sides), 20 * width), nn.ReLU(),
        nn.Linear(20 * width, 14 * width), nn.ReLU(), nn.Linear(14 * width, classes),
    )  # fmt: skip


def vgg(shape: tuple[int, ...], classes: int, width: int, depth: int) -> nn.Sequential:
    """Convolutions of 3 pixels along each axis that keep the size, each pooled by 2, as VGG begins, and two layers.

    Stage i has ``width`` times 2^i channels, and the layer before the classes 8 times ``width`` neurons. An axis that
    has come to fewer than 4 pixels is not pooled further, and each stage must pool one. One convolution a stage, these
    numbers and this rule are our choice.

    Raises
    ------
    InputError
        As for :func:`cnn`.
    """
    return _pooled("vgg", shape, classes, width, depth, residual=False)


def resnet(shape: tuple[int, ...], classes: int, width: int, depth: int) -> nn.Sequential:
    """The network of :func:`vgg` with a :class:`Residual` block and ReLU behind each pooling, our choice."""
    return _pooled("resnet", shape, classes, width, depth, residual=True)


def _pooled(name: str, shape: tuple[int, ...], classes: int, width: int, depth: int, residual: bool) -> nn.Sequential:
    _check(shape, name, width, depth)
    axes, sides, channels = len(shape) - 1, list(shape[1:]), shape[0]
    layers: list[nn.Module] = []
    for stage in range(depth):
        kernel = tuple(2 if side >= 4 else 1 for side in sides)
        if max(kernel) == 1:
            remedy = f"it has room for -depth {stage}" if stage else "at least one axis of 4 pixels is needed"
            raise InputError(f"network '{name}' of {depth} stages is too deep for samples {shape}: {remedy}")
        layers += [CONVOLUTIONS[axes](channels, width << stage, 3, padding=1), nn.ReLU(), MAXIMA[axes](kernel)]
        channels, sides = width << stage, [side // k for side, k in zip(sides, kernel, strict=True)]
        if residual:  # Fixup's L^(-1 / (2m - 2)) for L = depth branches of m = 2 layers
            layers += [Residual(channels, depth**-0.5, axes=axes), nn.ReLU()]
    neurons = 8 * width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * math.prod(sides), neurons), nn.ReLU(), nn.Linear(neurons, classes)
    )


def _check(shape: tuple[int, ...], name: str, width: int, depth: int) -> None:
    for what, number in (("width", width), ("depth", depth)):
        if number < 1:
            raise InputError(f"network '{name}' needs a {what} of 1 or more, got {number}")
    if len(shape) not in (3, 4):
        raise InputError(f"network '{name}' needs images (C, H, W) or volumes (C, D, H, W); the samples are {shape}")


class Family(NamedTuple):
    """Networks of one kind: what makes one of a shape, classes, width and depth, and its sizes by default.

    Attributes
    ----------
    make
        ``make(shape, classes, width, depth)``.
    width, depth : int
        Of images, by default; volumes have ``volume_width``.
    """

    make: Callable[[tuple[int, ...], int, int, int], nn.Sequential]
    width: int
    volume_width: int
    depth: int

    def sizes(self, shape: Sequence[int], width: int | None, depth: int | None) -> tuple[int, int]:
        """Width and depth for samples of a shape, those given or those by default."""
        return width or (self.volume_width if len(shape) == 4 else self.width), depth or self.depth


# the first is LeNet's; the others are our choice: what an evaluation may cost
FAMILIES = {"cnn": Family(cnn, 6, 6, 2), "vgg": Family(vgg, 16, 8, 3), "resnet": Family(resnet, 16, 8, 3)}
