"""Hierarchies over depth that tests share, and what they must be, written out."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.hierarchy.depth import DepthHierarchy, depth_hierarchy
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.networks.euler import euler, euler_cnn
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.problems import Burgers, PDELoss
from ddml.problems.classification import ClassificationLoss

HORIZON = 1.5


def classification(network: nn.Module, shape: tuple[int, ...], count: int = 30) -> ClassificationLoss:
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *shape, generator=g, dtype=torch.float64)
    return ClassificationLoss(network.double(), TensorSamples(inputs, torch.arange(count) % 3), 3)


def dense(blocks: int = 12) -> ClassificationLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classification(euler((6,), 3, blocks, 5, HORIZON), (6,))


def conv(blocks: int = 12) -> ClassificationLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classification(euler_cnn((2, 5, 4), 3, blocks, 2, HORIZON), (2, 5, 4))


def images(blocks: int = 12) -> ClassificationLoss:
    """Of 8 x 16 pixels, next 4 x 8, which do not get coarser any more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classification(euler((2, 8, 16), 3, blocks, 5, HORIZON, 2), (2, 8, 16))


def pinn(depth: int = 12, problem: Any = Burgers) -> PDELoss:
    network = TanhNetwork(2, 5, depth, 1, residual=True, adaptive=True).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(problem(), network, 37)


class Diffusion(Burgers):
    """With a coefficient that is trained, which is no parameter of the network."""

    coefficients = {"nu": 0.02}

    def residual(self, u: Any, t: Any, x: Any, nu: Any) -> Any:
        return u.t - nu * u.xx


CASES: dict[str, Callable[..., Any]] = {
    "dense": dense, "conv": conv, "images": images, "pinn": pinn,
    "coefficients": lambda depth=12: pinn(depth, Diffusion),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)
factors = pytest.mark.parametrize(("factor", "levels"), [(2, 3), (3, 2), (4, 2), (12, 2)])


def objective_of(loss: Loss, comm: MPI.Comm, blocks: int = 0) -> Objective:
    kind = ResidualObjective if isinstance(loss, PDELoss) else Objective
    return kind(loss, ParameterLayout(loss.parameters, comm), blocks=blocks)


def made(name: str, comm: MPI.Comm, levels: int, factor: int = 2, blocks: int = 0, depth: int = 12) -> DepthHierarchy:
    return depth_hierarchy(objective_of(CASES[name](depth), comm, blocks), levels, factor)


def random(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


def put(objective: Objective, values: Any) -> PETSc.Vec:
    x = objective.layout.vector()
    x.setArray(np.asarray(values)[slice(*x.getOwnershipRange())])
    return x


def all_of(objective: Objective, x: PETSc.Vec) -> np.ndarray:
    return objective.layout.gather(x).numpy().copy()


def applied(act: Callable[[PETSc.Vec, PETSc.Vec], None], source: Objective, target: Objective, values: Any) -> Any:
    """What a transfer makes of values, on all ranks."""
    x, y = put(source, values), put(target, random(target.loss.size, 9))
    act(x, y)
    found = all_of(target, y)
    assert np.array_equal(all_of(source, x), values)
    x.destroy()
    y.destroy()
    return found


def prolongation(fine: Loss, coarse: Loss, factor: int) -> np.ndarray:
    """I, written down from the formulas."""
    places = {p.name: p for p in coarse.parameters}
    depth = max(int(n) for n in re.findall(r"maps\.(\d+)", " ".join(places))) if isinstance(fine, PDELoss) else 0
    found = np.zeros((fine.size, coarse.size))
    for p in fine.parameters:
        name, scale = p.name, 1.0
        if block := re.match(r"block(\d+)", name):
            name, scale = name.replace(block[0], f"block{int(block[1]) // factor}"), factor**-0.5
        elif slope := re.match(r"slopes.(\d+)", name):
            name = f"slopes.{int(slope[1]) // factor}"
        elif layer := re.match(r"maps.(\d+)\.(.*)", name):
            number = int(layer[1])
            last = (depth - 1) * factor + 1
            if number == 0:
                scale = factor
            else:
                scale = 1 / factor if layer[2] == "weight" else 1.0
                name = f"maps.{depth if number == last else 1 + (number - 1) // factor}.{layer[2]}"
        if p.shape == places[name].shape:
            found[p.range, places[name].range] = scale * np.eye(p.size)
            continue
        for neuron, channel, row, column in np.ndindex(p.shape[0], 2, 8, 16):  # a pixel's weight is half of its cell's
            pixel = ((neuron * 2 + channel) * 8 + row) * 16 + column
            cell = ((neuron * 2 + channel) * 4 + row // 2) * 8 + column // 2
            found[p.offset + pixel, places[name].offset + cell] = 0.5
    return found


def written_out(theta: Tensor, loss: ModuleLoss, gain: float, blocks: int) -> Tensor:
    """The cross entropy of a dense or convolutional network."""
    p = {q.name: theta[q.range].view(q.shape) for q in loss.parameters}
    y = loss.inputs.flatten(1) if len(loss.parameters[0].shape) == 2 else loss.inputs
    if y.dim() == 2:
        y = torch.tanh(y @ p["open.layer.weight"].T + p["open.layer.bias"])
    else:
        y = torch.tanh(nn.functional.conv2d(y, p["open.layer.weight"], p["open.layer.bias"], padding=1))
    for i in range(blocks):
        weight, bias = (gain * p[f"block{i}.layer.{n}"] for n in ("weight", "bias"))
        branch = y @ weight.T + bias if y.dim() == 2 else nn.functional.conv2d(y, weight, bias, padding=1)
        y = y + HORIZON / blocks * torch.tanh(branch)
    if y.dim() == 4:
        y = nn.functional.adaptive_avg_pool2d(y, 4).flatten(1)
    outputs = y @ p["close.layer.weight"].T + p["close.layer.bias"]
    return nn.functional.cross_entropy(outputs, loss.targets)
