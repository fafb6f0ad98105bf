"""Numbers that a kernel machine needs and nobody has given: from the training samples alone."""

from __future__ import annotations

import numpy as np
import torch

from .cuts import Array
from .functions import Kernel

WIDTH = 0.5  # of the median distance (our choice)
SHIFTS = tuple(10.0 ** (-half / 2) for half in range(9))  # 1 to 1e-4 that lambda is chosen from (our choice)
TRIED = 1000  # samples that the choice looks at (our choice)


def leave_one_out(values: Array, vectors: Array, targets: Array, shift: float) -> float:
    r"""The mean square of what a machine without a sample gets wrong there, :math:`\alpha_i / (A^{-1})_{ii}`.

    Parameters
    ----------
    values, vectors
        Eigenvalues (n,) and eigenvectors (n, n) of K.
    targets
        Y (n, k).
    shift
        mu.
    """
    inverse = 1.0 / (np.maximum(values, 0.0) + shift)
    alpha = vectors @ (inverse[:, None] * (vectors.T @ targets))
    diagonal = (vectors**2) @ inverse
    return float(np.mean((alpha / diagonal[:, None]) ** 2))


def best_shift(kernel: Kernel, samples: Array, targets: Array, seed: int = 0) -> float:
    """The lambda of :data:`SHIFTS` with the least leave-one-out error on a thousand samples at most, drawn with a seed.

    Parameters
    ----------
    samples, targets
        (n, d) and (n, k).
    """
    rows = np.arange(len(samples))
    if len(rows) > TRIED:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), TRIED, replace=False))
    x = torch.as_tensor(samples[rows])
    values, vectors = np.linalg.eigh(kernel(x, x.clone()).numpy())
    return min(SHIFTS, key=lambda shift: leave_one_out(values, vectors, targets[rows], shift))
