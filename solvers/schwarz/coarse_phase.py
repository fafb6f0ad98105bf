"""The coarse phase of a Schwarz method: how far each network of a tile goes, and the coarse net that suits that."""

from __future__ import annotations

from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.losses.stepped import SteppedLoss
from ddml.norms.norm import Norm
from ddml.objectives.branched import BranchedObjective
from ddml.objectives.objective import Objective
from solvers.minimisation import minimise


class CoarsePhase:
    """Combines corrections of networks side by side, all of which correct the same residual.

    From the outputs of all networks before and behind their corrections, one gather more, L-BFGS finds a length for
    each and the parameters of the coarse net together (:class:`ddml.losses.stepped.SteppedLoss`), on every rank, from
    1 / N for N networks on. Lengths are cut to [0, 1], so that no network goes farther than its budget (our choices).

    Parameters
    ----------
    objective
        Of networks of tiles.
    steps
        Of L-BFGS.
    name
        Of the option that asks for it, for messages.

    Raises
    ------
    InputError
        Another objective.
    """

    def __init__(self, objective: Objective, steps: int, name: str) -> None:
        if not isinstance(objective, BranchedObjective):
            raise InputError(f"option {name} is for networks of tiles with a coarse net behind them")
        self.objective, self.steps = objective, steps

    def combine(self, x: PETSc.Vec, f: float, s: PETSc.Vec, norm: Norm) -> tuple[float, float]:
        """Replace a sum of corrections from x, where the loss is f; the decrease it promises, and the networks' length.

        The length is in a norm, without the change of the coarse net. Collective.
        """
        objective, loss = self.objective, self.objective.loss
        before = objective.outputs_at(x).logits
        trial = x.duplicate()
        trial.waxpy(1.0, x, s)
        moved = frozenset(n for net in loss.branches.nets for n in net)
        behind = objective.outputs_at(trial, moved).logits
        trial.destroy()
        theta = objective.parameters(x).clone()
        stepped = SteppedLoss(loss, theta, before, behind, 1 / len(loss.nets))
        found = minimise(stepped, "lbfgs", MPI.COMM_SELF, iterations=self.steps, blocks=1)
        objective.work.add(objective.fraction * stepped.share * found.work)
        best = found.theta.clone()
        lengths = best[: len(loss.nets)].clamp_(0.0, 1.0)
        promised = f - float(stepped.value(best.to(theta)))
        place = loss.coarse.place
        with s as array:
            for net, length in zip(loss.nets, lengths, strict=True):
                array[self._mine(net.place)] *= float(length)
            array[self._mine(place)] = 0.0
        size = float(norm(s))
        change = best[len(loss.nets) :] - theta[place].double()
        with s as array:
            array[self._mine(place)] = change[self._mine(place, place.start)].numpy()
        return promised, size

    def _mine(self, place: slice, origin: int | None = None) -> slice:
        """The part of a range of theta that this rank owns, in its local array, or counted from an origin."""
        begin, end = self.objective.layout.ranges[self.objective.comm.rank :][:2]
        low, high = (min(max(edge, begin), end) for edge in (place.start, place.stop))
        shift = begin if origin is None else origin
        return slice(low - shift, high - shift) if low < high else slice(0, 0)
