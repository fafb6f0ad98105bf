"""Train a physics-informed network: mpiexec -n P python -m mpi4py drivers/pinn.py [options].

One problem, one network, one solver; -help explains every option.
"""

from __future__ import annotations

from program import HELP, run_program  # first: it initialises PETSc

import sys
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import ddml.run
from ddml import kernels, options, plugins
from ddml.decomposition import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.networks.build import OPTIONS as NETWORK_OPTIONS
from ddml.networks.build import build_network
from ddml.options import Option
from ddml.parallel import StopRequest, agreed
from ddml.problems import PDE, PROBLEMS, PDELoss, collocation
from ddml.problems.accuracy import SolutionError
from ddml.residual import ResidualObjective
from solvers import PETSC_TYPES, SOLVERS, NystromPC, SchwarzPC, configure
from solvers.spqn import subdomains

PREFIXES = {
    **dict.fromkeys(
        ("aspqn", "mspqn", "mspqn_dense"), " (of a local solver with sub_ before them, of the coarse one coarse_)"
    ),
    "gauss_newton": " (and PETSc's -gn_ksp_type, -gn_ksp_rtol, -gn_pc_type, ...)",
}
LARGE = 25_000  # parameters for which a dense inverse Hessian takes 2.5 GB in all

OPTIONS = (
    Option("problem", "burgers", f"One of {', '.join(PROBLEMS)}; or path/to/file.py:Class."),
    Option("solver", "auto", f"One of {', '.join(SOLVERS)}; or PETSc's {', '.join(PETSC_TYPES)}; or "
           f"path/to/file.py:Class; auto is ssbroyden up to {LARGE} parameters, lbfgs with memory 50 beyond."),
    *NETWORK_OPTIONS,
    Option("points", None, "Collocation points in the interior (default 10,000; where they move 5 for 3 parameters, at "
           "least 1,000 and at most 5,000).", kind=int, minimum=1),
    *collocation.OPTIONS,
    Option("seed", 0, "Of the initial parameters.", minimum=0),
    Option("dtype", "float64", "Precision of the network; parameters are kept in float64.",
           choices=("float64", "float32")),
    Option("device", "cpu", "Where torch computes, as in cpu or cuda; parameters are kept on the host."),
    Option("chunk", 0, "Points that go through the network at a time; 0: what suits the evaluator.", minimum=0),
    Option("summation_blocks", 12, "Blocks of points that are summed in a fixed order, so that a run is the same to "
           "the last bit on any number of ranks up to this; 0 sums by ranks.", minimum=0),
    Option("error_points", 5000, "Grid points where the error is measured.", minimum=2),
    Option("threads", 1, "Threads of torch on each rank.", minimum=1),
    Option("view", False, "Print the solver and the split of the parameters."),
)  # fmt: skip


def help_text() -> str:
    """What -help prints."""
    lines = [__doc__ or "", "Options of this driver:", *map(str, OPTIONS), *map(str, ddml.run.OPTIONS)]
    for name, solver in SOLVERS.items():
        lines += [
            "",
            f"Options of -solver {name}{PREFIXES.get(name, '')}:",
        ]
        lines += map(str, solver.options)
    for pc in (NystromPC, SchwarzPC):
        lines += ["", f"Options of -gn_pc_type python -gn_pc_python_type solvers.{pc.__name__}, with gn_ before them:"]
        lines += map(str, pc.options)
    lines += [
        "",
        "All of PETSc's options apply, such as -tao_fmin, -tao_ls_gtol, -sub_tao_type, -log_view, -options_file.",
    ]
    return "\n".join(lines)


