"""Deep kernels of drivers/kernel.py: features that are trained under a kernel machine, by any solver of gradients."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.data.classified import Classified
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance
from ddml.kernel_machines.costs import Task, choices
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.features import FeatureLoss, Penalty, decay, native_penalty
from ddml.kernel_machines.gradients import smooth
from ddml.kernel_machines.inexact import InexactSystem
from ddml.kernel_machines.leave_one_out import LeaveOneOut
from ddml.kernel_machines.losses import classes_of
from ddml.kernel_machines.reduced import HeldOut, ReducedFunctional, ReducedTikhonov
from ddml.kernel_machines.rules import WIDTH, best_shift
from ddml.layout import ParameterLayout
from ddml.objectives.deep import DeepKernelObjective
from ddml.parallel import agreed
from ddml.runs import feature_maps, machines
from ddml.runs.feature_maps import EXPANSION
from ddml.runs.opened import open_run
from solvers import Minimisation, fit_kernel
from solvers.kernel_machines.inner import InnerSolver

from .options import ALONE, OVERLAP

MEASURED = 1e-3  # tolerance of the machine whose accuracy is measured (our choice)
INTERVAL = 10  # iterations between measurements by default (our choice)
NEVER = 1 << 62
CONTINUE = PETSc.TAO.ConvergedReason.CONTINUE_ITERATING


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

        def machine(theta: Tensor) -> tuple[KernelOperator, Array]:
            phi = loss.features(theta).numpy()
            operator = KernelOperator(kernel, phi, shift, whole, settings.kernel_memory, settings.dtype)
            found = fit_kernel(operator, wanted, settings.preconditioner, "inner_", ksp_rtol=MEASURED)
            return operator, found.coefficients

        def measure(theta: Tensor) -> dict[str, float]:
            if data.test_samples is None or data.test_labels is None:
                return {}
            operator, alpha = machine(theta)
            outputs = operator.predict(alpha, loss.of_inputs(theta, data.test_samples).numpy())
            return {"accuracy": float((classes_of(outputs) == data.test_labels).mean())}

        states = Inner(made, objective, machine)
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
    """What inner solves begin with, as of the last complete iteration: for the run file, as samples that move have.

    Of a run that has come to its end it is the machine, too, which takes a solve.

    Parameters
    ----------
    made
        What trains the features.
    objective
        What they lower.
    machine
        From their parameters to the machine's matrix and coefficients.
    """

    interval = NEVER

    def __init__(
        self,
        made: Minimisation,
        objective: DeepKernelObjective,
        machine: Callable[[Tensor], tuple[KernelOperator, Array]],
    ) -> None:
        self.made, self.objective, self._machine, self._state = made, objective, machine, dict[str, Any]()
        self._last: Tensor | None = None

    def remembered(self) -> Mapping[str, float]:
        """Take note of the state behind an iteration; no columns of the history. Collective."""
        self._state = copy.deepcopy(self.objective.state())
        self._last = self.objective.parameters(self.made.x).clone()
        return {}

    def move(self, theta: Tensor) -> None:
        """Nothing moves."""

    def state(self) -> dict[str, Any]:
        """See :class:`ddml.runs.checkpoints.Moving`. Collective."""
        stop, comm = self.objective.stop, self.objective.comm
        hurried = stop is not None and comm.allreduce(stop.requested, MPI.LOR)
        if self._last is None or hurried or self.made.tao.getConvergedReason() == CONTINUE:
            return self._state
        return {**self._state, machines.MACHINE: self._machine(self._last)[1]}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`ddml.runs.checkpoints.Moving`."""
        self._state = {name: copy.deepcopy(value) for name, value in state.items() if name != machines.MACHINE}
        self.objective.restore(copy.deepcopy(self._state))


def layout_of(settings: Any, phi: Array, wanted: Array, shift: float, comm: MPI.Comm) -> SampleLayout:
    """The samples, cut by their first features; what the settings leave open is chosen, and put into them."""
    n, q = phi.shape
    if settings.subdomains is None:
        chosen = choices(Task.within(settings.kernel_memory, n, q, wanted.shape[1], shift, comm.size, settings.dtype))
        count, overlap = chosen.subdomains, chosen.overlap
        settings.subdomains = str(count)  # the run's from now on, on any number of ranks
    elif settings.subdomains.isdecimal():
        count, overlap = int(settings.subdomains), OVERLAP
    else:
        raise InputError(f"option -subdomains must be a number with -solver deep, got '{settings.subdomains}'")
    if settings.overlap is None:
        settings.overlap = overlap
    return SampleLayout(SampleDomain.by_tree(phi, count, settings.overlap, settings.cut or "principal"), comm)


def feature_map(settings: Any, data: Classified) -> tuple[nn.Module, str, Penalty | None]:
    """The module that is trained, what it is in words, and its penalty.

    Raises
    ------
    InputError
        None is asked for; what :func:`ddml.runs.feature_maps.feature_map` refuses.
    """
    name, rho = settings.network, settings.inner_decay
    if name is None:
        raise InputError(
            f"option -network is missing: with -solver deep it is {EXPANSION}, path/to/file.py:Name or the run file of "
            "a classifier"
        )

    def trained(path: str) -> object:
        return open_run(path).network(trust=settings.trust, data=settings.data)

    module, words = feature_maps.feature_map(name, settings.centres, settings.features, settings.seed, data, trained)
    if not rho:
        return module, words, None
    return module, words, native_penalty(module, rho) if name == EXPANSION else decay(rho)
