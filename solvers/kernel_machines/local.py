"""One level of overlapping Schwarz: systems of subdomains of the samples, factorised where they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import blas, lapack

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array, Values
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.restrictions import Exchange
from ddml.kernel_machines.system import Operations
from ddml.parallel import agreed, check_memory

AT_ONCE = 128  # columns of F that are exchanged at a time (our choice)


class LocalSolves:
    r"""The one-level preconditioner :math:`D^{-1} = \sum_i R_i^T W_i S_i^{-1} V_i R_i`.

    :math:`S_i = R_i (K - F F^T + \mu I) R_i^T = L_i L_i^T`, or without F. With :math:`D_i` one over the number of
    subdomains that a sample is in: ``symmetric``: :math:`W_i = V_i = D_i^{1/2}`; ``plain``: :math:`W_i = V_i = I`;
    ``restricted``: :math:`V_i = I`, and :math:`W_i` is one in the core of i and zero outside (Cai and Sarkis 1999);
    ``unity``: :math:`W_i = D_i, V_i = I`. The last two are not symmetric. Collective.

    Parameters
    ----------
    operator
        K + mu I.
    F
        This rank's rows of F, or None.
    weights
        ``symmetric``, ``plain``, ``restricted`` or ``unity``.
    damping
        What is added to the diagonal of each S_i: an array (n_i,) or a number for each subdomain.
    dtype
        ``float64`` or ``float32``: what factors are computed and kept in.

    Raises
    ------
    InputError
        On all ranks, if a system is not positive definite to rounding, or the factors of a node need more than its
        memory.
    """

    def __init__(
        self, operator: KernelOperator, F: Values | None, weights: str, damping: Sequence[Any], dtype: str = "float64"
    ) -> None:
        self.operator = operator
        layout = self.layout = operator.layout
        domain, self.dtype = layout.domain, dtype
        needed = sum(np.dtype(dtype).itemsize * len(domain.sets[i]) ** 2 for i in layout.mine)
        check_memory(layout.comm, needed, "the factors of subdomains", "use more nodes or more subdomains")
        self.exchange = Exchange(layout)
        self.left: list[Array] = []
        self.right: list[Array] = []
        for i in layout.mine:
            one = np.ones((len(domain.sets[i]), 1))
            half = np.sqrt(domain.weights(i))[:, None]
            core = np.isin(domain.sets[i], domain.cores[i]).astype(float)[:, None]
            self.left.append({"symmetric": half, "plain": one, "restricted": core, "unity": half**2}[weights])
            self.right.append(half if weights == "symmetric" else one)
        self.factors = self._factors(operator, F, damping)

    def _factors(self, operator: KernelOperator, F: Values | None, damping: Sequence[Any]) -> list[Values]:
        """The transposes of L_i, in upper triangles."""
        layout = self.layout
        # transposed: columns stand one behind the other in memory, and it is the upper triangle that is computed
        found = [system.T for system in operator.submatrices(self.dtype)]
        largest = [system.diagonal().max(initial=0.0) for system in found]
        for _, parts in self._columns(F):
            for system, part in zip(found, parts, strict=True):
                if len(part):
                    blas.get_blas_funcs("syrk", [system])(-1.0, part, beta=1.0, c=system, overwrite_c=True)
        with agreed(layout.comm):
            for number, i in enumerate(layout.mine):
                factor = _factorised(found[number], operator.shift + damping[i], largest[number])
                if factor is None:
                    remedy = "use a larger lambda"
                    remedy += ", or -factors float64" if self.dtype != "float64" else ""
                    remedy += ", or with lambda 0 -coarse balanced" if F is not None else ""
                    raise InputError(
                        f"the kernel matrix of subdomain {i} is not positive definite to rounding with lambda "
                        f"{operator.shift:g}: samples are equal, or nearly so for this kernel, or pivots; {remedy}"
                    )
                found[number] = factor
        return found

    def _columns(self, F: Values | None) -> Iterator[tuple[slice, list[Values]]]:
        """Some columns of F at a time, those of each of this rank's subdomains. Collective."""
        if F is None:
            return
        for begin in range(0, F.shape[1], AT_ONCE):
            columns = slice(begin, begin + AT_ONCE)
            yield columns, self.exchange.restrict(F[:, columns])

    def images(self, F: Values, transposed: bool = False) -> list[Values]:
        r""":math:`L_i^{-1} V_i R_i F` of this rank's subdomains, or with W_i, of its rows of F (n, r). Collective."""
        weights = self.left if transposed else self.right
        found = [np.empty((len(factor), F.shape[1]), self.dtype, order="F") for factor in self.factors]
        for columns, parts in self._columns(F):
            for image, factor, W, part in zip(found, self.factors, weights, parts, strict=True):
                image[:, columns] = half_solved(factor, W * part)
        return found

    def forward(self, rows: Array, transposed: bool = False) -> list[Values]:
        r""":math:`L_i^{-1} V_i R_i X` of this rank's subdomains, or with W_i, of its rows of X (n, k). Collective."""
        weights = self.left if transposed else self.right
        parts = self.exchange.restrict(rows)
        return [half_solved(factor, W * part) for factor, W, part in zip(self.factors, weights, parts, strict=True)]

    def backward(self, parts: Sequence[Values], columns: int, transposed: bool = False) -> Array:
        r"""This rank's rows of :math:`\sum_i R_i^T W_i L_i^{-T} Z_i`, or with V_i, of Z_i (n_i, k). Collective."""
        weights = self.right if transposed else self.left
        local = zip(parts, self.factors, weights, strict=True)
        return self.exchange.extend([W * half_solved(factor, part, True) for part, factor, W in local], columns)

    def set_up_operations(self, rank: int) -> Operations:
        """Multiply-adds of matrices and factors, with so many pivots."""
        d = 0 if self.operator.picks(self.dtype) else self.operator.samples.shape[1]
        sizes = [float(len(wide)) for wide in self.layout.domain.sets]
        return Operations.side_by_side([m * m * (d + rank + m / 6) for m in sizes])

    def operations(self, columns: int) -> Operations:
        """Multiply-adds of solving with so many columns."""
        return Operations.side_by_side([float(len(wide) ** 2 * columns) for wide in self.layout.domain.sets])

    def solve(self, rows: Array) -> Array:
        """This rank's rows of D^-1 X, of those of X (n, k). Collective."""
        return self.backward(self.forward(rows), rows.shape[1])


