"""How far a network's fields are from the solution."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from torch import Tensor

from ..parallel import split
from .pde_loss import PDELoss


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
    """

    def __init__(self, loss: PDELoss, comm: MPI.Comm, count: int) -> None:
        self.loss, self.comm = loss, comm
        axes, values = loss.problem.reference(count)
        mesh = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=-1)
        edges = split(len(mesh), comm.size)
        mine = slice(edges[comm.rank], edges[comm.rank + 1])
        self.points = mesh[mine]
        self.values = None if values is None else values[mine]

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """``error`` = |u - u*| / |u*| and ``error_network_norm`` = |u - u*| / |u| (the SPQN paper's). Collective."""
        if self.values is None:
            return {}
        fields = self.loss.fields(theta, self.points)
        sums = np.array([np.sum((fields - self.values) ** 2), np.sum(self.values**2), np.sum(fields**2)])
        self.comm.Allreduce(MPI.IN_PLACE, sums)
        with np.errstate(all="ignore"):
            return {
                "error": float(np.sqrt(sums[0] / sums[1])),
                "error_network_norm": float(np.sqrt(sums[0] / sums[2])),
            }
