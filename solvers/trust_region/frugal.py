"""First-order trust-region steps of large networks in little memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.linalg.compact import Compact, add_rounded, aside, release
from ddml.objectives.objective import Objective
from solvers.owner import Owner

from .models import FirstOrder


class Frugal(Owner):
    """What a first-order method knows besides the point x, the gradient g there, the momentum and a work vector s.

    Gradients of float32 losses are numbers of float32, and so are directions but those of small matrices: they are
    kept as such wherever PETSc's vectors are not at work, to the last bit, and the memory of those is given back
    meanwhile. Only the displacement since the objective changed is rounded to float32; what it is asked for is which
    part of the promised decrease is left (:class:`solvers.trust_region.trust_region.TrustRegion`).

    Parameters
    ----------
    objective
        Of a float32 loss, without linear terms.
    model
        Of the same objective.
    unused : tuple of Vec
        Vectors of zeros, whose memory is not needed yet.
    """

    def __init__(self, objective: Objective, model: FirstOrder, *unused: PETSc.Vec) -> None:
        self.objective, self.model = objective, model
        self.comm = objective.comm
        for vec in unused:
            release(vec)
        self.begin_g: Compact
        self._stay()

    def mark(self, g: PETSc.Vec) -> None:
        """The objective begins to be what it is, with the gradient g."""
        self.begin_g = Compact.of(g)
        self._stay()

    def _stay(self) -> None:
        """Set the displacement to 0."""
        size = int(self.objective.layout.counts[self.comm.rank])
        self.displacement: NDArray[np.float32] = np.zeros(size, np.float32)

    def propose(self, x: PETSc.Vec, g: PETSc.Vec, delta: float, s: PETSc.Vec) -> _Trial:
        """Write the step from x of norm delta to s, which is used up, and evaluate there. Collective."""
        self.destroy()
        before = Compact.of(g)
        slope = self.model.direction(g, s, lambda: aside(g, before))
        with aside(g, before):
            direction = Compact.of(s)
            s.scale(-delta)
            s.axpy(1.0, x)
            value, gradient = self.objective.value_compact(s, lambda: release(s))
        finite = math.isfinite(value) and bool(self.comm.allreduce(gradient.finite(), MPI.LAND))
        return _Trial(value if finite else math.inf, delta * slope, delta if slope > 0 else 0.0, direction, gradient)

    def accept(self, trial: _Trial, x: PETSc.Vec, g: PETSc.Vec, delta: float, s: PETSc.Vec) -> None:
        """Go to a trial of the radius delta; s is used up."""
        release(g)
        trial.direction.load(s)
        s.scale(-delta)
        add_rounded(self.displacement, s)
        x.axpy(1.0, s)
        release(s)
        trial.gradient.load(g)

    def renew(self, x: PETSc.Vec, g: PETSc.Vec, s: PETSc.Vec) -> tuple[float, float, float]:
        """Evaluate at x the objective, which has changed; the loss, and the slopes that S had then and has now.

        S is the displacement, which begins anew. Collective.
        """
        self.destroy()
        self._show(s)
        self.begin_g.load(g)
        promised = float(g.dot(s))
        release(s)
        release(g)
        value, gradient = self.objective.value_compact(x)
        self.begin_g = gradient
        self._show(s)
        self._stay()
        gradient.load(g)
        found = float(g.dot(s))
        release(s)
        return value, promised, found

    def _show(self, s: PETSc.Vec) -> None:
        with s as array:
            array[:] = self.displacement

    def state(self, s: PETSc.Vec) -> dict[str, PETSc.Vec]:
        """For a checkpoint, until the next step: vectors of this object, and s, which is used up. Collective."""
        self.destroy()
        begin_g = self.own(s.duplicate())
        self.begin_g.load(begin_g)
        self._show(s)
        return {"batch_g": begin_g, "displacement": s}

    def restore(self, vectors: Mapping[str, PETSc.Vec], x: PETSc.Vec) -> None:
        """Go on at x from a :meth:`state`, or from what a run that was not frugal has: where the batch began.

        The vectors stay the caller's; the second one is changed. Collective.
        """
        self.mark(vectors["batch_g"])
        moved = vectors.get("displacement")
        if moved is None:
            moved = vectors["batch_x"]
            moved.aypx(-1.0, x)
        add_rounded(self.displacement, moved)


class _Trial:
    """A step that has been tried: loss, predicted decrease, length, direction, and the gradient there."""

    def __init__(self, value: float, predicted: float, length: float, direction: Compact, gradient: Compact) -> None:
        self.value, self.predicted, self.length = value, predicted, length
        self.direction, self.gradient = direction, gradient
