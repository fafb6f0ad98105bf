r"""The modular norm of a network's parameters, and its duality map (Large et al. 2024; Bernstein, Newhouse 2024).

A module has a mass, a sensitivity and a norm of its weights. Of the layers ("atoms", sensitivity 1, mass free):

- ``Linear``, W (o, i): :math:`\sqrt{i / o}\, \sigma_{\max}(W)`, the operator norm from RMS to RMS. A bias is one
  more column, of an input that is always 1, and counts in i (our choice).
- ``Embedding``, a row a token: the largest RMS norm of a row.
- Convolutions, W (o, i, k_1, ...): ``unfolded``, the norm of a Linear layer on patches, W flattened to
  (o, i k_1 k_2 ...) with the bias as a column; or ``slices`` as in the paper, :math:`k_1 k_2` times the
  largest norm of a W[:, :, a, b], where a bias is one more slice, of one channel (our choice). With the largest RMS
  norm over all pixels as the norm of an image, both make the layer well-normed; the first is the smaller one, and
  what the measured results are for. In groups, the matrices of all groups are blocks of one matrix.
- ``LayerNorm``, ``GroupNorm``, ``BatchNorm`` (our choice): a diagonal matrix and a bias, 2 max(max |w|, RMS of b).

Modules without weights ("bonds") have mass 0 and sensitivity 1. With m the mass of the whole, the norm of a sequence
is :math:`\max_l\, (m / m_l) \prod_{j > l} s_j\, \|w_l\|_l`, masses add and sensitivities multiply; that of a
tuple of modules is :math:`\max_l\, (m / m_l) \|w_l\|_l`, masses and sensitivities add. An ``nn.Sequential`` is a
sequence. Any other module is, as far as its weights go, the tuple of its layers; as nothing is known of how data
pass through it, its sensitivity is 1 (our choice, right for a well-normed residual block), or its attribute
``sensitivity``.

Frozen parameters are not there, and a layer with no others is a bond. A weight that layers share belongs to the first
of them; the masses of the others stay in m, so that its uses together may change the output as much as all these
layers may (our choice).

So for a chain of L layers with equal masses the norm is :math:`L \max_l \sqrt{i_l / o_l}\, \sigma_{\max}(W_l)`
and the duality map :math:`G_l \mapsto L^{-1} \sqrt{o_l / i_l}\, U_l V_l^T`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import InputError
from .polar import EPS, polar_factor

if TYPE_CHECKING:
    from .loss import Parameter

Indices = NDArray[np.int64]
CONVOLUTIONS = ("unfolded", "slices")


@dataclass(frozen=True)
class Block:
    """A matrix among the parameters and its share of a norm that is a maximum: scale times the block's own norm.

    Attributes
    ----------
    entries : array of int
        Where the matrix (rows, columns) is in theta.
    scale : float
        0: the block has no mass, and does not move.
    by_rows : bool
        Whether the block's own norm is the largest length of a row, instead of the largest singular value.
    """

    entries: Indices
    scale: float
    by_rows: bool = False

    @property
    def cost(self) -> float:
        """Multiplications of a duality map, roughly."""
        rows, columns = sorted(self.entries.shape)
        return float(rows * columns if self.by_rows else rows**2 * columns)

    def norm(self, matrix: Tensor) -> float:
        """Scaled norm of a matrix (rows, columns)."""
        if self.by_rows:
            return self.scale * float(matrix.norm(dim=1).max())
        gram = matrix @ matrix.T if len(matrix) <= len(matrix.T) else matrix.T @ matrix
        return self.scale * math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))

    def dualize(self, matrix: Tensor, eps: float) -> Tensor:
        """The matrix of scaled norm 1 with the largest inner product with this one; zero directions stay zero."""
        if self.scale == 0:
            return torch.zeros_like(matrix)
        if not self.by_rows:
            return polar_factor(matrix, eps=eps) / self.scale
        lengths = matrix.norm(dim=1, keepdim=True)
        return torch.where(lengths > 0, matrix / lengths, torch.zeros_like(matrix)) / self.scale


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
        Of the layers with weights, in the order of ``network.modules()``; default: all 1.
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
        own = {name: self._entries(p) for name, p in tensors if id(p) not in self.taken}
        self.taken |= {id(p) for p in layer.parameters(recurse=False)}
        weight, bias = own.pop("weight", None), own.pop("bias", None)
        column = [] if bias is None else [bias.reshape(-1, 1)]
        blocks: list[Block] | None = None
        norms = nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm
        if own:
            pass
        elif isinstance(layer, nn.Embedding):
            blocks = [] if weight is None else [Block(weight, weight.shape[1] ** -0.5, True)]
        elif isinstance(layer, nn.Linear):
            matrix = [] if weight is None else [weight]
            blocks = _operators([np.hstack([*matrix, *column])] if matrix or column else [])
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            blocks = self._convolution(weight, column, layer.groups)
        elif isinstance(layer, norms):
            blocks = [] if weight is None else [Block(weight.reshape(-1, 1), 2.0, True)]
            blocks += _operators(column, 2.0)
        if blocks is None:
            raise InputError(
                f"there is no modular norm for layer {self.names[id(layer)]} of class {type(layer).__name__}, with "
                f"parameters {', '.join(n for n, _ in layer.named_parameters(recurse=False))}: choose another norm"
            )
        return Atom(self.masses[id(layer)], tuple(blocks))

    def _entries(self, tensor: Tensor) -> Indices:
        place = self.places.get(id(tensor))
        if place is None:
            raise InputError("the network has parameters that the loss does not know")
        return np.arange(place.offset, place.offset + place.size).reshape(place.shape)

    def _convolution(self, weight: Indices | None, column: list[Indices], groups: int) -> list[Block]:
        if weight is None:
            return _operators(column)
        out, channels = len(weight) // groups, weight.shape[1]
        kernels = weight.reshape(groups, out, channels, -1)
        if self.convolution == "unfolded":
            flat = kernels.reshape(groups, out, -1)
            columns = [c.reshape(groups, out, 1) for c in column]
            return _operators(np.concatenate([flat, *columns], axis=2))
        slices = [kernels[g, :, :, k] for g in range(groups) for k in range(kernels.shape[3])]
        count = kernels.shape[3] + len(column)
        return _operators(slices, count) + _operators(column, count)


def _operators(matrices: Sequence[Indices] | Indices, factor: float = 1.0) -> list[Block]:
    """Blocks with ``factor`` times the operator norm from RMS to RMS."""
    return [Block(m, factor * math.sqrt(m.shape[1] / m.shape[0])) for m in matrices]


class ModularNorm:
    r"""A norm max_b c_b \|theta_b\|_b over blocks b of a parameter vector theta (n,), its dual norm and duality map.

    The dual norm is :math:`\sum_b \|g_b\|_b^\dagger / c_b`, with the sum of the singular values, or of the
    lengths of the rows, as a block's own dual norm. Vectors are given and returned in float64.

    Parameters
    ----------
    size
        n.
    blocks
        Disjoint ones.
    eps
        Relative precision of gradients: what is less in them is not dualized, see :func:`.polar.polar_factor`.
    """

    def __init__(self, size: int, blocks: Sequence[Block], eps: float = EPS) -> None:
        self.size, self.blocks, self.eps = size, tuple(blocks), eps
        self._entries = [torch.as_tensor(b.entries) for b in blocks]

    @property
    def costs(self) -> list[float]:
        """Relative cost of each block in :meth:`dualize`."""
        return [b.cost for b in self.blocks]

    def norms(self, theta: Tensor, chosen: Sequence[int] | None = None) -> list[float]:
        """The scaled norm of each block, or of the chosen ones."""
        return [self.blocks[b].norm(theta[self._entries[b]].double()) for b in self._chosen(chosen)]

    def norm(self, theta: Tensor) -> float:
        """The norm of theta (n,)."""
        return max(self.norms(theta), default=0.0)

    def dualize_blocks(self, g: Tensor, direction: Tensor, chosen: Sequence[int] | None = None) -> list[float]:
        """Write the chosen blocks of the duality map of g to ``direction`` (n,); their shares of the dual norm."""
        shares = []
        for b in self._chosen(chosen):
            matrix = g[self._entries[b]].double()
            dual = self.blocks[b].dualize(matrix, self.eps)
            direction[self._entries[b]] = dual
            shares.append(float((matrix * dual).sum()))
        return shares

    def dualize(self, g: Tensor) -> Tensor:
        """A maximiser (n,) of <g, t> over the t of norm 1; where g has no part, neither has it."""
        direction = torch.zeros(self.size, dtype=torch.float64)
        self.dualize_blocks(g, direction)
        return direction

    def dual_norm(self, g: Tensor) -> float:
        """The largest <g, t> over all t (n,) of norm 1; blocks without mass do not count."""
        return math.fsum(self.dualize_blocks(g, torch.empty(self.size, dtype=torch.float64)))

    def restricted(self, ranges: Sequence[slice]) -> ModularNorm:
        """The norm of the vectors that are zero outside some ranges of theta, as a function of what is inside.

        Raises
        ------
        InputError
            If the ranges hold other parts of a block than whole rows and columns: there is no duality map then.
        """
        where = np.full(self.size, -1)
        end = 0
        for r in ranges:
            where[r] = np.arange(end, end + r.stop - r.start)
            end += r.stop - r.start
        blocks = []
        for block in self.blocks:
            inside = where[block.entries] >= 0
            rows, columns = inside.any(axis=1), inside.any(axis=0)
            if not inside[np.ix_(rows, columns)].all():
                raise InputError("a subdomain cuts a tensor: the modular norm needs whole rows and columns of a matrix")
            if rows.any():
                blocks.append(replace(block, entries=where[block.entries[np.ix_(rows, columns)]]))
        return ModularNorm(end, blocks, self.eps)

    def _chosen(self, chosen: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.blocks)) if chosen is None else chosen
