"""Subdomains of subdomains: a Schwarz method as the local solver of another."""

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

NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "aspqn in mspqn": ("mspqn", {"local_solver": "aspqn", "sub_subdomains": 2, "sub_local_steps": 3}),
    "mspqn in aspqn": ("aspqn", {"local_solver": "mspqn", "sub_subdomains": 2, "sub_local_steps": 3}),
    "dense mspqn in mspqn": ("mspqn", {"local_solver": "mspqn_dense", "sub_window": 1, "sub_local_steps": 3}),
    "apts in mspqn": ("mspqn", {"local_solver": "apts_weights", "sub_norm": "2", "sub_window": 1}),
}


def burgers() -> PDELoss:
    network = TanhNetwork(2, 5, 4, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, 30)


@pytest.mark.parametrize("name", NESTED)
def test_nested_decompositions_have_the_same_bits_on_any_number_of_ranks(
    comm: MPI.Comm, train: Train, name: str
) -> None:
    solver, settings = NESTED[name]
    settings = {"subdomains": 2, "local_steps": 3, **settings}
    run, alone = (train(burgers(), solver, 3, where, 6, **settings) for where in (comm, MPI.COMM_SELF))
    for column in ("losses", "theta", "total", "critical"):
        assert np.array_equal(vars(run)[column], vars(alone)[column])
    assert run.losses[-1] < 0.9 * run.losses[1]  # after the plain first step
    flat = train(burgers(), solver, 3, MPI.COMM_SELF, 6, subdomains=2, local_steps=3)
    assert not np.array_equal(flat.losses, alone.losses)
