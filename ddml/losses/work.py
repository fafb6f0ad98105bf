r"""Counting work: what is charged, by one formula.

The work unit is one loss-and-gradient evaluation of the whole network on the whole data set, and everything is charged
by the multiply-adds that it takes over those of that evaluation. Per sample, a layer l takes

- c_l in a product with its weights, and as many in the adjoint of that product and in the gradient of the weights;
- p_l in what is done number by number (activations), and as many in its adjoint;
- k_l where what enters the layer is kept: to write it once, and to read it in every evaluation behind it;

and the criterion takes e, and e in its adjoint. An evaluation from layer f on, with respect to the layers in a set S
whose lowest is m, passes

.. math::
    F = k_f + \sum_{l \ge f} (c_l + p_l) + e \qquad\text{(forward)}

    A = \sum_{l > m} c_l + \sum_{l \ge m} p_l + e \qquad\text{(adjoint)}

    W = \sum_{l \in S} c_l, \quad V = \sum_{l \in S, l > m} c_l \qquad\text{(gradient of the weights)}

with k_f = 0 for the first layer. A loss is charged F, a gradient F + A + W, the prefix that is kept for layer f its
share of the forward pass and k_f, a Hessian product F + 3 A + 3 W + 2 V and a Gauss-Newton product F + 3 A + 3 W, which
are the passes of torch's second derivatives (those of convolutions take up to half as much again); each over F + A + W
of the whole network. What losses of residuals do otherwise they say themselves
(:class:`ddml.losses.residual.ResidualLoss`). An evaluation on a fraction of the samples is charged that fraction.
Linear algebra beside the network is charged its multiply-adds and the numbers that it moves
(:meth:`ddml.objectives.objective.Objective.compute`), over the multiply-adds of a work unit. Whatever is charged does
not depend on the number of ranks.

c_l is counted. What else a number costs has been measured on one core of an Intel Xeon with AVX-512, on networks
784-32-32-10 and tanh networks 20x8 and 50x6 with second derivatives; the constants below are our choice. Not charged
are vector operations of solvers, and making the inputs of new samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

# multiply-adds that a number takes: of an activation in torch and in the compiled kernels; of a network's outputs in
# cross entropy, with what torch takes to begin an evaluation, which is most of it; of what enters a kept layer
ACTIVATION, TANH, CRITERION, KEPT = 70.0, 25.0, 800.0, 100.0
# and in dense linear algebra in double precision: a multiply-add; a number of a matrix that passes by in a product with
# a vector; a number of an array that is made anew, or of a Jacobian that is stored
DOUBLE, PASSED, FRESH, STORED = 2.0, 24.0, 350.0, 220.0


@dataclass(frozen=True)
class Besides:
    """What a sample takes besides products with weights.

    Attributes
    ----------
    pointwise, kept : tuple of float
        p_l and k_l of each layer.
    criterion : float
        e.
    repeats : float
        How many times all of this, and the products, is done for a sample: derivatives that are propagated.
    """

    pointwise: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    criterion: float = 0.0
    repeats: float = 1.0


class Passes(NamedTuple):
    """F, A, W and V of the formula."""

    forward: float
    adjoint: float
    weights: float
    inner: float

    @property
    def gradient(self) -> float:
        """Of a loss and its gradient."""
        return self.forward + self.adjoint + self.weights

    @property
    def hessian(self) -> float:
        """Of a Hessian product."""
        return self.forward + 3 * self.adjoint + 3 * self.weights + 2 * self.inner

    @property
    def gauss_newton(self) -> float:
        """Of a Gauss-Newton product."""
        return self.forward + 3 * self.adjoint + 3 * self.weights


def passes(costs: Sequence[float], besides: Besides, first: int, active: Collection[int]) -> Passes:
    """Multiply-adds for a sample of one evaluation that starts at layer ``first``.

    Parameters
    ----------
    costs
        c_l of each layer.
    besides
        What there is besides.
    first
        Number of the layer where the evaluation starts: what enters it is kept.
    active
        Layers whose gradient is wanted.
    """
    pointwise = besides.pointwise or (0.0,) * len(costs)
    kept = besides.kept[first] if first and besides.kept else 0.0
    lowest = min(active, default=first)
    return Passes(
        kept + sum(costs[first:]) + sum(pointwise[first:]) + besides.criterion,
        sum(costs[lowest + 1 :]) + sum(pointwise[lowest:]) + besides.criterion,
        sum(costs[i] for i in active),
        sum(costs[i] for i in active if i > lowest),
    )


def prefix(costs: Sequence[float], besides: Besides, first: int) -> float:
    """Multiply-adds for a sample of computing and keeping what enters layer ``first``."""
    if first == 0:
        return 0.0
    return sum(costs[:first]) + sum(besides.pointwise[:first]) + (besides.kept[first] if besides.kept else 0.0)


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

    @contextmanager
    def unpaid(self) -> Iterator[None]:
        """Charge nothing in this block: what a restart does again has been paid before."""
        spent = self.state()
        try:
            yield
        finally:
            for name, value in spent.items():
                setattr(self, name, value)

    def reset(self) -> None:
        """Set everything to zero."""
        for f in fields(self):
            setattr(self, f.name, f.default)
        self.settle()

    def state(self) -> dict[str, float]:
        """The counters as a dictionary, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def restore(self, state: dict[str, float]) -> None:
        """Take the counters from :meth:`state`; a ValueError where one is no amount."""
        for f in fields(self):
            if not 0 <= state[f.name] < float("inf"):
                raise ValueError(f"{f.name} is {state[f.name]}")
            setattr(self, f.name, state[f.name])
        self.settle()
