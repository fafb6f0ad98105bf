"""Objectives made from objectives: on a subset of the samples, and with a linear term."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from petsc4py import PETSc

from ddml.errors import InputError

from .linear import LinearTerm
from .objective import Objective


def sampled(objective: Objective, rows: ArrayLike) -> Objective:
    """The objective of a data set of some samples only (mini-batches, nested subsets), normalised anew.

    ``rows`` are sample numbers of the objective's data set, the same on every rank. An evaluation is
    charged the fraction of the samples; the counter is the objective's own. Linear terms are added as they are,
    not in parts. What parameters are frozen at is what they are frozen at in the objective, now and later; but the
    samples stay those of its loss now when that is replaced.

    Raises
    ------
    InputError
        No rows, or a number out of range.
    """
    numbers = np.asarray(rows, dtype=np.int64).ravel()
    if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= objective.loss.count:
        raise InputError(f"sample numbers must be 0 to {objective.loss.count - 1}, at least one; got {numbers}")
    loss = objective.loss.sampled(torch.as_tensor(numbers))
    return objective.derived(loss, fraction=objective.fraction * numbers.size / objective.loss.count)


def shifted(objective: Objective, dg: PETSc.Vec, theta0: PETSc.Vec) -> Objective:
    """h(theta) = L(theta) + <dg, theta - theta0>: with dg = g - grad L(theta0), grad h(theta0) = g.

    The shift enters the value and the gradient. The vectors stay the caller's and are read at
    every evaluation; work is charged to the objective. When the objective's loss is replaced, so is that of h. A sum
    of squares with a linear term is none: h has the Jacobian products of a
    :class:`ddml.objectives.residual.ResidualObjective`, and refuses to give its residual.
    """
    derived = objective.derived(objective.loss, objective.parts, terms=[LinearTerm(dg, theta0)])
    objective.follow_with(derived)
    return derived
