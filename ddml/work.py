"""Counting work.

The work unit is one loss-and-gradient evaluation of the whole network on the whole data set. A
loss alone costs 1/3, a Hessian product 2, a Jacobian product or its transpose 1. An evaluation on
a fraction of the samples costs that fraction. A gradient with respect to some layers, behind a
kept prefix, costs the matrix products that are left::

    (sum of c_l from the first active layer on          forward
     + sum of c_l behind the first active layer         adjoint
     + sum of c_l of the active layers)                 gradient of the weights
    / (the same sum with all layers active)

with c_l the cost of one forward pass through layer l (see :func:`charge`), a loss alone a third
of its share of the forward pass, and the prefix itself a third of the rest, once per local solve.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields


def charge(costs: Sequence[float], first: int, active: Collection[int], gradient: bool = True) -> float:
    """Work units of one evaluation that starts at layer ``first``.

    Parameters
    ----------
    costs
        Cost of one forward pass through each layer, in any unit.
    first
        Number of the layer where the evaluation starts: what enters it is kept.
    active
        Layers whose gradient is wanted.
    gradient
        False: the loss alone.
    """
    if not gradient:
        return sum(costs[first:]) / sum(costs) / 3
    lowest = min(active, default=first)
    spent = sum(costs[first:]) + sum(costs[lowest + 1 :]) + sum(costs[i] for i in active)
    return spent / (3 * sum(costs) - costs[0])


@dataclass
class WorkCounter:
    """Work units and calls.

    Attributes
    ----------
    total
        Work units, summed over subdomains.
    critical
        Work units along the critical path: subdomains that can be treated in parallel count as
        their maximum, whatever the number of ranks really is.
    losses, gradients, products
        Number of evaluations of each kind, of any size.
    settled : dict
        The counters at the last :meth:`settle`: what a state that can be gone back to has cost.
    """

    total: float = 0.0
    critical: float = 0.0
    losses: int = 0
    gradients: int = 0
    products: int = 0

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """The solver's state includes all that was spent so far."""
        self.settled = self.state()

    def add(self, units: float, losses: int = 0, gradients: int = 0, products: int = 0) -> None:
        """Charge one sequential evaluation."""
        self.total += units
        self.critical += units
        self.losses += losses
        self.gradients += gradients
        self.products += products

    def add_parallel(self, parts: Sequence[WorkCounter]) -> None:
        """Charge work that was done side by side: totals add up, the critical path is the longest."""
        self.critical += max((p.critical for p in parts), default=0.0)
        for part in parts:
            self.total += part.total
            self.losses += part.losses
            self.gradients += part.gradients
            self.products += part.products

    def reset(self) -> None:
        """Set everything to zero."""
        for f in fields(self):
            setattr(self, f.name, f.default)
        self.settle()

    def state(self) -> dict[str, float]:
        """The counters as a dictionary, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def restore(self, state: dict[str, float]) -> None:
        """Take the counters from :meth:`state`."""
        for f in fields(self):
            setattr(self, f.name, state[f.name])
        self.settle()
