"""Newton methods by dense NumPy matrices, and logistic losses for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddml.losses.module import ModuleLoss

Array = NDArray[np.float64]


def data(samples: int, features: int, seed: int = 0) -> tuple[Array, Array]:
    """Gaussian rows of several scales, and labels -1 and 1 that no plane separates."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((samples, features)) * np.linspace(0.3, 2.0, features)
    return X, np.sign(X @ rng.standard_normal(features) + 2.0 * rng.standard_normal(samples))


def criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(-y z))."""
    return nn.functional.softplus(-y * outputs[:, 0], threshold=1e9)


def squares(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(z - y)^2 / 2."""
    return (outputs[:, 0] - y).square() / 2


def linear_loss(X: Array, y: Array, start: Array, of: Callable[..., torch.Tensor] = criterion) -> ModuleLoss:
    """The mean over samples of a criterion of X theta."""
    module = nn.Linear(X.shape[1], 1, bias=False).double()
    module.weight.data = torch.as_tensor(start)[None].clone()
    return ModuleLoss(module, of, torch.as_tensor(X), torch.as_tensor(y))


@dataclass
class Logistic:
    """The mean of log(1 + exp(-y x.theta)) and its derivatives."""

    X: Array
    y: Array

    def value(self, theta: Array) -> float:
        return float(np.logaddexp(0.0, -self.y * (self.X @ theta)).mean())

    def gradient(self, theta: Array) -> Array:
        return -(self.X.T @ (self.y / (1 + np.exp(self.y * (self.X @ theta))))) / len(self.y)

    def hessian(self, theta: Array) -> Array:
        p = 1 / (1 + np.exp(self.X @ theta))
        return (self.X.T * (p * (1 - p))) @ self.X / len(self.y)

    def on(self, rows: NDArray[np.int64]) -> Logistic:
        return Logistic(self.X[rows], self.y[rows])

    def minimiser(self) -> Array:
        theta = np.zeros(self.X.shape[1])
        for _ in range(30):
            theta -= np.linalg.solve(self.hessian(theta), self.gradient(theta))
        return theta


def steihaug(H: Array, g: Array, radius: float, rtol: float, atol: float, limit: int) -> Array:
    """Conjugate gradients for H s = -g that end at the boundary; without it before negative curvature."""
    s, r = np.zeros_like(g), -g
    p, end = r.copy(), max(rtol * np.linalg.norm(g), atol)
    for number in range(limit):
        if number > 0 and np.linalg.norm(r) <= end:  # PETSc makes one iteration in any case
            break
        curvature = p @ H @ p
        step = r @ r / curvature if curvature > 0 else math.inf
        if np.linalg.norm(s + step * p if step < math.inf else np.full_like(s, step)) >= radius:
            if radius == math.inf:
                return s
            b, c = s @ p, s @ s - radius**2
            return s + p * (-b + math.sqrt(b**2 - p @ p * c)) / (p @ p)
        s = s + step * p
        rest = r - step * (H @ p)
        p = rest + rest @ rest / (r @ r) * p
        r = rest
    return s


RULES: dict[str, Callable[[float, float], tuple[float, float, int]]] = {
    "fixed": lambda now, first: (0.1, 0.0, 20),
    "cap": lambda now, first: (0.0, 1e-9, 10),
    "sqrt": lambda now, first: (min(0.5, math.sqrt(now / first)), 0.0, 10),
}


def dense_astrom(
    loss: Logistic,
    rows: Callable[[int], NDArray[np.int64]],
    theta: Array,
    iterations: int,
    *,
    m: int,
    rule: str = "sqrt",
    accept: float = 1e-4,
    enlarge: float = 0.75,
    growth: float = 4.0,
    delta: float = 1.0,
    shrink: float = 0.25,
    keep: bool = False,
) -> tuple[Array, list[int], list[float]]:
    """Iterates, sizes of the set before each step, and ratios; ``rows`` gives the first so many samples."""
    f, g, N = loss.value(theta), loss.gradient(theta), len(loss.y)
    first = float(np.linalg.norm(g))
    iterates, sizes, ratios = [theta], [], []
    for _ in range(iterations):
        H = loss.on(rows(m)).hessian(theta)
        s = steihaug(H, g, delta, *RULES[rule](float(np.linalg.norm(g)), first))
        predicted, size = -(g @ s + s @ H @ s / 2), float(np.linalg.norm(s))
        trial = loss.value(theta + s)
        e = 10 * 2.0**-52 * max(1.0, abs(f))
        rho = (f - trial + e) / (predicted + e)
        accepted = rho > accept and trial <= f
        if not accepted:
            delta = delta if keep and m < N else min(delta, size) * shrink
        elif rho < 0.25:
            delta *= shrink
        elif rho > 0.75 and size >= 0.9 * delta:
            delta = min(2 * delta, 100.0)
        if accepted:
            theta = theta + s
            f, g = trial, loss.gradient(theta)
        sizes.append(m)
        ratios.append(rho)
        if rho <= enlarge:
            m = min(max(round(growth * m), m + 1), N)
        iterates.append(theta)
    return np.array(iterates), sizes, ratios
