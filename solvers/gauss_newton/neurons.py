"""The coarse space of the neurons in Gauss-Newton systems."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import numpy as np
from petsc4py import PETSc
from scipy import linalg, sparse

from ddml.linalg.small import cholesky
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective

from .preconditioners import Array, Tall, owned


class Neurons:
    """The coarse space: Z (n, k) with orthonormal columns, J^T J Z, and what is made of them; collective."""

    def __init__(self, objective: Objective, basis: sparse.csc_array, images: Array) -> None:
        self.images = images
        layout, begin = objective.layout, owned(objective).start
        rows = basis.tocsr()
        # entries of a piece belong to neighbouring neurons: those of its first and its last entry, and all between
        columns = [slice(rows.indices[a], rows.indices[b - 1] + 1) for a, b in pairwise(layout.edges)]
        blocks = [
            rows[begin + piece.start : begin + piece.stop, columns[bisect_left(layout.edges, begin + piece.start)]]
            for piece in layout.pieces
        ]
        self.Z = Tall(layout, columns, blocks, basis.shape[1])
        self.W = Tall.dense(layout, images)  # J^T J Z
        self.gram = self.Z.transpose_times(images)  # Z^T J^T J Z

    def damp(self, damping: float) -> None:
        """Add damping * I to J^T J."""
        self.damping = damping
        self.factor = cholesky(self.gram, damping)

    def _solve(self, small: Array) -> Array:
        return np.asarray(linalg.cho_solve((self.factor, True), small, check_finite=False))

    def project(self, x: PETSc.Vec, rest: PETSc.Vec) -> None:
        """Write (I - A Q) x to ``rest``."""
        self.small = self._solve(self.Z.transpose_times(x.array_r))
        rest.array[:] = x.array_r - self.W.times(self.small) - self.damping * self.Z.times(self.small)

    def correct(self, y: PETSc.Vec) -> None:
        """Make y the sum of (I - Q A) y and Q x with the x of the last projection."""
        local = y.array_r
        images = self.W.transpose_times(local) + self.damping * self.Z.transpose_times(local)
        change = self.Z.times(self.small - self._solve(images))
        y.array[:] += change


def neuron_basis(loss: Loss, theta: Array) -> sparse.csc_array:
    """Z (n, k) with orthonormal columns: each neuron's weights as they are in theta (n,), and each other parameter.

    A neuron's weights are theta[i] of a tensor of two or more dimensions; where they are all zero, all alike.
    """
    labels, values, count = np.zeros(loss.size, dtype=np.int64), np.ones(loss.size), 0
    for p in loss.parameters:
        rows = p.shape[0] if len(p.shape) > 1 else p.size
        table = theta[p.range].reshape(rows, -1) if len(p.shape) > 1 else np.ones((rows, 1))
        table = np.where(np.any(table != 0, axis=1, keepdims=True), table, 1.0)
        values[p.range] = (table / linalg.norm(table, axis=1, keepdims=True)).ravel()
        labels[p.range] = count + np.repeat(np.arange(rows), table.shape[1])
        count += rows
    return sparse.csc_array((values, (np.arange(loss.size), labels)), shape=(loss.size, count))
