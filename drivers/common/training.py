"""What the drivers that train share: options, the solver of a loss, and the run from its header to its last line."""

from __future__ import annotations

from .program import HELP  # first: it initialises PETSc

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import ddml.runs.run
from ddml import plugins
from ddml.decomposition.subdomains import Subdomains
from ddml.linalg.compact import trim_at_once
from ddml.errors import CollectiveError, InputError
from ddml.losses.loss import Loss
from ddml.losses.recorded import Recorder, cuda_graph
from ddml.numbers import read
from ddml.objectives.branched import BranchedObjective
from ddml.options import EACH_START, NEVER, Option, for_runs, names_code
from ddml.parallel import agreed, split
from ddml.runs.checkpoints import Minimised, Moving, ResumableSolver
from ddml.runs.limits import SIGNAL
from ddml.runs.progress import say
from ddml.sampling.batches import Batches
from ddml.summation import efficiency, fixes_order
from solvers import PETSC_TYPES, SOLVERS, TO_ROUNDING, Minimisation, solver_class
from .device import short_of_memory
from .start import INTERRUPTED_CODE, Start, started

__all__ = ["HELP", "OPTIONS", "Start", "Training", "help_text", "started"]

PREFIXES = {
    **dict.fromkeys(
        ("aspqn", "mspqn", "mspqn_dense"), " (of a local solver with sub_ before them, of the coarse one coarse_)"
    ),
    "gauss_newton": " (and PETSc's -gn_ksp_type, -gn_ksp_rtol, -gn_pc_type, ...)",
    "newton": " (and PETSc's -newton_ksp_type, -newton_ksp_max_it, ...)",
}

RESIDUALS_ONLY = ("gauss_newton",)  # solvers of sums of squares

OPTIONS = (
    Option("seed", 0, "Of the initial parameters, of points and of batches.", minimum=0, changes=NEVER),
    Option("dtype", "float64", "Precision of the network; parameters are kept in float64.",
           choices=("float64", "float32"), changes=NEVER),
    Option("device", "cpu", "Where torch computes: cpu; cuda, a card for each rank of a node in turn; or cuda:K. "
           "Parameters are there, too, if PETSc has CUDA, else and with -vec_type standard on the host."),
    Option("capture", False, "On a GPU, replay the launches of a loss and gradient as a CUDA graph (not run yet)."),
    Option("chunk", 0, "Points that go through the network at a time; 0: what suits the evaluator.", minimum=0),
    Option("summation_blocks", None, "Blocks of points whose sums are added in a fixed order, so that a run is the "
           "same to the last bit on any number of ranks; no more ranks than blocks are busy; 0 sums by ranks (default: "
           "8 to 512, by what an evaluation costs; 0 above -summation_limit).", kind=int, minimum=0),
    Option("summation_limit", 1_000_000, "Parameters above which sums go by ranks.", minimum=0, changes=NEVER),
    Option("threads", 1, "Threads of torch on each rank.", minimum=1),
    Option("view", False, "Print the solver and the split of the parameters.", changes=EACH_START),
    Option("check", False, "Only say what the run would be, or what is wrong with it: end before the first evaluation.",
           changes=EACH_START),
    INTERRUPTED_CODE,
)  # fmt: skip


_EACH_START = {o.name for o in (*OPTIONS, *ddml.runs.run.OPTIONS) if o.changes == EACH_START}


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


def refuse_residuals_only(solver: str) -> None:
    """Raise an InputError for a solver of sums of squares, where the loss is none."""
    if solver in RESIDUALS_ONLY:
        raise InputError(f"solver '{solver}' is for losses that are sums of squares, as those of drivers/pinn.py")


