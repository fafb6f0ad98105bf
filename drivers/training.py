"""What the drivers that train share: options, the solver of a loss, and the run from its header to its last line."""

from __future__ import annotations

from program import HELP  # first: it initialises PETSc

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import ddml.run
from ddml import options, plugins
from ddml.compact import trim_at_once
from ddml.decomposition import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.loss import Loss
from ddml.objective import Objective
from ddml.options import Option
from ddml.parallel import StopRequest
from ddml.summation import efficiency, fixes_order, leaves
from solvers import PETSC_TYPES, SOLVERS, TO_ROUNDING, Solver, configure, solver_class
from solvers.spqn import subdomains

__all__ = ["HELP", "OPTIONS", "Training", "check_device", "decompose", "help_text", "read_options"]

PREFIXES = {
    **dict.fromkeys(
        ("aspqn", "mspqn", "mspqn_dense"), " (of a local solver with sub_ before them, of the coarse one coarse_)"
    ),
    "gauss_newton": " (and PETSc's -gn_ksp_type, -gn_ksp_rtol, -gn_pc_type, ...)",
}

OPTIONS = (
    Option("seed", 0, "Of the initial parameters.", minimum=0),
    Option("dtype", "float64", "Precision of the network; parameters are kept in float64.",
           choices=("float64", "float32")),
    Option("device", "cpu", "Where torch computes, as in cpu or cuda; parameters are kept on the host."),
    Option("chunk", 0, "Points that go through the network at a time; 0: what suits the evaluator.", minimum=0),
    Option("summation_blocks", None, "Blocks of points whose sums are added in a fixed order, so that a run is the "
           "same to the last bit on any number of ranks; no more ranks than blocks are busy; 0 sums by ranks (default: "
           "8 to 512, by what an evaluation costs; 0 above -summation_limit).", kind=int, minimum=0),
    Option("summation_limit", 1_000_000, "Parameters above which sums go by ranks.", minimum=0),
    Option("threads", 1, "Threads of torch on each rank.", minimum=1),
    Option("view", False, "Print the solver and the split of the parameters."),
)  # fmt: skip


def help_text(title: str, table: Sequence[Option], left_out: Sequence[str] = (), more: Iterable[str] = ()) -> str:
    """What -help prints: a driver's options, those of the solvers except some, and more lines."""
    lines = [title, "Options of this driver:", *map(str, table)]
    for name, solver in SOLVERS.items():
        if name not in left_out:
            lines += ["", f"Options of -solver {name}{PREFIXES.get(name, '')}:", *map(str, solver.options)]
    lines += [
        *more,
        "",
        "All of PETSc's options apply, such as -tao_fmin, -tao_ls_gtol, -sub_tao_type, -log_view, -options_file.",
    ]
    return "\n".join(lines)


def read_options(table: Sequence[Option], limits: Sequence[Option]) -> tuple[Any, Any]:
    """A driver's settings and the limits of its run, from the command line; also sets torch's threads.

    Raises
    ------
    InputError
        Words that are neither options nor values of options, values out of range.
    """
    stray = options.stray(sys.argv)
    if stray:
        raise InputError(f"'{stray[0]}' is neither an option nor the value of one; -help lists the options")
    settings = options.read(table), options.read(limits)
    settings[0].solver = chosen_solver(settings[0].solver)
    torch.set_num_threads(settings[0].threads)
    return settings


def chosen_solver(name: str) -> str:
    """The solver that ``-solver``, whose value or default this is, and PETSc's ``-tao_type`` ask for.

    Raises
    ------
    InputError
        If they contradict each other, or there is none of that type here; ``-tao_max_it``.
    """
    database = PETSc.Options()
    if database.hasName("tao_max_it"):
        raise InputError("option -tao_max_it is -max_it here, which also counts the iterations before a restart")
    if not database.hasName("tao_type"):
        return name
    kind = database.getString("tao_type")
    if kind not in PETSC_TYPES:
        raise InputError(f"option -tao_type must be one of {', '.join(PETSC_TYPES)}; got '{kind}'; others by -solver")
    if database.hasName("solver") and name != kind:
        raise InputError(f"options -solver {name} and -tao_type {kind} ask for two solvers: give one")
    return kind


