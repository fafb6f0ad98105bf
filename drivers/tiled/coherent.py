"""The coherent phase of networks of tiles: one network, trained end to end with its networks dealt over the ranks.

Called by the driver behind the local and the coarse phase, or without them:

- ``module = Coherent(nets, coarse, tiles, link, scalings)``, on every rank;
- ``prepared(module, theta, frozen)``: begin at the parameters of a run file, with ``-freeze``;
- ``loss = coherent_loss(module, classes, labels, tile, comm)``: ``tile(i)`` gives the training samples of a tile; it is
  called for those of this rank only;
- :class:`drivers.common.training.Training` of that loss, with ``solver_class(name).decompose(loss)`` as subdomains, is
  the model-parallel run; any solver without second derivatives;
- ``TiledTestSet(made.objective, TiledSamples({i: tile(i), ...}, labels))`` is its measure.

:func:`eliminated` gives the solver where the coarse net is solved at every trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mpi4py import MPI
from torch import Tensor

from ddml.losses.branched import BranchedLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.objectives.eliminated import EliminatedObjective, Solve
from ddml.parallel import StopRequest
from ddml.problems.coherent import FREEZABLE, TiledTestSet, coherent_loss, prepared
from solvers import Minimisation, minimise

__all__ = ["FREEZABLE", "TiledTestSet", "coherent_loss", "eliminated", "prepared"]

# of L-BFGS for the coarse net at each trial, our choice: on faces of 48x42 pixels in 4x4 tiles, two seeds and two local
# phases, on average the least loss of held-out samples at equal training loss of 5, 10, 20, 40 (docs/results/tiles.md)
STEPS = 5


def solved(steps: int = STEPS) -> Solve:
    """What solves a coarse net by so many steps of L-BFGS, see :data:`ddml.objectives.eliminated.Solve`."""

    def solve(loss: RestrictedLoss) -> tuple[Tensor, float]:
        found = minimise(loss, "lbfgs", MPI.COMM_SELF, iterations=steps, blocks=1)
        return found.theta, found.work

    return solve


def eliminated(
    loss: BranchedLoss,
    comm: MPI.Comm,
    prefix: str = "",
    steps: int = STEPS,
    stop: StopRequest | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Minimisation:
    """A trust region on the networks of tiles, at each trial of which the coarse net is solved. Collective.

    Parameters
    ----------
    loss
        Of :func:`ddml.problems.coherent.coherent_loss`.
    prefix
        Of the options of ``tr``.
    steps
        Of L-BFGS for the coarse net.
    stop
        See :class:`ddml.objectives.objective.Objective`.
    defaults
        See :class:`solvers.minimisation.Minimisation`.

    Raises
    ------
    InputError
        A coarse net or networks that are frozen; what ``tr`` refuses.
    """
    branched = partial(EliminatedObjective, solved(steps))
    return Minimisation(loss, "tr", comm, prefix, stop=stop, branched=branched, **(defaults or {}))
