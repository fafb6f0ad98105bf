"""Objectives made from objectives: on a subset of the samples, and with a linear term."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from petsc4py import PETSc

from .errors import InputError
from .objective import Objective


def sampled(objective: Objective, rows: ArrayLike) -> Objective:
    """The objective of a data set of some samples only (mini-batches, nested subsets), normalised anew.

    ``rows`` are sample numbers of the whole data set, the same on every rank. An evaluation is
    charged the fraction of the samples; the counter is the objective's own.

    Raises
    ------
    InputError
        No rows, or a number out of range.
    """
    numbers = np.asarray(rows, dtype=np.int64).ravel()
    if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= objective.loss.count:
        raise InputError(f"sample numbers must be 0 to {objective.loss.count - 1}, at least one; got {numbers}")
    loss = objective.loss.sampled(torch.as_tensor(numbers, device=objective.loss.device))
    derived = type(objective)(loss, objective.layout, objective.stop, objective.blocks)
    derived.fraction = objective.fraction * numbers.size / objective.loss.count
    derived.work, derived.metric = objective.work, objective.metric
    return derived


class Shift(Objective):
    """An objective with the term <dg, theta - theta0>, in the value and in the gradient."""

    dg: PETSc.Vec
    theta0: PETSc.Vec

    def _shift(self, x: PETSc.Vec) -> float:
        step = x.duplicate()
        step.waxpy(-1.0, self.theta0, x)
        value = float(self.dg.dot(step))
        step.destroy()
        return value

    def value(self, x: PETSc.Vec) -> float:
        """The value at x."""
        return super().value(x) + self._shift(x)

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """The value at x; the gradient, dg included, is written to g."""
        value = super().value_gradient(x, g)
        g.axpy(1.0, self.dg)
        return value + self._shift(x)


class ShiftedObjective(Shift):
    """See :func:`shifted`."""

    def __init__(self, objective: Objective, dg: PETSc.Vec, theta0: PETSc.Vec) -> None:
        super().__init__(objective.loss, objective.layout, objective.stop, objective.blocks, objective.parts)
        self.fraction, self.work = objective.fraction, objective.work
        self.dg, self.theta0 = dg, theta0


def shifted(objective: Objective, dg: PETSc.Vec, theta0: PETSc.Vec) -> ShiftedObjective:
    """h(theta) = L(theta) + <dg, theta - theta0>: with dg = g - grad L(theta0), grad h(theta0) = g.

    The shift enters the value and the gradient. The vectors stay the caller's and are read at
    every evaluation; work is charged to the objective.
    """
    return ShiftedObjective(objective, dg, theta0)
