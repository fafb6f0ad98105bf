"""When a run stops, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from petsc4py import PETSc

from ddml.options import Option

from .history import History

OPTIONS = (
    Option("max_it", 1000, "Outer iterations in all, restarts included.", minimum=0),
    Option("max_work", math.inf, "Stop when this many work units are spent.", above=0.0),
    Option("max_time", math.inf, "Stop after this many seconds, restarts included.", above=0.0),
    Option("target_error", 0.0, "Stop when the relative error is below this.", minimum=0.0),
    Option("target_accuracy", 1.01, "Stop when the accuracy reaches this; above 1: never.", above=0.0),
)

SIGNAL, NOT_FINITE = "a signal asked to stop", "the loss is not finite"

_REASONS = {
    PETSc.TAO.ConvergedReason.CONVERGED_GATOL: "the gradient is below tao_gatol",
    PETSc.TAO.ConvergedReason.CONVERGED_GRTOL: "the gradient is below tao_grtol",
    PETSc.TAO.ConvergedReason.CONVERGED_GTTOL: "the gradient is below tao_gttol",
    PETSc.TAO.ConvergedReason.CONVERGED_STEPTOL: "the step is below tao_steptol, or what is left to gain is rounding",
    PETSc.TAO.ConvergedReason.CONVERGED_MINF: "the loss is below tao_fmin",
    PETSc.TAO.ConvergedReason.DIVERGED_MAXITS: "max_it is reached",
    PETSc.TAO.ConvergedReason.DIVERGED_MAXFCN: "the limit of evaluations is reached",
    PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE: "no step along the direction decreases the loss",
    PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION: "no step in the trust region decreases the loss",
    PETSc.TAO.ConvergedReason.DIVERGED_NAN: NOT_FINITE,
}

REFUSED = frozenset(
    _REASONS[kind]
    for kind in (
        PETSc.TAO.ConvergedReason.CONVERGED_STEPTOL,
        PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE,
        PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION,
    )
)
"""Why a solver ended that found no further step."""


def in_words(reason: int) -> str:
    """What a TAO solver's reason to stop means."""
    return _REASONS.get(reason, f"PETSc's reason {reason}")


@dataclass(frozen=True)
class Limits:
    """Where a run stops, whatever its solver thinks; the defaults are those of :data:`OPTIONS`, so no limit but one.

    Attributes
    ----------
    max_it : int
        Iterations, restarts included.
    max_work : float
        Work units.
    max_time : float
        Seconds, restarts included.
    target_error, target_accuracy : float
        A run stops below the one, and where it reaches the other.
    """

    max_it: int = 1000
    max_work: float = math.inf
    max_time: float = math.inf
    target_error: float = 0.0
    target_accuracy: float = math.inf

    @classmethod
    def of(cls, settings: Any) -> Limits:
        """Those of :data:`OPTIONS` that a driver has read; the others are not limits of its runs."""
        values = vars(settings)
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def reached(self, history: History, work: float, seconds: float) -> str:
        """Which limit the last row of a history, so many work units and seconds have reached, in words; else ''."""
        if self.max_it == 0:
            return "max_it is reached"
        if seconds >= self.max_time:
            return "max_time is reached"
        if work >= self.max_work:
            return "max_work is reached"
        if history.last("error") < self.target_error:
            return "target_error is reached"
        if history.last("accuracy") >= self.target_accuracy:
            return "target_accuracy is reached"
        return ""
