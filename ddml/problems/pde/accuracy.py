"""How far a network's fields are from the solution."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from torch import Tensor

from ddml.parallel import own, summed

from .loss import PDELoss


class SolutionError:
    """Relative L2 errors on an equidistant grid, whose points are split over the ranks.

    Parameters
    ----------
    loss
        The problem and its network.
    comm
        Ranks that share the grid.
    count
        About how many grid points.
    blocks
        As in :class:`ddml.objectives.objective.Objective`: what is summed in a fixed order is the same on any number of
        ranks to the last bit.
    """

    def __init__(self, loss: PDELoss, comm: MPI.Comm, count: int, blocks: int = 0) -> None:
        self.loss, self.comm = loss, comm
        axes, values = loss.problem.reference(count)
        mesh = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=-1)
        self.parts = [] if values is None else [(mesh[part], values[part]) for part in own(len(mesh), comm, blocks)]
        self.known = values is not None

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """``error`` = |u - u*| / |u*| and ``error_network_norm`` = |u - u*| / |u| (the SPQN paper's). Collective."""
        if not self.known:
            return {}
        found = []
        for points, values in self.parts:
            fields = self.loss.fields(theta, points)
            found.append([np.sum((fields - values) ** 2), np.sum(values**2), np.sum(fields**2)])
        sums = summed(self.comm, found)
        with np.errstate(all="ignore"):
            return {
                "error": float(np.sqrt(sums[0] / sums[1])),
                "error_network_norm": float(np.sqrt(sums[0] / sums[2])),
            }
