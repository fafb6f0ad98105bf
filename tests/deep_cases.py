"""Deep kernels of a few digits, for tests: feature maps, functionals, objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from ddml.data.files import digits
from ddml.kernel_machines import SampleDomain, SampleLayout, median_distance
from ddml.kernel_machines.features import FeatureLoss, Penalty, kernel_expansion, native_penalty
from ddml.kernel_machines.gradients import smooth
from ddml.kernel_machines.inexact import InexactSystem
from ddml.kernel_machines.leave_one_out import LeaveOneOut
from ddml.kernel_machines.reduced import HeldOut, ReducedFunctional, ReducedTikhonov
from ddml.layout import ParameterLayout
from ddml.objectives.deep import DeepKernelObjective
from solvers.kernel_machines.inner import InnerSolver

N, HELD, MU = 150, 40, 0.1
X = digits().inputs[:N].reshape(N, -1) / 16.0
Y = np.eye(10)[digits().labels[:N]] - 0.1


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def expansion() -> nn.Sequential:
    return kernel_expansion(smooth("rbf", 0.7 * median_distance(X)), X[::5], 4)


def width(loss: FeatureLoss, name: str = "rbf") -> float:
    return 1.5 if name == "polynomial" else 0.5 * median_distance(loss.features(loss.initial()).numpy())


def functional(
    kind: str, loss: FeatureLoss, comm: MPI.Comm, name: str = "rbf", targets: Any = Y, **settings: Any
) -> ReducedFunctional:
    phi, kernel = loss.features(loss.initial()).numpy(), smooth(name, width(loss, name))
    count = N - HELD if kind == "held" else N
    layout = SampleLayout(SampleDomain.by_tree(phi[:count], 4, 0.1), comm)
    if kind == "left":
        return LeaveOneOut(kernel, MU, layout, targets)
    inner = settings.pop("inner", None) or InnerSolver(coarse_rank=15)
    system = InexactSystem(kernel, MU, layout, inner, **settings)
    if kind == "held":
        return HeldOut(system, targets, np.arange(N - HELD), np.arange(N - HELD, N))
    return ReducedTikhonov(system, targets)


def objective(
    kind: str, comm: MPI.Comm, module: nn.Module | None = None, penalty: Penalty | None = None, **settings: Any
) -> DeepKernelObjective:
    module = expansion() if module is None else module
    if penalty is None and isinstance(module[0], nn.Module) and not list(module[0].parameters()):
        penalty = native_penalty(module, 1e-3)
    loss = FeatureLoss(module, X)
    layout = ParameterLayout(loss.parameters, comm)
    return DeepKernelObjective(loss, layout, functional(kind, loss, comm, **settings), penalty)


def evaluated(made: DeepKernelObjective, theta: torch.Tensor | None = None) -> tuple[float, np.ndarray]:
    """Value and gradient, whole on every rank."""
    x, g = made.layout.vector(), made.layout.vector()
    made.initial(x)
    if theta is not None:
        x.array[:] = theta.numpy()[slice(*x.getOwnershipRange())]
    value = made.value_gradient(x, g)
    gradient = made.layout.gather(g).numpy().copy()
    x.destroy()
    g.destroy()
    return value, gradient
