"""Randomised Nystrom approximations of positive semidefinite matrices (Frangella, Tropp, Udell 2023)."""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from .small import cholesky

Array = NDArray[np.float64]


def gaussian(n: int, rank: int, seed: int) -> Array:
    """A test matrix (n, rank): random, with orthonormal columns."""
    test = np.random.default_rng(seed).standard_normal((n, rank))
    return np.asarray(linalg.qr(test, mode="economic", check_finite=False)[0])


def eigenpairs(test: Array, product: Array) -> tuple[Array, Array]:
    """U (n, l), with orthonormal columns, and m (l,), falling, with A ~ U diag(m) U^T; algorithm 2.1.

    Parameters
    ----------
    test
        (n, l), with orthonormal columns.
    product
        A times it, of a positive semidefinite matrix A (n, n).
    """
    # a small shift, undone below, keeps the Cholesky factorisation positive definite
    shift = np.finfo(float).eps * np.sqrt(len(test)) * linalg.norm(product, 2)
    factor = cholesky(test.T @ product, shift)
    half = linalg.solve_triangular(factor, (product + shift * test).T, lower=True, check_finite=False).T
    basis, singular, _ = linalg.svd(half, full_matrices=False, check_finite=False)
    return np.ascontiguousarray(basis), np.maximum(singular**2 - shift, 0.0)


def less_identity(values: Array, damping: float) -> Array:
    r"""What :math:`(m_l + \lambda) (m + \lambda)^{-1} - 1` is of eigenvalues m (l,), falling; equation 5.3.

    The inverse of the preconditioner of A + lambda I is I plus U times this times U^T.
    """
    least = max(values[-1] + damping, np.finfo(float).tiny)
    return np.asarray(least / (values + damping) - 1)
