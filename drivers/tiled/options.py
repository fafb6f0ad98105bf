"""Options of divided classifiers, and what is refused of them before anything is read."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from petsc4py import PETSc

from ddml.decomposition import tiles
from ddml.errors import InputError
from ddml.networks import local
from ddml.networks.fusions import FUSIONS
from ddml.options import EACH_START, FREELY, WITH_SOLVER, Option
from ddml.problems.coherent import FREEZABLE
from ddml.runs import board, checkpoints, limits, progress
from ddml.sampling.batches import OPTIONS as BATCHES
from solvers import solver_class

from . import coarse
from .coherent import STEPS
from .whole import PHASES

SOLVER = "adam"  # of local networks: with a coarse net behind, better than tr (docs/images.md)
ADAMS = 32  # samples of a batch of Adam (our choice)
QUARTERS = 4  # batches of an epoch of trust regions (our choice)
COHERENT = "coherent_"  # before the options of the coherent phase
TRAINED, ELIMINATED = "trained", "eliminated"  # values of -coherent_coarse

_LIMITS = tuple(o for o in limits.OPTIONS if o.name != "target_error")

OPTIONS = (
    *tiles.OPTIONS,
    *local.OPTIONS,
    Option("local_solver", None, f"With -tiles: what trains the networks of tiles (default {SOLVER}). Its options, "
           "-batch_size and others of batches, -max_it and all other limits hold for each of them."),
    Option("phase", "local,coarse", "With -tiles, what is done: local, the networks of tiles are trained; coarse, a "
           "net behind them; coherent, all of them together as one network."),
    Option("fusion", None, "With -tiles: which is the history's accuracy, that of the coarse net, of the average of "
           "probabilities, or of the majority (ties by the average); all are shown (default: coarse, where there is "
           "one).", choices=("coarse", *FUSIONS)),
    Option("start", None, "With -tiles: the run file whose local or coarse phase the later phases go on from.",
           changes=EACH_START),
    Option("freeze", None, "With -tiles: what the coherent phase leaves as it is.", choices=FREEZABLE),
    # of an undivided network it is the option of solvers with levels
    *(replace(o, default=None, choices=(), changes=WITH_SOLVER) if o.name == "coarse_solver" else o
      for o in coarse.OPTIONS),
    Option(f"{COHERENT}solver", "tr", "Solver of the coherent phase, with coherent_ before its options, too."),
    Option(f"{COHERENT}coarse", TRAINED, f"The coarse net in the coherent phase: trained beside the networks; or "
           f"{ELIMINATED}, which is solved anew at each trial of the networks, for -{COHERENT}solver tr: fewer "
           "synchronisations, more work behind each.", choices=(TRAINED, ELIMINATED)),
    Option(f"{COHERENT}coarse_iterations", None, f"With -{COHERENT}coarse {ELIMINATED}: of L-BFGS at each trial "
           f"(default {STEPS}).", kind=int, minimum=1),
    *(replace(o, name=COHERENT + o.name, help=f"Of the coherent phase. {o.help}", changes=FREELY)
      for o in (*BATCHES, *_LIMITS)),
)  # fmt: skip
# what a restart may change without a local network going on that has come to its end
COARSE = {o.name for o in coarse.OPTIONS}
LATER = {
    *("phase", "fusion", "start", "freeze", "threads"),
    *(o.name for o in (*checkpoints.OPTIONS, *progress.OPTIONS, *board.OPTIONS)),
}


def later(name: str) -> bool:
    """Whether an option has no part in the local phase."""
    return name in LATER | COARSE or name.startswith(COHERENT)


def refuse_without_tiles(settings: Any) -> None:
    """Raise an InputError for options of divided classifiers where there are no tiles, unless they are the solver's."""
    given = [option.name for option in OPTIONS if getattr(settings, option.name) != option.default]
    for name in given:
        if name not in {option.name for option in solver_class(settings.solver).options}:
            raise InputError(f"option -{name} is for -tiles, as in -tiles 4x4")


def check(settings: Any, undivided: str) -> list[str]:
    """The phases; sets the local solver, and refuses what does not go together.

    Parameters
    ----------
    settings
        Of the run.
    undivided
        The solver of an undivided network by default.

    Raises
    ------
    InputError
        Phases that there are not; a solver that there is not, is for sums of squares, or for an undivided network.
    """
    found = phases(settings.phase)
    if settings.solver != undivided:
        raise InputError(
            f"-solver (or -tao_type) {settings.solver} trains an undivided network: with -tiles it is -local_solver"
        )
    settings.local_solver = settings.local_solver or SOLVER
    settings.coarse_solver = settings.coarse_solver or next(iter(coarse.SOLVERS))
    if settings.coarse_solver not in coarse.SOLVERS:
        raise InputError(
            f"option -coarse_solver must be one of {', '.join(coarse.SOLVERS)}; got '{settings.coarse_solver}'"
        )
    for name in (settings.local_solver, settings.coherent_solver):
        training.refuse_residuals_only(name)
        if solver_class(name).levels_of == "depth":
            raise InputError(f"-local_solver {name} is for networks of several depths: those of tiles have one")
    if settings.start is not None and "local" in found:
        raise InputError("option -start is for the phases behind the local one: leave local out of -phase")
    if settings.freeze is not None and "coherent" not in found:
        raise InputError("option -freeze is for -phase coherent")
    _check_elimination(settings)
    return found


def _check_elimination(settings: Any) -> None:
    if settings.coherent_coarse == TRAINED:
        if settings.coherent_coarse_iterations is not None:
            raise InputError(f"option -coherent_coarse_iterations is for -coherent_coarse {ELIMINATED}")
        return
    if settings.coherent_solver != "tr":
        raise InputError(
            f"option -coherent_coarse {ELIMINATED} is for -coherent_solver tr, which keeps the trial point that it "
            f"evaluated last; got {settings.coherent_solver}"
        )
    if settings.freeze is not None:
        raise InputError(
            f"option -coherent_coarse {ELIMINATED} trains the networks and solves the coarse net: -freeze "
            f"{settings.freeze} leaves one of both as it is"
        )


def batches(settings: Any, count: int) -> None:
    """Set the batches of local networks, of ``count`` samples in all, where they are not given."""
    if PETSc.Options().hasName("batch_size"):
        return
    if settings.local_solver == "adam":
        settings.batch_size, settings.batch_steps = min(ADAMS, count), settings.batch_steps or 1
    elif solver_class(settings.local_solver).judges_batches and count > QUARTERS:
        settings.batch_size = -(-count // QUARTERS)


def phases(text: str) -> list[str]:
    """The phases that an option names, in their order.

    Raises
    ------
    InputError
        If it names others, none, or one twice.
    """
    words = [word.strip() for word in text.split(",")]
    found = [phase for phase in PHASES if phase in words]
    if sorted(words) != sorted(found):
        raise InputError(f"option -phase must be of {', '.join(PHASES)}, each once, separated by commas; got '{text}'")
    return found


def of_coherent(settings: Any, table: Sequence[Option]) -> SimpleNamespace:
    """The values that some options have in the coherent phase."""
    return SimpleNamespace(**{o.name: getattr(settings, COHERENT + o.name) for o in table})


def coherent(settings: Any, limits_: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Settings and limits of the coherent phase, from those of the run."""
    own = {**vars(of_coherent(settings, BATCHES)), "solver": settings.coherent_solver}
    return (
        SimpleNamespace(**vars(settings) | own),
        SimpleNamespace(**vars(limits_) | vars(of_coherent(settings, _LIMITS))),
    )
