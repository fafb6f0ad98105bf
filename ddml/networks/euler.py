"""Residual networks as the forward Euler method: blocks of a step, which networks of other depths share."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ddml.errors import InputError

from .depth import average, check_blocks

CELLS = 4  # rows and columns of means that an image leaves to the last layer (our choice)


class Opening(nn.Module):
    """tanh of an affine map of a sample: a linear one of what is flattened, or a convolution."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, width) or (B, width, H, W)."""
        return torch.tanh(self.layer(x.flatten(1) if isinstance(self.layer, nn.Linear) else x))


class EulerBlock(nn.Module):
    """y + h tanh(g (W y + b)), of the shape of y: a step h with the weights g W and g b.

    Attributes
    ----------
    step, gain : float
        h and g.
    modular_mass, modular_scale : float
        See :mod:`ddml.norms.modular`: the mass given, and h g, by which a change of W changes the branch.
    """

    def __init__(self, layer: nn.Module, step: float, gain: float, mass: float) -> None:
        super().__init__()
        self.layer = layer
        self.step, self.gain, self.modular_mass = step, gain, mass
        self.modular_scale = step * gain

    def forward(self, y: Tensor) -> Tensor:
        """See the class."""
        bent = self.layer(y) if self.gain == 1 else self.gain * self.layer(y)
        return y + self.step * torch.tanh(bent)


class Closing(nn.Module):
    """A linear layer, of an image's means over 4 x 4 cells or over as many as it has pixels."""

    def __init__(self, width: int, classes: int, cells: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.cells = cells
        self.layer = nn.Linear(width * (math.prod(cells) if cells else 1), classes)

    def forward(self, y: Tensor) -> Tensor:
        """Values (B, classes)."""
        if self.cells is not None:
            y = nn.functional.adaptive_avg_pool2d(y, self.cells).flatten(1)
        return self.layer(y)


class EulerNetwork(nn.Sequential):
    r"""L steps T / L of forward Euler for y' = tanh(W(t) y + b(t)) between an opening and a closing layer.

    Initially all weights are drawn from N(0, 1 / inputs of a neuron), each block's anew, and biases are 0. The
    children are ``open``, ``block0``, ``block1``, ... and ``close``.

    A network that is coarser by a factor c has L / c blocks of the step c T / L, and is kept in other coordinates: its
    blocks compute with g / sqrt(c) times their parameters (:mod:`ddml.networks.depth`). That the parameters of k
    levels below the finest have the gain c^(-k / 2), so that prolongations are isometries, is our choice.

    In the modular norm all blocks together have the mass of one layer, and a block the share 1 / L of it; with the
    branch scaled by T g / L the norm of the network is the maximum of 3 s(open), 3 T g s(block) and 3 s(close), with s
    the norm of a layer: that of a coarse network's step is that of its prolongation (our choice).

    Parameters
    ----------
    opening, layer, closing
        Make the first module, the affine map of a block, which keeps the shape, and the last one.
    blocks
        L.
    horizon
        T.
    gain
        g.
    """

    def __init__(
        self,
        opening: Callable[[], nn.Module],
        layer: Callable[[], nn.Module],
        closing: Callable[[], nn.Module],
        blocks: int,
        horizon: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        step, mass = horizon / blocks, 1 / blocks
        stages: list[tuple[str, nn.Module]] = [("open", opening())]
        stages += [(f"block{i}", EulerBlock(layer(), step, gain, mass)) for i in range(blocks)]
        super().__init__(OrderedDict([*stages, ("close", closing())]))
        self.made_of = opening, layer, closing
        self.blocks, self.horizon, self.gain = blocks, horizon, gain
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=math.prod(parameter.shape[1:]) ** -0.5)

    def coarsened(self, factor: int) -> EulerNetwork:
        """A network of that many times fewer blocks, at the means over the blocks that come together.

        Raises
        ------
        InputError
            If the factor does not divide the blocks, or is below 2.
        """
        check_blocks(self.blocks, factor)
        coarse = EulerNetwork(*self.made_of, self.blocks // factor, self.horizon, self.gain / math.sqrt(factor))
        coarse = coarse.to(next(self.parameters())).train(self.training)
        average(self, coarse, factor)
        return coarse


def euler(shape: tuple[int, ...], classes: int, blocks: int, width: int, horizon: float) -> EulerNetwork:
    """A dense network for samples of any shape."""
    return EulerNetwork(
        partial(_opened, nn.Linear, math.prod(shape), width),
        partial(nn.Linear, width, width),
        partial(Closing, width, classes),
        blocks, horizon,
    )  # fmt: skip


def euler_cnn(shape: tuple[int, ...], classes: int, blocks: int, width: int, horizon: float) -> EulerNetwork:
    """A network of 3 x 3 convolutions of ``width`` channels, for images (C, H, W).

    The first one has 6 x 6 pixels and a stride of 4 for images of 28 pixels and more, 4 x 4 and 2 from 16 on, else
    3 x 3 and 1; the last layer sees the means over 4 x 4 cells. All of it is our choice, tanh in the place of ReLU
    too: blocks that only add what is positive could but grow, and second-order methods want it smooth.

    Raises
    ------
    InputError
        If the samples are no images.
    """
    if len(shape) != 3:
        raise InputError(f"network 'euler_cnn' needs images (C, H, W); the samples are {shape}")
    smallest = min(shape[1:])
    stride = 4 if smallest >= 28 else 2 if smallest >= 16 else 1
    kernel, padding = stride + 2, (stride + 1) // 2
    left = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:]]
    return EulerNetwork(
        partial(_opened, nn.Conv2d, shape[0], width, kernel, stride, padding),
        partial(nn.Conv2d, width, width, 3, padding=1),
        partial(Closing, width, classes, (min(left[0], CELLS), min(left[1], CELLS))),
        blocks, horizon,
    )  # fmt: skip


def _opened(kind: type[nn.Module], *arguments: int) -> Opening:
    return Opening(kind(*arguments))  # type: ignore[arg-type]
