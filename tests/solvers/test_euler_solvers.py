"""Solvers on Euler networks: their blocks are subdomains, and layers of all norms."""

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.data.sample_sets import TensorSamples
from ddml.networks.euler import euler, euler_cnn
from ddml.problems.classification import ClassificationLoss

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "aspqn": ("aspqn", {"subdomains": 3, "local_steps": 3}),
    "apts_weights": ("apts_weights", {"subdomains": 3}),
    "apts_weights, windows": ("apts_weights", {"decomposition": "windows", "window": 3}),
    "modular norm": ("tr", {"norm": "modular"}),
    "K-FAC norm": ("tr", {"norm": "kfac"}),
    "L-BFGS": ("lbfgs", {}),
}  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (50,)) for name in SETTINGS), ("modular norm", (2, 5, 5)), ("K-FAC norm", (2, 5, 5))]
)
def test_solvers_train_them_alike_on_any_number_of_ranks(
    comm: MPI.Comm, train: Any, name: str, shape: tuple[int, ...]
) -> None:
    make = euler if len(shape) == 1 else euler_cnn
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(shape, 3, 4, 4, 1.0).double().eval()
        targets = torch.arange(45) % 3
        inputs = torch.randn(3, 50)[targets].double() + 0.5 * torch.randn(45, 50).double()
    loss = ClassificationLoss(network, TensorSamples(inputs.view(45, *shape), targets), 3)
    solver, settings = SETTINGS[name]
    run = train(loss, solver, 4, comm, blocks=3, **settings)
    assert run.losses[-1] < 0.8 * run.losses[0]
    if comm.size > 1:
        alone = train(loss, solver, 4, MPI.COMM_SELF, blocks=3, **settings)
        assert np.array_equal(run.theta, alone.theta)