def solved(factor: Array, right: Array) -> Array:
    """S^-1 X (m, k) by the transposed Cholesky factor of S (m, m), its upper triangle."""
    return linalg.cho_solve((factor, False), right, check_finite=False) if len(factor) else right


def half_solved(factor: Values, right: Values, transposed: bool = False) -> Values:
    """L^-1 X (m, k), or L^-T X, by the transposed Cholesky factor L^T (m, m), and in its precision."""
    # torch takes half the time of scipy for few columns
    L, given = torch.from_numpy(factor.T), torch.from_numpy(right.astype(factor.dtype, copy=False))
    found: Values = torch.linalg.solve_triangular(L.T if transposed else L, given, upper=transposed).numpy()
    return found


def _factorised(system: Values, shift: Any, largest: float) -> Values | None:
    """The transposed Cholesky factor of S_i + shift, whose upper triangle is overwritten; None: it is indefinite."""
    if not len(system):
        return system
    system[np.diag_indices(len(system))] += shift
    factor, failed = lapack.get_lapack_funcs("potrf", [system])(system, lower=False, clean=False, overwrite_a=True)
    # a pivot of the size of its rounding errors is as bad as none
    bad = failed or (factor.diagonal() ** 2 <= np.finfo(factor.dtype).eps * largest).any()
    return None if bad else factor
