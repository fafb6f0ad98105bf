"""The polar factor U V^T of a matrix G = U S V^T: what a gradient becomes under a spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# our choices: the smaller side up to which a dense factorisation is used, and the smallest eigenvalue of G G^T
# relative to the largest down to which one iteration restores all digits that the product has lost
DENSE, CONDITION = 1024, 1e-10

# singular values below this fraction of the Frobenius norm are not brought to 1 (our choice); the
# largest factor that singular values are multiplied with before an iteration (our choice)
SMALLEST, LARGEST_SCALE = 1e-9, 1.7

EPS = torch.finfo(torch.float64).eps

CUBIC = ((1.5, -0.5),)  # Bernstein and Newhouse 2024, equation 15
QUINTIC = ((3.0, -16 / 5, 6 / 5),)  # modula
MUON = ((3.4445, -4.7750, 2.0315),)  # of that optimiser: fast, and does not converge
SIX_STEPS = tuple(
    (a / 1024, b / 1024, c / 1024)
    for a, b, c in (
        (3955, -8306, 5008), (3735, -6681, 3463), (3799, -6499, 3211),
        (4019, -6385, 2906), (2677, -3029, 1162), (2172, -1833, 682),
    )
)  # fmt: skip


def polar_factor(G: Tensor, dense: int = DENSE, eps: float = EPS) -> Tensor:
    """U V^T (rows, columns) of G (rows, columns) in float64, without the singular directions that are rounding errors.

    Those are the ones with singular values below eps^(2/3) of the largest (our choice), with eps the precision that G
    was computed in: the gradient of a classifier's last layer, for one, has a zero singular value, as the outputs'
    gradients sum to zero. NaN if G is not finite.
    Up to ``dense`` rows or columns, from the symmetric eigenproblem of the smaller of G G^T and G^T G and one
    Newton-Schulz iteration, or from a singular value decomposition where that product has lost too many digits;
    beyond, by :func:`newton_schulz`, which needs matrix products only, and keeps all directions down to 1e-9.
    """
    if G.shape[0] > G.shape[1]:
        return polar_factor(G.T, dense, eps).T
    rows, columns = (G != 0).any(dim=1), (G != 0).any(dim=0)
    if not (rows.all() and columns.all()):  # of units that are switched off
        factor = torch.zeros_like(G)
        if rows.any():
            factor[rows.nonzero(), columns.nonzero().T] = polar_factor(G[rows][:, columns], dense, eps)
        return factor
    size = G.abs().max()
    if not torch.isfinite(size):
        return torch.full_like(G, torch.nan)
    G = G / size
    if len(G) > dense:
        return newton_schulz(G)
    values, U = torch.linalg.eigh(G @ G.T)
    cut = eps ** (2 / 3)
    if values[0] > max(CONDITION, cut**2) * values[-1]:
        return _step((U * values.rsqrt()) @ (U.T @ G), CUBIC[0])
    U, sigma, V = torch.linalg.svd(G, full_matrices=False)
    kept = sigma > cut * sigma[0]
    return U[:, kept] @ V[kept]


def newton_schulz(G: Tensor) -> Tensor:
    r"""U V^T of G by odd cubic polynomials.

    .. math:: X_0 = G / \|G\|_F, \quad
              X \leftarrow \tfrac32 \alpha X - \tfrac12 \alpha^3 X X^T X, \quad
              \alpha = \min(1.7, \sqrt{3 / (1 + l + l^2)})

    (Bernstein, Newhouse 2024, equation 15, with the scaling of Chen and Chow 2014): it keeps the singular values in
    [l, 1], and l, the image of both ends of that interval or of the lower one, grows 2.55-fold an iteration where
    it is small, against 1.5-fold for alpha = 1, and quadratically at the end. Without the bound of 1.7 the largest
    singular values would be mapped to tiny ones, at the cost of their digits. l begins as 1e-9: singular values
    below that fraction of the Frobenius norm stay below 1.
    """
    X = G / torch.linalg.matrix_norm(G)
    for alpha in _scales(SMALLEST):
        X = _step(X, (1.5 * alpha, -0.5 * alpha**3))
    return X


def _scales(low: float) -> list[float]:
    """The factors alpha until every singular value from ``low`` on is 1 to rounding."""
    scales = []
    while 1 - low > 1e-15:
        alpha = min((3 / (1 + low + low**2)) ** 0.5, LARGEST_SCALE)
        scales.append(alpha)
        low = min(1.5 * alpha * low - 0.5 * (alpha * low) ** 3, 1.0)
    return [*scales, 1.0]


def iterate(X: Tensor, coefficients: Sequence[Sequence[float]], steps: int) -> Tensor:
    """Apply odd polynomials a x + b x^3 + c x^5 + ... to the singular values of X (rows, columns), in turn."""
    for k in range(steps):
        X = _step(X, coefficients[k % len(coefficients)])
    return X


def _step(X: Tensor, coefficients: Sequence[float]) -> Tensor:
    product: Callable[[Tensor], Tensor] = (lambda Y: (X @ X.T) @ Y) if len(X) <= len(X.T) else (lambda Y: Y @ (X.T @ X))
    total = coefficients[-1] * X
    for a in reversed(coefficients[:-1]):
        total = a * X + product(total)
    return total
