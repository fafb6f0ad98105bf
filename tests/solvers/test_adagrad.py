"""AdaGrad without loss values, alone, over levels and with Schwarz corrections, against NumPy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_newton import Logistic, data, linear_loss
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn

from ddml.losses.module import ModuleLoss
from ddml.networks.euler import euler

Train = Callable[..., SimpleNamespace]
Array = NDArray[np.float64]

X, y = data(40, 6)
DENSE, START = Logistic(X, y), np.full(6, 0.5)


def test_it_is_adagrad(train: Train) -> None:
    run = train(linear_loss(X, y, START), "adagrad", 8, rate=0.2, sigma=1e-2)
    theta, squares = START, np.full(6, 1e-2)
    for k in range(8):
        g = DENSE.gradient(theta)
        squares = squares + g**2
        theta = theta - 0.2 * g / np.sqrt(squares)
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-14
    assert run.gradients[-1] == 9


def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the squared distance."""
    return (outputs - targets).square().sum(1) / 2


def network_loss() -> ModuleLoss:
    """A function of the plane on an Euler network of four blocks."""
    torch.manual_seed(3)
    inputs = torch.randn(30, 2, dtype=torch.float64)
    module = euler((2,), 2, blocks=4, width=3, horizon=2.0).double()
    return ModuleLoss(module, criterion, inputs, torch.sin(2 * inputs))


def gradient(loss: ModuleLoss, theta: Array) -> Array:
    """Of all samples."""
    g = torch.zeros(loss.size, dtype=torch.float64)
    loss.value_gradient(torch.as_tensor(theta), g)
    return g.numpy()


def test_corrections_stay_within_the_bounds_of_gradients(train: Train) -> None:
    """An entry of a coarse phase moves at most as many bounds as it has steps, of the copy that may go farthest."""
    loss, moved = network_loss(), list[tuple[Array, Array]]()

    def whole(vec: Any) -> Array:
        return np.concatenate(vec.comm.tompi4py().allgather(vec.array_r))

    def watch(context: Any, iteration: int) -> None:
        if iteration:
            coarse = context.levels[0]
            moved.append(
                (np.abs(whole(coarse.x) - whole(coarse.start)), whole(context.levels[1].context.vectors["squares"]))
            )

    settings = {"levels": 2, "coarse_steps": 3, "rate": 0.1, "sigma": 1e-3}
    run = train(loss, "mladagrad", 6, watch=watch, **settings)
    squares = np.full(loss.size, 1e-3)
    names = [p.name for p in loss.parameters]
    coarse_loss = loss.of_module(loss.module.coarsened(2))  # type: ignore[operator]
    for k, (distance, sums) in enumerate(moved):
        theta = run.theta[k]
        g = gradient(loss, theta)
        squares = squares + g**2
        theta = theta - 0.1 * g / np.sqrt(squares)  # the step before the correction
        assert np.abs(sums - squares).max() <= 1e-12
        g = gradient(loss, theta)
        bound = 3 * 0.1 * np.abs(g) / np.sqrt(squares + g**2)
        for parameter in coarse_loss.parameters:
            kind, _, rest = parameter.name.partition(".")
            copies = [parameter.name]
            scale = 1.0
            if kind.startswith("block"):
                copies = [f"block{2 * int(kind[5:]) + i}.{rest}" for i in range(2)]
                scale = 2**-0.5
            limits = [bound[loss.parameters[names.index(name)].range] / scale for name in copies]
            assert (distance[parameter.range] <= np.max(limits, axis=0) * (1 + 1e-9)).all()
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_schwarz_corrections_are_local_steps_within_the_bounds(train: Train, steps: int) -> None:
    """Steps on each layer, whose sums of squares are its own, and one of the whole network."""
    loss, cut = network_loss(), 0
    run = train(loss, "asadagrad", 5, local_steps=steps, decomposition="layers", rate=0.1, sigma=1e-3)
    layers = [np.concatenate([np.r_[loss.parameters[k].range] for k in layer]) for layer in loss.layers]
    theta = loss.initial().numpy().copy()
    inside, squares = (np.full(loss.size, 1e-3) for _ in range(2))
    for k in range(5):
        g = gradient(loss, theta)
        limit, correction = steps * 0.1 * np.abs(g) / np.sqrt(squares + g**2), np.zeros(loss.size)
        for layer in layers:
            own = theta.copy()
            for _ in range(steps):
                slope = gradient(loss, own)[layer]
                inside[layer] += slope**2
                own[layer] -= 0.1 * slope / np.sqrt(inside[layer])
            correction[layer] = own[layer] - theta[layer]
        cut += int((np.abs(correction) > limit).sum())
        theta = theta + np.clip(correction, -limit, limit)
        g = gradient(loss, theta)
        squares = squares + g**2
        theta = theta - 0.1 * g / np.sqrt(squares)
        assert np.abs(run.theta[k + 1] - theta).max() <= 1e-12
    assert 0 < cut < 4 * loss.size


@pytest.mark.parametrize("solver", ["adagrad", "mladagrad", "asadagrad"])
def test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly(train: Train, copied: Any, solver: str) -> None:
    alone = train(network_loss(), solver, 6, MPI.COMM_SELF, blocks=4)
    states: list[Any] = []

    def keep(context: Any, iteration: int) -> None:
        if iteration == 3:
            states.append(copied(context.state()))

    run = train(network_loss(), solver, 6, blocks=4, watch=keep)
    assert (run.theta == alone.theta).all()
    again = train(network_loss(), solver, 6, blocks=4, start=run.theta[3], state=states[0])
    assert (again.theta[-1] == run.theta[-1]).all()


def test_a_loss_that_is_not_finite_ends_the_run(train: Train) -> None:
    module = nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(1.0)
    one = torch.ones(4, 1, dtype=torch.float64)
    loss = ModuleLoss(module, lambda z, y: torch.where(z < 0.75, torch.inf, z)[:, 0], one, one)
    run = train(loss, "adagrad", 50)
    assert run.reason < 0 and 1 < len(run.losses) < 50 and np.isfinite(run.losses).all()
