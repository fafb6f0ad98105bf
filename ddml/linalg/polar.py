r"""The polar factor U V^T of a matrix G = U S V^T: what a gradient becomes under a spectral norm.

Small matrices get it to rounding (:func:`polar_factor`). Of large ones a direction needs a few digits only, and
:func:`near_factor` gives one that is proven to be within a tolerance of the best. It computes X = U p(S) V^T, p a
composition of odd quintic polynomials that map [0, 1] into itself, from matrix products in the precision of G.

With c an upper bound of the largest singular value, :math:`c^2 = \|G G^T\|_F`, and s the singular values of G / c,
the first polynomials are all the same, which multiplies small values by 4.156 and keeps values above 0.0144 above
0.06; three further ones bring [0.06, 1] into [r, 1], r = 0.9929. Each is the odd quintic that is closest to 1 on such
an interval (Amsel et al. 2025, "The Polar Express", which has the idea and the theorem that this greedy choice is
optimal), divided by its maximum and made for inputs up to 1.01, so that rounding errors cannot grow (their safety
factor). After k of the first, p is at least r from :math:`l = 0.06 / 4.156^k` on, and below l it is increasing with
p(s) / s decreasing, as each polynomial's is up to its first maximum; so :math:`p(s) \ge r s / l` there. Therefore,
with m the smaller side,

.. math:: \sum_i s_i - \sum_i s_i p(s_i) \le (1 - r) \sum_i s_i + \sum_{s_i < l} s_i (r - r s_i / l)
          \quad\text{and}\quad s (1 - s / l) \le l / 4,

.. math:: r \|G\|_* \le \langle G, X\rangle + r m l c / 4.

This bound of the dual norm is computed; k is the first number for which :math:`\langle G, X_k\rangle`, a lower bound
of it as X_k has no singular value above 1, promises that the result will be within the tolerance. For gradients with
2,048 rows and 5 per cent k is 4, and all takes 21 products of matrices, 14 of which are symmetric and cost two thirds.
There is no state: a factor depends on its matrix alone, and a restarted run goes on to the last bit. (A factor of the
last iteration is no useful start: odd polynomials can only act on the matrix itself.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddml.numbers import as_number, read

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

# odd quintics that take [0, 1.01] into [0, 1], see above: the first, and what it multiplies small values by at least;
# then those that take [LOW, 1] into [REACHED, 1] (made by the algorithm of Remez; LOW is our choice)
LOW, REACHED, GROWTH = 0.06, 0.99293, 4.156
GROWING = (4.15852531, -11.8086978, 8.53122438)
FINISHING = (
    (3.97853158, -10.4189437, 7.34182440),
    (3.32058629, -6.27056513, 3.90745776),
    (2.21833065, -2.03401543, 0.813630820),
)
FINEST = 0.01  # the smallest tolerance of near_factor (our choice)
TILE = 256  # rows up to which a symmetric product is computed whole (measured on CPUs, our choice)


def near_factor(G: Tensor, tolerance: float) -> Tensor | None:
    r"""X (rows, columns) with no singular value above 1 and :math:`\langle G, X\rangle \ge (1 - t) \|G\|_*`.

    Both to rounding; the proof stands in :mod:`ddml.linalg.polar`. In the precision and on the device of G.

    Parameters
    ----------
    G
        (rows, columns), finite, its entries far from under- and overflow.
    tolerance
        t, at least :data:`FINEST`.

    Returns
    -------
    Tensor or None
        None where the precision of G does not suffice.
    """
    if len(G) > len(G.T):
        found = near_factor(G.T, tolerance)
        return None if found is None else found.T
    m, n = G.shape
    # X is in one of two rooms, R = X X^T in the other, where the next X is written: with Z and G four matrices in all
    here, there, Z = G.new_empty(m * n), G.new_empty(m * n), G.new_empty(m, m)
    R = symmetric_product(G, out=there[: m * m].view(m, m))
    bound = math.sqrt(float(torch.linalg.matrix_norm(R)))
    if bound == 0:
        return torch.zeros_like(G)
    R /= bound**2
    X = torch.div(G, bound, out=here.as_strided((m, n), torch.empty_like(G, device="meta").stride()))
    low, number = LOW, 0
    at_least = float(torch.linalg.matrix_norm(X)) ** 3  # of the dual norm of X, Hoelder's inequality
    spare = 4 * (REACHED - (1 - tolerance)) / REACHED
    while number < len(FINISHING):
        if m * low <= spare * at_least:
            coefficients, number = FINISHING[number], number + 1
        elif low < 8 * torch.finfo(G.dtype).eps:
            return None
        else:
            coefficients = GROWING
        a, b, c = coefficients
        symmetric_product(R, c, R, b, out=Z)
        Z.diagonal().add_(a)
        X, here, there = torch.mm(Z, X, out=there.view(m, n)), there, here
        if coefficients is GROWING:
            low, at_least = low / GROWTH, max(at_least, inner(G, X) / bound)
        if number < len(FINISHING):
            R = symmetric_product(X, out=there[: m * m].view(m, m))
    reached = inner(G, X)
    dual = reached / REACHED + m * low * bound / 4
    return X if reached >= (1 - tolerance) * dual else None


def inner(A: Tensor, B: Tensor) -> float:
    """<A, B>, summed in float64."""
    pieces = zip(A.split(TILE), B.split(TILE), strict=True)
    return math.fsum(read([as_number((a * b).sum(dtype=torch.float64)) for a, b in pieces]))


def symmetric_product(
    A: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Compute alpha A A^T + beta plus (m, m) of A (m, n) and a symmetric ``plus``; on a CPU half of it is mirrored.

    Written to ``out`` if that is given, which is none of the others.
    """
    out = A.new_empty(len(A), len(A)) if out is None else out
    _fill(A, alpha, plus, beta, out, TILE if A.device.type == "cpu" else len(A))
    return out


