"""The coarse net eliminated: it is solved anew wherever the networks before it are tried (variable projection)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.linalg.compact import Compact
from ddml.losses.branched import BranchedLoss
from ddml.losses.loss import Loss
from ddml.losses.outputs import Outputs
from ddml.losses.recorded import Recorder
from ddml.losses.residual import restricted_loss
from ddml.losses.restricted import RestrictedLoss
from ddml.parallel import StopRequest

from .branched import BranchedObjective

Solve = Callable[[RestrictedLoss], tuple[Tensor, float]]
"""From the loss as a function of the coarse net's parameters: some where it is smaller, and the work units spent."""


class EliminatedObjective(BranchedObjective):
    r"""The loss where the coarse net has been solved, as a function of the networks' parameters.

    .. math:: \varphi(w) = \min_c L(w, c), \quad \nabla\varphi(w) = \nabla_w L(w, c^*(w))

    (Golub, Pereyra 1973). A point has both parameters: an evaluation begins at its c and *moves the point* to c*; the
    gradient by c is 0, so that a step changes the networks only. A trust region that accepts a trial so takes over the
    coarse net that belongs to it, and where the solver ends early the loss of what is accepted still decreases. It is
    for solvers that look at the loss at trial points and keep the one which they evaluated last, as ``tr`` does.

    Parameters
    ----------
    solve
        Called on every rank, on the same loss of all samples.
    loss, layout, stop, blocks, parts, record
        See :class:`ddml.objectives.branched.BranchedObjective`.

    Raises
    ------
    InputError
        If the coarse net or all networks are frozen.
    """

    def __init__(
        self,
        solve: Solve,
        loss: BranchedLoss,
        layout: ParameterLayout,
        stop: StopRequest | None = None,
        blocks: int = 0,
        parts: Sequence[Loss] | None = None,
        record: Recorder | None = None,
    ) -> None:
        if not loss.branches.head or not any(loss.branches.nets):
            raise InputError(
                "a coarse net can be eliminated where it and networks before it are trained: one is frozen"
            )
        super().__init__(loss, layout, stop, blocks, parts, record)
        self.solve = solve

    def _made(self, loss: Loss, blocks: int, parts: Sequence[Loss] | None) -> BranchedObjective:
        assert isinstance(loss, BranchedLoss)
        return EliminatedObjective(self.solve, loss, self.layout, self.stop, blocks, parts)

    def value_compact(self, x: PETSc.Vec, ready: Callable[[], None] = lambda: None) -> tuple[float, Compact]:
        """See :meth:`.Objective.value_compact`; who asks for it does not keep the point, which moves."""
        raise InputError(
            "the coarse net cannot be eliminated by a solver that spares memory, and so keeps no trial point: -norm 2 "
            "keeps it"
        )

    def settle(self, x: PETSc.Vec, theta: Tensor, logits: Tensor) -> None:
        """See :meth:`.BranchedObjective.settle`: solve the coarse net, and move x and theta there."""
        place = self.loss.coarse.place
        coarse = restricted_loss(self.loss, [place])
        coarse.freeze(theta, Outputs(logits, self.loss.samples.numbers))
        found, units = self.solve(coarse)
        self.work.add(self.fraction * (coarse.owed() + units))
        theta[place] = found.to(theta)
        begin, end = self.layout.ranges[self.comm.rank], self.layout.ranges[self.comm.rank + 1]
        low, high = max(begin, place.start), min(end, place.stop)
        if low < high:
            with x as array:
                array[low - begin : high - begin] = found[low - place.start : high - place.start].cpu().numpy()

    def value_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """See :meth:`.Objective.value_gradient`."""
        value = super().value_gradient(x, g)
        begin, end = self.layout.ranges[self.comm.rank], self.layout.ranges[self.comm.rank + 1]
        low = max(begin, self.loss.coarse.place.start)
        with g as array:
            array[min(low, end) - begin :] = 0.0  # the coarse net stands last
        return value
