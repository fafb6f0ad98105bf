"""Two-level overlapping Schwarz preconditioners of kernel machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import blas

from ddml.kernel_machines.costs import SINGLE, Task, coarse_rank, memory
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.pivots import KINDS, Pivots
from ddml.kernel_machines.system import Operations
from ddml.linalg.small import cholesky
from ddml.options import Option
from ddml.parallel import agreed, check_memory

from .local import LocalSolves
from .preconditioner import ChargedPreconditioner, check_limit

CARELESS = 0.1  # of lambda is what F F^T may be wrong by (our choice)


class KernelSchwarzPC(ChargedPreconditioner):
    r"""Overlapping Schwarz on the samples, with a coarse space of pivots (ours; the pieces are known).

    One level of Schwarz does not precondition a kernel matrix, whose large eigenvalues all subdomains share. The
    coarse space takes them away first: with :math:`F F^T \approx K` from the pivots (:class:`Pivots`) and
    :math:`D^{-1}` one level on :math:`S = K - F F^T + \mu I` (:class:`LocalSolves`),

    .. math:: M = D + F F^T, \quad M^{-1} = D^{-1} - D^{-1} F (I + F^T D^{-1} F)^{-1} F^T D^{-1}

    (``woodbury``). With :math:`G_i = L_i^{-1} V_i R_i F` of the local Cholesky factors, :math:`F^T D^{-1} F` is
    :math:`\sum_i G_i^T G_i`, and an application needs one forward and one backward solve of each subdomain, between
    which the coarse space is subtracted; F itself is not kept.
    Without overlap M agrees with the matrix in every diagonal block and in the pivots' columns.
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
        Option("coarse_rank", None, "Pivots (default: by a model of cost).", kind=int, minimum=1),
        Option("pivots", "uniform", "Samples drawn at random, or by randomly pivoted Cholesky factorisation.",
               choices=KINDS),
        Option("pivots_seed", 0, "Seed of the pivots.", minimum=0),
        Option("omega", 0.0, "What is added to the diagonal of each subdomain's matrix, for Richardson's iteration.",
               minimum=0),
        Option("factors", None, "What factors of subdomains are kept in (default: float32 where lambda is large enough "
               "for it).", kind=str, choices=("float32", "float64")),
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
            More pivots than samples; factors that do not fit the operator's limit; see :class:`LocalSolves`.
        """
        layout, form = operator.layout, self.settings.coarse
        self.layout = layout
        task = self._task(operator)
        sizes = [len(wide) for wide in layout.domain.sets]
        damping, weights = [self.settings.omega] * len(layout.domain), self.settings.schwarz
        pivots = None if form == "none" else self._pivots(operator, task, sizes)
        rank = self.rank = 0 if pivots is None else len(pivots)
        what = f"factors of {len(sizes)} subdomains and {rank} pivots"
        advice = "use a lower -coarse_rank, more subdomains or ranks"
        check_limit(memory(task, sizes, rank), task.memory, what, advice)
        needed = 8 * rank * (3 * (layout.end - layout.begin) + 2 * rank)
        check_memory(layout.comm, needed, f"a coarse space of {rank} pivots", "use a lower -coarse_rank")
        if pivots is None or form == "balanced":
            self.local = LocalSolves(operator, None, weights, damping, task.factors)
        if pivots is None:
            return
        if form == "balanced":
            F = self.F = pivots.mine()
            self.image = operator.multiply(F)
            self._factorise(layout.inner(F, self.image))
            return
        F = pivots.mine(task.factors, CARELESS * task.shift)
        self.local = LocalSolves(operator, F, weights, damping, task.factors)
        self.images = self.local.images(F)
        self.duals = self.images if self.symmetric else self.local.images(F, transposed=True)
        self._factorise(np.eye(rank) + layout.summed(self._gram))

    def _task(self, operator: KernelOperator) -> Task:
        n, d = operator.samples.shape
        with agreed(operator.layout.comm):
            shift = operator.shift / float(operator.kernel.diagonal(operator.samples).max())
        single = self.settings.coarse == "woodbury" and self.symmetric and shift >= SINGLE
        factors = self.settings.factors or ("float32" if single else "float64")
        ranks, kept = operator.layout.comm.size, operator.keeps
        return Task(n, d, self.columns, shift, ranks, kept, operator.spare, operator.dtype, factors)

    def _pivots(self, operator: KernelOperator, task: Task, sizes: list[int]) -> Pivots:
        if self.points is not None:
            return Pivots(operator, operator.prepared(self.points))
        rank = self.settings.coarse_rank or coarse_rank(task, sizes)
        return Pivots.chosen(operator, rank, self.settings.pivots, self.settings.pivots_seed)

    def _gram(self, i: int) -> Array:
        """The contribution of a subdomain of this rank to F^T D^-1 F; its lower triangle, where that is enough."""
        number = i - self.layout.mine[0]
        image, dual = self.images[number], self.duals[number]
        if not self.symmetric or not len(image):
            return (dual.T @ image).astype(np.float64)
        return np.asarray(blas.get_blas_funcs("syrk", [image])(1.0, image, trans=True, lower=True), np.float64)

    def _factorise(self, matrix: Array) -> None:
        if self.symmetric or self.settings.coarse == "balanced":
            factor = cholesky(matrix, 0.0)
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
            return self._woodbury(rows)
        projected = layout.inner(self.F, rows)
        found = self.local.solve(rows - layout.times(self.image, self.coarse(projected)))
        small = self.coarse(projected - layout.inner(self.image, found))
        return found + layout.times(self.F, small)

    def _woodbury(self, rows: Array) -> Array:
        parts = [torch.from_numpy(part) for part in self.local.forward(rows)]
        images, duals = (list(map(torch.from_numpy, some)) for some in (self.images, self.duals))
        first = min(self.layout.mine, default=0)
        small = self.coarse(self.layout.summed(lambda i: (duals[i - first].T @ parts[i - first]).double().numpy()))
        given = torch.from_numpy(small.astype(self.local.dtype))
        left = [(part - image @ given).numpy() for part, image in zip(parts, images, strict=True)]
        return self.local.backward(left, rows.shape[1])

    def set_up_operations(self) -> Operations:
        """See :meth:`ChargedPreconditioner.set_up_operations`."""
        rank, domain, operator = self.rank, self.layout.domain, self.local.operator
        d = 0 if operator.keeps and self.points is None else operator.samples.shape[1]
        sums = [rank * len(core) * (d + 1.5 * rank) for core in domain.cores]
        found = self.local.set_up_operations(rank if self.settings.coarse == "woodbury" else 0)
        found = found + Operations.side_by_side(sums) + Operations(rank**3 / 6, rank**3 / 6)
        if self.settings.coarse == "woodbury":
            return found + self.local.operations(rank)
        n = self.layout.size
        image = float(n * rank * (n + (0 if operator.keeps else operator.samples.shape[1])))
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
