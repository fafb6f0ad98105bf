"""Tiles of images and volumes against numpy's slicing, and their restrictions as matrices."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from ddml.decomposition.tiles import Tiles, numbers, placed
from ddml.errors import InputError
from ddml.parallel import split

# shape of a sample, tiles and overlap as they are written (H x W, or H x W x D), and both by axes of the array
CASES = {
    "undivided": ((1, 28, 28), 1, 0, (1, 1), (0, 0)),
    "undivided volume": ((2, 3, 5, 4), 1, 0, (1, 1, 1), (0, 0, 0)),
    "even": ((3, 8, 8), 2, 0, (2, 2), (0, 0)),
    "faces": ((1, 24, 21), 4, 2, (4, 4), (2, 2)),
    "uneven": ((2, 7, 11), (3, 4), 1, (3, 4), (1, 1)),
    "a pixel each": ((1, 3, 5), (3, 5), 0, (3, 5), (0, 0)),
    "rows": ((1, 9, 4), (4, 1), (2, 0), (4, 1), (2, 0)),
    "wider than the next tile": ((1, 6, 5), 3, 4, (3, 3), (4, 4)),
    "slices together": ((1, 3, 8, 9), (4, 4, 1), (1, 2, 0), (1, 4, 4), (0, 1, 2)),
    "blocks": ((1, 8, 8, 8), (4, 4, 2), 1, (2, 4, 4), (1, 1, 1)),
    "uneven blocks": ((2, 7, 5, 6), (2, 3, 4), (0, 1, 2), (4, 2, 3), (2, 0, 1)),
}
cases = pytest.mark.parametrize("name", CASES)


def made(name: str, padded: bool = False) -> Tiles:
    shape, parts, overlap, _, _ = CASES[name]
    return Tiles(shape, parts, overlap, padded)


def values(shape: tuple[int, ...], *leading: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*leading, *shape))


def bounds(name: str) -> list[tuple[tuple[int, int], ...]]:
    """First and last pixels of each tile by the formula."""
    shape, _, _, parts, overlap = CASES[name]
    along = []
    for n, p, delta in zip(shape[1:], parts, overlap, strict=True):
        edges = [n * i // p for i in range(p + 1)]
        along.append([(max(edges[i] - delta, 0), min(edges[i + 1] + delta, n)) for i in range(p)])
    return list(itertools.product(*along))


@cases
def test_cores_tile_the_image_and_coverage_counts(name: str) -> None:
    tiles = made(name)
    assert len(tiles) == len(tiles.cores) == len(tiles.shapes) == np.prod(CASES[name][3])
    cores, counted = np.zeros(tiles.shape[1:], int), np.zeros(tiles.shape[1:], int)
    for core, ranges, bound in zip(tiles.cores, tiles.ranges, bounds(name), strict=True):
        cores[core] += 1
        counted[tuple(slice(*b) for b in bound)] += 1
        assert all(r.start <= c.start < c.stop <= r.stop for r, c in zip(ranges, core, strict=True))
    assert (cores == 1).all()
    assert np.array_equal(tiles.coverage, counted)
    assert tiles.stored == counted.mean()
    for axis in range(cores.ndim):
        sizes = {core[axis].stop - core[axis].start for core in tiles.cores}
        assert max(sizes) - min(sizes) <= 1


@cases
def test_a_tile_is_a_slice(name: str, tmp_path: Path) -> None:
    tiles = made(name)
    x = values(tiles.shape, 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        stored = file.create_dataset("x", data=x)
        for i, bound in enumerate(bounds(name)):
            expected = x[(slice(None), slice(None), *(slice(*b) for b in bound))]
            found = tiles.cut(x, i)
            assert found.shape[1:] == tiles.shapes[i]
            assert np.array_equal(found, expected)
            assert np.shares_memory(found, x)
            assert np.array_equal(tiles.cut(torch.as_tensor(x), i).numpy(), expected)
            assert np.array_equal(tiles.cut(x[1], i), expected[1])
            assert np.array_equal(tiles.cut(stored, i), expected)


@pytest.mark.ranks
@cases
@pytest.mark.parametrize("padded", [False, True])
def test_restrictions_are_slices_on_any_number_of_ranks(comm: MPI.Comm, name: str, padded: bool) -> None:
    tiles = made(name, padded)
    x, size = values(tiles.shape), int(np.prod(tiles.shape))
    columns = slice(*split(size, comm.size)[comm.rank : comm.rank + 2])
    image = PETSc.Vec().createMPI((columns.stop - columns.start, size), comm=comm)
    covered = np.zeros(columns.stop - columns.start)
    for i in range(len(tiles)):
        R = tiles.restriction(i, comm)
        tile, back = R.createVecLeft(), R.createVecRight()
        rows = slice(*tile.getOwnershipRange())
        expected = tiles.cut(x, i).reshape(-1)
        assert R.getSize() == (expected.size, size)
        image.setArray(x.reshape(-1)[columns])
        R.mult(image, tile)
        assert np.array_equal(tile.array_r, expected[rows])
        outside = np.full_like(x, np.nan)  # another tile's pixels are not read
        outside[(slice(None), *tiles.ranges[i])] = x[(slice(None), *tiles.ranges[i])]
        image.setArray(outside.reshape(-1)[columns])
        R.mult(image, tile)
        assert np.array_equal(tile.array_r, expected[rows])
        weights = np.random.default_rng(i).standard_normal(expected.size)
        tile.setArray(weights[rows])
        R.multTranspose(tile, back)
        image.setArray(x.reshape(-1)[columns])
        assert back.dot(image) == pytest.approx(weights @ expected, rel=1e-12, abs=1e-12)
        image.set(1.0)
        R.mult(image, tile)
        R.multTranspose(tile, back)
        covered += back.array_r
        for thing in (R, tile, back):
            thing.destroy()
    image.destroy()
    assert np.array_equal(covered, np.broadcast_to(tiles.coverage, tiles.shape).reshape(-1)[columns])


@pytest.mark.parametrize(
    ("width", "parts", "overlap", "expected"),
    [
        (6, 3, 1, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]),  # where the border has clipped
        (7, 2, 0, [[1, 2, 3, 0], [4, 5, 6, 7]]),  # behind a smaller core
        (7, 3, 1, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]),  # the largest is clipped itself
        (8, 2, 3, [[1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8]]),  # none are needed
    ],
)
def test_zeros_make_tiles_of_one_shape(width: int, parts: int, overlap: int, expected: list[list[int]]) -> None:
    tiles = Tiles((1, 1, width), (1, parts), (0, overlap), padded=True)
    line = np.arange(1, width + 1).reshape(1, 1, width)
    for i, row in enumerate(expected):
        assert tiles.cut(line, i).tolist() == [[row]]
        assert tiles.cut(torch.as_tensor(line), i).tolist() == [[row]]
    assert len(set(tiles.shapes)) == 1


@cases
def test_padded_tiles_hold_the_slices_and_zeros(name: str) -> None:
    tiles, bare = made(name, padded=True), made(name)
    assert set(tiles.shapes) == {tuple(np.max(bare.shapes, axis=0))}
    for i in range(len(tiles)):
        ones = tiles.cut(np.ones((2, *tiles.shape)), i)
        assert ones.shape == (2, *tiles.shapes[i])
        assert ones.sum() == 2 * np.prod(bare.shapes[i])
        assert np.array_equal(ones, tiles.cut(torch.ones(2, *tiles.shape), i).numpy())


@pytest.mark.parametrize(
    ("shape", "parts", "overlap", "pixels"),
    [
        ((1, 96, 84), 2, 0, 1.00), ((1, 96, 84), 2, 8, 1.39), ((1, 96, 84), 4, 4, 1.61), ((1, 96, 84), 4, 8, 2.36),
        ((1, 192, 168), 4, 8, 1.61), ((1, 32, 32, 32), (4, 4, 2), 2, 2.13), ((3, 32, 32), 2, 4, 1.56),
    ],
)  # fmt: skip
def test_overlap_stores_pixels_more_than_once(
    shape: tuple[int, ...], parts: int | tuple[int, ...], overlap: int, pixels: float
) -> None:
    assert Tiles(shape, parts, overlap).stored == pytest.approx(pixels, abs=0.005)


def test_tiles_in_words() -> None:
    tiles = Tiles((2, 4, 5, 6), numbers("2x3x1", "tiles"), numbers("1x0x0", "an overlap"))
    assert repr(tiles) == "2x3x1 tiles of 2x4x5x6, overlap 1x0x0: 2x4x3x2 to 2x4x4x2, 1.40 times the pixels"
    assert repr(Tiles((1, 8, 8), 2, padded=True)) == "2x2 tiles of 1x8x8, padded: 1x4x4, 1.00 times the pixels"
    lines = tiles.described().splitlines()
    assert lines[:3] == [repr(tiles), "tile 0: D 0:4, H 0:3, W 0:2, 2x4x3x2", "tile 1: D 0:4, H 0:3, W 2:4, 2x4x3x2"]
    assert len(lines) == 7
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 3)) for shape in tiles.shapes]
    assert tiles.described(networks).splitlines()[4] == (
        "tile 3: D 0:4, H 1:5, W 0:2, 2x4x4x2, 195 parameters, 192 multiplications"
    )
    assert (tiles.narrowing, Tiles((1, 9, 9, 9), (2, 2, 5)).narrowing, Tiles((1, 9, 9), 1).narrowing) == (3, 2, 1)


IMAGE, VOLUME = (1, 8, 6), (1, 4, 8, 6)
REFUSED = [
    ((64,), "2", "0", r"the samples are \(64,\)"),
    ((8, 8), "2", "0", r"images \(C, H, W\) or volumes \(C, D, H, W\)"),
    ((1, 2, 3, 4, 5), "2", "0", "the samples are"),
    (IMAGE, "2x2x2", "0", r"tiles of 2x2x2 does not fit an image \(C, H, W\): one number, or 2 as in 4x4"),
    (VOLUME, "2x2", "0", r"tiles of 2x2 does not fit a volume .* or 3 as in 4x4x2"),
    (IMAGE, "2x2x1x1", "0", "does not fit an image"),
    (IMAGE, "2", "1x1x1", "an overlap of 1x1x1 does not fit"),
    (VOLUME, "2", "1x1", "an overlap of 1x1 does not fit"),
    (IMAGE, "9", "0", "9 tiles along H are more than its 8 pixels"),
    (IMAGE, "8x7", "0", "7 tiles along W are more than its 6 pixels: 8x7"),
    (VOLUME, "2x2x5", "0", "5 tiles along D are more than its 4 pixels: 2x2x5"),
    (VOLUME, "9x1x1", "0", "9 tiles along H"),
    (IMAGE, "0", "0", "must be 1 tile or more along each axis, got 0x0"),
    (IMAGE, "2x0", "0", "must be 1 tile or more along each axis, got 2x0"),
    (VOLUME, "-1", "0", "1 tile or more"),
    (IMAGE, "2", "-1", "an overlap of -1 is negative"),
    (IMAGE, "2", "1x-3", "an overlap of -3 is negative"),
    (IMAGE, "2", "6", "an overlap of 6 is as wide as the 6 pixels along W: it must be from 0 to 5 there"),
    (IMAGE, "2", "8x0", "an overlap of 8 is as wide as the 8 pixels along H"),
    (VOLUME, "4x4x1", "4", "as wide as the 4 pixels along D: .* one for each as in 4x4x2"),
    (IMAGE, "2x", "0", "tiles must be an integer, or one for each axis as in 4x4 or 4x4x2; got '2x'"),
    (IMAGE, "a", "0", "tiles must be an integer"),
    (IMAGE, "2.5", "0", "tiles must be an integer"),
    (IMAGE, "2", "", "an overlap must be an integer"),
    (IMAGE, "2,2", "0", "tiles must be an integer"),
    (IMAGE, "9999999999", "0", "tiles must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "parts", "overlap", "expected"), REFUSED)
def test_what_cannot_be_cut_is_refused(shape: tuple[int, ...], parts: str, overlap: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Tiles(shape, numbers(parts, "tiles"), numbers(overlap, "an overlap"))


def test_samples_of_another_shape_are_refused() -> None:
    tiles = Tiles(IMAGE, 2)
    for shape in ((8, 6), (1, 6, 8), (4, 2, 8, 6), (5, 1, 8, 7)):
        with pytest.raises(InputError, match=r"tiles of samples \(1, 8, 6\), got"):
            tiles.cut(np.zeros(shape), 0)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 9, 8), (3, 2)), ((1, 9, 8), (2,)), ((1, 5, 9, 8), (3, 2, 4)), ((1, 9, 8, 7), (3,)), ((1, 4, 4), (1,))],
)
def test_numbers_are_placed_where_their_tiles_are(shape: tuple[int, ...], parts: tuple[int, ...]) -> None:
    tiles = Tiles(shape, parts)
    table = placed(range(len(tiles)), parts)
    starts = [sorted({core[axis].start for core in tiles.cores}) for axis in range(len(shape) - 1)]
    assert table.shape == tuple(map(len, starts))
    for tile, core in enumerate(tiles.cores):
        assert table[tuple(along.index(c.start) for along, c in zip(starts, core, strict=True))] == tile
    with pytest.raises(ValueError, match="reshape"):
        placed(range(len(tiles) + 5), parts)
