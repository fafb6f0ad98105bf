"""Networks for classification, by name."""

from __future__ import annotations

import inspect
import math
import os
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ddml import plugins
from ddml.errors import InputError
from ddml.options import NEVER, Option

from .euler import euler, euler_cnn
from .families import FAMILIES, Residual

WIDTHS = {"euler": 32, "euler_cnn": 16}  # our choice: what an evaluation may cost

OPTIONS = (
    Option("network", "mlp", "mlp (widths of -widths, ReLU), cnn (LeNet: two convolutions and three linear layers), "
           "vgg (convolutions, each pooled, and two linear layers), resnet (vgg with a residual block behind each "
           "pooling), residual (three residual blocks), euler and euler_cnn (-blocks steps of y' = tanh(W y + b), "
           "dense and of convolutions), or path/to/file.py:Name, called with the shape of a sample, the number of "
           "classes, and width and depth where they are given. cnn, vgg and resnet are for images and volumes; none "
           "has batch statistics.", changes=NEVER),
    Option("widths", "32,32", "Hidden layers of the mlp: their neurons, as in 512,256.", changes=NEVER),
    Option("blocks", 16, "Steps of euler and euler_cnn; levels of depth halve them.", minimum=1, changes=NEVER),
    Option("width", None, f"Neurons of a block (default: euler {WIDTHS['euler']}), or channels (euler_cnn "
           f"{WIDTHS['euler_cnn']}); of cnn, vgg and resnet channels of the first stage, with which all other numbers "
           "of channels and neurons grow (cnn 6; vgg and resnet 16, of volumes 8).", kind=int, minimum=1,
           changes=NEVER),
    Option("depth", None, "Stages, each a convolution and its pooling (default: cnn 2; vgg and resnet 3).", kind=int,
           minimum=1, changes=NEVER),
    Option("horizon", 1.0, "The time T of euler and euler_cnn, of which each block is an equal step.", above=0.0,
           changes=NEVER),
    Option("image_refinement", 1, "Factor by which the sides of euler's images get smaller from level to level of "
           "depth, as long as it divides them and leaves 4 pixels; 1: all levels see all pixels.", minimum=1,
           changes=NEVER),
)  # fmt: skip


def mlp(shape: tuple[int, ...], classes: int, widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; 28 x 28 pixels, widths 32, 32 and 10 classes make 26,506 parameters."""
    sizes = [math.prod(shape), *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def residual(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Three residual blocks of 16, 32 and 64 channels, halved in size between them, and the mean over what is left.

    The cut and its widths are our choice.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise InputError(f"network 'residual' needs images (C, H, W) of at least 4 x 4 pixels; the samples are {shape}")
    scale = 3**-0.5  # Fixup's L^(-1 / (2m - 2)) for L = 3 branches of m = 2 layers
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1), nn.ReLU(), Residual(16, scale), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Residual(32, scale), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), Residual(64, scale), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


KNOWN: dict[str, Any] = {
    "mlp": mlp, **{name: family.make for name, family in FAMILIES.items()},
    "residual": residual, "euler": euler, "euler_cnn": euler_cnn,
}  # fmt: skip

SIZES = ("width", "depth")  # what a user's network may take by name


def parse_widths(text: str, option: str = "widths") -> list[int]:
    """Positive integers, separated by commas, that an option of that name is; none for an empty text.

    Raises
    ------
    InputError
        If the text is anything else.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"option -{option} must be integers above 0, as in 512,256; got '{text}'")
    return [int(word) for word in words]


def sizes_taken(network: str, chosen: Any) -> dict[str, Any]:
    """Which of width and depth a network takes, and their defaults: None for ours, Parameter.empty for none."""
    if network in KNOWN:
        return dict.fromkeys(SIZES if network in FAMILIES else SIZES[:1] if network in WIDTHS else ())
    try:
        arguments = inspect.signature(chosen).parameters
    except (TypeError, ValueError):  # nothing that can be called, or that says how
        return {}
    behind = [*list(arguments)[2:], *(a.name for a in arguments.values() if a.kind is a.KEYWORD_ONLY)]
    return {name: arguments[name].default for name in SIZES if name in behind}


