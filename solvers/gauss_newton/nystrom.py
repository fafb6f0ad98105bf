"""The Nystrom preconditioner of Gauss-Newton systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from petsc4py import PETSc

from ddml.linalg.nystrom import eigenpairs, gaussian, less_identity
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.options import Option

from .preconditioners import Array, Preconditioner, Tall, everywhere, owned

DECOMPOSED = (
    8  # multiply-adds of what follows the products, over n l^2: two QR, triangles, singular values (our estimate)
)


class NystromPC(Preconditioner):
    r"""Randomised Nystrom preconditioner of rank l (Frangella, Tropp, Udell 2023, algorithms 2.1 and 5.3).

    With J^T J ~ U diag(m) U^T, m_1 >= ... >= m_l,

    .. math:: M^{-1} = I + U ((m_l + \lambda) (m + \lambda)^{-1} - I) U^T.

    The test matrix is Gaussian the first time, and U of the time before later on (our choice: a step
    of a subspace iteration that costs nothing).
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rank", 300, "Rank l (at most n).", minimum=1),
        Option("rank_seed", 0, "Seed of the first test matrix.", minimum=0),
    )

    def __init__(self) -> None:
        super().__init__()
        self.basis: Array | None = None
        self.values = np.zeros(0)
        self.matrix: Tall | None = None

    def kind(self) -> str:
        """See :meth:`Preconditioner.kind`."""
        return f"{super().kind()} of rank {self.settings.rank}"

    def build(self, at: Linearisation) -> None:
        """See :meth:`Preconditioner.build`; every rank does what is small for itself."""
        n = self.objective.layout.size
        rank = min(self.settings.rank, n)
        test = self.basis
        if test is None or test.shape[1] != rank:
            test = gaussian(n, rank, self.settings.rank_seed)
        product = everywhere(self.objective, at.gram_product(test))
        self.objective.compute(DECOMPOSED * n * rank**2)
        self._take(*eigenpairs(test, product))

    def _take(self, basis: Array, values: Array) -> None:
        # in one order: what a product rounds depends on it
        self.basis, self.values = np.ascontiguousarray(basis), values
        self.matrix = Tall.dense(self.objective.layout, self.basis[owned(self.objective)])

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """See :meth:`Preconditioner.apply`."""
        assert self.matrix is not None
        self.objective.compute(0.0, 2 * self.objective.layout.size * len(self.values))
        small = self.matrix.transpose_times(x.array_r)
        small *= less_identity(self.values, self.damping)
        y.array[:] = self.matrix.times(small) + x.array_r

    def state(self) -> dict[str, Any]:
        """See :meth:`Preconditioner.state`."""
        return {"basis": self.basis, "values": self.values}

    def restore(self, objective: Objective, state: dict[str, Any]) -> None:
        """See :meth:`Preconditioner.restore`."""
        self.objective = objective  # type: ignore[assignment]
        self._take(np.asarray(state["basis"]), np.asarray(state["values"]))
        self.restored = True
