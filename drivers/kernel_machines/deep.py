"""Deep kernels of drivers/kernel.py: features that are trained under a kernel machine, by any solver of gradients."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml import plugins
from ddml.data.classified import Classified
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance
from ddml.kernel_machines.costs import Task, choices
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.features import FeatureLoss, Penalty, decay, kernel_expansion, last_hidden, native_penalty
from ddml.kernel_machines.gradients import smooth
from ddml.kernel_machines.inexact import InexactSystem
from ddml.kernel_machines.leave_one_out import LeaveOneOut
from ddml.kernel_machines.losses import classes_of
from ddml.kernel_machines.reduced import HeldOut, ReducedFunctional, ReducedTikhonov
from ddml.kernel_machines.rules import WIDTH, best_shift
from ddml.layout import ParameterLayout
from ddml.objectives.deep import DeepKernelObjective
from ddml.parallel import agreed
from ddml.problems.classification import Classifier
from ddml.runs.opened import open_run
from solvers import Minimisation, fit_kernel
from solvers.kernel_machines.inner import InnerSolver

from .options import ALONE, EXPANSION, OVERLAP

MEASURED = 1e-3  # tolerance of the machine whose accuracy is measured (our choice)
INTERVAL = 10  # iterations between measurements by default (our choice)
NEVER = 1 << 62


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start, data: Classified, wanted: Array) -> int:
    """Train features under a machine; the exit code. Collective."""
    for name in ALONE:
        if vars(settings)[name] is not None:
            raise InputError(f"option -{name} is not for -solver deep")
    with agreed(comm):
        module, words, penalty = feature_map(settings, data)
        loss = FeatureLoss(module, data.samples)
        phi = loss.features(loss.initial()).numpy()
        if settings.kernel_width is None and ":" not in settings.kernel:
            settings.kernel_width = WIDTH * median_distance(phi, settings.seed)
        kernel = smooth(settings.kernel, settings.kernel_width or 1.0, settings.kernel_degree)
    shift = vars(settings)["lambda"]
    if shift is None:
        shift = float(comm.bcast(best_shift(kernel, phi, wanted, settings.seed) if comm.rank == 0 else None))
        vars(settings)["lambda"] = shift
    count = len(phi)
    if settings.deep_objective == "held_out":
        count -= max(round(settings.held * count), 1)
    with agreed(comm):
        layout, whole = (layout_of(settings, phi[:n], wanted, shift, comm) for n in (count, len(phi)))
    solve = InnerSolver(settings.preconditioner, "inner_")
    functional: ReducedFunctional
    if settings.deep_objective == "leave_one_out":
        functional = LeaveOneOut(kernel, shift, layout, wanted)
    else:
        system = InexactSystem(kernel, shift, layout, solve, settings.kernel_memory, settings.inner_rtol)
        if settings.deep_objective == "held_out":
            functional = HeldOut(system, wanted, np.arange(count), np.arange(count, len(phi)))
        else:
            functional = ReducedTikhonov(system, wanted)
    objective = DeepKernelObjective(loss, ParameterLayout(loss.parameters, comm), functional, penalty, start.stop)
    made = Minimisation(objective, settings.deep_solver, comm, stop=start.stop, fmin=0.0)
    try:
        program = training.Conducted(
            comm, settings, start, objective, made.tao, made.x, made.context, objective.parts.blocks
        )
        attributes = {
            "driver": "kernel", "network": f"{words} under {kernel!r}, lambda {shift:g}", "data": settings.data,
            "problem": data.problem, "samples": settings.samples, "inputs": str(data.inputs),
            "width": settings.kernel_width or 0.0,
        }  # fmt: skip
        limits.error_interval = limits.error_interval or INTERVAL

        def measure(theta: Tensor) -> dict[str, float]:
            if data.test_samples is None or data.test_labels is None:
                return {}
            operator = KernelOperator(
                kernel, loss.features(theta).numpy(), shift, whole, settings.kernel_memory, settings.dtype
            )
            found = fit_kernel(operator, wanted, settings.preconditioner, "inner_", ksp_rtol=MEASURED)
            outputs = operator.predict(found.coefficients, loss.of_inputs(theta, data.test_samples).numpy())
            return {"accuracy": float((classes_of(outputs) == data.test_labels).mean())}

        states = Inner(objective)
        lines = [
            f"data {settings.data}, {data.origin}: {len(phi)} samples, scaling {data.inputs.scaling}",
            f"features {words}: {loss.width} of each sample, {loss.size} parameters, by {settings.deep_solver}",
            f"under {kernel!r}, lambda {shift:g}: {settings.deep_objective}, inner solves to {settings.inner_rtol:g} "
            "at first",
            repr(layout.domain),
        ]
        return program.run(
            limits, attributes, measure, states, "\n".join(lines), shown="accuracy", more=states.remembered
        )
    finally:
        made.destroy()


class Inner:
    """What inner solves begin with, as of the last complete iteration: for the run file, as samples that move have."""

    interval = NEVER

    def __init__(self, objective: DeepKernelObjective) -> None:
        self.objective, self._state = objective, dict[str, Any]()

    def remembered(self) -> Mapping[str, float]:
        """Take note of the state behind an iteration; no columns of the history."""
        self._state = copy.deepcopy(self.objective.state())
        return {}

    def move(self, theta: Tensor) -> None:
        """Nothing moves."""

    def state(self) -> dict[str, Any]:
        """See :class:`ddml.runs.checkpoints.Moving`."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`ddml.runs.checkpoints.Moving`."""
        self.objective.restore(state)
        self._state = copy.deepcopy(state)


