"""The part of a trust-region method that picks the radius and accepts or rejects."""

from __future__ import annotations

import math
from typing import Any

from ddml.options import Option

OPTIONS = (
    Option("delta0", None, "First radius (default 0.1; 0.01 in the infinity norm).", kind=float, above=0.0),
    Option("delta_min", None, "A new batch begins with at least this radius (default 1e-4; 1e-5 in the infinity norm).",
           kind=float, above=0.0),
    Option("delta_max", None, "Largest radius (default 1 in the modular and the infinity norm, 100 in the 2-norm).",
           kind=float, above=0.0),
    Option("accept", 1e-4, "A step is accepted above this ratio of actual to predicted decrease.", minimum=0.0),
    Option("shrink_below", 0.25, "The radius shrinks below this ratio.", minimum=0.0),
    Option("grow_above", None, "The radius grows above this ratio (default 0.75; 0.9 of steps with momentum).",
           kind=float, above=0.0),
    Option("shrink", 0.5, "Factor by which it shrinks.", above=0.0),
    Option("grow", 2.0, "Factor by which it grows.", minimum=1.0),
    Option("nonmonotone", 0, "M: trials are judged against the largest of the last M + 1 losses; 0: no step increases "
           "the loss.", minimum=0),
)  # fmt: skip

# first, smallest and largest radius by norm: measured for the modular norm, our choice for the others
DEFAULTS = {
    "modular": (0.1, 1e-4, 1.0),
    "infinity": (0.01, 1e-5, 1.0),
    "2": (0.1, 1e-4, 100.0),
    "kfac": (1.0, 1e-4, 100.0),
}

# grow_above, without and with momentum, whose steps add up (0.9 is our choice). With 0.75, the papers', batches of
# 1,000 of MNIST end 2 % less accurate after 20 work units; 0.9 without momentum slows APTS
GROW_ABOVE = 0.75, 0.9
ROUNDINGS = 10  # that a difference of two losses may be off by (our choice)
BOUNDARY = 0.9  # a step of this many radii was limited by the radius (the constant of the DD4ML code)
SMALLEST = 1e-14  # of a radius: no step shorter than this is tried (our choice)


class TrustRadius:
    r"""Radius delta, acceptance, growth and non-monotone window of every trust-region method.

    With f_ref the largest of the last M + 1 accepted losses and e = 10 eps max(1, \|f_ref\|), eps of the precision
    that losses are computed in,

    .. math:: \rho = (f_{ref} - f_+ + e) / (\text{predicted decrease} + e)

    (Conn, Gould, Toint 2000, section 17.4.2 for e, 10.1 for the window). A trial is accepted if rho is above
    ``accept`` and f_+ is at most f_ref. delta shrinks if rho is below ``shrink_below``, and from the norm of the step,
    if that is less, where the trial is rejected: no step is tried twice. It grows if rho is above ``grow_above``, the
    step was limited by delta, and the prediction is more than 10 e.
    Losses that are not finite are rejected.

    Attributes
    ----------
    value : float
        delta, in units of the norm.
    recent : list of float
        The last M + 1 accepted losses.
    ratio : float
        rho of the last trial; minus infinity where the loss was not finite or no decrease was predicted.
    """

    def __init__(self, settings: Any, norm: str, eps: float) -> None:
        first, smallest, largest = DEFAULTS[norm]
        self.settings, self.eps = settings, eps
        self.smallest = settings.delta_min or smallest
        self.largest = settings.delta_max or largest
        self.first = min(settings.delta0 or first, self.largest)
        self.value = self.first
        self.recent: list[float] = []
        self.rejected = 0
        self.ratio = -math.inf

    def begin(self, f: float) -> None:
        """Start from a loss with the first radius."""
        self.value, self.recent, self.rejected = self.first, [f], 0

    def renew(self, f: float, factor: float = 1.0) -> None:
        """Go on with another objective, whose loss here is f, and a radius times ``factor``."""
        self.recent = [f]
        self.value = min(max(self.value * factor, self.smallest), self.largest)

    @property
    def reference(self) -> float:
        """f_ref."""
        return max(self.recent)

    def judge(
        self, trial: float, predicted: float, limited: bool = True, momentum: bool = False, size: float = math.inf
    ) -> bool:
        """Whether a trial point with this loss is accepted; delta follows.

        Parameters
        ----------
        trial
            Its loss.
        predicted
            Decrease of the loss that was expected.
        limited
            Whether the step would have been longer with a larger delta.
        momentum
            Whether the step has some.
        size
            Norm of the step: after a refusal delta is less, so that the same step is not tried again.
        """
        s, grow_above = self.settings, self.settings.grow_above or GROW_ABOVE[momentum]
        e = ROUNDINGS * self.eps * max(1.0, abs(self.reference))
        rho = -math.inf
        if math.isfinite(trial) and predicted + e > 0:
            rho = (self.reference - trial + e) / (predicted + e)
        self.ratio = rho
        accepted = rho > s.accept and trial <= self.reference
        if not accepted:
            self.value = min(self.value, size) * s.shrink
        elif rho < s.shrink_below:
            self.value *= s.shrink
        elif rho > grow_above and limited and predicted > ROUNDINGS * e:
            self.value = min(self.value * s.grow, self.largest)
        if accepted:
            self.recent = [*self.recent, trial][-(s.nonmonotone + 1) :]
        else:
            self.rejected += 1
        return accepted

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "recent": [float(f) for f in self.recent], "rejected": self.rejected}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.value, self.recent = state["value"], [float(f) for f in state["recent"]]
        self.recent = self.recent[-(self.settings.nonmonotone + 1) :]
        self.rejected = state["rejected"]


def complaint(prefix: str, settings: Any) -> str:
    """What is wrong with the constants, in words, or nothing."""
    if not settings.shrink < 1:
        return f"option -{prefix}shrink must be less than 1, got {settings.shrink:g}"
    grow_above = settings.grow_above or GROW_ABOVE[0]
    if not settings.accept < grow_above or not settings.shrink_below < grow_above:
        return (
            f"options -{prefix}accept and -{prefix}shrink_below must be less than -{prefix}grow_above, "
            f"got {settings.accept:g}, {settings.shrink_below:g} and {grow_above:g}"
        )
    return ""