def _sizes_given(settings: Any, chosen: Any) -> dict[str, int]:
    """Width and depth where they are given, by name.

    Raises
    ------
    InputError
        If the network does not take what is given, or needs what is not.
    """
    taken = sizes_taken(settings.network, chosen)
    given = {name: getattr(settings, name) for name in SIZES if getattr(settings, name) is not None}
    for name in given:
        if name not in taken:
            how = "" if settings.network in KNOWN else f", or give it an argument {name}"
            raise InputError(f"network '{settings.network}' takes no {name}: leave option -{name} out{how}")
    for name, default in taken.items():
        if default is inspect.Parameter.empty and name not in given:
            raise InputError(f"network '{settings.network}' takes a {name} without a default: give option -{name}")
    return given


def _arguments(settings: Any, shape: tuple[int, ...], classes: int) -> list[Any]:
    """What a network of ours is called with behind the shape and the classes.

    Raises
    ------
    InputError
        Numbers that do not go together, or ask for more parameters than there is memory for.
    """
    arguments: list[Any] = []
    least = 0  # parameters
    if settings.network == "mlp":
        arguments = [parse_widths(settings.widths)]
        least = sum(a * b for a, b in pairwise([math.prod(shape), *arguments[0], classes]))
    elif settings.network in FAMILIES:
        family = FAMILIES[settings.network]
        arguments = [*family.sizes(shape, settings.width, settings.depth)]
        least = family.plan(shape, classes, *arguments).parameters
    elif settings.network in WIDTHS:
        if not math.isfinite(settings.horizon):
            raise InputError(f"option -horizon must be a number, got {settings.horizon}")
        arguments = [settings.blocks, settings.width or WIDTHS[settings.network], settings.horizon]
        if settings.network == "euler":
            arguments.append(settings.image_refinement)
        elif settings.image_refinement > 1:
            raise InputError(f"option -image_refinement is for -network euler, got {settings.network}")
        least = arguments[0] * arguments[1] ** 2
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > memory // 4:  # bytes of one in single precision, in which torch makes them
        raise InputError(
            f"network '{settings.network}' has {least} parameters or more: they do not fit into the memory"
        )
    return arguments


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
        Unknown network, one that does not fit the samples or takes no width or depth where they are given, or a user's
        that is no torch module.
    """
    chosen = plugins.load(settings.network, KNOWN, "network")
    named = _sizes_given(settings, chosen)
    arguments = _arguments(settings, shape, classes)
    with torch.random.fork_rng(devices=[]), plugins.blamed(settings.network, KNOWN, "network"):
        torch.manual_seed(settings.seed)
        network = chosen(shape, classes, *arguments, **({} if settings.network in KNOWN else named))
    if not isinstance(network, nn.Module) or not list(network.parameters()):
        raise InputError(f"network '{settings.network}' must give a torch module with parameters")
    words = "x".join(map(str, shape))
    if settings.network == "mlp":
        words = "-".join(map(str, [math.prod(shape), *arguments[0], classes]))
    elif settings.network in FAMILIES and (named or settings.network != "cnn"):  # without, LeNet needs no words
        words += f"-{arguments[0]}x{arguments[1]}-{classes}"
    elif settings.network in WIDTHS:
        blocks, width, horizon = arguments[:3]
        words += f"-{width}x{blocks}-{classes}, T = {horizon:g}"
        words += f", images coarser by {settings.image_refinement}" if settings.image_refinement > 1 else ""
    elif settings.network not in KNOWN:
        words += "".join(f", {name} {number}" for name, number in named.items())
    return network.to(getattr(torch, settings.dtype)).eval(), f"{settings.network} {words}"