def described(
    settings: Any, limits: Any, start: Start, attributes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options in force, and the attributes of a run file: these, and those that every driver writes."""
    given = start.options()
    in_force = {**vars(settings), **vars(limits), **{name: text for name, (text, _) in given.items()}}
    return in_force, {
        "solver": settings.solver, "seed": settings.seed, "dtype": settings.dtype,
        "torch_version": str(torch.__version__), **attributes,
        **{f"option {name}": str(value) for name, value in in_force.items()},
        **{f"origin {k}": v for k, (_, v) in given.items() if v and for_runs(k) and k not in _EACH_START},
    }  # fmt: skip


class Conducted:
    """What is run from its header to its last line: all that a run needs to be made; collective.

    Parameters
    ----------
    comm, settings, start
        Of the driver; the settings have ``solver``, ``seed``, ``dtype``, ``view`` and ``check``.
    objective, tao, x, context
        As :class:`ddml.runs.run.Run` takes them.
    blocks
        Of samples whose sums are added in a fixed order; 0: by ranks.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        settings: Any,
        start: Start,
        objective: Minimised,
        tao: PETSc.TAO,
        x: PETSc.Vec,
        context: ResumableSolver | None,
        blocks: int,
    ) -> None:
        self.comm, self.settings, self.start = comm, settings, start
        self.objective, self.tao, self.x, self.solver, self.blocks = objective, tao, x, context, blocks

    def run(
        self,
        limits: Any,
        attributes: Mapping[str, Any],
        measure: Callable[[Tensor], Mapping[str, float]],
        moving: Moving | None,
        header: str,
        closing: Callable[[ddml.runs.run.Run], Iterable[str]] = lambda _: (),
        shown: str = "error",
        more: Callable[[], Mapping[str, float]] = dict,
    ) -> int:
        """Run to the end; the exit code. Collective.

        ``limits``, ``measure``, ``moving``, ``shown`` and ``more`` are those of :class:`ddml.runs.run.Run`;
        ``attributes`` of the run file come beside those that every driver writes, and ``closing`` gives what is
        printed behind the summary.

        Raises
        ------
        InputError
            Options that nothing has read; what :class:`ddml.runs.run.Run` refuses; at the end a run file that could
            not be written.
        """
        settings, restart = self.settings, self.start.restart
        notes = self.start.unread()
        given = self.start.options()
        sums = {"summation_blocks": self.blocks, "summation": "by ranks" if not self.blocks else "tree"}
        in_force, attributes = described(settings, limits, self.start, {**sums, **attributes})
        run = ddml.runs.run.Run(
            self.objective, self.tao, self.x, limits, attributes, measure, moving, shown,
            solver=self.solver, same_samples=restart.same_samples, more=more,
        )  # fmt: skip
        lines = [header, *self.start.elsewhere()]
        lines += [
            f"note: {note}" for note in [*self.start.notes, *restart.notes, *restart.unread(), *notes, *run.notes]
        ]
        self._say(lines)
        if settings.view:
            self.tao.view()
            self._say([repr(self.objective.layout), "Options, and where they come from:"])
            self._say(
                f"  -{k} {v or ''} ({origin or 'the run file'})" for k, (v, origin) in given.items() if for_runs(k)
            )
        if settings.check:
            return 0
        self.start.stop.check(self.comm)
        begin = run.first_iteration
        with short_of_memory():
            finished = run.execute()
        self._say([run.summary(), *(closing(run) if self.comm.rank == 0 else ())])
        if run.failure:
            raise CollectiveError(run.failure)
        if run.output and len(run.history) and run.exact:
            trust = any(names_code(k, str(v)) for k, v in in_force.items() if for_runs(k) and k not in _EACH_START)
            then = "smaller tolerance" if self.solver is not None and self.solver.reason else "larger limit"
            beside = " -trust" * trust + f" and a {then}" * (run.reason != SIGNAL)
            self._say([f"to go on: the same driver with -restart {run.output}{beside}"])
        if run.reason == SIGNAL:
            return self.start.interrupted(len(run.history) > 0 and run.history.last("iteration") > begin)
        return 0 if finished else 1

    def _say(self, lines: Iterable[str]) -> None:
        """Print lines once."""
        if self.comm.rank == 0:
            for line in lines:
                say(line)


