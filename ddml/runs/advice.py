"""What a run that ended far from a loss of zero ran into, and one thing to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .history import History
from .limits import REFUSED, SIGNAL

# our choices
FAR = 1e-5  # a loss above this share of that at the start is far from zero
WELL, WRONG = 1e-3, 0.1  # relative errors below and above which a run went well or did not, whatever the loss
ROWS = 50  # iterations that say something
FALL = 0.5  # a loss that a third of the run takes no further down than to this share of it is flat
ABOVE = 100.0  # loss on other points over the loss from which on the points are fitted, not the equation

REMEDIES = {
    "loss on other points": "more -points, or a smaller network",
    "floor of rounding": "-dtype float64, or fields without the large part that cancels",
    "steps refused": "another -seed, or -solver gauss_newton",
    "flat": "another -seed, or a larger -width",
}


class Advice(NamedTuple):
    """What was seen, by the name that it has in docs/convergence.md and in words."""

    name: str
    seen: str

    def __str__(self) -> str:
        """The line at the end of a run."""
        return f"it did not converge: {self.seen}; try {REMEDIES[self.name]} (docs/convergence.md, '{self.name}')"


def advise(history: History, measured: Mapping[str, float], reason: str, rounding: float = 0.0) -> Advice | None:
    """The first that a run's history shows of: loss on other points far above, floor of rounding, steps refused, flat.

    Nothing of runs that went well, were stopped from outside or have hardly begun. It is for losses of which zero can
    be reached, sums of squares of residuals.

    Parameters
    ----------
    history
        Of the run, its restarts included.
    measured
        Columns that were measured at its end, where the history's last row lacks them.
    reason
        Why it stopped, in the words of :mod:`ddml.runs.limits`.
    rounding
        About the loss that rounding leaves.
    """
    if len(history) < (1 if reason in REFUSED else ROWS) or reason == SIGNAL:
        return None
    losses, third = history["loss"], len(history) // 3
    start, end = losses[0], losses[-1]
    fresh, error = (float(np.nan_to_num(measured.get(n, history.last(n)))) for n in ("test_loss", "error"))
    if 0 < error < WELL or not (max(end, fresh) > FAR * start or error > WRONG):
        return None
    if fresh > max(ABOVE * end, FAR * start):
        return Advice("loss on other points", f"the loss on other points is {fresh / end:.0e} times the loss")
    if end < rounding:
        return Advice("floor of rounding", f"a loss of {end:.1e} is about what rounding leaves of it")
    if reason in REFUSED:
        return Advice("steps refused", reason)
    refused = float((np.diff(losses[-third - 1 :]) == 0).mean())
    if refused > 0.5:
        return Advice("steps refused", f"{refused:.0%} of the steps of late left the loss as it was")
    if losses[-third:].min() > FALL * losses[:-third].min():
        return Advice(
            "flat", f"the loss stayed about {np.median(losses[-third:]):.1e} in the last third of the iterations"
        )
    return None
