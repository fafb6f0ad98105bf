"""Small factorisations, whole on each process."""

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cholesky(matrix: Array, damping: float) -> Array:
    """The lower Cholesky factor of matrix + damping * I, of which the lower triangle is given.

    Where rounding has left it indefinite, the damping is raised to some roundings of the largest diagonal entry; a
    matrix without scale, zero, becomes I.
    """
    shift = damping
    while True:
        moved = torch.tensor(matrix)
        moved.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(moved)  # takes half the time of scipy's
        if not failed:
            return np.asfortranarray(factor.numpy())
        if not np.isfinite(matrix).all():
            return np.full_like(matrix, np.nan)  # and what it solves is refused, on every rank
        scale = float(np.abs(matrix.diagonal()).max()) or float(np.abs(np.tril(matrix)).max())
        if scale == 0:
            return np.eye(len(matrix), order="F")
        shift = max(10 * shift, 10 * np.finfo(float).eps * scale, np.finfo(float).tiny)
