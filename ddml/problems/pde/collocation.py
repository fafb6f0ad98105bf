"""Collocation points that move, and the loss on points that the training never sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ddml.data.sequences import sobol
from ddml.numbers import read
from ddml.objectives.objective import Objective
from ddml.options import WITH_SOLVER, Option
from ddml.parallel import own, split, summed

from .loss import PDELoss
from .pde import Array, Interior
from .spikes import Tier, tiers, whole

OPTIONS = (
    Option("resample", "auto", "New interior points: never; 'sobol', scrambled anew; 'residual', where residuals are "
           "large; auto is residual for gauss_newton and the self-scaled solvers, and never for the others.",
           choices=("auto", "never", "sobol", "residual"), changes=WITH_SOLVER),
    Option("resample_interval", None, "Iterations between new points (default 250; gauss_newton 5, mspqn_dense 1).",
           kind=int, minimum=1),
    Option("resample_candidates", 5, "Sobol points to choose from, for each point.", minimum=2),
    Option("resample_power", 1.0, "k in the density |r|^k / mean |r|^k + c.", minimum=0.0),
    Option("resample_constant", 1.0, "c in that density.", minimum=0.0),
    Option("test_points", 1000, "Points where the loss is measured on the side; 0 for none.", minimum=0),
)  # fmt: skip


@torch.no_grad()
def residual_size(loss: PDELoss, term: int, points: Array, theta: Tensor) -> Array:
    """The residual's absolute value at points (N, d) of one term, the 2-norm of its pieces if there are several."""
    if not len(points):
        return np.zeros(0)
    moved = loss.with_sets([loss.statement.points(loss.indices, term, 1.0, points[:, None], {})])
    theta = theta.to(device=loss.device, dtype=loss.dtype)
    squares = torch.cat([sum(r * r for r in pieces) for pieces in moved.pieces(theta)])  # type: ignore[misc]
    return np.asarray(squares.sqrt().to(torch.float64).cpu().numpy())


class MovingPoints:
    """Draws the interior points of an objective anew between iterations; everything is collective.

    ``residual`` is the residual-based adaptive distribution: from scrambled Sobol candidates, points
    are drawn without replacement with probabilities proportional to |r|^k / mean |r|^k + c, k = c = 1
    by default (Wu, Zhu, Tan, Kartha, Lu 2023). The candidates, five a point by default, are our choice, and that those
    of which the residual is far beyond most weigh less (:class:`ddml.problems.pde.spikes.Tier`).
    Residuals of candidates are charged as losses (:meth:`ddml.problems.pde.charges.PDECharges.candidates`).
    All is drawn for the whole problem from the seed and the number of the draw: the points do not
    depend on the number of ranks.

    Parameters
    ----------
    objective
        Of a :class:`ddml.problems.PDELoss`; its loss is replaced.
    settings
        Values of :data:`OPTIONS`, ``resample`` being sobol or residual.
    seed
        Of the draws.
    """

    def __init__(self, objective: Objective, settings: Any, seed: int) -> None:
        self.objective, self.settings, self.seed = objective, settings, seed
        self.interval: int = settings.resample_interval
        assert isinstance(objective.loss, PDELoss)
        self.loss = objective.loss
        self.terms = [i for i, term in enumerate(self.loss.problem_terms) if isinstance(term.where, Interior)]
        self.sizes = {i: sum(len(s) for s in self.loss.sets if s.term == i) for i in self.terms}
        self.draws = 0
        self.points: dict[int, Array] = {}
        self.tiers: dict[int, list[Tier]] = {}

    def move(self, theta: Tensor) -> None:
        """Draw new points at the parameters theta (n,)."""
        self.draws += 1
        for i in self.terms:
            self.points[i], self.tiers[i] = self._draw(i, theta)
        self.objective.replace(self.loss.with_points(self.points, self.tiers))

    def _draw(self, term: int, theta: Tensor) -> tuple[Array, list[Tier]]:
        count, bounds = self.sizes[term], self.loss.problem.bounds
        seed = int(np.random.SeedSequence([self.seed, self.draws, term]).generate_state(1)[0])
        if self.settings.resample == "sobol":
            return sobol(count, bounds, seed), whole(count)
        candidates = sobol(count * self.settings.resample_candidates, bounds, seed)
        comm = self.objective.comm
        edges = split(len(candidates), comm.size)
        mine = candidates[edges[comm.rank] : edges[comm.rank + 1]]
        self.objective.work.add(self.objective.fraction * self.loss.charges.candidates(len(candidates)))
        size = np.concatenate(comm.allgather(residual_size(self.loss, term, mine, theta)))
        squares = size**2
        size **= self.settings.resample_power
        density = size / max(size.mean(), np.finfo(float).tiny) + self.settings.resample_constant
        # where residuals are not finite, and with them the whole density, all candidates are alike; and with c = 0
        # there may be fewer than enough where the residual is not zero
        density = np.maximum(np.where(np.isfinite(density), density, 1.0), 1e-9)
        chosen = None
        if comm.rank == 0:
            rng = np.random.default_rng(seed)
            chosen = np.sort(rng.choice(len(candidates), count, replace=False, p=density / density.sum()))
        chosen = comm.bcast(chosen)
        order, found = tiers(squares[chosen], squares)
        return candidates[chosen[order]], found

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "draws": self.draws,
            "points": {str(i): p for i, p in self.points.items()},
            "tiers": {str(i): [list(tier) for tier in t] for i, t in self.tiers.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the points of a :meth:`state`."""
        self.draws = state["draws"]
        self.points = {int(i): p for i, p in state["points"].items()}
        stored = state.get("tiers", {})  # older run files have none
        self.tiers = {int(i): [Tier(int(n), float(w)) for n, w in t] for i, t in stored.items()}
        if self.points:
            self.objective.replace(self.loss.with_points(self.points, self.tiers))


class FreshLoss:
    """The loss on interior points of its own: where it leaves the training loss behind, the points are overfitted.

    Parameters
    ----------
    loss
        Of the whole problem; the points of other terms stay.
    comm
        Ranks that share the points.
    count, seed
        Scrambled Sobol points, and their seed.
    blocks
        As in :class:`ddml.objectives.objective.Objective`: what is summed in a fixed order is the same on any number of
        ranks to the last bit.
    """

    def __init__(self, loss: PDELoss, comm: MPI.Comm, count: int, seed: int, blocks: int = 0) -> None:
        self.comm = comm
        terms = [i for i, term in enumerate(loss.problem_terms) if isinstance(term.where, Interior)]
        whole = loss.with_points({i: sobol(count, loss.problem.bounds, seed + i) for i in terms})
        self.parts = [whole.part(part.start, part.stop) for part in own(whole.count, comm, blocks)]

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """The column ``test_loss``. Collective."""
        found = read([part.value(theta.to(device=part.device, dtype=part.dtype)) for part in self.parts])
        return {"test_loss": float(summed(self.comm, [[value] for value in found])[0])}
