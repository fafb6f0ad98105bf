"""What the drivers that train on batches of samples share: options, what is refused, what is said."""

from __future__ import annotations

from . import training  # first: it initialises PETSc

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import ddml.runs.run
from ddml.errors import InputError
from ddml.options import Option
import ddml.sampling.batches
from ddml.sampling.batches import Batches
from solvers import PETSC_TYPES, SOLVERS

_HELP = {
    "summation_blocks": "Blocks of samples whose sums are added in a fixed order, so that a run is the same to the "
    "last bit on any number of ranks; no more ranks than blocks are busy; 0 sums by ranks (default: 8 to 512, by what "
    "an evaluation costs; 0 above -summation_limit).",
}


def options(more: str, table: Iterable[Option], help_: Mapping[str, str]) -> tuple[Option, ...]:
    """Those of the solver, whose help ends with ``more``, of batches, and ``table`` with other texts of help."""
    own = ", ".join(name for name in SOLVERS if name not in training.RESIDUALS_ONLY)
    solver = f"One of {own}; or PETSc's {', '.join(PETSC_TYPES)}; or path/to/file.py:Class.{more}"
    texts = {**_HELP, **help_}
    return (
        Option("solver", "tr", solver),
        *ddml.sampling.batches.OPTIONS,
        *(replace(o, help=texts.get(o.name, o.help)) for o in table),
    )


def limits(error_interval: str) -> tuple[Option, ...]:
    """Those of a run without an exact solution; the help of ``-error_interval``."""
    table = (o for o in ddml.runs.run.OPTIONS if o.name != "target_error")
    return tuple(replace(o, help=error_interval) if o.name == "error_interval" else o for o in table)


def check(settings: Any, count: int) -> None:
    """Raise an InputError for batches of more samples than there are."""
    if settings.batch_size > count:
        raise InputError(f"option -batch_size must be at most {count}, the samples; got {settings.batch_size}")


def attributes(settings: Any, moving: Batches | None) -> dict[str, Any]:
    """What a run file says of batches."""
    return {
        "batch_size": settings.batch_size, "batch_overlap": settings.batch_overlap,
        "batch_steps": 1 if moving is None else moving.interval, "batch_growth": settings.batch_growth,
    }  # fmt: skip


def in_words(settings: Any, count: int, moving: Batches | None) -> str:
    """How many of ``count`` samples there are in an evaluation."""
    if moving is None:
        return "all in each evaluation"
    sizes = f"{moving.per_epoch} batches an epoch of {-(-count // moving.per_epoch)} and {moving.wanted}"
    grows = f", growing by {settings.batch_growth:g}" if settings.batch_growth > 1 else ""
    return f"{sizes} of the one before, {moving.interval} iterations on each{grows}"
