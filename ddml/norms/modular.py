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
``sensitivity``. Two more attributes say what a block of a deep network is: its ``modular_mass`` is that of its layers
together, in equal shares, and its ``modular_scale`` the factor by which the norms of its layers count, because the
block does (:class:`ddml.networks.euler.EulerBlock`).

Frozen parameters are not there, and a layer with no others is a bond. A weight that layers share belongs to the first
of them; the masses of the others stay in m, so that its uses together may change the output as much as all these
layers may (our choice).

So for a chain of L layers with equal masses the norm is :math:`L \max_l \sqrt{i_l / o_l}\, \sigma_{\max}(W_l)`
and the duality map :math:`G_l \mapsto L^{-1} \sqrt{o_l / i_l}\, U_l V_l^T`.

Matrices whose smaller side is at most ``exact`` get their norms and factors to rounding, in float64. Of larger ones
both come in the precision of the loss and on its device from matrix products alone, within a ``tolerance`` that is
proven (:mod:`ddml.linalg.polar`): the factor has norm at most 1 and at least 1 - tolerance of the largest inner
product, the norm is an upper bound that is at most 1 + tolerance times too large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddml.errors import InputError
from ddml.linalg import polar
from ddml.linalg.polar import EPS, polar_factor

Indices = NDArray[np.int64]


# our choices: the part of the dual norm that a direction of a large matrix may lack, and the smaller side of those
# that are not large: of 256 x 512 an exact factor takes 18 ms and a near one 6 ms, of 1,024 x 2,048 1.2 s and 0.3 s
TOLERANCE, EXACT = 0.05, 256

ROWS = 256  # of a matrix that are worked on at a time (our choice)


@dataclass(frozen=True)
class Tile:
    """A part of a matrix whose entry (i, j) is at ``offset + i steps[0] + j steps[1]`` in theta.

    Attributes
    ----------
    corner, shape, steps : tuple of int
        First row and column in the matrix, numbers of rows and columns, and steps in theta.
    """

    corner: tuple[int, int]
    shape: tuple[int, int]
    steps: tuple[int, int]
    offset: int

    def of(self, theta: Tensor) -> Tensor:
        """Its entries (rows, columns) in the memory of theta (n,)."""
        return theta.as_strided(self.shape, self.steps, theta.storage_offset() + self.offset)

    def inside(self, matrix: Tensor) -> Tensor:
        """Its part of the matrix, in the memory of that."""
        (row, column), (rows, columns) = self.corner, self.shape
        return matrix[row : row + rows, column : column + columns]


def tiles(entries: Indices) -> tuple[Tile, ...]:
    """Where a matrix (rows, columns) is in theta: it is cut where the steps between its rows, or columns, change."""
    found = []
    for top, bottom in _runs(entries):
        for left, right in _runs(entries[top:bottom].T):
            found += _affine(entries[top:bottom, left:right], (top, left))
    return tuple(found)


def _runs(lines: Indices) -> list[tuple[int, int]]:
    """Cut lines (count, length) into runs of equal differences."""
    steps = np.diff(lines, axis=0)
    edges = [0]
    for k in np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1:
        if k > edges[-1]:  # else that step is one between two runs
            edges.append(int(k) + 1)
    return list(itertools.pairwise([*edges, len(lines)]))


def _affine(entries: Indices, corner: tuple[int, int]) -> list[Tile]:
    """A tile of entries whose columns, and whose rows, have equal differences; more where torch has no such strides."""
    rows, columns = entries.shape
    first = int(entries[0, 0])
    down = int(entries[1, 0]) - first if rows > 1 else 0
    along = int(entries[0, 1]) - first if columns > 1 else 0
    if rows > 1 and (down < 0 or int(entries[-1, -1]) != first + (rows - 1) * down + (columns - 1) * along):
        return [t for i in range(rows) for t in _affine(entries[i : i + 1], (corner[0] + i, corner[1]))]
    if along < 0:
        return [t for j in range(columns) for t in _affine(entries[:, j : j + 1], (corner[0], corner[1] + j))]
    return [Tile(corner, (rows, columns), (down, along), first)]


