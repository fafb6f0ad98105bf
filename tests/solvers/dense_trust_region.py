"""Dense first-order trust-region methods, and what the tests of all models share."""

import math
from typing import Any

import numpy as np
import pytest
from classifiers import value_gradient

MODELS = [
    ("first", "modular"), ("first", "2"), ("first", "infinity"), ("sr1", "2"), ("lbfgs", "2"), ("hessian", "2"),
    ("gauss_newton", "2"), ("first", "kfac"), ("sr1", "kfac"), ("lbfgs", "kfac"), ("gauss_newton", "kfac"),
]  # fmt: skip


every = pytest.mark.parametrize(("model", "norm"), MODELS)


def dense_dual(norm: str, g: np.ndarray) -> np.ndarray:
    """The duality map on the chain 6-5-4-3, by singular value decompositions."""
    if norm == "2":
        return g / np.linalg.norm(g)
    if norm == "infinity":
        return np.sign(g)
    direction, end = np.zeros_like(g), 0
    for inputs, outputs in ((6, 5), (5, 4), (4, 3)):
        begin, end = end, end + (inputs + 1) * outputs
        W = np.column_stack([g[begin : end - outputs].reshape(outputs, inputs), g[end - outputs : end]])
        U, sigma, V = np.linalg.svd(W, full_matrices=False)
        kept = sigma > 1e-10 * sigma[0]  # outputs' gradients sum to zero: the last layer's has rank 2
        D = math.sqrt(outputs / (inputs + 1)) / 3 * U[:, kept] @ V[kept]
        direction[begin:end] = np.concatenate([D[:, :-1].ravel(), D[:, -1]])
    return direction


def dense_first_order(
    norm: str, iterations: int, delta: float, momentum: float, losses: Any, brake: float = math.sqrt(2)
) -> tuple[Any, Any]:
    """Iterates and accepted losses; ``losses`` gives the loss of each iteration."""
    theta = losses(0).initial().numpy().copy()
    loss = losses(0)
    (f, g), m = value_gradient(loss, theta), np.zeros_like(theta)
    start, first = theta, g
    iterates, values = [theta], [f]
    for k in range(iterations):
        if losses(k) is not loss:
            loss = losses(k)
            f, g = value_gradient(loss, theta)
            S = theta - start
            if first @ S < 0 and (1 + (g @ S) / (first @ S)) / 2 < 0.25:
                delta /= brake
            delta = max(delta, 1e-4)
            start, first = theta, g
        m = momentum * m + (1 - momentum) * g
        s = -delta * dense_dual(norm, momentum * m + (1 - momentum) * g)
        if -g @ s <= 0:
            m, s = g, -delta * dense_dual(norm, g)
        trial, gradient = value_gradient(loss, theta + s)
        e = 10 * 2.0**-52 * max(1, abs(f))
        rho = (f - trial + e) / (-g @ s + e)
        accepted = rho > 1e-4 and trial <= f
        if rho < 0.25 or not accepted:
            delta /= 2
        elif rho > (0.9 if momentum else 0.75) and -g @ s > 10 * e:
            delta = min(2 * delta, 1.0)
        if accepted:
            theta, f, g = theta + s, trial, gradient
        iterates.append(theta)
        values.append(f)
    return np.array(iterates), np.array(values)


class Batches:
    """Replaces the objective's loss every few iterations, as a sampler does."""

    def __init__(self, losses: list[Any], interval: int, first: int = 0, at: int = -1, copied: Any = None) -> None:
        self.losses, self.interval, self.first = losses, interval, first
        self.at, self.copied, self.state = at, copied, None

    def __call__(self, context: Any, iteration: int) -> None:
        if iteration > 0 and iteration % self.interval == 0 and iteration > self.first:
            context.objective.replace(self.losses[iteration // self.interval])
        if iteration == self.at:
            self.state = self.copied(context.state())


def norm_of_chain(theta: np.ndarray) -> float:
    """The modular norm of the chain 6-5-4-3, by singular values."""
    found, end = [], 0
    for inputs, outputs in ((6, 5), (5, 4), (4, 3)):
        begin, end = end, end + (inputs + 1) * outputs
        W = np.column_stack([theta[begin : end - outputs].reshape(outputs, inputs), theta[end - outputs : end]])
        found.append(3 * math.sqrt((inputs + 1) / outputs) * np.linalg.norm(W, 2))
    return max(found)