def main(comm: MPI.Comm) -> int:
    """Run what the options say; the exit code. Collective."""
    if HELP:
        if comm.rank == 0:
            print(help_text())
        return 0
    stray = options.stray(sys.argv)
    if stray:
        raise InputError(f"'{stray[0]}' is neither an option nor the value of one; -help lists the options")
    settings, limits = options.read(OPTIONS), options.read(ddml.run.OPTIONS)
    torch.set_num_threads(settings.threads)
    stop = StopRequest()
    with agreed(comm), plugins.blamed(settings.problem, PROBLEMS, "problem"):
        loss, network = build(settings)
        chosen = decompose(settings, loss)
    limits.error_interval = limits.error_interval or getattr(SOLVERS.get(settings.solver), "measures_error", 1)
    blocks = settings.summation_blocks
    if blocks:
        blocks *= -(-comm.size // blocks)  # on more ranks than blocks, every rank needs some
    # one owner for all parameters: dot products, too, are then the same on any number of ranks
    ranges = [0] + [loss.size] * comm.size if blocks else chosen.ownership(comm.size)
    layout = ParameterLayout(loss.parameters, comm, ranges)
    objective = ResidualObjective(loss, layout, stop, blocks)
    x = layout.vector()
    objective.initial(x)
    tao = PETSc.TAO().create(comm)
    with plugins.blamed(settings.solver, {**SOLVERS, **dict.fromkeys(PETSC_TYPES)}, "solver"):
        configure(tao, settings.solver)
    objective.attach(tao)
    tao.setSolution(x)
    tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
    with options.understood():
        with options.preset(tao_fmin=1e-9 if settings.solver in ("lbfgs", "aspqn", "mspqn") else 0.0):  # the paper's
            tao.setFromOptions()
        tao.setUp()
    left = options.unused()
    if left:
        raise InputError(f"unknown option{'s' * (len(left) > 1)} {', '.join('-' + k for k in left)}; -help lists them")
    with agreed(comm), plugins.blamed(settings.problem, PROBLEMS, "problem"):
        error = SolutionError(loss, comm, settings.error_points)
        fresh = collocation.FreshLoss(loss, comm, settings.test_points, settings.seed) if settings.test_points else None
    moving = collocation.MovingPoints(objective, settings, settings.seed) if settings.resample != "never" else None

    def measure(theta: Tensor) -> dict[str, float]:
        return {**error(theta), **(fresh(theta) if fresh else {})}

    attributes = {
        "driver": "pinn", "problem": settings.problem, "solver": settings.solver, "network": network,
        "seed": settings.seed, "points": settings.points, "resample": settings.resample,
        "dtype": settings.dtype, "summation_blocks": blocks,
        "torch_version": str(torch.__version__),
        **{f"option {k}": str(v) for k, v in {**vars(settings), **vars(limits), **PETSc.Options().getAll()}.items()},
    }  # fmt: skip
    run = ddml.run.Run(objective, tao, x, limits, attributes, measure, moving)
    if comm.rank == 0:
        print(header(settings, loss, network, comm.size, blocks), flush=True)
        if settings.device == "cpu" and kernels.library() is None:
            print(
                "note: the kernels were not built (make env does it with a C compiler): torch does their work, slower"
            )
        for note in run.notes:
            print(f"note: {note}", flush=True)
    if settings.view:
        tao.view()
        if comm.rank == 0:
            print(repr(layout), flush=True)
    stop.listen()
    finished = run.execute()
    if comm.rank == 0:
        print(run.summary())
        for name, value in coefficients(loss, run).items():
            print(f"{name} = {value}")
        if run.output and len(run.history) and run.exact:
            print(f"to go on: the same command with -restart {run.output} and a larger limit")
    return 0 if finished else 1


def build(settings: Any) -> tuple[PDELoss, str]:
    """The loss that the options describe, and the network in words; what a run leaves open is chosen."""
    problem_class = plugins.load(settings.problem, PROBLEMS, "problem")
    problem = problem_class() if isinstance(problem_class, type) else problem_class
    if not isinstance(problem, PDE):
        raise InputError(f"problem '{settings.problem}' is no ddml.problems.PDE")
    problem.check()
    dtype = getattr(torch, settings.dtype)
    probe = [torch.zeros(2, dtype=dtype)] * len(problem.domain)
    network, words = build_network(
        settings, len(problem.embed(*probe)), len(problem.fields), problem.width, problem.depth
    )
    device = check_device(settings.device)
    if hasattr(settings, "solver"):
        choose(settings, sum(p.numel() for p in network.parameters()))
    loss = PDELoss(problem, network, settings.points, dtype, device, settings.chunk)
    if loss.count == 0:
        raise InputError(f"problem '{settings.problem}' has no terms, or none with points")
    return loss, words


def decompose(settings: Any, loss: PDELoss) -> Subdomains:
    """The subdomains of the solver, or those that the options ask for if it has none."""
    return getattr(SOLVERS.get(settings.solver), "decompose", subdomains)(loss)


def choose(settings: Any, size: int) -> None:
    """Set what was left open: solver, moving points and their number, for a network of so many parameters."""
    if settings.solver == "auto":
        settings.solver = "ssbroyden" if size <= LARGE else "lbfgs"
        if size > LARGE and not PETSc.Options().hasName("memory"):
            PETSc.Options().setValue("memory", 50)
    interval = getattr(SOLVERS.get(settings.solver), "moves_points", 0)
    if settings.resample == "auto":
        settings.resample = "residual" if interval else "never"
    settings.resample_interval = settings.resample_interval or interval or 250
    few = min(max(5 * size // 3, 1000), 5000)
    settings.points = settings.points or (10_000 if settings.resample == "never" else few)


def check_device(name: str) -> torch.device:
    """The torch device of that name, if this rank can compute there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"option -device: cannot compute on '{name}': {str(error).splitlines()[0]}") from error
    return device


def header(settings: Any, loss: PDELoss, network: str, ranks: int, blocks: int) -> str:
    """What is about to run, in words."""
    terms = ", ".join(f"{t.label} at {len(s)}" for t, s in zip(loss.problem_terms, loss.sets, strict=True))
    summation = f"in fixed order over {blocks} blocks" if blocks else "by ranks"
    moving = ""
    if settings.resample != "never":
        moving = f", the interior ones new every {settings.resample_interval} iterations ({settings.resample})"
    compiled = "" if len(loss.programs) < len(loss.problem_terms) else ", residuals compiled"
    return (
        f"problem {settings.problem}, {loss.count} points ({terms}){moving}\n"
        f"network {network}, {loss.size} parameters, {settings.dtype} on {settings.device},"
        f" {loss.evaluator!r} with derivatives up to order {max(len(i) for i in loss.indices)}{compiled}\n"
        f"solver {settings.solver} on {ranks} rank{'s' * (ranks > 1)}, sums {summation}\n"
        + (f"{decompose(settings, loss)!r}" if hasattr(SOLVERS.get(settings.solver), "decompose") else "")
    ).rstrip()


def coefficients(loss: PDELoss, run: ddml.run.Run) -> dict[str, str]:
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
