"""One level of overlapping Schwarz: systems of subdomains of the samples, factorised where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import linalg

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.pivots import Pivots
from ddml.kernel_machines.restrictions import Exchange
from ddml.kernel_machines.system import Operations
from ddml.parallel import agreed, check_memory


class LocalSolves:
    r"""The one-level preconditioner :math:`D^{-1} = \sum_i R_i^T W_i S_i^{-1} V_i R_i`.

    :math:`S_i = R_i (K - F F^T + \mu I) R_i^T`, or without F. With :math:`D_i` one over the number of subdomains that a
    sample is in: ``symmetric``: :math:`W_i = V_i = D_i^{1/2}`; ``plain``: :math:`W_i = V_i = I`; ``restricted``:
    :math:`V_i = I`, and :math:`W_i` is one in the core of i and zero outside (Cai and Sarkis 1999); ``unity``:
    :math:`W_i = D_i, V_i = I`. The last two are not symmetric. Collective.

    Parameters
    ----------
    operator
        K + mu I.
    pivots
        Those of F, or None.
    weights
        ``symmetric``, ``plain``, ``restricted`` or ``unity``.
    damping
        What is added to the diagonal of each S_i: an array (n_i,) or a number for each subdomain.

    Raises
    ------
    InputError
        On all ranks, if a system is not positive definite to rounding, or the factors of a node need more than its
        memory.
    """

    def __init__(self, operator: KernelOperator, pivots: Pivots | None, weights: str, damping: Sequence[Any]) -> None:
        self.operator = operator
        layout = self.layout = operator.layout
        domain = layout.domain
        needed = sum(8 * len(domain.sets[i]) ** 2 for i in layout.mine)
        check_memory(layout.comm, needed, "the factors of subdomains", "use more nodes or more subdomains")
        self.exchange = Exchange(layout)
        self.factors: list[Array] = []
        self.left: list[Array] = []
        self.right: list[Array] = []
        with agreed(layout.comm):
            for i in layout.mine:
                one = np.ones((len(domain.sets[i]), 1))
                half = np.sqrt(domain.weights(i))[:, None]
                core = np.isin(domain.sets[i], domain.cores[i]).astype(float)[:, None]
                self.factors.append(_factor(operator, pivots, i, damping[i]))
                self.left.append({"symmetric": half, "plain": one, "restricted": core, "unity": half**2}[weights])
                self.right.append(half if weights == "symmetric" else one)

    def set_up_operations(self, rank: int) -> Operations:
        """Multiply-adds of matrices and factors, with so many pivots."""
        d = self.operator.samples.shape[1]
        sizes = [float(len(wide)) for wide in self.layout.domain.sets]
        return Operations.side_by_side([m * m * (d + rank + m / 6) for m in sizes])

    def operations(self, columns: int) -> Operations:
        """Multiply-adds of solving with so many columns."""
        return Operations.side_by_side([float(len(wide) ** 2 * columns) for wide in self.layout.domain.sets])

    def solve(self, rows: Array) -> Array:
        """This rank's rows of D^-1 X, of those of X (n, k). Collective."""
        return self._solve(rows, self.left, self.right)

    def solve_transposed(self, rows: Array) -> Array:
        """This rank's rows of D^-T X, of those of X (n, k). Collective."""
        return self._solve(rows, self.right, self.left)

    def _solve(self, rows: Array, left: list[Array], right: list[Array]) -> Array:
        parts = self.exchange.restrict(rows)
        local = zip(parts, self.factors, left, right, strict=True)
        return self.exchange.extend([W * solved(factor, V * part) for part, factor, W, V in local], rows.shape[1])


def solved(factor: Array, right: Array) -> Array:
    """S^-1 X (m, k) by the lower Cholesky factor of S (m, m)."""
    return linalg.cho_solve((factor, True), right, check_finite=False) if len(factor) else right


def _factor(operator: KernelOperator, pivots: Pivots | None, i: int, damping: Any) -> Array:
    """The Cholesky factor of S_i."""
    places = operator.layout.places[operator.layout.domain.sets[i]]
    if not len(places):
        return np.empty((0, 0))
    samples = operator.samples[places]
    system = operator.kernel(samples, samples.clone()).numpy()
    largest = float(system.diagonal().max())
    if pivots is not None:
        F = pivots.rows(samples)
        system = system - F @ F.T
    system[np.diag_indices(len(system))] += operator.shift + damping
    try:
        factor = linalg.cholesky(system, lower=True, check_finite=False)
    except linalg.LinAlgError:
        factor = np.zeros_like(system)
    # a pivot of the size of its rounding errors is as bad as none
    if (factor.diagonal() ** 2 <= np.finfo(float).eps * largest).any():
        remedy = "use a larger lambda" + (", or with lambda 0 -coarse balanced" if pivots is not None else "")
        raise InputError(
            f"the kernel matrix of subdomain {i} is not positive definite to rounding with lambda {operator.shift:g}: "
            f"samples are equal, or nearly so for this kernel, or pivots; {remedy}"
        )
    return np.asarray(factor)
