"""Norms of distributed vectors against those of gathered ones."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from ddml.layout import ParameterLayout
from ddml.loss import ModuleLoss
from ddml.norms import DistributedModularNorm, InfinityNorm, Norm, TwoNorm


def make_loss() -> ModuleLoss:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 4)
    ).double()
    rng = np.random.default_rng(1)
    inputs, targets = torch.as_tensor(rng.standard_normal((12, 1, 6, 6))), torch.arange(12) % 4
    return ModuleLoss(network, nn.CrossEntropyLoss(reduction="none"), inputs, targets)


@pytest.mark.parametrize("kind", ["2", "infinity", "modular"])
def test_steepest_directions(kind: str, comm: MPI.Comm) -> None:
    loss = make_loss()
    layout = ParameterLayout(loss.parameters, comm)
    modular = loss.modular_norm()
    norm: Norm = {"2": TwoNorm(), "infinity": InfinityNorm()}.get(kind) or DistributedModularNorm(modular, layout)
    g, direction = layout.vector(), layout.vector()
    full = np.random.default_rng(0).standard_normal(loss.size)
    full[5] = 0.0
    begin, end = g.getOwnershipRange()
    g.setArray(full[begin:end])
    dual = norm.steepest(g, direction)
    found = layout.gather(direction).numpy().copy()
    expected = {
        "2": full / np.linalg.norm(full), "infinity": np.sign(full),
        "modular": modular.dualize(torch.as_tensor(full)).numpy(),
    }[kind]  # fmt: skip
    assert np.abs(found - expected).max() < 1e-14
    assert norm(direction) == pytest.approx(1, rel=1e-12)
    assert dual == pytest.approx(full @ expected, rel=1e-13)
    if kind == "modular":  # to the last bit
        assert found.tobytes() == (expected + 0.0).tobytes()
        assert dual == modular.dual_norm(torch.as_tensor(full))
        assert norm(g) == modular.norm(torch.as_tensor(full))
    g.set(0.0)
    assert norm.steepest(g, direction) == 0
    assert layout.gather(direction).abs().max() == 0
    g.destroy()
    direction.destroy()