@dataclass(frozen=True)
class Block:
    """A matrix among the parameters and its share of a norm that is a maximum: scale times the block's own norm.

    Attributes
    ----------
    tiles : tuple of Tile
        Where the matrix is in theta.
    shape : tuple of int
        Rows and columns.
    scale : float
        0: the block has no mass, and does not move.
    by_rows : bool
        Whether the block's own norm is the largest length of a row, instead of the largest singular value.
    """

    tiles: tuple[Tile, ...]
    shape: tuple[int, int]
    scale: float
    by_rows: bool = False

    @classmethod
    def of(cls, entries: Indices, scale: float, by_rows: bool = False) -> Block:
        """A block of a matrix whose entries (rows, columns) are at these places in theta."""
        rows, columns = entries.shape
        return cls(tiles(entries), (rows, columns), scale, by_rows)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where in theta each tile's entries lie, from the first to behind the last."""
        ends = [t.offset + sum((k - 1) * step for k, step in zip(t.shape, t.steps, strict=True)) for t in self.tiles]
        return [(t.offset, end + 1) for t, end in zip(self.tiles, ends, strict=True)]

    def moved(self, place: Callable[[int], int]) -> Block:
        """The same matrix in another vector, where entry ``offset`` of a tile is at ``place(offset)``."""
        return replace(self, tiles=tuple(replace(t, offset=place(t.offset)) for t in self.tiles))

    @property
    def entries(self) -> Indices:
        """Where the matrix (rows, columns) is in theta."""
        places = np.empty(self.shape, dtype=np.int64)
        for tile in self.tiles:
            (row, column), (rows, columns), (down, along) = tile.corner, tile.shape, tile.steps
            inside = tile.offset + down * np.arange(rows)[:, None] + along * np.arange(columns)
            places[row : row + rows, column : column + columns] = inside
        return places

    def read(self, theta: Tensor, like: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """The matrix (rows, columns) times ``factor``, in float64 or in the precision and on the device of ``like``."""
        like = theta.new_empty(0, dtype=torch.float64) if like is None else like
        matrix = like.new_empty(self.shape)
        for tile in self.tiles:
            place, part = tile.inside(matrix), tile.of(theta)
            if factor == 1:
                place.copy_(part)
                continue
            for rows, given in zip(place.split(ROWS), part.split(ROWS), strict=True):
                rows.copy_(given * factor)
        return matrix

    def write(self, matrix: Tensor, theta: Tensor) -> None:
        """Put a matrix (rows, columns) to its place in theta."""
        for tile in self.tiles:
            tile.of(theta).copy_(tile.inside(matrix))

    def largest(self, theta: Tensor) -> float:
        """The largest absolute value of an entry; NaN if there is one."""
        return max((float(torch.linalg.vector_norm(t.of(theta), math.inf)) for t in self.tiles), key=_nan_last)

    def inner(self, theta: Tensor, matrix: Tensor) -> float:
        """The inner product with a matrix (rows, columns), in float64."""
        total = 0.0
        for tile in self.tiles:
            for a, b in zip(tile.of(theta).split(ROWS), tile.inside(matrix).split(ROWS), strict=True):
                total += float((a * b.to(a)).sum())
        return total

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


def _nan_last(value: float) -> float:
    """What to sort by for NaN to be the largest."""
    return math.inf if math.isnan(value) else value


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
    like
        A tensor of the precision and on the device that large matrices are worked on in; default: float64, here.
    tolerance
        Of large matrices: what their part of the dual norm may lack of the largest, as a fraction of it. Below
        :data:`.polar.FINEST` no matrix is large.
    exact
        The smaller side up to which a matrix is not large.
    """

    def __init__(
        self,
        size: int,
        blocks: Sequence[Block],
        eps: float = EPS,
        like: Tensor | None = None,
        tolerance: float = TOLERANCE,
        exact: int = EXACT,
    ) -> None:
        self.size, self.blocks, self.eps = size, tuple(blocks), eps
        self.like = torch.empty(0, dtype=torch.float64) if like is None else like
        self.tolerance, self.exact = tolerance, exact

    def large(self, block: Block) -> bool:
        """Whether a block's norm and factor are found within the tolerance only."""
        return not block.by_rows and min(block.shape) > self.exact and self.tolerance >= polar.FINEST

    @property
    def costs(self) -> list[float]:
        """Relative cost of each block in :meth:`dualize`: products of matrices, or as many as take the same time."""
        found = []
        for block in self.blocks:
            m, n = sorted(block.shape)
            products = 21 * m**2 * n if self.large(block) else 90 * m**2 * n
            found.append(float(m * n if block.by_rows else products))
        return found

    def norms(self, theta: Tensor, chosen: Sequence[int] | None = None) -> list[float]:
        """The scaled norm of each block, or of the chosen ones; of large ones upper bounds."""
        return [self._norm(self.blocks[b], theta) for b in self._chosen(chosen)]

    def _norm(self, block: Block, theta: Tensor) -> float:
        if not self.large(block):
            return block.norm(block.read(theta))
        size = block.largest(theta)
        if not 0 < size < math.inf:
            return block.scale * size
        return block.scale * size * polar.norm_bound(block.read(theta, self.like, 1 / size), self.tolerance)

    def norm(self, theta: Tensor) -> float:
        """The norm of theta (n,)."""
        return max(self.norms(theta), default=0.0)

    def dualize_blocks(self, g: Tensor, direction: Tensor, chosen: Sequence[int] | None = None) -> list[float]:
        """Write the chosen blocks of the duality map of g to ``direction`` (n,); their shares of the dual norm.

        ``direction`` may be g itself.
        """
        shares = []
        for b in self._chosen(chosen):
            block = self.blocks[b]
            dual = self._near(block, g) if self.large(block) else None
            dual = None if dual is None else dual.to(g.device)
            if dual is None:
                matrix = block.read(g)
                dual = block.dualize(matrix, self.eps)
                shares.append(float((matrix * dual).sum()))
            else:
                shares.append(block.inner(g, dual))
            block.write(dual, direction)
        return shares

    def _near(self, block: Block, g: Tensor) -> Tensor | None:
        """The duality map of a large block within the tolerance; None where only the exact one will do."""
        size = block.largest(g)
        if not 0 < size < math.inf or block.scale == 0:
            return None
        for like in (self.like, self.like.double()):
            factor = polar.near_factor(block.read(g, like, 1 / size), self.tolerance)
            if factor is not None:
                return factor.div_(block.scale)
        return None

    def dualize(self, g: Tensor) -> Tensor:
        """A maximiser (n,) of <g, t> over the t of norm 1; where g has no part, neither has it."""
        direction = torch.zeros(self.size, dtype=torch.float64)
        self.dualize_blocks(g, direction)
        return direction

    def dual_norm(self, g: Tensor) -> float:
        """The largest <g, t> over all t (n,) of norm 1; blocks without mass do not count.

        Of large blocks a lower bound, the inner product with what :meth:`dualize` gives.
        """
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
            entries = block.entries
            inside = where[entries] >= 0
            rows, columns = inside.any(axis=1), inside.any(axis=0)
            if not inside[np.ix_(rows, columns)].all():
                raise InputError("a subdomain cuts a tensor: the modular norm needs whole rows and columns of a matrix")
            if rows.any():
                blocks.append(Block.of(where[entries[np.ix_(rows, columns)]], block.scale, block.by_rows))
        return ModularNorm(end, blocks, self.eps, self.like, self.tolerance, self.exact)

    def among(self, chosen: Sequence[int], place: Callable[[int], int], size: int) -> ModularNorm:
        """The norm of some blocks only, in another vector (size,), see :meth:`Block.moved`."""
        blocks = [self.blocks[b].moved(place) for b in chosen]
        return ModularNorm(size, blocks, self.eps, self.like, self.tolerance, self.exact)

    def _chosen(self, chosen: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.blocks)) if chosen is None else chosen