def check_device(name: str) -> torch.device:
    """The torch device of that name, if this rank can compute there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"option -device: cannot compute on '{name}': {str(error).splitlines()[0]}") from error
    return device


def decompose(settings: Any, loss: Loss) -> Subdomains:
    """The subdomains of the solver, or those that the options ask for if it has none."""
    kind = solver_class(settings.solver)
    if not hasattr(kind, "decompose") and any(o.name == "subdomains" for o in getattr(kind, "options", ())):
        return Subdomains.by_layers(loss, 1)  # its subdomains are not of parameters
    return getattr(kind, "decompose", subdomains)(loss)


class Training:
    """A loss on the ranks and the solver that the options ask for, set up; collective.

    Parameters
    ----------
    comm
        All ranks.
    settings
        Values of :data:`OPTIONS`, and ``solver``.
    loss
        What is minimised.
    chosen
        Subdomains of its parameters, which the ownership of these follows.
    kind
        Of the objective.
    fmin
        Default of ``-tao_fmin``.
    samples
        Of an evaluation, where it is not of all (mini-batches).

    Raises
    ------
    InputError
        A solver that there is not, or that refuses its options or the loss; options that nothing reads.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        settings: Any,
        loss: Loss,
        chosen: Subdomains,
        kind: type[Objective],
        fmin: float,
        samples: int = 0,
    ) -> None:
        self.comm, self.settings, self.loss = comm, settings, loss
        self.stop = StopRequest()
        self.blocks = settings.summation_blocks
        if self.blocks is None:
            self.blocks = 0 if loss.size > settings.summation_limit else leaves(samples or loss.count, loss.enough)
        if loss.large:
            trim_at_once()
        self.layout = ParameterLayout(loss.parameters, comm, chosen.ownership(comm.size))
        self.objective = kind(loss, self.layout, self.stop, self.blocks)
        self.x = self.layout.vector()
        self.objective.initial(self.x)
        self.tao = PETSc.TAO().create(comm)
        with plugins.blamed(settings.solver, {**SOLVERS, **dict.fromkeys(PETSC_TYPES)}, "solver"):
            configure(self.tao, settings.solver)
        self.objective.attach(self.tao)
        self.tao.setSolution(self.x)
        self.tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        with options.understood():
            with options.preset(tao_fmin=fmin):
                self.tao.setFromOptions()
            self.tao.setUp()
        context = self.tao.getPythonContext() if self.tao.getType() == "python" else None
        if isinstance(context, Solver) and context.spares_memory:
            loss.drop_initial()
        left = options.unused()
        if left:
            names = ", ".join("-" + key for key in left)
            raise InputError(f"unknown option{'s' * (len(left) > 1)} {names}; -help lists them")

    def summation(self) -> str:
        """How samples are summed, in words."""
        ranks = self.comm.size
        words = f"on {ranks} rank{'s' * (ranks > 1)}, "
        if not self.blocks:
            above = self.settings.summation_blocks is None
            limit = self.settings.summation_limit
            return f"{words}sums by ranks{f' (more than {limit} parameters)' * above}"
        words += f"sums in fixed order over {self.blocks} blocks of samples"
        if not fixes_order():
            words += ", dot products by ranks (kernels/sums.c was not built)"
        elif self.settings.solver in TO_ROUNDING:
            words += ", in PETSc's secant matrices by ranks"
        busy = efficiency(self.blocks, ranks)
        return words + (f"; they keep {busy:.0%} of the ranks busy" if busy < 0.9 else "")

    def run(
        self,
        limits: Any,
        attributes: Mapping[str, Any],
        measure: Callable[[Tensor], Mapping[str, float]],
        moving: ddml.run.Moving | None,
        header: str,
        closing: Callable[[ddml.run.Run], Iterable[str]] = lambda _: (),
        shown: str = "error",
    ) -> int:
        """Run to the end; the exit code. Collective.

        ``limits``, ``measure``, ``moving`` and ``shown`` are those of :class:`ddml.run.Run`; ``attributes`` of the run
        file come beside those that every driver writes, and ``closing`` gives what is printed behind the summary.
        """
        settings = self.settings
        given = {**vars(settings), **vars(limits), **PETSc.Options().getAll()}
        attributes = {
            "solver": settings.solver, "seed": settings.seed, "dtype": settings.dtype, "summation_blocks": self.blocks,
            "summation": "by ranks" if not self.blocks else "tree",
            "torch_version": str(torch.__version__), **attributes, **{f"option {k}": str(v) for k, v in given.items()},
        }  # fmt: skip
        run = ddml.run.Run(self.objective, self.tao, self.x, limits, attributes, measure, moving, shown)
        say: Callable[[str], None] = (lambda text: print(text, flush=True)) if self.comm.rank == 0 else lambda _: None
        say(header)
        for note in run.notes:
            say(f"note: {note}")
        if settings.view:
            self.tao.view()
            say(repr(self.layout))
        self.stop.listen()
        finished = run.execute()
        say(run.summary())
        for line in closing(run) if self.comm.rank == 0 else ():
            say(line)
        if run.output and len(run.history) and run.exact:
            say(f"to go on: the same command with -restart {run.output} and a larger limit")
        return 0 if finished else 1