def layout_of(settings: Any, phi: Array, wanted: Array, shift: float, comm: MPI.Comm) -> SampleLayout:
    """The samples, cut by their first features."""
    n, q = phi.shape
    if settings.subdomains is None:
        chosen = choices(Task.within(settings.kernel_memory, n, q, wanted.shape[1], shift, comm.size, settings.dtype))
        count, overlap = chosen.subdomains, chosen.overlap
    elif settings.subdomains.isdecimal():
        count, overlap = int(settings.subdomains), OVERLAP
    else:
        raise InputError(f"option -subdomains must be a number with -solver deep, got '{settings.subdomains}'")
    overlap = overlap if settings.overlap is None else settings.overlap
    return SampleLayout(SampleDomain.by_tree(phi, count, overlap, settings.cut or "principal"), comm)


def feature_map(settings: Any, data: Classified) -> tuple[nn.Module, str, Penalty | None]:
    """The module that is trained, what it is in words, and its penalty.

    Raises
    ------
    InputError
        None is asked for; one that there is not.
    """
    name, rho = settings.network, settings.inner_decay
    if name is None:
        raise InputError(
            f"option -network is missing: with -solver deep it is {EXPANSION}, path/to/file.py:Name or the run file of "
            "a classifier"
        )
    if name == EXPANSION:
        n = len(data.samples)
        if settings.centres > n:
            raise InputError(f"option -centres must be at most {n}, the samples; got {settings.centres}")
        rows = np.sort(np.random.default_rng(settings.seed).choice(n, settings.centres, replace=False))
        inner = smooth("rbf", WIDTH * median_distance(data.samples, settings.seed))
        expansion = kernel_expansion(inner, data.samples[rows], settings.features)
        words = f"kernel expansion on {settings.centres} centres"
        return expansion, words, native_penalty(expansion, rho) if rho else None
    if name.endswith((".h5", ".hdf5")):
        network = open_run(name).network(trust=settings.trust, data=settings.data)
        if not isinstance(network, Classifier):
            raise InputError(f"option -network: {name} is no run of a classifier")
        if network.inputs.shape != data.inputs.shape:
            raise InputError(f"{name} is of samples {network.inputs.shape}, {settings.data} has {data.inputs.shape}")
        hidden = last_hidden(network.network).requires_grad_(True)
        module = nn.Sequential(Between(data, network), *hidden.children())
        return module, f"last hidden layer of {name}", decay(rho) if rho else None
    torch.manual_seed(settings.seed)
    kind = plugins.load(name, {EXPANSION: None}, "network")
    with plugins.blamed(name, {}, "network"):
        module = kind(data.samples.shape[1]) if callable(kind) else kind
    if not isinstance(module, nn.Module):
        raise InputError(f"network '{name}' must give a torch module for samples of {data.samples.shape[1]} numbers")
    return module, f"network {name}", decay(rho) if rho else None


class Between(nn.Module):
    """From samples as a kernel machine has them to those that a classifier's network takes.

    Parameters
    ----------
    data
        How samples are scaled here.
    network
        How they are there.
    """

    def __init__(self, data: Classified, network: Classifier) -> None:
        super().__init__()
        self.shape = data.inputs.shape
        view = (1, -1, *[1] * (len(self.shape) - 1))
        for name in ("shift", "scale"):
            numbers = torch.tensor(getattr(data.inputs, name), dtype=torch.float64).view(view)
            self.register_buffer(name, numbers.to(network.shift.dtype))
        self.register_buffer("there", network.shift.clone())
        self.register_buffer("divisor", network.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        stored = x.reshape(len(x), *self.shape) * self.scale + self.shift
        return (stored - self.there) / self.divisor
