"""Points: Hammersley sequences and grids."""

import numpy as np
import pytest

from ddml.data.sequences import grid, hammersley, measuring, one_of_each, spread


def radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point."""
    value, place = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * place
        place /= base
    return value


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("bounds", [[(0.0, 1.0)], [(-1.0, 3.0), (2.0, 2.5)], [(0, 1), (-1, 1), (5, 9), (0, 2)]])
def test_hammersley_points_are_radical_inverses(count: int, bounds: list[tuple[float, float]]) -> None:
    points = hammersley(count, bounds)
    assert points.shape == (count, len(bounds))
    for i, point in enumerate(points):
        unit = [(i + 0.5) / count, *(radical_inverse(i + 1, base) for base in (2, 3, 5))][: len(bounds)]
        assert point == pytest.approx([a + u * (b - a) for u, (a, b) in zip(unit, bounds, strict=True)], abs=1e-14)


@pytest.mark.parametrize("count", [1, 10, 1023, 4096])
@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 10, 40])
def test_no_hammersley_point_is_on_the_boundary(count: int, dimension: int) -> None:
    bounds = [(-2.0 * k, 1.0 + k) for k in range(dimension)]
    low, high = np.array(bounds).T
    points = hammersley(count, bounds)
    assert (points > low).all()
    assert (points < high).all()
    assert len(np.unique(points, axis=0)) == count


def test_no_points_and_no_dimensions() -> None:
    assert hammersley(0, [(0.0, 1.0), (0.0, 1.0)]).shape == (0, 2)
    assert hammersley(1, []).shape == (1, 0)


@pytest.mark.parametrize(
    ("count", "dimension", "each"), [(100, 2, 10), (5000, 2, 71), (1, 3, 2), (27, 3, 3), (50, 1, 50)]
)
def test_grids_have_about_the_number_of_points_and_the_boundary(count: int, dimension: int, each: int) -> None:
    bounds = [(-1.0 - k, 2.0) for k in range(dimension)]
    axes = grid(count, bounds)
    assert len(axes) == dimension
    for axis, (a, b) in zip(axes, bounds, strict=True):
        assert len(axis) == each
        assert (axis[0], axis[-1]) == (a, b)
        assert np.diff(axis) == pytest.approx(np.full(each - 1, (b - a) / (each - 1)), rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 9, 10, 40, 41, 60])
def test_points_are_spread_in_any_number_of_dimensions(dimension: int) -> None:
    bounds = [(-1.0 - k, 2.0) for k in range(dimension)]
    low, high = np.array(bounds).T
    points = spread(500, bounds)
    assert ((points > low) & (points < high)).all()
    assert np.array_equal(points, spread(500, bounds))
    assert np.abs(((points - low) / (high - low)).mean(axis=0) - 0.5).max() < 0.12
    if dimension <= 40:
        assert np.array_equal(points, hammersley(500, bounds))


@pytest.mark.parametrize(("dimension", "count"), [(1, 50), (2, 49), (3, 64), (4, 50), (10, 50), (45, 50)])
def test_errors_are_measured_on_a_grid_or_inside(dimension: int, count: int) -> None:
    bounds = [(0.0, 1.0)] * dimension
    points = measuring(50, bounds)
    assert points.shape == (count, dimension)
    inside = ((points > 0) & (points < 1)).all()
    assert inside == (dimension > 3)
    if dimension <= 3:
        assert np.array_equal(np.unique(points[:, 0]), grid(50, bounds)[0])


@pytest.mark.parametrize(("count", "parts"), [(0, 4), (3, 4), (4, 4), (5, 4), (1000, 64)])
def test_one_of_each_part(count: int, parts: int) -> None:
    rows = one_of_each(count, parts)
    edges = np.arange(parts + 1) * count // parts
    if count <= parts:
        assert rows.tolist() == list(range(count))
    else:
        assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
