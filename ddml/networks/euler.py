"""Residual networks as the forward Euler method: blocks of a step, which networks of other depths share."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ddml.errors import InputError

from .depth import Source, average, check_blocks

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
        coarse = self.coarser(self.blocks // factor, self.gain / math.sqrt(factor))
        coarse = coarse.to(next(self.parameters())).train(self.training)
        average(self, coarse, factor)
        return coarse

    def coarser(self, blocks: int, gain: float) -> EulerNetwork:
        """The next coarser network, of so many blocks and such a gain, at any parameters."""
        return EulerNetwork(*self.made_of, blocks, self.horizon, gain)


class CellOpening(Opening):
    """tanh of an affine map of an image whose pixels have been summed over cells of so many rows and columns.

    Attributes
    ----------
    modular_scale : float
        By which a change of the weights counts as much as that of their copies, the weights of pixels.
    """

    def __init__(self, shape: tuple[int, ...], width: int, cell: int) -> None:
        pixels = math.prod(shape)
        cells = pixels // cell**2
        super().__init__(nn.Linear(cells, width))
        self.modular_scale = math.sqrt((pixels + 1) / (cells + 1))


class EulerImages(EulerNetwork):
    r"""A dense network for images, of which coarser networks see images of fewer pixels.

    The next coarser network, of however many blocks, takes the sum over c of each cell of c x c pixels, and a weight of
    a pixel is 1 / c times that of its cell: the first layer gives the same then, and prolongations are isometries. That
    goes on as long as c divides both sides and leaves four cells a side (our choice).

    Parameters
    ----------
    shape
        Of the finest network's images (C, H, W).
    classes, blocks, width, horizon, gain
        See :func:`euler` and :class:`EulerNetwork`.
    refinement
        c.
    cell
        Rows and columns of the finest images' pixels that are one pixel here.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        blocks: int,
        width: int,
        horizon: float,
        gain: float = 1.0,
        *,
        refinement: int,
        cell: int = 1,
    ) -> None:
        super().__init__(
            partial(CellOpening, shape, width, cell),
            partial(nn.Linear, width, width),
            partial(Closing, width, classes),
            blocks, horizon, gain,
        )  # fmt: skip
        self.images = shape, classes, width
        self.refinement, self.cell = refinement, cell

    @property
    def coarser_cell(self) -> int:
        """The cell of the next coarser network."""
        found = self.cell * self.refinement
        coarsens = all(side % found == 0 and side // found >= CELLS for side in self.images[0][1:])
        return found if coarsens else self.cell

    def coarser(self, blocks: int, gain: float) -> EulerImages:
        """See :meth:`EulerNetwork.coarser`."""
        shape, classes, width = self.images
        chosen = {"refinement": self.refinement, "cell": self.coarser_cell}
        return EulerImages(shape, classes, blocks, width, self.horizon, gain, **chosen)

    def coarse_inputs(self, x: Tensor) -> Tensor:
        """What this network takes, of images (B, C, H, W) of the finest one: (B, C, H / cell, W / cell)."""
        return self.cell * nn.functional.avg_pool2d(x, self.cell) if self.cell > 1 else x

    def sources(self, factor: int) -> dict[str, Source]:
        """What the weights of pixels are copies of in the network that is coarser by a factor."""
        (channels, *sides), _, width = self.images
        c = self.coarser_cell // self.cell
        if c == 1:
            return {}
        rows, columns = (side // self.coarser_cell for side in sides)
        cells = torch.arange(width * channels * rows * columns).view(width, channels, rows, columns)
        entries = cells.repeat_interleave(c, 2).repeat_interleave(c, 3).flatten(1)
        return {"open.layer.weight": Source("open.layer.weight", 1 / c, entries)}


def euler(
    shape: tuple[int, ...], classes: int, blocks: int, width: int, horizon: float, image_refinement: int = 1
) -> EulerNetwork:
    """A dense network for samples of any shape, or one whose coarser levels see coarser images.

    Raises
    ------
    InputError
        If the samples are no images that get coarser by that factor.
    """
    if image_refinement > 1:
        made = EulerImages(shape, classes, blocks, width, horizon, refinement=image_refinement)
        if len(shape) != 3 or made.coarser_cell == 1:
            raise InputError(
                f"option -image_refinement {image_refinement} must divide the sides of images (C, H, W) and leave "
                f"{CELLS} pixels or more; the samples are {shape}"
            )
        return made
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
