"""What self-scaled methods have learnt on a level goes on where layers are inserted, and the first step shows it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss

Train = Callable[..., SimpleNamespace]


def burgers() -> PDELoss:
    network = TanhNetwork(2, 4, 4, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, 40)


def inverse_hessian(context: Any, comm: MPI.Comm) -> np.ndarray:
    """H of a solver on a level, on all ranks, its waiting update included."""
    context.g.copy(context.vectors["accepted_g"])
    context.inverse.renew()
    values = np.concatenate(comm.allgather(context.inverse.matrix.values))
    n = context.inverse.matrix.size
    if context.form == "factored":
        factor = values.reshape(n, n)
        return np.asarray(factor.T @ factor)
    lower = np.zeros((n, n))
    lower[np.tril_indices(n)] = values
    return np.asarray(lower + np.tril(lower, -1).T)


@pytest.mark.parametrize("solver", ["ssbroyden", "ssbfgs"])
@pytest.mark.parametrize("form", ["symmetric", "factored"])
def test_the_first_step_is_along_the_enlarged_matrix(comm: MPI.Comm, train: Train, solver: str, form: str) -> None:
    seen, loss = dict[int, Any](), burgers()

    def watch(context: Any, iteration: int) -> None:
        if context.phase or not iteration:
            return
        coarse, transfer = context.levels[0], context.hierarchy.insertions[0]
        coarse.g.copy(coarse.context.g)
        H, places = inverse_hessian(coarse.context, comm), transfer.places
        larger = np.eye(loss.size)
        larger[np.ix_(places, places)] = H
        seen[iteration] = larger

    settings = {"smoother": solver, "levels": 2, "cascade_work": 12, "prolongation": "insert", "coarse_start": "drawn"}
    forms = {"coarse_matrix_form": form, "smooth_matrix_form": form}
    run = train(loss, "cascade", 40, blocks=4, watch=watch, **settings, **forms)
    last = max(seen)
    assert 3 < last < 39
    g = torch.zeros(loss.size, dtype=torch.float64)
    theta = run.theta[last]
    loss.value_gradient(torch.as_tensor(theta), g)
    step, expected = run.theta[last + 1] - theta, -seen[last] @ g.numpy()
    length = step @ expected / (expected @ expected)
    assert 1e-3 < length < 10
    assert np.linalg.norm(step - length * expected) <= 1e-6 * np.linalg.norm(step)
    assert np.linalg.norm(expected + g.numpy()) > 0.1 * np.linalg.norm(expected)  # not along the gradient
