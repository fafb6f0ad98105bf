"""The Nystrom preconditioner of kernel machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.system import Operations
from ddml.linalg.nystrom import eigenpairs, gaussian, less_identity
from ddml.options import Option

from .preconditioner import ChargedPreconditioner


class KernelNystromPC(ChargedPreconditioner):
    r"""Randomised Nystrom preconditioner of :math:`K + \mu I` (Frangella, Tropp, Udell 2023), as of Gauss-Newton's.

    It takes a product of K with ``rank`` columns; each rank does what is small for itself.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rank", 300, "Rank l (at most n).", minimum=1),
        Option("rank_seed", 0, "Seed of the test matrix.", minimum=0),
    )

    def build(self, operator: KernelOperator) -> None:
        """See :meth:`ChargedPreconditioner.build`."""
        self.layout = layout = operator.layout
        mine = slice(layout.begin, layout.end)
        test = gaussian(layout.size, min(self.settings.rank, layout.size), self.settings.rank_seed)
        product = layout.everywhere(operator.multiply(test[mine]) - operator.shift * test[mine])
        basis, values = eigenpairs(test, product)
        self.basis, self.factors = basis[mine], less_identity(values, operator.shift)

    def solve(self, rows: Array) -> Array:
        """See :meth:`ChargedPreconditioner.solve`."""
        small = self.layout.inner(self.basis, rows)
        return rows + self.layout.times(self.basis, self.factors[:, None] * small)

    def set_up_operations(self) -> Operations:
        """See :meth:`ChargedPreconditioner.set_up_operations`."""
        n, rank = self.layout.size, self.basis.shape[1]
        d = self.operator.samples.shape[1] if self.operator is not None and not self.operator.keeps else 0
        share = max(map(len, self.layout.domain.cores)) / n
        product, small = float(n * n * (rank + d)), float(3 * n * rank**2)
        return Operations(product + small, product * share + small)

    def operations(self, columns: int) -> Operations:
        """See :meth:`ChargedPreconditioner.operations`."""
        rank = self.basis.shape[1]
        return Operations.side_by_side([2.0 * len(core) * rank * columns for core in self.layout.domain.cores])

    def received(self, columns: int) -> float:
        """See :meth:`ChargedPreconditioner.received`."""
        return float(len(self.layout.domain) * self.basis.shape[1] * columns)
