r"""Other methods for :math:`(K + \mu I) \alpha = Y`, a kernel machine of n samples and k outputs, on one core.

Each builds what it needs of K by torch, in half of its blocks where symmetry gives the others, multiplies with it by
numpy, and puts its iterates aside with a stopwatch that stands still meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from ddml.kernel_machines import Kernel, named
from ddml.parallel import split

Array = NDArray[Any]
Product = Callable[[Array], Array]

BLOCK = 512  # rows of K that are computed together (our choice)
# our choices: iterations of conjugate gradients, passes over the samples of EigenPro and of block descent, and at how
# many places of one the first is looked at
MOST, EPOCHS, SWEEPS, LOOKS = 600, 20, 100, 4
# our choice: methods that see the residual part by part stop where it seems to be this share of what is wanted
CAREFUL = 0.25
FALKON_ITERATIONS = 20  # as its authors have it
# EigenPro 2: sub-samples, eigenvalues that are computed of them and used at least, exponent (its authors' code)
SUBSAMPLES, EIGENVALUES, FEWEST, EXPONENT = 2000, 1000, 5, 0.95
# our choice, the best of 1 to 1e-4 on 2,000 images of MNIST: the least eigenvalue that ASkotch expects of a step, times
# the number of blocks
ACCELERATION = 0.01


@dataclass(frozen=True)
class Problem:
    """Samples X (n, d), whose mean is zero, columns Y (n, k) of norm 1, the kernel's name and width, mu, and rtol."""

    X: Array
    Y: Array
    name: str
    width: float
    shift: float
    rtol: float = 1e-6

    @property
    def kernel(self) -> Kernel:
        """The kernel."""
        return named(self.name, self.width)

    def gram(self, rows: Any = slice(None), dtype: str = "float64") -> Array:
        """K of some samples (m, m)."""
        x = torch.as_tensor(self.X[rows].astype(dtype))
        K = np.empty((len(x), len(x)), dtype)
        for begin, end in pairwise([*range(0, len(x), BLOCK), len(x)]):
            K[begin:end, begin:] = self.kernel(x[begin:end], x[begin:].clone()).numpy()
            K[end:, begin:end] = K[begin:end, end:].T
        return K

    def between(self, points: Array, others: Array) -> Array:
        """The values of k for points (a, d) and others (b, d), (a, b)."""
        x, y = torch.as_tensor(points), torch.as_tensor(others)
        return np.concatenate([self.kernel(part, y).numpy() for part in x.split(BLOCK)])


class Watch:
    """A stopwatch of processor seconds, and what was put aside.

    Attributes
    ----------
    setup : float
        Seconds until what does not iterate was done; NaN if nothing iterates.
    total : float
        Seconds until the end.
    times, products, iterates : list
        Of each iterate: seconds until it was there; products of K with k columns; alpha (n, k).
    """

    def __init__(self) -> None:
        self.setup = self.total = float("nan")
        self.times: list[float] = []
        self.products: list[float] = []
        self.iterates: list[Array] = []
        self._begin = time.process_time()

    @property
    def now(self) -> float:
        """Seconds so far."""
        return time.process_time() - self._begin

    def ready(self) -> None:
        """Set-up is done."""
        self.setup = self.now

    def keep(self, products: float, alpha: Callable[..., Array], *arguments: Any) -> None:
        """Put aside what a function gives for some arguments; the clock stands still."""
        begin = time.process_time()
        self.times.append(begin - self._begin)
        self.products.append(products)
        self.iterates.append(np.array(alpha(*arguments)))
        self._begin += time.process_time() - begin

    def stop(self) -> None:
        """The method has ended."""
        self.total = self.now


def kernel_ridge(problem: Problem, watch: Watch) -> None:
    """scikit-learn's KernelRidge: a Cholesky factorisation; its own kernel matrix where it has the kernel."""
    from sklearn.kernel_ridge import KernelRidge

    if problem.name == "rbf":
        made = KernelRidge(kernel="rbf", gamma=0.5 / problem.width**2, alpha=problem.shift)
        found = made.fit(problem.X, problem.Y)
    else:
        found = KernelRidge(kernel="precomputed", alpha=problem.shift).fit(problem.gram(), problem.Y)
    watch.keep(0, np.copy, found.dual_coef_)


