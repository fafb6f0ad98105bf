"""Which samples are to train on, which to test with, and which are held out of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError

from .data_set import Array, row_pieces
from .writing import Stream

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Samples to train on, or to test with, some of which are to be written.

    Attributes
    ----------
    labels : ndarray, shape (N,)
        Their classes, from 0.
    stream : callable
        From their numbers to a :class:`ddml.data.writing.Stream` of them.
    """

    labels: Array
    stream: Callable[[Rows], Stream]

    @classmethod
    def of(cls, inputs: Array, labels: Array) -> Part:
        """What is in memory."""

        def stream(rows: Rows) -> Stream:
            def pieces() -> Iterator[tuple[Array, Array]]:
                for begin, end in row_pieces(inputs, 0, len(rows)):
                    yield inputs[rows[begin:end]], labels[rows[begin:end]]

            return Stream(len(rows), inputs.shape[1:], inputs.dtype, pieces)

        return cls(labels, stream)


def cut(count: int, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and to test with, of so many samples: that fraction of them, at random.

    Raises
    ------
    InputError
        A fraction that leaves no sample on one side.
    """
    test = round(count * fraction) if 0 < fraction < 1 else 0
    if not 0 < test < count:
        raise InputError(f"a test fraction of {fraction} of {count} samples leaves none on one side")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[test:]), np.sort(order[:test])


def held_out(labels: Any, wanted: str, classes: Sequence[str], seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and to hold out: of each class as many as it has of all samples, rounded, at random.

    What rounding down leaves goes to the classes with the largest remainders (Hare's method), the first of equal ones,
    and to none that would have no sample to train on.

    Parameters
    ----------
    labels
        Classes of the samples (N,), from 0.
    wanted
        A share between 0 and 1, which has a decimal point, or a number of samples.
    classes
        Their names.
    seed
        Of the choice.

    Raises
    ------
    InputError
        What is neither; none or all of the samples; so many that a class would have none to train on.
    """
    labels = np.asarray(labels)
    try:
        number = round(float(wanted) * len(labels)) if "." in wanted and 0 <= float(wanted) <= 1 else int(wanted)
    except ValueError as error:
        raise InputError(f"held-out samples must be a share as 0.1 or a number of them, got '{wanted}'") from error
    if not 0 < number < len(labels):
        raise InputError(f"{wanted} held-out samples of {len(labels)} to train on leave none on one side")
    counts = np.bincount(labels, minlength=len(classes))
    taken, remainders = np.divmod(number * counts, len(labels))
    able = np.flatnonzero(taken + 1 < counts)
    chosen = able[np.argsort(-remainders[able], kind="stable")][: number - int(taken.sum())]
    taken[chosen] += 1
    if taken.sum() < number:
        raise InputError(f"{wanted} held-out samples of {len(labels)} leave a class without one to train on")
    rng = np.random.default_rng(seed)
    rows = [rng.choice(np.flatnonzero(labels == k), n, replace=False) for k, n in enumerate(taken)]
    held = np.sort(np.concatenate(rows))
    return np.setdiff1d(np.arange(len(labels)), held), held


def folds(labels: Any, number: int, classes: Sequence[str], seed: int) -> Rows:
    """The fold of each sample, from 0: at random, so many, whose sizes differ by one at most, in each class as well.

    Parameters
    ----------
    labels
        Classes of the samples (N,), from 0.
    number
        Of folds.
    classes
        Their names.
    seed
        Of the choice.

    Raises
    ------
    InputError
        Fewer than two folds, more than samples, or a class of one sample, which would be in none of the others.
    """
    labels = np.asarray(labels)
    if not 2 <= number <= len(labels):
        raise InputError(f"{number} folds of {len(labels)} samples: there must be 2 or more, and a sample for each")
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 1).any():
        raise InputError(f"class {classes[int((counts == 1).argmax())]} has one sample only: no fold can do without it")
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in range(len(classes))])
    found = np.empty(len(labels), np.int64)
    found[order] = np.arange(len(labels)) % number  # dealt in turn, class behind class
    return found
