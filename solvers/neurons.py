"""The coarse space of the neurons in Gauss-Newton systems."""

from __future__ import annotations

import numpy as np
from petsc4py import PETSc
from scipy import linalg, sparse

from ddml.loss import Loss
from ddml.objective import Objective

from .preconditioners import Array, cholesky, owned, tall


class Neurons:
    """The coarse space: Z (n, k) with orthonormal columns, J^T J Z, and what is made of them."""

    def __init__(self, objective: Objective, basis: sparse.csc_array, images: Array) -> None:
        self.images = images
        mine = basis.tocsr()[owned(objective)]
        self.Z, self.W = tall(objective, mine), tall(objective, images)  # W = J^T J Z
        self.gram = objective.comm.allreduce(mine.T @ images)  # Z^T J^T J Z
        self.small, self.more, self.spare = (self.Z.createVecRight() for _ in range(3))

    def damp(self, damping: float) -> None:
        """Add damping * I to J^T J."""
        self.damping = damping
        self.factor = cholesky(self.gram, damping)

    def _solve(self, vec: PETSc.Vec) -> None:
        if vec.getLocalSize():
            vec.array[:] = linalg.cho_solve((self.factor, True), vec.array_r, check_finite=False)

    def _images(self, vec: PETSc.Vec, small: PETSc.Vec) -> None:
        """Z^T A vec."""
        self.W.multTranspose(vec, small)
        self.Z.multTranspose(vec, self.spare)  # no multTransposeAdd: it rounds otherwise on several ranks
        small.axpy(self.damping, self.spare)

    def project(self, x: PETSc.Vec, rest: PETSc.Vec) -> None:
        """Write (I - A Q) x to ``rest``."""
        self.Z.multTranspose(x, self.small)
        self._solve(self.small)
        self.W.mult(self.small, rest)
        rest.aypx(-1.0, x)
        self.small.copy(self.more)
        self.more.scale(-self.damping)
        self.Z.multAdd(self.more, rest, rest)

    def correct(self, y: PETSc.Vec) -> None:
        """Make y the sum of (I - Q A) y and Q x with the x of the last projection."""
        self._images(y, self.more)
        self._solve(self.more)
        self.small.axpy(-1.0, self.more)
        self.Z.multAdd(self.small, y, y)

    def destroy(self) -> None:
        """Destroy the PETSc objects."""
        for thing in (self.Z, self.W, self.small, self.more, self.spare):
            thing.destroy()


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
