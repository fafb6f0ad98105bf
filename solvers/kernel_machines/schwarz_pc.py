"""Two-level overlapping Schwarz preconditioners of kernel machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from scipy import linalg

from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.pivots import KINDS, Pivots, chosen
from ddml.kernel_machines.system import Operations
from ddml.linalg.small import cholesky
from ddml.options import Option
from ddml.parallel import check_memory

from .local import LocalSolves
from .preconditioner import ChargedPreconditioner

SHARE, MOST = 10, 1000  # a pivot for so many samples, so many at most (our choices)


class KernelSchwarzPC(ChargedPreconditioner):
    r"""Overlapping Schwarz on the samples, with a coarse space of pivots (ours; the pieces are known).

    One level of Schwarz does not precondition a kernel matrix, whose large eigenvalues all subdomains share. The
    coarse space takes them away first: with :math:`F F^T \approx K` from the pivots (:class:`Pivots`) and
    :math:`D^{-1}` one level on :math:`S = K - F F^T + \mu I` (:class:`LocalSolves`),

    .. math:: M = D + F F^T, \quad M^{-1} = D^{-1} - D^{-1} F (I + F^T D^{-1} F)^{-1} F^T D^{-1}

    (``woodbury``). Without overlap M agrees with the matrix in every diagonal block and in the pivots' columns.
    ``balanced`` is one level on :math:`A = K + \mu I` itself (Mandel 1993): with :math:`Q = F (F^T A F)^{-1} F^T`,

    .. math:: M^{-1} = Q + (I - Q A) D^{-1} (I - A Q),

    which takes a product of A with as many columns as there are pivots to build; ``none`` is one level on A. What is
    small is done by each rank for itself; an application takes one exchange of overlaps and one sum over ranks.

    Parameters
    ----------
    points
        Inducing points (r, ...), in the place of pivots that the options choose.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("schwarz", "symmetric", "Weights of overlaps: their square roots on both sides; none; or cores only, "
               "which is not symmetric.", choices=("symmetric", "plain", "restricted")),
        Option("coarse", "woodbury", "How subdomains and coarse space are put together.",
               choices=("woodbury", "balanced", "none")),
        Option("coarse_rank", None, "Pivots (default: a tenth of the samples, at most 1000).", kind=int, minimum=1),
        Option("pivots", "uniform", "Samples drawn at random, or by randomly pivoted Cholesky factorisation.",
               choices=KINDS),
        Option("pivots_seed", 0, "Seed of the pivots.", minimum=0),
        Option("omega", 0.0, "What is added to the diagonal of each subdomain's matrix, for Richardson's iteration.",
               minimum=0),
    )  # fmt: skip

    def __init__(self, points: Any = None) -> None:
        super().__init__()
        self.points = points

    @property
    def symmetric(self) -> bool:
        """See :attr:`ChargedPreconditioner.symmetric`."""
        return bool(self.settings.schwarz != "restricted")

    def build(self, operator: KernelOperator) -> None:
        """See :meth:`ChargedPreconditioner.build`.

        Raises
        ------
        InputError
            More pivots than samples; see :class:`LocalSolves`.
        """
        layout, form = operator.layout, self.settings.coarse
        self.layout = layout
        pivots = None if form == "none" else self._pivots(operator)
        if pivots is not None:
            needed = 8 * len(pivots) * (3 * (layout.end - layout.begin) + 2 * len(pivots))
            check_memory(layout.comm, needed, f"a coarse space of {len(pivots)} pivots", "use a lower -coarse_rank")
        damping = [self.settings.omega] * len(layout.domain)
        self.local = LocalSolves(operator, pivots if form == "woodbury" else None, self.settings.schwarz, damping)
        if pivots is None:
            return
        F = self.F = pivots.mine()
        if form == "balanced":
            self.image = operator.multiply(F)
            self._factorise(layout.inner(F, self.image))
            return
        self.image = self.local.solve(F)  # D^-1 F, and D^-T F
        self.dual = self.image if self.symmetric else self.local.solve_transposed(F)
        self._factorise(np.eye(len(pivots)) + layout.inner(F, self.image))

    def _pivots(self, operator: KernelOperator) -> Pivots:
        if self.points is not None:
            return Pivots(operator, operator.prepared(self.points))
        rank = self.settings.coarse_rank or max(min(operator.layout.size // SHARE, MOST), 1)
        return Pivots(operator, chosen(operator, rank, self.settings.pivots, self.settings.pivots_seed))

    def _factorise(self, matrix: Array) -> None:
        if self.symmetric or self.settings.coarse == "balanced":
            factor = cholesky((matrix + matrix.T) / 2, 0.0)
            self.coarse = lambda right: linalg.cho_solve((factor, True), right, check_finite=False)
        else:
            both = linalg.lu_factor(matrix, check_finite=False)
            self.coarse = lambda right: linalg.lu_solve(both, right, check_finite=False)

    def solve(self, rows: Array) -> Array:
        """See :meth:`ChargedPreconditioner.solve`."""
        layout, form = self.layout, self.settings.coarse
        if form == "none":
            return self.local.solve(rows)
        if form == "woodbury":
            small = self.coarse(layout.inner(self.dual, rows))
            return self.local.solve(rows) - layout.times(self.image, small)
        projected = layout.inner(self.F, rows)
        found = self.local.solve(rows - layout.times(self.image, self.coarse(projected)))
        small = self.coarse(projected - layout.inner(self.image, found))
        return found + layout.times(self.F, small)

    @property
    def rank(self) -> int:
        """Pivots; 0 without a coarse space."""
        return 0 if self.settings.coarse == "none" else int(self.F.shape[1])

    def set_up_operations(self) -> Operations:
        """See :meth:`ChargedPreconditioner.set_up_operations`."""
        rank, domain, operator = self.rank, self.layout.domain, self.local.operator
        d = operator.samples.shape[1]
        sums = [rank * len(core) * (d + 1.5 * rank) for core in domain.cores]
        found = self.local.set_up_operations(rank if self.settings.coarse == "woodbury" else 0)
        found = found + Operations.side_by_side(sums) + Operations(rank**3 / 6, rank**3 / 6)
        if self.settings.coarse == "woodbury":
            return found + self.local.operations(rank)
        n = self.layout.size
        image = float(n * rank * (n + (0 if operator.keeps else d)))
        return found + Operations(image, image * max(map(len, domain.cores)) / n)

    def operations(self, columns: int) -> Operations:
        """See :meth:`ChargedPreconditioner.operations`."""
        passes = {"none": 0, "woodbury": 2, "balanced": 4}[self.settings.coarse]
        coarse = [float(passes * len(core) * self.rank * columns) for core in self.layout.domain.cores]
        small = float(self.rank**2 * columns)
        return self.local.operations(columns) + Operations.side_by_side(coarse) + Operations(small, small)

    def received(self, columns: int) -> float:
        """See :meth:`ChargedPreconditioner.received`."""
        domain = self.layout.domain
        overlaps = sum(map(len, domain.sets)) - domain.size
        return float(columns * (2 * overlaps + len(domain) * self.rank))