class Training(Conducted):
    """A loss on the ranks and the solver that the options ask for, set up; collective.

    Parameters
    ----------
    comm
        All ranks.
    settings
        Values of :data:`OPTIONS`, and ``solver``.
    start
        What :func:`drivers.common.start.started` gave.
    loss
        What is minimised.
    chosen
        Subdomains of its parameters, which the ownership of these follows.
    fmin
        Default of ``-tao_fmin``.
    samples
        Of an evaluation, where it is not of all (mini-batches).
    vectors, prefix, branched
        See :class:`solvers.minimisation.Minimisation`.

    Raises
    ------
    InputError
        A solver that there is not, or that refuses its options or the loss.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        settings: Any,
        start: Start,
        loss: Loss,
        chosen: Subdomains,
        fmin: float,
        samples: int = 0,
        vectors: torch.device | None = None,
        prefix: str = "",
        branched: Callable[..., BranchedObjective] = BranchedObjective,
    ) -> None:
        self.comm, self.settings, self.loss = comm, settings, loss
        start.stop.check(comm)  # the data have been read
        self._try(samples or loss.count)
        if loss.large:
            trim_at_once()
        with plugins.blamed(settings.solver, dict.fromkeys((*SOLVERS, *PETSC_TYPES)), "solver"):
            made = Minimisation(
                loss, settings.solver, comm, prefix, subdomains=chosen, blocks=settings.summation_blocks,
                samples=samples, limit=settings.summation_limit, stop=start.stop, record=self._recorder(),
                vectors=vectors, branched=branched, fmin=fmin,
            )  # fmt: skip
        self.made, self.layout, self.context = made, made.layout, made.context
        blocks = made.objective.parts.blocks
        super().__init__(comm, settings, start, made.objective, made.tao, made.x, made.context, blocks)
        if self.context is not None and self.context.spares_memory:
            loss.drop_initial()

    def destroy(self) -> None:
        """Destroy what PETSc has."""
        self.made.destroy()

    def _recorder(self) -> Recorder | None:
        """What records evaluations, where the settings ask for it."""
        if "capture" not in vars(self.settings) or not self.settings.capture:
            return None
        if self.loss.device.type != "cuda":
            raise InputError("option -capture is for -device cuda: it replays what a GPU is told to do")
        return cuda_graph

    def _try(self, count: int) -> None:
        """Evaluate a rank's share of so many samples once, unless on a CPU, to see that there is the memory.

        Raises
        ------
        InputError
            On all ranks, if a card's memory is short.
        """
        if self.loss.device.type == "cpu":
            return
        part = self.loss.part(*split(count, self.comm.size)[self.comm.rank :][:2])
        with agreed(self.comm), short_of_memory():
            theta = self.loss.initial()
            read([part.value_gradient(theta, torch.zeros_like(theta))])

    def _to_rounding(self) -> str:
        """What sums by ranks in spite of fixed orders, in words; nothing if nothing does. Collective."""
        if self.tao.getType() in TO_ROUNDING:
            return ", in PETSc's secant matrices by ranks"
        mine = self.context.inner_types if self.context is not None else frozenset()
        inside = sorted(frozenset(TO_ROUNDING) & frozenset().union(*self.comm.allgather(mine)))
        return f", in PETSc's secant matrices of local solvers ({', '.join(inside)}) by ranks" if inside else ""

    def summation(self) -> str:
        """How samples are summed, in words. Collective."""
        ranks = self.comm.size
        words = f"on {ranks} rank{'s' * (ranks > 1)}, "
        if not self.blocks:
            limit, why = self.settings.summation_limit, ""
            if self.settings.summation_blocks is None:
                why = f" (more than {limit} parameters)" if self.loss.size > limit else " (one pass over all samples)"
            return f"{words}sums by ranks{why}"
        words += f"sums in fixed order over {self.blocks} blocks of samples"
        if not fixes_order():
            words += ", dot products by ranks (kernels/sums.c was not built)"
        else:
            words += self._to_rounding()
        busy = efficiency(self.blocks, ranks)
        return words + (f"; they keep {busy:.0%} of the ranks busy" if busy < 0.9 else "")

    def batches(self) -> Batches | None:
        """The batches that the settings ask for, of which the objective has the first one then. Collective.

        Raises
        ------
        InputError
            Batches that grow, with a solver that does not judge them.
        """
        settings = self.settings
        if not 0 < settings.batch_size < self.loss.count:
            return None
        if settings.batch_growth > 1 and not solver_class(settings.solver).judges_batches:
            raise InputError(f"option -batch_growth is for solvers with a trust region, not '{settings.solver}'")
        return Batches(self.objective, settings, settings.seed)
