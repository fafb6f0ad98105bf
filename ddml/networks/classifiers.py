"""Networks for classification, by name."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ddml import plugins
from ddml.errors import InputError
from ddml.options import NEVER, Option

from .euler import euler, euler_cnn

WIDTHS = {"euler": 32, "euler_cnn": 16}  # our choice: what an evaluation may cost

OPTIONS = (
    Option("network", "mlp", "mlp (widths of -widths, ReLU), cnn (LeNet: two convolutions and three linear layers), "
           "residual (three residual blocks without batch statistics), euler and euler_cnn (-blocks steps of y' = "
           "tanh(W y + b), dense and of convolutions), or path/to/file.py:Name, called with the shape of a sample and "
           "the number of classes.", changes=NEVER),
    Option("widths", "32,32", "Hidden layers of the mlp: their neurons, as in 512,256.", changes=NEVER),
    Option("blocks", 16, "Steps of euler and euler_cnn; levels of depth halve them.", minimum=1, changes=NEVER),
    Option("width", None, f"Neurons of a block (default: euler {WIDTHS['euler']}), or channels (euler_cnn "
           f"{WIDTHS['euler_cnn']}).", kind=int, minimum=1, changes=NEVER),
    Option("horizon", 1.0, "The time T of euler and euler_cnn, of which each block is an equal step.", above=0.0,
           changes=NEVER),
    Option("image_refinement", 1, "Factor by which the sides of euler's images get smaller from level to level of "
           "depth, as long as it divides them and leaves 4 pixels; 1: all levels see all pixels.", minimum=1,
           changes=NEVER),
)  # fmt: skip


class Residual(nn.Module):
    """x + F(relu(C(x))) with two convolutions C and F of k x k that keep the size.

    Initialised as Fixup does without normalisation (Zhang, Dauphin, Ma 2019): F is zero, so that the block begins as
    the identity, and C is He's, times ``scale``.
    """

    def __init__(self, channels: int, scale: float, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        with torch.no_grad():
            self.first.weight *= scale
        for tensor in (self.first.bias, self.second.weight, self.second.bias):
            if tensor is not None:
                nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """The block's value, of the shape of x (B, C, H, W)."""
        return x + self.second(torch.relu(self.first(x)))


def mlp(shape: tuple[int, ...], classes: int, widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; 28 x 28 pixels, widths 32, 32 and 10 classes make 26,506 parameters."""
    sizes = [math.prod(shape), *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def _check_images(shape: tuple[int, ...], name: str, smallest: int) -> None:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        least = f"{smallest} x {smallest}"
        raise InputError(f"network '{name}' needs images (C, H, W) of at least {least} pixels; the samples are {shape}")


def cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """LeNet with ReLU and maxima: convolutions 6@5x5 and 16@5x5, each pooled by 2, then 120, 84 and the classes.

    3 x 32 x 32 pixels and 10 classes make 62,006 parameters.
    """
    _check_images(shape, "cnn", 16)
    height, width = (((n - 4) // 2 - 4) // 2 for n in shape[1:])
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def residual(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Three residual blocks of 16, 32 and 64 channels, halved in size between them, and the mean over what is left.

    The cut and its widths are our choice.
    """
    _check_images(shape, "residual", 4)
    scale = 3**-0.5  # Fixup's L^(-1 / (2m - 2)) for L = 3 branches of m = 2 layers
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1), nn.ReLU(), Residual(16, scale), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Residual(32, scale), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), Residual(64, scale), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


KNOWN: dict[str, Any] = {
    "mlp": mlp, "cnn": cnn, "residual": residual, "euler": euler, "euler_cnn": euler_cnn,
}  # fmt: skip


def parse_widths(text: str) -> list[int]:
    """Positive integers, separated by commas; none for an empty text.

    Raises
    ------
    InputError
        If the text is anything else.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"option -widths must be integers above 0, as in 512,256; got '{text}'")
    return [int(word) for word in words]


def build_classifier(settings: Any, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, str]:
    """A network with initial parameters drawn from ``settings.seed``, and its description.

    Parameters
    ----------
    settings
        Values of :data:`OPTIONS`, ``seed`` and ``dtype``.
    shape
        Of a sample.
    classes
        How many there are.

    Raises
    ------
    InputError
        Unknown network, one that does not fit the samples, or a user's that is no torch module.
    """
    chosen = plugins.load(settings.network, KNOWN, "network")
    arguments: list[Any] = [parse_widths(settings.widths)] if settings.network == "mlp" else []
    if settings.network in WIDTHS:
        if not math.isfinite(settings.horizon):
            raise InputError(f"option -horizon must be a number, got {settings.horizon}")
        arguments = [settings.blocks, settings.width or WIDTHS[settings.network], settings.horizon]
        if settings.network == "euler":
            arguments.append(settings.image_refinement)
        elif settings.image_refinement > 1:
            raise InputError(f"option -image_refinement is for -network euler, got {settings.network}")
    with torch.random.fork_rng(devices=[]), plugins.blamed(settings.network, KNOWN, "network"):
        torch.manual_seed(settings.seed)
        network = chosen(shape, classes, *arguments)
    if not isinstance(network, nn.Module) or not list(network.parameters()):
        raise InputError(f"network '{settings.network}' must give a torch module with parameters")
    words = "x".join(map(str, shape))
    if settings.network == "mlp":
        words = "-".join(map(str, [math.prod(shape), *arguments[0], classes]))
    elif settings.network in WIDTHS:
        blocks, width, horizon = arguments[:3]
        words += f"-{width}x{blocks}-{classes}, T = {horizon:g}"
        words += f", images coarser by {settings.image_refinement}" if settings.image_refinement > 1 else ""
    return network.to(getattr(torch, settings.dtype)).eval(), f"{settings.network} {words}"
