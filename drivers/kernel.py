"""Fit a kernel machine: mpiexec -n P python -m mpi4py drivers/kernel.py [options].

Where ddml is installed, it is mpiexec -n P ddml-kernel [options].

The samples are cut into overlapping subdomains, and (K + lambda I) alpha = Y is solved to any tolerance: the exact
machine of all samples, and no approximation by some of them. The loss is |Y - f(X)|^2 + lambda |f|^2 over the number of
samples, or that of -loss with lambda/2 |f|^2; a unit of work is a product with the kernel matrix.
"""

from __future__ import annotations

from common import signals

if __name__ == "__main__":
    signals.remember()  # what comes during the imports, which take seconds

from common.program import run_program  # it initialises PETSc

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from common import training
from ddml import options as tables
from ddml.data import classified
from ddml.data.classified import Classified
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleLayout, functions, median_distance
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.losses import class_targets, classes_of, named_loss
from ddml.kernel_machines.rules import WIDTH, best_shift
from ddml.kernel_machines.speeds import Speeds
from ddml.kernel_machines.system import KernelSystem
from ddml.parallel import agreed
from ddml.runs import machines
from kernel_machines import deep
from kernel_machines.arranged import arranged, settle_pivots, take_over, task_of
from kernel_machines.options import LIMITS, OPTIONS, SQUARED, help_text, options_of
from solvers import PETSC_TYPES
from solvers.kernel_machines.fit import PRECONDITIONERS
from solvers.kernel_machines.iterations import KernelIterations
from solvers.kernel_machines.krylov import ConjugateGradients, KrylovCycles
from solvers.kernel_machines.newton import preconditioner_of
from solvers.kernel_machines.newton_iterations import NewtonIterations
from solvers.kernel_machines.sweeps import NO_SOLUTION, ExchangeInTurn


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if training.HELP:
        if comm.rank == 0:
            print(help_text(__doc__ or ""))
        return 0
    if PETSc.Options().hasName("tao_type"):
        raise InputError(f"option -tao_type asks for one of {', '.join(PETSC_TYPES[:3])}, ...: kernel.py has -ksp_type")
    with training.started(comm, "kernel", OPTIONS, LIMITS, options_of) as (settings, limits, start):
        return train(comm, settings, limits, start)


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start) -> int:
    """Run what has been read; the exit code. Collective."""
    data = classified.load(
        settings.data, comm, settings.samples, settings.scaling, settings.test_data, settings.index_base
    )
    if settings.later is not None:
        data = classified.joined(data, settings.data, settings.later, comm, settings.index_base)
    settings.samples = len(data.samples)
    start.stop.check(comm)
    settle_loss(settings)
    wanted = class_targets(SQUARED, data.labels, len(data.inputs.classes))
    if settings.solver == "deep":
        settings.trust = limits.trust
        return deep.train(comm, settings, limits, start, data, wanted)
    with agreed(comm):
        if settings.start is not None and limits.restart is None:
            take_over(settings)
        kernel = build_kernel(settings, data.samples)
    vars(settings)["lambda"] = shift = chosen_shift(settings, kernel, data.samples, wanted, comm)
    wanted = class_targets(settings.loss, data.labels, len(data.inputs.classes))
    with agreed(comm):
        task = task_of(settings, kernel, data.samples, wanted.shape[1], comm.size)
    domain, notes = arranged(settings, data, limits.restart, task, kernel, comm)
    with agreed(comm):
        settle_pivots(settings, domain, task)
    start.notes += notes
    made = partial(KernelOperator, kernel, data.samples, shift, memory=settings.kernel_memory, dtype=settings.dtype)
    operator = made(layout=SampleLayout(domain, comm))
    if settings.rank_speeds and comm.size > 1 and not settings.check:
        operator.multiply(np.ones((len(operator.layout.rows), 1)))
        speeds = Speeds.measured(operator)
        start.notes.append(f"ranks took {speeds!r}")
        operator = made(layout=SampleLayout(domain, comm, speeds.shares))
    layout = operator.layout
    system = KernelSystem(operator, wanted, start.stop)
    context = build_solver(settings, system)
    tao, x = PETSc.TAO().create(comm), system.vector()
    if settings.start is not None and limits.restart is None:
        layout.set(x, machines.coefficients_of(settings.start, *wanted.shape))
    try:
        tao.setType("python")
        tao.setPythonContext(context)
        tao.setSolution(x)
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        with tables.understood():
            tao.setUp()
        measure = Test(data, system)
        limits.error_interval = limits.error_interval or measure.interval
        program = training.Conducted(comm, settings, start, system, tao, x, context, layout.tree.count)
        attributes = {
            "driver": "kernel", "network": f"kernel machine, {kernel!r}, lambda {shift:g}, loss {settings.loss}",
            "data": settings.data,
            "problem": data.problem, "samples": settings.samples, "inputs": str(data.inputs),
            "width": settings.kernel_width or 0.0,
        }  # fmt: skip
        return program.run(
            limits, attributes, measure, None, header(settings, data, operator, context), shown="accuracy",
            more=context.columns,
        )  # fmt: skip
    finally:
        tao.destroy()
        context.destroy()
        x.destroy()


