"""Tiles: images and volumes cut into rectangular parts that may overlap, each one linear restriction."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.losses.costs import multiplications
from ddml.options import NEVER, Option
from ddml.parallel import split

KINDS = {3: "an image (C, H, W)", 4: "a volume (C, D, H, W)"}
WRITTEN = {3: (0, 1), 4: (1, 2, 0)}  # axes of H x W, and of H x W x D, in an array
EXAMPLES = {3: "4x4", 4: "4x4x2"}

OPTIONS = (
    Option("tiles", None, "Cut images into tiles, as in 4x4 (H x W), and volumes, as in 4x4x2 (H x W x D), or by one "
           "number for all axes, and train a narrower network on each, side by side: see docs/images.md.",
           changes=NEVER),
    Option("tile_overlap", "0", "Pixels that a tile has more on each inner side, one number, or one for each axis as "
           "in 8x4.", changes=NEVER),
    Option("tiles_padded", False, "Give all tiles the shape of the largest, with zeros.", changes=NEVER),
)  # fmt: skip


def numbers(text: str, what: str) -> tuple[int, ...]:
    """The integers that are written as 4x4x2, or as one.

    Raises
    ------
    InputError
        If the text is anything else; ``what`` it should be stands in front.
    """
    words = text.strip().split("x")
    if not all(re.fullmatch("-?[0-9]{1,9}", word) for word in words):
        raise InputError(f"{what} must be an integer, or one for each axis as in 4x4 or 4x4x2; got '{text}'")
    return tuple(int(word) for word in words)


def placed(values: Sequence[float], parts: Sequence[int]) -> NDArray[np.float64]:
    """Numbers of all tiles in their order, as an array of tiles (H, W), or (D, H, W) of volumes.

    ``parts`` are those along each axis, as H x W or H x W x D, or one number for all axes.

    Raises
    ------
    ValueError
        If there are not as many numbers as tiles.
    """
    if len(parts) == 1:
        parts = (*parts, *parts, *parts) if len(values) == parts[0] ** 3 > 1 else (*parts, *parts)
    return np.array(values, dtype=np.float64).reshape([parts[axis] for axis in _order(WRITTEN[len(parts) + 1])])


def _order(written: Sequence[int]) -> list[int]:
    """For each axis of an array its place where parts are written."""
    return [written.index(axis) for axis in range(len(written))]


class Tiles:
    """A regular split of images (C, H, W) or volumes (C, D, H, W) into tiles, which have all channels.

    Along an axis the cores have the sizes of :func:`ddml.parallel.split`, which differ by at most one. A tile is its
    core and ``overlap`` pixels more on each side, clipped at the border, so that two neighbours share twice the overlap
    (our choice). Tiles are in the order of their first pixels in an array.

    Parameters
    ----------
    shape
        Of a sample.
    parts
        Tiles along each axis, as H x W of images and as H x W x D of volumes, which is how 4x4x1 is published; or one
        number for all axes.
    overlap
        Pixels, one number or, in the same order, one for each axis.
    padded
        Whether all tiles are given the shape of the largest, with zeros. They stand where the border has clipped a
        tile, as far as there is room, and else at its end.

    Attributes
    ----------
    cores, ranges : list of tuple of slice
        Of each tile, along the axes (H, W) or (D, H, W): its core, and the whole tile without zeros.
    shapes : list of tuple of int
        Of each tile, with channels and zeros.

    Raises
    ------
    InputError
        Samples that are no images or volumes; parts or overlap for another number of axes; no part, or more parts than
        pixels along an axis; an overlap that is negative or as wide as the image.
    """

    def __init__(
        self,
        shape: Sequence[int],
        parts: int | Sequence[int],
        overlap: int | Sequence[int] = 0,
        padded: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        if len(self.shape) not in KINDS or min(self.shape) < 1:
            raise InputError(f"tiles are of images (C, H, W) or volumes (C, D, H, W); the samples are {self.shape}")
        self.parts = self._one_each("tiles", parts)
        self.overlap = self._one_each("an overlap", overlap)
        self.padded = padded
        sides, parts_of, overlap_of = self.shape[1:], self._by_axis(self.parts), self._by_axis(self.overlap)
        for axis, n, p, delta in zip(self.axes, sides, parts_of, overlap_of, strict=True):
            if p < 1:
                raise InputError(f"there must be 1 tile or more along each axis, got {_written(self.parts)}")
            if p > n:
                raise InputError(f"{p} tiles along {axis} are more than its {n} pixels: {_written(self.parts)}")
            if not 0 <= delta < n:
                what = "negative" if delta < 0 else f"as wide as the {n} pixels along {axis}"
                raise InputError(
                    f"an overlap of {delta} is {what}: it must be from 0 to {n - 1} there, one number for all axes or "
                    f"one for each as in {EXAMPLES[len(self.shape)]}"
                )
        edges = [split(n, p) for n, p in zip(sides, parts_of, strict=True)]
        cores = [[slice(a, b) for a, b in itertools.pairwise(e)] for e in edges]
        wide = [
            [slice(max(c.start - delta, 0), min(c.stop + delta, n)) for c in along]
            for along, n, delta in zip(cores, sides, overlap_of, strict=True)
        ]
        self.cores, self.ranges = list(itertools.product(*cores)), list(itertools.product(*wide))
        largest = [max(r.stop - r.start for r in along) for along in wide]
        self.shapes = [
            (self.shape[0], *(largest if padded else [r.stop - r.start for r in ranges])) for ranges in self.ranges
        ]

    def _one_each(self, what: str, given: int | Sequence[int]) -> tuple[int, ...]:
        axes = len(self.shape) - 1
        found = (given,) * axes if isinstance(given, int | np.integer) else tuple(given)
        if len(found) == 1:
            found *= axes
        if len(found) != axes:
            raise InputError(
                f"{what} of {_written(found)} does not fit {KINDS[len(self.shape)]}: one number, or {axes} as in "
                f"{EXAMPLES[len(self.shape)]}"
            )
        return found

    def _by_axis(self, written: Sequence[int]) -> list[int]:
        """Numbers in the order of an array's axes."""
        return [written[place] for place in _order(WRITTEN[len(self.shape)])]

    @property
    def axes(self) -> str:
        """Names of the axes in an array."""
        return "HW" if len(self.shape) == 3 else "DHW"

    def __len__(self) -> int:
        return len(self.ranges)

    @property
    def narrowing(self) -> int:
        """How many times narrower than the global network local ones are: the most parts along H or W (our choice)."""
        return max(self.parts[:2])

    @property
    def stored(self) -> float:
        """Pixels of all tiles, zeros included, over those of the image."""
        return sum(math.prod(shape) for shape in self.shapes) / math.prod(self.shape)

    @cached_property
    def coverage(self) -> NDArray[np.int64]:
        """How many tiles each pixel, of an array of shape (H, W) or (D, H, W), is in."""
        counts = np.zeros(self.shape[1:], dtype=np.int64)
        for ranges in self.ranges:
            counts[ranges] += 1
        return counts

    def cut(self, values: Any, tile: int) -> Any:
        """A tile of samples (..., *shape): a view of an array or tensor, or what is read of a data set in a file.

        With zeros it is a new array or tensor.

        Raises
        ------
        InputError
            If the samples are of another shape.
        """
        if tuple(values.shape[-len(self.shape) :]) != self.shape:
            raise InputError(f"these are tiles of samples {self.shape}, got {tuple(values.shape)}")
        return self.pad(values[(..., *self.ranges[tile])], tile)

    def pad(self, part: Any, tile: int) -> Any:
        """Samples of a tile without its zeros, (..., C, *pixels), with them: a new array or tensor if there are any."""
        zeros = self._zeros(tile)
        if not any(itertools.chain(*zeros)):
            return part
        if isinstance(part, Tensor):
            return nn.functional.pad(part, [z for before_and_behind in reversed(zeros) for z in before_and_behind])
        return np.pad(part, [(0, 0)] * (part.ndim - len(zeros)) + zeros)

    def _zeros(self, tile: int) -> list[tuple[int, int]]:
        """How many zeros are before and behind a tile, along each axis."""
        found = []
        for r, core, size, delta in zip(
            self.ranges[tile], self.cores[tile], self.shapes[tile][1:], self._by_axis(self.overlap), strict=True
        ):
            room = size - (r.stop - r.start)
            before = min(room, delta - (core.start - r.start))
            found.append((before, room - before))
        return found

    def restriction(self, tile: int, comm: MPI.Comm) -> PETSc.Mat:
        """The matrix R (m, n) that takes a sample to one of its tiles, both as vectors in the order of their arrays.

        Collective on ``comm``, over whose ranks rows and columns are split evenly. The caller destroys it.
        """
        m, n = math.prod(self.shapes[tile]), math.prod(self.shape)
        (begin, end), (first, last) = (split(size, comm.size)[comm.rank : comm.rank + 2] for size in (m, n))
        # one more than the place of each entry, so that zeros have none
        places = self.cut(np.arange(1, n + 1, dtype=np.int64).reshape(self.shape), tile).reshape(-1)[begin:end]
        held = places > 0
        pointers = np.concatenate(([0], np.cumsum(held))).astype(PETSc.IntType)
        mat = PETSc.Mat().createAIJ(((end - begin, m), (last - first, n)), nnz=(1, 1), comm=comm)
        mat.setValuesCSR(pointers, (places[held] - 1).astype(PETSc.IntType), np.ones(int(held.sum())))
        mat.assemble()
        return mat

    def __repr__(self) -> str:
        overlap = f", overlap {_written(self.overlap)}" if any(self.overlap) else ""
        sizes = " to ".join(dict.fromkeys(_written(s) for s in (min(self.shapes), max(self.shapes))))
        padded = ", padded" if self.padded else ""
        return (
            f"{_written(self.parts)} tiles of {_written(self.shape)}{overlap}{padded}: {sizes}, "
            f"{self.stored:.2f} times the pixels"
        )

    def described(self, networks: Sequence[nn.Module] = ()) -> str:
        """A line for all and one for each tile: where it is, its shape, and what its network, if given, costs."""
        lines = [repr(self)]
        for tile, (ranges, shape) in enumerate(zip(self.ranges, self.shapes, strict=True)):
            where = ", ".join(f"{axis} {r.start}:{r.stop}" for axis, r in zip(self.axes, ranges, strict=True))
            line = f"tile {tile}: {where}, {_written(shape)}"
            if networks:
                network = networks[tile]
                size = sum(p.numel() for p in network.parameters())
                like = next(network.parameters())
                passed = multiplications(network, torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
                line += f", {size} parameters, {passed} multiplications"
            lines.append(line)
        return "\n".join(lines)


def build_tiles(settings: Any, shape: Sequence[int]) -> Tiles:
    """Those of samples of a shape that values of :data:`OPTIONS` ask for.

    Raises
    ------
    InputError
        Texts that are no numbers; see :class:`Tiles`.
    """
    overlap = numbers(settings.tile_overlap, "option -tile_overlap")
    return Tiles(shape, numbers(settings.tiles, "option -tiles"), overlap, settings.tiles_padded)


def _written(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))
