"""How far a network's fields are from the solution."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ddml.data.sequences import measuring
from ddml.errors import InputError
from ddml.parallel import own, summed

from . import calling
from .loss import PDELoss
from .pde import PDE, Array
from .residuals import placed


def reference(problem: PDE, count: int = 5000) -> tuple[Array, Array | None]:
    """About ``count`` points (N, d) where errors are measured, and the exact fields (N, F) there, None where unknown.

    The points are those of :func:`ddml.data.sequences.measuring`.

    Raises
    ------
    InputError
        If ``exact`` raises, or gives anything but real numbers, one a point for each field.
    """
    points = measuring(count, problem.bounds)
    return points, calling.exact(problem, torch.from_numpy(points.T.copy()))


class SolutionError:
    """Relative L2 errors on the points of :func:`reference`, which are split over the ranks.

    Where the exact fields are not finite, the error is that over the other points; the loss gets a note of the share.

    Parameters
    ----------
    loss
        The problem and its network.
    comm
        Ranks that share the points.
    count
        About how many points.
    blocks
        As in :class:`ddml.objectives.objective.Objective`: what is summed in a fixed order is the same on any number of
        ranks to the last bit.

    Raises
    ------
    InputError
        See :func:`reference`; if the exact fields are finite nowhere.
    """

    def __init__(self, loss: PDELoss, comm: MPI.Comm, count: int, blocks: int = 0) -> None:
        self.loss, self.comm = loss, comm
        points, values = reference(loss.problem, count)
        self.known = values is not None
        self.parts = []
        if values is None:
            if type(loss.problem).exact is not PDE.exact:
                loss.notes.append("exact gives None (is there a return?): no error is measured")
            return
        finite = np.isfinite(values).all(axis=1)
        if not finite.any():
            raise InputError(f"{type(loss.problem).__name__}.exact is finite nowhere; leave it out if it is not known")
        if not finite.all():
            share = 1 - finite.mean()
            loss.notes.append(f"exact is not finite at {share:.2g} of the points: the error is that over the others")
            points, values = points[finite], values[finite]
        if not values.any():
            loss.notes.append("exact is zero: there are no errors relative to it")
        self.parts = [(placed(loss, points[part]), values[part]) for part in own(len(points), comm, blocks)]

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
