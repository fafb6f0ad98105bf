"""Train a physics-informed network: mpiexec -n P python -m mpi4py drivers/pinn.py [options].

Where ddml is installed, it is mpiexec -n P ddml-pinn [options].

One problem, one network, one solver; -help explains every option.
"""

from __future__ import annotations

from common import signals

if __name__ == "__main__":
    signals.remember()  # what comes during the imports, which take seconds

from common.program import run_program  # it initialises PETSc

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import ddml.runs.run
import solvers
from common import training
from ddml import kernels, plugins
from ddml.errors import InputError
from ddml.jets.fused import ORDER
from ddml.networks.build import OPTIONS as NETWORK_OPTIONS
from ddml.options import NEVER, WITH_SOLVER, Option
from ddml.parallel import agreed
from ddml.problems import PROBLEMS, Interior, PDELoss
from ddml.problems.build import build_problem
from ddml.problems.pde import collocation, magnitudes
from ddml.problems.pde.accuracy import SolutionError
from ddml.problems.pde.loss import TORCH_JETS
from ddml.problems.pde.scales import parsed
from ddml.runs.advice import advise
from solvers import PETSC_TYPES, SOLVERS, solver_class
from common.device import Device, bind, short_of_memory

WITHOUT_KERNELS = "note: the kernels were not built (make env does it with a C compiler): torch does their work, slower"
LARGE = 25_000  # parameters for which a dense inverse Hessian takes 2.5 GB in all

MANY = 10_000  # from here on a pass over the matrix costs more than the points (our choice)

OPTIONS = (
    Option("problem", "burgers", f"One of {', '.join(PROBLEMS)}; or path/to/file.py:Class.", changes=NEVER),
    Option("solver", "auto", f"One of {', '.join(SOLVERS)}; or PETSc's {', '.join(PETSC_TYPES)}; or "
           f"path/to/file.py:Class; auto is ssbroyden up to {LARGE} parameters, lbfgs with memory 50 beyond."),
    *NETWORK_OPTIONS,
    Option("points", None, "Collocation points in the interior (default 10,000; where they move 5 for 3 parameters, at "
           f"least 1,000 and at most 5,000; 2,000 from {MANY} parameters on).", kind=int, minimum=1,
           changes=WITH_SOLVER),
    *collocation.OPTIONS,
    *magnitudes.OPTIONS,
    Option("error_points", 5000, "Grid points where the error is measured.", minimum=2),
    *training.OPTIONS,
)  # fmt: skip

LIMITS = tuple(o for o in ddml.runs.run.OPTIONS if o.name != "target_accuracy")


def help_text() -> str:
    """What -help prints."""
    more: list[str] = []
    for pc in (solvers.NystromPC, solvers.SchwarzPC):
        more += ["", f"Options of -gn_pc_type python -gn_pc_python_type solvers.{pc.__name__}, with gn_ before them:"]
        more += map(str, pc.options)
    return training.help_text(__doc__ or "", (*OPTIONS, *LIMITS), more=more)


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if training.HELP:
        if comm.rank == 0:
            print(help_text())
        return 0
    with training.started(comm, "pinn", OPTIONS, LIMITS) as (settings, limits, start):
        return train(comm, settings, limits, start)


def train(comm: MPI.Comm, settings: Any, limits: Any, start: training.Start) -> int:
    """Run what has been read; the exit code. Collective."""
    device = bind(comm, settings.device)
    with agreed(comm), plugins.blamed(settings.problem, PROBLEMS, "problem"), short_of_memory():
        if limits.restart is not None and settings.scales is None:
            settings.scales = "none"  # older run files know no others
        loss, network, sizes = build(settings, device.torch)
        chosen = solver_class(settings.solver).decompose(loss)
    limits.error_interval = limits.error_interval or solver_class(settings.solver).measures_error
    fmin = 1e-9 if settings.solver in ("lbfgs", "aspqn", "mspqn") else 0.0  # the paper's
    made = training.Training(comm, settings, start, loss, chosen, fmin, vectors=device.vectors)
    with agreed(comm), plugins.blamed(settings.problem, PROBLEMS, "problem"):
        error = SolutionError(loss, comm, settings.error_points, made.blocks)
        fresh = None
        if settings.test_points and any(isinstance(term.where, Interior) for term in loss.problem_terms):
            fresh = collocation.FreshLoss(loss, comm, settings.test_points, settings.seed, made.blocks)
    moving = None
    if settings.resample != "never":
        moving = collocation.MovingPoints(made.objective, settings, settings.seed)

    def measure(theta: Tensor) -> dict[str, float]:
        return {**error(theta), **(fresh(theta) if fresh else {})}

    def closing(run: ddml.runs.run.Run) -> list[str]:
        advice = advise(run.history, run.measured, run.reason, magnitudes.rounding(sizes, loss.dtype))
        found = [f"{name} = {value}" for name, value in coefficients(loss, run).items()]
        return [*found, *([str(advice)] if advice else [])]

    attributes = {
        "driver": "pinn", "problem": settings.problem, "network": network, "points": settings.points,
        "resample": settings.resample,
    }  # fmt: skip
    words = header(settings, loss, network, made.summation(), sizes, device)
    return made.run(limits, attributes, measure, moving, words, closing)


