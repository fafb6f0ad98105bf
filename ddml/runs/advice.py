"""What a run that ended far from a loss of zero ran into, and one thing to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .history import History
from .limits import REFUSED, ROUNDED, SIGNAL

# our choices
FAR = 1e-5  # loss over that at the start above which a run has ended far from zero
WELL = 1e-3  # relative error below which it went well whatever the loss
ROWS = 20  # of a history that say something
FALL = 0.5  # a loss that a third of the run takes no further down than to this share of it is flat
ABOVE = 100.0  # loss on other points over the loss from which on the points are overfitted
FLOOR = 1e6  # the loss is rounding below as many squared units of it, times the loss at the start


class Advice(NamedTuple):
    """What was seen, by the name that it has in docs/convergence.md, in words, and what to try."""

    name: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen}: try {self.remedy} (docs/convergence.md, '{self.name}')"


def advise(
    history: History,
    measured: Mapping[str, float],
    reason: str,
    precision: float,
    remedies: Mapping[str, str] | None = None,
) -> Advice | None:
    """The first that a run's history shows of: loss on other points far above, steps refused, floor of rounding, flat.

    Nothing of runs that went well, were stopped from outside or have hardly begun. It is for losses of which zero can be
    reached: squares of residuals.

    Parameters
    ----------
    history
        Of the run, its restarts included.
    measured
        Columns that were measured at its end, where the history's last row lacks them.
    reason
        Why it stopped, in the words of :mod:`ddml.runs.limits`.
    precision
        Distance from 1 of the next number in the precision of the loss.
    remedies
        What to try instead of the usual, by the names of what is seen.
    """
    last = {name: measured.get(name, history.last(name)) for name in ("loss", "test_loss", "error")}
    if len(history) < ROWS or reason == SIGNAL or last["error"] < WELL:
        return None
    loss, fresh = history["loss"], last["test_loss"]
    start = loss[0]
    if not max(last["loss"], np.nan_to_num(fresh)) > FAR * start:
        return None
    third = len(loss) // 3
    before, late = loss[:-third].min(), loss[-third:]
    refused = (np.diff(loss[-third - 1 :]) == 0).mean()
    name = ""
    if fresh > max(ABOVE * last["loss"], FAR * start):
        name, seen = "loss on other points", f"the loss on other points is {fresh / last['loss']:.0e} times the loss"
    elif last["loss"] < FLOOR * precision**2 * start or (reason in (*REFUSED, ROUNDED) and precision > 1e-10):
        name, seen = "floor of rounding", f"the loss is {last['loss']:.1e}, about what rounding leaves of it"
    elif refused > 0.5:
        name, seen = "steps refused", f"{refused:.0%} of the steps of late were refused"
    elif reason in (*REFUSED, ROUNDED):
        name, seen = "steps refused", f"the run ended at a loss of {last['loss']:.1e} as {reason}"
    elif late.min() > FALL * before:
        name, seen = "flat", f"the loss stayed about {np.median(late):.1e} in the last third of the iterations"
    return Advice(name, seen, {**REMEDIES, **(remedies or {})}[name]) if name else None


REMEDIES = {
    "loss on other points": "more -points, or a smaller network",
    "floor of rounding": "-dtype float64",
    "steps refused": "another -seed, or -matrix_form factored",
    "flat": "another -seed, or a larger -width",
}
