"""Nested sets of samples."""

import numpy as np
import pytest
from mpi4py import MPI

from ddml.errors import InputError
from ddml.sampling.nested import NestedSets, coarsened, part_of


def test_each_set_holds_those_before_it() -> None:
    sets = NestedSets(50, [5, 13, 50], seed=4)
    small, middle, whole = (sets.rows(level) for level in range(3))
    assert [len(rows) for rows in (small, middle, whole)] == [5, 13, 50]
    assert set(small) < set(middle) and whole.tolist() == list(range(50))
    assert all((np.diff(rows) > 0).all() for rows in (small, middle))
    assert sets.rows(1) is middle and not sets.whole(1) and sets.whole(2)
    assert "5, 13, 50 of 50 samples" in repr(sets)


def test_another_number_or_seed_is_another_permutation_and_the_same_one_comes_back() -> None:
    sets = NestedSets(200, [40], seed=1)
    first = sets.rows(0)
    sets.draw(7)
    seventh = sets.rows(0)
    other = NestedSets(200, [40], seed=2).rows(0)
    assert len(first) == len(seventh) == 40
    assert not np.array_equal(first, seventh) and not np.array_equal(first, other)
    sets.draw(0)
    assert np.array_equal(first, sets.rows(0))
    # every sample has the same chance: 60 draws of 40 of 200, a standard deviation of 3.1 about 12
    counts = np.zeros(200)
    for number in range(60):
        sets.draw(number)
        counts[sets.rows(0)] += 1
    assert counts.mean() == 12 and counts.min() > 0 and counts.std() < 4


@pytest.mark.ranks
def test_sets_are_the_same_on_all_ranks(comm: MPI.Comm) -> None:
    sets = NestedSets(1000, [100], seed=3)
    sets.draw(5)
    assert len(set(comm.allgather(sets.rows(0).tobytes()))) == 1


def test_growth_keeps_what_there_is() -> None:
    sets = NestedSets(100, [3, 10, 100])
    before = [sets.rows(level) for level in range(3)]
    sets.grow(0, 1.01)
    assert sets.sizes == (4, 10, 100) and set(before[0]) < set(sets.rows(0))
    assert sets.rows(1) is before[1]
    sets.grow(0, 4.0)
    assert sets.sizes == (16, 16, 100) and set(before[1]) < set(sets.rows(1))
    sets.grow(0, 1e9)
    sets.grow(2, 4.0)
    assert sets.sizes == (100, 100, 100) and sets.whole(0)


def test_a_state_is_gone_back_to() -> None:
    sets = NestedSets(100, [8, 30], seed=9)
    sets.draw(3)
    sets.grow(0, 2.0)
    state, rows = sets.state(), sets.rows(0)
    sets.draw(4)
    sets.grow(0, 2.0)
    other = NestedSets(100, [1, 2])
    other.restore(state)
    assert other.sizes == (16, 30) and np.array_equal(other.rows(0), rows) and other.state() == state
    with pytest.raises(InputError, match="of 100 samples, there are 99"):
        NestedSets(99, [1, 2]).restore(state)
    with pytest.raises(InputError, match="of 2 nested sets of samples, there are 1"):
        NestedSets(100, [1]).restore(state)


def test_sizes() -> None:
    assert part_of(690, 0.01) == 7 and part_of(10, 0.01) == 1 and part_of(10, 1.0) == 10
    assert coarsened(1000, 3, 10.0) == [10, 100, 1000] and coarsened(7, 1, 2.0) == [7]
    assert coarsened(1000, 3, 2.5) == [160, 400, 1000]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        part_of(10, fraction)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([], "got none"), ([0, 3], "got 0, 3"), ([3, 3], "got 3, 3"), ([4, 11], "from 1 to 10"), ([5, 2], "got 5, 2")],
)
def test_sets_that_are_not_nested_are_refused(sizes: list[int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        NestedSets(10, sizes)
    with pytest.raises(InputError, match="increasing sizes"):
        NestedSets(3, [1, 2, 3, 4])  # more of them than samples


def test_levels_and_factors_that_cannot_be_are_refused() -> None:
    for levels, factor, words in ((4, 10.0, "are too many for 100"), (0, 2.0, "at least 1 level"), (2, 1.0, "above 1"),
                                  (8, 1.1, "are too many for 5 samples")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            coarsened(5 if levels == 8 else 100, levels, factor)
    with pytest.raises(InputError, match="grows must be above 1"):
        NestedSets(10, [3]).grow(0, 1.0)
