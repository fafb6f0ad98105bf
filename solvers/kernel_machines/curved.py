r"""Newton systems of kernel machines with other losses than the squared one, and what preconditions them.

With H the second derivatives of the loss by outputs, :math:`H = G G^T`, and r the gradient in the kernel's own metric,
Newton's step is :math:`(H K + \mu I) d = -r`, or with a symmetric positive definite matrix

.. math:: (\mu I + G^T K G) u = -G^T K r, \quad d = -(r + G u) / \mu

(as of Gaussian processes: Rasmussen, Williams 2006, section 3.4.3). Weights H of 0 do no harm there. The residual s of
the first is G / mu times that of the second; and whatever a preconditioned conjugate gradient method has for u, however
early it ends, d is a direction of descent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from mpi4py import MPI
from scipy import linalg

from ddml.kernel_machines.cuts import Array, Numbers
from ddml.kernel_machines.losses import Curvature
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.pivots import KINDS, Pivots
from ddml.kernel_machines.restrictions import Exchange
from ddml.kernel_machines.system import Operations
from ddml.linalg.small import cholesky
from ddml.options import Option
from ddml.parallel import check_memory

from .preconditioner import ChargedPreconditioner, check_limit

# our choices: a pivot for so many samples, so many at most, and of coupled columns so many unknowns of the coarse space
SHARE, MOST, COUPLED = 10, 200, 2000


class CurvedOperator(KernelOperator):
    r"""The matrix :math:`\mu I + G^T K G` at a point, which :meth:`move` sets; on the rows of K of an operator.

    Parameters
    ----------
    operator
        K + mu I; nothing of it is copied.
    """

    def __init__(self, operator: KernelOperator) -> None:
        vars(self).update(vars(operator))
        self.operator = operator
        self.curvature: Curvature

    @property
    def kept(self) -> dict[int, list[torch.Tensor]] | None:
        """See :attr:`KernelOperator.kept`: once for both. Collective."""
        return self.operator.kept

    def move(self, curvature: Curvature) -> None:
        """Take over H."""
        self.curvature = curvature

    def image(self, V: Array) -> Array:
        """This rank's rows of K V, of those of V (n, k). Collective."""
        return super().multiply(V) - self.shift * V

    def exact(self, V: Array) -> Array:
        """This rank's rows of K V, in float64 whatever K is kept in. Collective."""
        return -self.residual(self.shift * V, V)

    def multiply(self, V: Array) -> Array:
        """This rank's rows of the matrix times V (n, k). Collective."""
        return self.shift * V + self.curvature.transposed(self.image(self.curvature.factor(V)))