def _fill(A: Tensor, alpha: float, plus: Tensor | None, beta: float, out: Tensor, tile: int) -> None:
    n, half = len(A), len(A) // 2
    if n <= tile:
        _add(A, A, alpha, plus, beta, out)
        return
    first, second = slice(0, half), slice(half, n)
    for part in (first, second):
        _fill(A[part], alpha, None if plus is None else plus[part, part], beta, out[part, part], tile)
    _add(A[second], A[first], alpha, None if plus is None else plus[second, first], beta, out[second, first])
    out[first, second] = out[second, first].T


def _add(A: Tensor, B: Tensor, alpha: float, plus: Tensor | None, beta: float, out: Tensor) -> None:
    if plus is None:
        torch.mm(A, B.T, out=out).mul_(alpha)
    else:
        torch.addmm(plus, A, B.T, beta=beta, alpha=alpha, out=out)


def norm_bound(G: Tensor, tolerance: float) -> float:
    r"""An upper bound, to rounding, of the largest singular value of G; at most 1 + tolerance times that.

    With :math:`A_k = (G G^T)^{2^k}`, of largest eigenvalue :math:`\lambda`:
    :math:`\|A_{k+1}\|_F / \|A_k\|_F \le \lambda \le \|A_k\|_F`. At most the logarithm of (log m / tolerance)
    products of matrices. In the precision and on the device of G.
    """
    A = symmetric_product(G if len(G) <= len(G.T) else G.T)
    size = float(torch.linalg.matrix_norm(A))
    if not 0 < size < math.inf:
        return math.sqrt(size)
    power, log = 1, math.log(size)  # A is the product to that power, divided by its Frobenius norm exp(log)
    while True:
        A = symmetric_product(A / size)
        size = float(torch.linalg.matrix_norm(A))
        power, log = 2 * power, 2 * log + math.log(size)
        # of the largest eigenvalue to that power: at most exp(log), at least exp(log) size
        if -math.log(size) <= 2 * power * math.log1p(tolerance):
            return math.exp(log / (2 * power))


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
    if torch.count_nonzero(G) < G.numel():
        rows, columns = G.any(dim=1), G.any(dim=0)
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
