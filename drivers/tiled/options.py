"""Options of divided classifiers, and what is refused of them before anything is read."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

from collections.abc import Iterable
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.networks import coarse
from ddml.options import NEVER, Option
from ddml.runs import board, checkpoints, progress
from solvers import solver_class

PHASES = ("local",)
SOLVER = "adam"  # of local networks
ADAMS = 32  # samples of a batch of Adam (our choice)
QUARTERS = 4  # batches of an epoch of trust regions (our choice)

OPTIONS = (
    Option("tiles", None, "Cut images into tiles, as in 4x4 (H x W), and volumes, as in 4x4x2 (H x W x D), or by one "
           "number for all axes, and train a narrower network on each, side by side: see docs/images.md.",
           changes=NEVER),
    Option("tile_overlap", "0", "Pixels that a tile has more on each inner side, one number, or one for each axis as "
           "in 8x4.", changes=NEVER),
    Option("tiles_padded", False, "Give all tiles the shape of the largest, with zeros.", changes=NEVER),
    Option("local_width", None, "The -width of the networks of tiles (default: that of the undivided one over the "
           "most tiles along H or W).", kind=int, minimum=1, changes=NEVER),
    Option("local_solver", None, f"With -tiles: what trains the networks of tiles (default {SOLVER}). Its options, "
           "-batch_size and others of batches, -max_it and all other limits hold for each of them."),
    Option("phase", "local", "With -tiles: what is done, as in local: the networks of tiles are trained."),
    Option("fusion", None, "With -tiles: how the networks together say the class, average of their probabilities, or "
           "majority (ties by the average); all are shown (default average).", choices=("average", "majority")),
)  # fmt: skip
# what a restart may change without a local network going on that has come to its end
LATER = {
    *("phase", "fusion", "threads"),
    *(o.name for o in (*coarse.OPTIONS, *checkpoints.OPTIONS, *progress.OPTIONS, *board.OPTIONS)),
}


def refuse_without_tiles(settings: Any) -> None:
    """Raise an InputError for options of divided classifiers where there are no tiles, unless they are the solver's."""
    given = [option.name for option in OPTIONS if getattr(settings, option.name) != option.default]
    for name in given:
        if name not in {option.name for option in solver_class(settings.solver).options}:
            raise InputError(f"option -{name} is for -tiles, as in -tiles 4x4")


def check(settings: Any, undivided: str) -> None:
    """Set the local solver, its batches where they are not given, and refuse what does not go together.

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
    phases(settings.phase)
    if settings.solver != undivided:
        raise InputError(
            f"-solver (or -tao_type) {settings.solver} trains an undivided network: with -tiles it is -local_solver"
        )
    settings.local_solver = settings.local_solver or SOLVER
    training.refuse_residuals_only(settings.local_solver)
    if solver_class(settings.local_solver).levels_of == "depth":
        raise InputError(f"-local_solver {settings.local_solver} is for networks of several depths: tiles have others")


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
        raise InputError(f"option -phase must be of {_listed(PHASES)}, each once, separated by commas; got '{text}'")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