def conjugate_gradients(
    multiply: Product, Y: Array, rtol: float, most: int, precondition: Product = np.copy
) -> Iterator[Array]:
    """The iterates x of A x = Y, which are written over; each column has step lengths of its own."""
    x, r = np.zeros_like(Y), Y.copy()
    z = precondition(r)
    p, squares, least = z, (r * z).sum(axis=0), rtol * np.linalg.norm(Y)
    for _ in range(most):
        q = multiply(p)
        step = _over(squares, (p * q).sum(axis=0))
        x += step * p
        r -= step * q
        yield x
        if np.linalg.norm(r) <= least:
            return
        z = precondition(r)
        before, squares = squares, (r * z).sum(axis=0)
        p = z + _over(squares, before) * p


def _over(a: Array, b: Array) -> Array:
    """Quotients a / b, and zero where a column is solved."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def plain(problem: Problem, watch: Watch) -> None:
    """Conjugate gradients without a preconditioner."""
    K = problem.gram()
    K[np.diag_indices(len(K))] += problem.shift
    watch.ready()
    for count, x in enumerate(conjugate_gradients(K.__matmul__, problem.Y, problem.rtol, MOST), 1):
        watch.keep(count, np.copy, x)


def falkon(problem: Problem, watch: Watch, centres: int) -> None:
    """Conjugate gradients on coefficients of M centres, drawn at random (Rudi, Carratino, Rosasco 2017, and its code).

    They solve another problem: (K_nM^T K_nM + mu K_MM) alpha = K_nM^T Y.
    """
    n, M = len(problem.X), centres
    chosen = np.random.default_rng(0).choice(n, M, replace=False)
    damping = problem.shift / n
    T = problem.gram(chosen)
    T[np.diag_indices(M)] += np.finfo(float).eps * M
    T = linalg.cholesky(T, overwrite_a=True, check_finite=False)
    A = linalg.lapack.dlauum(T)[0] / M
    A[np.diag_indices(M)] += damping
    A = linalg.cholesky(A, overwrite_a=True, check_finite=False)
    K = problem.between(problem.X, problem.X[chosen])

    def solve(factor: Array, right: Array, trans: int = 0) -> Array:
        return linalg.solve_triangular(factor, right, trans=trans, check_finite=False)

    def multiply(u: Array) -> Array:
        v = solve(A, u)
        image = K.T @ (K @ solve(T, v)) / n
        return solve(A, solve(T, image, 1) + damping * v, 1)

    def coefficients(u: Array) -> Array:
        alpha = np.zeros_like(problem.Y)
        alpha[chosen] = solve(T, solve(A, u))
        return alpha

    right = solve(A, solve(T, K.T @ problem.Y / n, 1), 1)
    watch.ready()
    for count, u in enumerate(conjugate_gradients(multiply, right, problem.rtol, FALKON_ITERATIONS), 1):
        watch.keep(2 * count * M / n, coefficients, u)


def eigenpro(problem: Problem, watch: Watch, dtype: str = "float64", epochs: int = EPOCHS) -> None:
    """Stochastic gradients, preconditioned by eigenvectors of a sub-sample (Ma and Belkin 2019, EigenPro 2).

    The gradient is that of K + mu I, so that the solution is ours; the authors have mu = 0.
    """
    n, rng = len(problem.X), np.random.default_rng(0)
    order = rng.permutation(n)
    K, Y = problem.gram(order, dtype), problem.Y[order].astype(dtype)
    m = min(SUBSAMPLES, n)
    count = min(EIGENVALUES, m - 1)
    values, vectors = linalg.eigh(K[:m, :m] / m, subset_by_index=[m - count, m - 1], check_finite=False)
    values, vectors = np.maximum(values[::-1], np.finfo(dtype).tiny), vectors[:, ::-1]
    used = min(max(int((values**-EXPONENT < m).sum()) - 1, FEWEST), count)
    least, values, U = values[used - 1], values[: used - 1], vectors[:, : used - 1]
    damped = 1 - (least / values) ** EXPONENT
    # the largest diagonal entry, as the authors' code has it, and eigenvalue of what is left of K + mu I; with the true
    # diagonal steps are too long for samples outside the sub-sample: of 8,192 images it diverges
    bound = problem.shift + float((K.diagonal()[:m] - (U**2).sum(axis=1)).max())
    top = problem.shift / n + float(values[0] * (1 - damped[0]))
    batch = min(int(bound / top + 1), m)
    step = np.array(1 / bound if batch < bound / top + 1 else 1.98 / (bound + (batch - 1) * top), dtype)
    weights = (damped / values / m)[:, None].astype(dtype)
    alpha = np.zeros_like(Y)
    edges = split(n, -(-n // batch))
    looks, back = {len(edges) // LOOKS * i for i in range(1, LOOKS)} - {0}, np.argsort(order)
    watch.ready()
    for epoch in range(epochs):
        square = 0.0
        for number, i in enumerate(rng.permutation(len(edges) - 1)):
            if number in looks:
                watch.keep(epoch + number / (len(edges) - 1), np.take, alpha, back, 0)
            b = slice(edges[i], edges[i + 1])
            gradient = K[b] @ alpha + problem.shift * alpha[b] - Y[b]
            square += float((gradient**2).sum())
            alpha[b] -= step * gradient
            alpha[:m] += step * (U @ (weights * (U.T @ (K[b, :m].T @ gradient))))
        watch.keep(epoch + 1, np.take, alpha, back, 0)
        if math.sqrt(square) <= CAREFUL * problem.rtol * np.linalg.norm(Y):
            break


def block_descent(problem: Problem, watch: Watch, blocks: int, accelerated: bool, epochs: int = SWEEPS) -> None:
    """Blocks of samples, drawn at random and solved for exactly: block dual coordinate descent.

    Accelerated in the manner of ASkotch (Rathore, Frangella, Yang, Derezinski, Udell 2024), whose blocks are
    drawn anew and solved for by Nystrom's approximation; here each has its Cholesky factor, once for all.
    """
    n, rng = len(problem.X), np.random.default_rng(0)
    order = rng.permutation(n)
    K, Y = problem.gram(order), problem.Y[order]
    K[np.diag_indices(n)] += problem.shift
    edges = split(n, blocks)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    factors = [linalg.cholesky(K[b, b], lower=True, check_finite=False) for b in parts]
    back = np.argsort(order)
    w, v = np.zeros_like(Y), np.zeros_like(Y)
    nu, mu = blocks, ACCELERATION / blocks
    beta, gamma = 1 - np.sqrt(mu / nu), 1 / np.sqrt(mu * nu)
    share = 1 / (1 + gamma * nu)
    watch.ready()
    for epoch in range(epochs):
        square = 0.0
        for i in rng.integers(blocks, size=blocks) if accelerated else rng.permutation(blocks):
            b = parts[i]
            z = share * v + (1 - share) * w if accelerated else w
            gradient = K[b] @ z - Y[b]
            square += float((gradient**2).sum())
            d = linalg.cho_solve((factors[i], True), gradient, check_finite=False)
            if accelerated:
                v = beta * v + (1 - beta) * z
                v[b] -= gamma * d
            w = z
            w[b] -= d
        watch.keep(epoch + 1, np.take, w, back, 0)
        if math.sqrt(square) <= CAREFUL * problem.rtol * np.linalg.norm(Y):
            break


def averaged(problem: Problem, watch: Watch, parts: int) -> None:
    """The mean of independent machines on random parts (Zhang, Duchi, Wainwright 2015): another problem."""
    order = np.random.default_rng(0).permutation(len(problem.X))
    alpha = np.zeros_like(problem.Y)
    for part in np.array_split(order, parts):
        K = problem.gram(part)
        K[np.diag_indices(len(K))] += problem.shift / parts
        alpha[part] = linalg.solve(K, problem.Y[part], assume_a="pos", overwrite_a=True, check_finite=False) / parts
    watch.keep(0, np.copy, alpha)
