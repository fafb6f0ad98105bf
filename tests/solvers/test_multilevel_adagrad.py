"""AdaGrad over depth against dense numpy."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ddml.losses.module import ModuleLoss
from ddml.networks.euler import EulerNetwork, euler

Train = Callable[..., SimpleNamespace]
Array = NDArray[np.float64]
BLOCKS, WIDTH, RATE, SIGMA, STEPS = 6, 4, 0.05, 1e-3, 3


def network(blocks: int) -> EulerNetwork:
    """Two inputs, three classes; a coarse one of this class has the gain 1: its weights are the finer one's."""
    return euler((2,), 3, blocks=blocks, width=WIDTH, horizon=2.0).double()


def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Dense:
    """A network's gradient, and AdaGrad's sums."""

    def __init__(self, blocks: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.module, self.inputs, self.targets = network(blocks), inputs, targets
        self.squares = np.full(sum(p.numel() for p in self.module.parameters()), SIGMA)

    def gradient(self, theta: Array) -> Array:
        """(n,) to (n,)."""
        vector_to_parameters(torch.from_numpy(theta), self.module.parameters())
        loss = criterion(self.module(self.inputs), self.targets).mean()
        return parameters_to_vector(torch.autograd.grad(loss, list(self.module.parameters()))).numpy().copy()

    def step(self, theta: Array, g: Array) -> Array:
        """One of AdaGrad."""
        self.squares += g * g
        return theta - RATE * g / np.sqrt(self.squares)


def copies(factor: int) -> Array:
    """I (n fine, n coarse), which copies blocks, open and close as they are."""
    opened, block, closed = 3 * WIDTH, WIDTH * WIDTH + WIDTH, 3 * WIDTH + 3
    places = [np.arange(opened)]
    places += [opened + (i // factor) * block + np.arange(block) for i in range(BLOCKS)]
    places += [opened + BLOCKS // factor * block + np.arange(closed)]
    return np.eye(opened + BLOCKS // factor * block + closed)[np.concatenate(places)]


@pytest.mark.parametrize("factor", [2, 3])
def test_cycles_are_those_of_dense_numpy_and_cost_what_they_use(train: Train, factor: int) -> None:
    """On a coarse level a step moves copies as far as it would a fine entry; no gradient stays unused."""
    torch.manual_seed(3)
    inputs = torch.randn(50, 2, dtype=torch.float64)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    module = network(BLOCKS)
    x = parameters_to_vector(module.parameters()).detach().numpy().copy()
    loss = ModuleLoss(module, criterion, inputs, targets)
    settings = {"levels": 2, "refinement": factor, "rate": RATE, "sigma": SIGMA, "coarse_steps": STEPS, "descent": 0.0}
    run = train(loss, "mladagrad", 4, **settings)
    fine, coarse = Dense(BLOCKS, inputs, targets), Dense(BLOCKS // factor, inputs, targets)
    copy = copies(factor)
    for found in run.theta[1:]:
        x = fine.step(x, fine.gradient(x))
        g = fine.gradient(x)
        start = np.linalg.lstsq(copy, x, rcond=None)[0]
        slope = copy.T @ g - coarse.gradient(start)
        bound = np.abs(RATE * g / np.sqrt(fine.squares + g * g))
        limit = STEPS * (copy * bound[:, None]).max(axis=0)
        z = start
        for _ in range(STEPS):
            z = np.clip(coarse.step(z, coarse.gradient(z) + slope), start - limit, start + limit)
        x = x + copy @ (z - start)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    shallow = ModuleLoss(network(BLOCKS // factor), criterion, inputs, targets)
    share = shallow.charges.operations / loss.charges.operations
    assert np.diff(run.total) == pytest.approx(2 + STEPS * share)