def build(settings: Any, device: torch.device) -> tuple[PDELoss, str, list[magnitudes.Magnitude]]:
    """The loss that the options describe, the network in words, and what is how large in the beginning.

    What is left open is chosen; magnitudes are those of a run that has no scales yet.
    """
    problem, network, words = build_problem(settings)
    dtype = getattr(torch, settings.dtype)
    choose(settings, sum(p.numel() for p in network.parameters() if p.requires_grad))
    if settings.scales is None:
        scales, sizes, notes = magnitudes.find(problem, network, dtype, device, settings)
        settings.scales = str(scales)
    else:
        scales, sizes, notes = parsed(settings.scales, problem), [], []
    loss = PDELoss(problem, network, settings.points, dtype, device, settings.chunk, scales=scales)
    loss.notes += notes
    if loss.count == 0:
        raise InputError(f"problem '{settings.problem}' has no terms, or none with points")
    return loss, words, sizes


def choose(settings: Any, size: int) -> None:
    """Set what was left open: solver, moving points and their number, for a network of so many parameters."""
    if settings.solver == "auto":
        settings.solver = "ssbroyden" if size <= LARGE else "lbfgs"
        if size > LARGE and not PETSc.Options().hasName("memory"):
            PETSc.Options().setValue("memory", 50)
    interval = solver_class(settings.solver).moves_points
    if settings.resample == "auto":
        settings.resample = "residual" if interval else "never"
    settings.resample_interval = settings.resample_interval or interval or 250
    few = min(max(5 * size // 3, 1000), 5000) if size < MANY else 2000
    settings.points = settings.points or (10_000 if settings.resample == "never" else few)


def header(
    settings: Any,
    loss: PDELoss,
    network: str,
    summation: str,
    sizes: Sequence[magnitudes.Magnitude],
    device: Device,
) -> str:
    """What is about to run, in words."""
    kind = solver_class(settings.solver)
    terms = ", ".join(f"{t.label} at {len(s)}" for t, s in zip(loss.problem_terms, loss.sets, strict=True))
    moving = ""
    if settings.resample != "never":
        moving = f", the interior ones new every {settings.resample_interval} iterations ({settings.resample})"
    return (
        f"problem {settings.problem}, {loss.count} points ({terms}){moving}\n"
        f"{loss.statement.scales.said(loss.problem, [t.label for t in loss.problem_terms])}\n"
        + (f"at the start: {'; '.join(map(str, sizes))}\n" if sizes else "")
        + f"network {network}, {loss.size} parameters, {settings.dtype} on {settings.device},"
        f" {loss.evaluator!r} with derivatives up to order {max(len(i) for i in loss.indices)}\n"
        f"{derivatives(loss)}{residuals(loss)}\n"
        f"solver {settings.solver} {summation}\n"
        + "".join(f"{line}\n" for line in device.words().splitlines())
        + (f"{kind.decompose(loss)!r}\n" if kind.subdomains_of == "parameters" else "")
        + "".join(f"note: {note}\n" for note in loss.notes)
        + ("" if loss.device.type != "cpu" or kernels.library() is not None else WITHOUT_KERNELS)
    ).rstrip()


def derivatives(loss: PDELoss) -> str:
    """A line on derivatives that the kernels do not have, and what that costs; nothing where they have all."""
    if not loss.beyond_kernels or loss.device.type != "cpu":
        return ""
    names = ", ".join(loss.beyond_kernels)
    return f"derivatives {names} beyond the kernels' order {ORDER}: all in torch, about {TORCH_JETS:.0f} times slower\n"


def residuals(loss: PDELoss) -> str:
    """Which terms the kernels evaluate, and which torch and why."""
    if not loss.in_torch:
        return "residuals compiled"
    reasons = set(loss.in_torch.values())
    if not loss.programs and len(reasons) == 1:
        return f"residuals in torch ({reasons.pop()})"
    terms = loss.problem_terms
    compiled = ", ".join(terms[i].label for i in loss.programs)
    others = ", ".join(f"{terms[i].label} ({why})" for i, why in loss.in_torch.items())
    return f"residuals compiled: {compiled or 'none'}; in torch: {others}"


def coefficients(loss: PDELoss, run: ddml.runs.run.Run) -> dict[str, str]:
    """Trained coefficients of the equation, with what they should be where that is known."""
    if not loss.coefficients:
        return {}
    with run.last as values:
        found = values[-len(loss.coefficients) :]
    truth = loss.problem.true_coefficients
    return {
        name: f"{value:.8g}" + (f" (true value {truth[name]:.8g})" if name in truth else "")
        for name, value in zip(loss.coefficients, found, strict=True)
    }


if __name__ == "__main__":
    run_program(main)