class CurvedPivotsPC(ChargedPreconditioner):
    r"""The pivots' part of K, weighed by the curvature (Falkon's of the logistic loss: Marteau-Ferey and others 2019).

    With :math:`F F^T \approx K` from the pivots (:class:`~ddml.kernel_machines.pivots.Pivots`), which are made once,

    .. math:: M = D + U U^T, \quad M^{-1} = D^{-1} (I - U (I + U^T D^{-1} U)^{-1} U^T D^{-1}), \quad U = G^T F,

    with :math:`D = \mu I`. :math:`U^T D^{-1} U` is a matrix for each column, or one of all where the loss couples
    columns; each rank factorises it.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("coarse_rank", None, "Pivots (default: a tenth of the samples, at most 200, and of softmax at most 2000 "
               "over the columns).", kind=int, minimum=1),
        Option("pivots", "uniform", "Samples drawn at random, or by randomly pivoted Cholesky factorisation.",
               choices=KINDS),
        Option("pivots_seed", 0, "Seed of the pivots.", minimum=0),
    )  # fmt: skip

    def __init__(self, columns: int, coupled: bool) -> None:
        super().__init__()
        self.columns, self.coupled = columns, coupled

    def build(self, operator: KernelOperator) -> None:
        """See :meth:`ChargedPreconditioner.build`.

        Raises
        ------
        InputError
            More pivots than samples.
        """
        layout = self.layout = operator.layout
        rank = self.settings.coarse_rank or self._rank(layout.size)
        joined = rank * self.columns if self.coupled else rank
        needed = 8 * (2 * joined**2 + (self.columns * rank**2) + 2 * rank * (layout.end - layout.begin))
        _check(operator, needed, f"a coarse space of {rank} pivots", "use a lower -coarse_rank")
        self.pivots = Pivots.chosen(operator, rank, self.settings.pivots, self.settings.pivots_seed)
        self.shift, self.F = operator.shift, self.pivots.mine()
        # multiply-adds of an entry of K, but for those that are picked
        self.computed = 0 if operator.picks("float64") else operator.samples.shape[1]

    def _rank(self, n: int) -> int:
        most = max(COUPLED // self.columns, 1) if self.coupled else MOST
        return max(min(n // SHARE, most), 1)

    def renew(self, curvature: Curvature) -> None:
        """Follow the curvature. Collective."""
        self.curvature = curvature
        rank, k = self.F.shape[1], self.columns

        def block(a: int, b: int) -> Array:
            return self.layout.inner(self.F, curvature.entry(a, b)[:, None] * self.F)

        if self.coupled:
            whole = np.zeros((k * rank, k * rank))
            for a in range(k):
                for b in range(a + 1):  # the lower triangle is all that is asked for
                    whole[a * rank : (a + 1) * rank, b * rank : (b + 1) * rank] = block(a, b)
            self.factors = [cholesky(whole / self.shift, 1.0)]
        else:
            self.factors = [cholesky(block(a, a) / self.shift, 1.0) for a in range(k)]

    def inverse(self, rows: Array) -> Array:
        """This rank's rows of D^-1 X, of those of X (n, k). Collective."""
        return rows / self.shift

    def solve(self, rows: Array) -> Array:
        """See :meth:`ChargedPreconditioner.solve`."""
        small = self.layout.inner(self.F, self.curvature.factor(self.inverse(rows)))
        parts = np.reshape(small.T, (len(self.factors), -1))
        pairs = zip(self.factors, parts, strict=True)
        found = np.stack([linalg.cho_solve((factor, True), part, check_finite=False) for factor, part in pairs])
        back = self.layout.times(self.F, found.reshape(self.columns, -1).T)
        return self.inverse(rows - self.curvature.transposed(back))

    def set_up_operations(self) -> Operations:
        """See :meth:`ChargedPreconditioner.set_up_operations`."""
        rank, d = self.F.shape[1], self.pivots.points.shape[1]
        sums = [rank * len(core) * (self.computed + rank / 2) for core in self.layout.domain.cores]
        return Operations.side_by_side(sums) + _everywhere(rank**2 * (d + rank / 6))

    def renewal_operations(self) -> Operations:
        """Multiply-adds of following the curvature."""
        rank, k = self.F.shape[1], self.columns
        blocks, joined = (k * (k + 1) / 2, (k * rank) ** 3) if self.coupled else (k, k * rank**3)
        sums = [blocks * len(core) * rank**2 for core in self.layout.domain.cores]
        return Operations.side_by_side(sums) + _everywhere(joined / 6)

    def operations(self, columns: int) -> Operations:
        """See :meth:`ChargedPreconditioner.operations`."""
        rank = self.F.shape[1]
        sums = [2.0 * len(core) * rank * columns for core in self.layout.domain.cores]
        return Operations.side_by_side(sums) + _everywhere(
            float(rank * columns) ** 2 / (1 if self.coupled else columns)
        )

    def received(self, columns: int) -> float:
        """See :meth:`ChargedPreconditioner.received`."""
        return float(len(self.layout.domain) * self.F.shape[1] * columns)


