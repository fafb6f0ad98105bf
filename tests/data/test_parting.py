"""Samples are parted at random: those that are held out have their share of each class."""

import numpy as np
import pytest

from ddml.data import parting
from ddml.errors import InputError


@pytest.mark.parametrize("wanted", ["0.1", "0.25", "0.5", "37", "1", "90"])
@pytest.mark.parametrize("counts", [(50, 50), (60, 30, 10), (7, 3, 90), (98, 2)])
def test_held_out_samples_have_their_share_of_each_class(wanted: str, counts: tuple[int, ...]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    train, held = parting.held_out(labels, wanted, [*"abc"[: len(counts)]], 3)
    number = round(float(wanted) * 100) if "." in wanted else int(wanted)
    assert sorted([*train, *held]) == list(range(100))
    assert len(held) == number
    taken = np.bincount(labels[held], minlength=len(counts))
    assert (np.abs(taken - number * np.array(counts) / 100) <= 1).all()
    assert np.bincount(labels[train], minlength=len(counts)).min() > 0
    again, other = parting.held_out(labels, wanted, "abc", 3)[1], parting.held_out(labels, wanted, "abc", 4)[1]
    assert np.array_equal(held, again)
    assert number == 90 or not np.array_equal(held, other)


def test_a_class_of_one_sample_keeps_it() -> None:
    labels = np.array([0] * 9 + [1] + [2] * 9 + [3])
    for seed in range(5):
        train, held = parting.held_out(labels, "0.5", "abcd", seed)
        assert len(held) == 10 and {9, 19} <= set(train)
    with pytest.raises(InputError, match="19 held-out samples of 20 leave a class without one to train on"):
        parting.held_out(labels, "19", "abcd", 0)


def test_a_class_that_has_no_sample_is_none_to_keep_one_of() -> None:
    train, held = parting.held_out(np.array([0, 0, 2, 2]), "2", "abc", 0)
    assert (len(train), len(held)) == (2, 2)


@pytest.mark.parametrize("wanted", ["0", "0.0", "1.0", "10", "11", "-1", "0.01"])
def test_none_or_all_held_out_are_refused(wanted: str) -> None:
    with pytest.raises(InputError, match=f"{wanted} held-out samples of 10 to train on leave none on one side"):
        parting.held_out(np.arange(10) % 2, wanted, "ab", 0)


@pytest.mark.parametrize("wanted", ["some", "", "nan", "1.5", "-0.1", "1e-1", "10 %", "inf"])
def test_what_is_neither_a_share_nor_a_number_is_refused(wanted: str) -> None:
    with pytest.raises(InputError, match="held-out samples must be a share as"):
        parting.held_out(np.arange(10) % 2, wanted, "ab", 0)


def test_a_test_part_is_what_it_was() -> None:
    order = np.random.default_rng(5).permutation(20)
    train, test = parting.cut(20, 0.3, 5)
    assert test.tolist() == sorted(order[:6]) and train.tolist() == sorted(order[6:])
    for wrong in (0.0, 1.0, float("nan"), 0.01, -1):
        with pytest.raises(InputError, match="leaves none on one side"):
            parting.cut(20, wrong, 5)


@pytest.mark.parametrize("number", [2, 3, 5, 20])
@pytest.mark.parametrize("counts", [(50, 50), (60, 30, 10), (7, 3, 10), (18, 2), (20, 0, 20)])
def test_folds_have_their_share_of_each_class(number: int, counts: tuple[int, ...]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    found = parting.folds(labels, number, "abc", 3)
    assert np.ptp(np.bincount(found, minlength=number)) <= 1
    for k in range(len(counts)):
        assert np.ptp(np.bincount(found[labels == k], minlength=number)) <= 1
        assert len(set(found[labels == k])) > 1 or not counts[k]  # so that it is in the rest of each fold
    assert np.array_equal(found, parting.folds(labels, number, "abc", 3))
    assert not np.array_equal(found, parting.folds(labels, number, "abc", 4))
    assert not np.array_equal(found, np.arange(len(labels)) % number)


@pytest.mark.parametrize(
    ("labels", "number", "expected"),
    [
        ([0, 0, 1, 1], 1, "1 folds of 4 samples: there must be 2 or more"),
        ([0, 0, 1, 1], 0, "0 folds of 4 samples"),
        ([0, 0, 1, 1], -3, "-3 folds of 4 samples"),
        ([0, 0, 1, 1], 5, "5 folds of 4 samples: there must be 2 or more, and a sample for each"),
        ([0, 0, 1, 0], 2, "class b has one sample only"),
        ([2, 0, 0, 0], 4, "class c has one sample only"),
        ([0], 2, "2 folds of 1 samples"),
    ],
)
def test_folds_that_cannot_be_are_refused(labels: list[int], number: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parting.folds(labels, number, "abc", 0)
