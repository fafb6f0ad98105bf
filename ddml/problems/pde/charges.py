"""What evaluations of residuals of jets are charged beside the passes through the network."""

from __future__ import annotations

from ddml.jets.compiled import CompiledJets
from ddml.losses.charges import ResidualCharges
from ddml.losses.residual import ResidualLoss

# multiply-adds of torch's derivative of a residual at a point, and how many times longer torch takes for second
# derivatives by theta than the kernels for as many passes (measured, our choice)
AUTOGRAD, DOUBLE_BACKWARD = 12_000.0, 15.0


class PDECharges(ResidualCharges):
    """Work units of a loss whose residuals go through torch and whose network goes through an evaluator of jets.

    Parameters
    ----------
    loss
        Whose layers and numbers they are of.
    evaluator
        What evaluates its network.
    """

    def __init__(self, loss: ResidualLoss, evaluator: object) -> None:
        super().__init__(loss.costs, loss.besides, loss.keeps, loss.count, loss.size)
        self.compiled = isinstance(evaluator, CompiledJets)

    def hessian(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """See :meth:`ddml.losses.charges.Charges.hessian`: torch does it."""
        return (DOUBLE_BACKWARD if self.compiled else 1.0) * super().hessian(first, active)

    def jacobian(self) -> float:
        """See :meth:`ddml.losses.charges.ResidualCharges.jacobian`: forward, again, and with its tangent."""
        return self._linearised(4, 0)

    def transpose(self) -> float:
        """See :meth:`ddml.losses.charges.ResidualCharges.transpose`: forward, again, and backward."""
        return self._linearised(2, 1) + self.passes().weights / self.passes().gradient

    def rows(self, count: int) -> float:
        """See :meth:`ddml.losses.charges.ResidualCharges.rows`: all rows in one backward pass."""
        return self._linearised(2, 1) + self.stored(count)

    def candidates(self, count: int) -> float:
        """Of the residual at so many other points: as a loss, and what torch makes the points of."""
        return count / self.count * (self.evaluation(gradient=False) + 2 * AUTOGRAD / self.operations)

    def _linearised(self, forward: int, adjoint: int) -> float:
        whole = self.passes()
        spent = forward * whole.forward + adjoint * whole.adjoint
        return (spent + AUTOGRAD / self.besides.repeats) / whole.gradient