def settle_loss(settings: Any) -> None:
    """Put the preconditioner into the settings where they leave it open.

    Raises
    ------
    InputError
        A loss that the solver or the preconditioner is not for.
    """
    if settings.loss == SQUARED:
        settings.preconditioner = settings.preconditioner or "schwarz"
        if settings.preconditioner not in (*PRECONDITIONERS, "none"):
            raise InputError(f"option -preconditioner {settings.preconditioner} is for other losses than -loss squared")
        return
    if settings.solver != "ksp":
        raise InputError(f"option -loss {settings.loss} is for -solver ksp, not for -solver {settings.solver}")
    settings.preconditioner = preconditioner_of(settings.preconditioner, named_loss(settings.loss))


def build_kernel(settings: Any, samples: Array) -> functions.Kernel:
    """The kernel that the settings ask for; its width is put into them where they leave it open."""
    own = ":" in settings.kernel
    if settings.kernel_width is None and not own:
        settings.kernel_width = WIDTH * median_distance(samples, settings.seed)
    return functions.named(settings.kernel, settings.kernel_width or 1.0, settings.kernel_degree)


def chosen_shift(settings: Any, kernel: functions.Kernel, samples: Array, wanted: Array, comm: MPI.Comm) -> float:
    """The lambda that the settings ask for, or the rule gives: rank 0's, so that all have the same. Collective."""
    given = vars(settings)["lambda"]
    if given is not None and not given < math.inf:
        raise InputError(f"option -lambda must be finite, got {given}")
    found = given
    with agreed(comm):
        functions.check_symmetry(kernel, torch.as_tensor(samples))
        if given is None and comm.rank == 0:
            found = best_shift(kernel, samples, wanted, settings.seed)
    return float(comm.bcast(found))


def build_solver(settings: Any, system: KernelSystem) -> KernelIterations:
    """The solver that the settings ask for."""
    if settings.solver == "d3l" and settings.exchange != "once":
        try:
            omega = [float(word) for word in settings.omega.split(",")]
        except ValueError:
            raise InputError(f"option -omega must be numbers, as in 0 or 0,1,0,1; got '{settings.omega}'") from None
        each = omega[0] if len(omega) == 1 else omega
        return ExchangeInTurn(system, settings.rtol, settings.agreement, each, settings.exchange == "turn")
    if settings.loss != SQUARED:
        return NewtonIterations(system, settings.loss, settings.rtol, settings.preconditioner)
    database = PETSc.Options()
    kind = database.getString("ksp_type", "cg")
    if settings.solver == "d3l":
        kind = "richardson"
        database.setValue("ksp_type", kind)
    made = ConjugateGradients if kind == "cg" else KrylovCycles
    return made(system, settings.rtol, settings.preconditioner)


class Test:
    """How often the machine is right on the test samples, if there are some. Collective."""

    def __init__(self, data: Classified, system: KernelSystem) -> None:
        self.system, self.labels = system, data.test_labels
        self.samples = data.test_samples
        count = 0 if self.samples is None else len(self.samples)
        self.interval = max(math.ceil(2 * count / len(data.samples)), 1)

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """The accuracy at coefficients (n k,)."""
        if self.samples is None:
            return {}
        outputs = self.system.operator.predict(self.system.by_sample(theta), self.samples)
        return {"accuracy": float((classes_of(outputs) == self.labels).mean())}


def header(settings: Any, data: Classified, operator: KernelOperator, context: KernelIterations) -> str:
    """What is about to run, in words."""
    tested = "none to test with" if data.test_labels is None else f"{len(data.test_labels)} to test with"
    how = f"-exchange {settings.exchange}" if settings.solver == "d3l" else f"-preconditioner {settings.preconditioner}"
    lines = [
        f"data {settings.data}, {data.origin}: {len(data.samples)} samples, {tested}, scaling {data.inputs.scaling}",
        repr(operator),
        repr(operator.layout.domain),
        f"solver {settings.solver}, {how}: until the residual is below {context.rtol:g}",
    ]
    if settings.loss != SQUARED:
        lines.append(
            f"loss {settings.loss}: an iteration is a step of Newton's method, the residual that of its gradient"
        )
    if settings.solver == "d3l" and settings.exchange == "none":
        lines.append(f"note: {NO_SOLUTION}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
