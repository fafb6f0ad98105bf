"""What evaluations of a logistic model take, and what they are charged."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import logistic
import numpy as np
import torch
from mpi4py import MPI
from scipy import sparse

from ddml.problems.logistic import LogisticLoss


def prices(settings: Any) -> None:
    """Losses, gradients and products with the Hessian of logistic models, and the products with X in them."""
    print(
        "\n## Logistic models: losses F, gradients G, products H with the Hessian, the first at a point and others (ms)"
    )
    print("\n| data | n x d | stored | F | G | first H | H | F/G | charged | H/G | charged |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    losses = {name: loss_of(name) for name in settings.logistic_data.split(",")}
    for name, loss in losses.items():
        rng = np.random.default_rng(0)
        thetas = cycle([torch.from_numpy(0.01 * rng.standard_normal(loss.size)) for _ in range(2)])
        v, out = torch.from_numpy(rng.standard_normal(loss.size)), loss.initial()

        def value(loss: Any = loss, thetas: Any = thetas) -> None:
            loss.value(next(thetas))

        def gradient(loss: Any = loss, thetas: Any = thetas, out: Any = out) -> None:
            loss.value_gradient(next(thetas), out)

        def first(loss: Any = loss, thetas: Any = thetas, v: Any = v, out: Any = out) -> None:
            loss.hessian_product(next(thetas), v, out)

        def product(loss: Any = loss, v: Any = v, out: Any = out) -> None:
            loss.hessian_product(v, v, out)

        H1, F, G = least(settings.repeats, first, value, gradient)
        (H,) = least(settings.repeats, product)
        charges, stored = loss.charges, loss.samples.table.density
        charged = charges.evaluation(gradient=False), charges.hessian()
        print(
            f"| {name} | {loss.count} x {loss.size} | {stored:.0%} | {F:.3f} | {G:.3f} | {H1:.3f} | {H:.3f} | "
            f"{F / G:.2f} | {charged[0]:.2f} | {H / G:.2f} | {charged[1]:.2f} |"
        )
    print("\n| X v and X^T w (least ms) | scipy, sparse | torch, sparse, X and X^T stored | numpy, dense |")
    print("|---|---|---|---|")
    for name, loss in losses.items():
        print(f"| {name} | " + " | ".join(products(loss.samples.matrix, settings.repeats)) + " |")


def least(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Least milliseconds of functions that are called in turn: some take no longer than a turn of another program."""
    times = [np.inf] * len(functions)
    for _ in range(20 * repeats):
        for number, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[number] = min(times[number], 1e3 * (time.perf_counter() - start))
    return times


def loss_of(name: str) -> LogisticLoss:
    """The loss of some data, named as for -data, with the classes behind it where they are chosen: mnist.h5:4:9."""
    data, *classes = name.split(":")
    given = {o.name: o.default for o in logistic.OPTIONS}
    given |= {"data": data, "classes": ",".join(classes) or None}
    return LogisticLoss(logistic.load(SimpleNamespace(**given), MPI.COMM_SELF).train, 1e-3)


def products(matrix: Any, repeats: int) -> list[str]:
    """Times of both products with a matrix in each form."""
    X = sparse.csr_array(matrix)
    rng = np.random.default_rng(0)
    v, w = rng.standard_normal(X.shape[1]), rng.standard_normal(X.shape[0])
    dense, T = X.toarray(), X.T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are new
        tensors = [
            torch.sparse_csr_tensor(*(torch.from_numpy(a) for a in (Y.indptr, Y.indices, Y.data)), size=Y.shape)
            for Y in (X, sparse.csr_array(T))
        ]
    tv, tw = torch.from_numpy(v), torch.from_numpy(w)
    pairs = (
        (lambda: X @ v, lambda: T @ w),
        (lambda: tensors[0] @ tv, lambda: tensors[1] @ tw),
        (lambda: dense @ v, lambda: dense.T @ w),
    )
    return [" + ".join(f"{t:.3f}" for t in least(repeats, *pair)) for pair in pairs]
