"""Losses and layouts that the tests of objectives share."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.networks.tanh import TanhNetwork
from ddml.problems import Burgers, PDELoss


def burgers(points: int = 37, chunk: int = 1024) -> PDELoss:
    network = TanhNetwork(2, 5, 4, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, points, chunk=chunk)


def classifier() -> ModuleLoss:
    generator = torch.Generator().manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, generator=generator)
    inputs = torch.randn(29, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (29,), generator=generator)
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    return ModuleLoss(module, criterion, inputs, targets, 8)


LOSSES: dict[str, Callable[[], Loss]] = {"burgers": burgers, "chunks": lambda: burgers(37, 5), "classifier": classifier}


losses = pytest.mark.parametrize("name", LOSSES)


blocks = pytest.mark.parametrize("blocks", [0, 1, 5])


def points(loss: Loss, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [loss.initial().numpy() + 0.1 * rng.standard_normal(loss.size) for _ in range(count)]


def put(layout: ParameterLayout, values: np.ndarray) -> PETSc.Vec:
    x = layout.vector()
    x.setArray(values[slice(*x.getOwnershipRange())])
    return x


def serial(loss: Loss, theta: np.ndarray) -> tuple[float, np.ndarray]:
    gradient = torch.zeros(loss.size, dtype=torch.float64)
    return loss.value_gradient(torch.tensor(theta), gradient), gradient.numpy()


def close(layout: ParameterLayout, vec: PETSc.Vec, expected: np.ndarray, tolerance: float = 1e-12) -> bool:
    return float(np.abs(layout.gather(vec).numpy() - expected).max()) <= tolerance * float(np.abs(expected).max())


def layouts(loss: Loss, comm: MPI.Comm) -> list[ParameterLayout]:
    """Equal shares, everything on the first or last rank, and uneven shares."""
    n, p = loss.size, comm.size
    uneven = [0, *(n - (p - k) * 3 for k in range(1, p)), n]
    return [ParameterLayout(loss.parameters, comm, r) for r in (None, [0] + [n] * p, [0] * p + [n], uneven)]