class CurvedSchwarzPC(CurvedPivotsPC):
    r"""Two-level overlapping Schwarz, weighed by the curvature, of a loss that does not couple columns.

    Each column has its own matrix, and so its own preconditioner: that of :class:`CurvedPivotsPC` with
    :math:`D^{-1}` one level with symmetric weights on :math:`\mu I + G (K - F F^T) G`. K - F F^T of subdomains is
    computed once; samples whose weight is 0, as of a squared hinge, are left out.
    """

    def build(self, operator: KernelOperator) -> None:
        """See :meth:`CurvedPivotsPC.build`."""
        super().build(operator)
        layout, domain = operator.layout, operator.layout.domain
        needed = 8 * (1 + self.columns) * sum(len(domain.sets[i]) ** 2 for i in layout.mine)
        _check(operator, needed, "the factors of subdomains", "use -preconditioner pivots, or more subdomains")
        self.exchange = Exchange(layout)
        self.halves = [np.sqrt(domain.weights(i))[:, None] for i in layout.mine]
        parts = zip(operator.submatrices("float64"), self.exchange.restrict(self.F), strict=True)
        self.left = [matrix - F @ F.T for matrix, F in parts]  # whose lower triangle is needed

    def renew(self, curvature: Curvature) -> None:
        """See :meth:`CurvedPivotsPC.renew`."""
        self.curvature, identity, columns = curvature, np.eye(self.F.shape[1]), range(self.columns)
        roots = np.sqrt(np.stack([curvature.entry(c, c) for c in columns], axis=1))
        weights = self.exchange.restrict(roots)
        self.local = [
            [self._factor(left, here[:, [c]]) for c in columns] for left, here in zip(self.left, weights, strict=True)
        ]
        self.factors = []
        for c in columns:
            U = roots[:, [c]] * self.F
            self.factors.append(cholesky(identity + self.layout.inner(U, self._inverse(U, [c], [slice(None)])), 0.0))

    def _factor(self, left: Array, roots: Array) -> tuple[Numbers, Array]:
        """Which samples of a subdomain have a weight, and the factor of their matrix."""
        there = np.flatnonzero(roots)
        return there, cholesky(left[np.ix_(there, there)] * (roots[there] * roots[there].T), self.shift)

    def inverse(self, rows: Array) -> Array:
        """See :meth:`CurvedPivotsPC.inverse`."""
        columns = range(self.columns)
        return self._inverse(rows, columns, [slice(c, c + 1) for c in columns])

    def _inverse(self, rows: Array, columns: Iterable[int], places: Sequence[slice]) -> Array:
        """D^-1 X, by the matrices of some columns, each for some columns of X."""
        parts = self.exchange.restrict(rows)
        for local, half, part in zip(self.local, self.halves, parts, strict=True):
            part *= half
            for c, place in zip(columns, places, strict=True):
                there, factor = local[c]
                inside = linalg.cho_solve((factor, True), part[there, place], check_finite=False)
                part[:, place] /= self.shift
                part[there, place] = inside
            part *= half
        return self.exchange.extend(parts, rows.shape[1])

    def set_up_operations(self) -> Operations:
        """See :meth:`ChargedPreconditioner.set_up_operations`."""
        each = [m * m * (self.computed + self.F.shape[1]) for m in self._sizes()]
        return super().set_up_operations() + Operations.side_by_side(each)

    def renewal_operations(self) -> Operations:
        """See :meth:`CurvedPivotsPC.renewal_operations`: as if every sample had a weight."""
        rank = self.F.shape[1]
        each = [self.columns * m * m * (m / 6 + rank) for m in self._sizes()]
        return super().renewal_operations() + Operations.side_by_side(each)

    def operations(self, columns: int) -> Operations:
        """See :meth:`ChargedPreconditioner.operations`: D^-1 is applied twice."""
        return super().operations(columns) + Operations.side_by_side([2 * m * m * columns for m in self._sizes()])

    def received(self, columns: int) -> float:
        """See :meth:`ChargedPreconditioner.received`."""
        domain = self.layout.domain
        return super().received(columns) + 4.0 * columns * (sum(map(len, domain.sets)) - domain.size)

    def _sizes(self) -> list[float]:
        return [float(len(wide)) for wide in self.layout.domain.sets]


def _check(operator: KernelOperator, needed: int, what: str, advice: str) -> None:
    """See that there is the memory for what a rank is to keep, and that the kernel's limit leaves it. Collective."""
    most = operator.layout.comm.allreduce(needed, MPI.MAX)
    check_limit(most, operator.spare, what, advice)
    check_memory(operator.layout.comm, needed, what, advice)


def _everywhere(count: float) -> Operations:
    """What every process does."""
    return Operations(count, count)
