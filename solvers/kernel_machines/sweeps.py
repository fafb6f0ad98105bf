"""The exchange of local minimisers, sweep by sweep, as a run wants it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines.system import KernelSystem, Operations

from .exchange import RENEWED, Turns, damping_of, omegas_of
from .iterations import RTOL, KernelIterations
from .local import LocalSolves

NO_SOLUTION = "local minimisers without exchange are NO solution of the whole"


class ExchangeInTurn(KernelIterations):
    """:func:`solvers.exchange_in_turn` as iterations: one is a sweep over all subdomains.

    Parameters
    ----------
    system
        What is solved.
    rtol
        See :class:`KernelIterations`.
    agreement
        For the disagreement in overlaps.
    omega
        0 or more, one for all subdomains or one each.
    exchange
        Whether there is any: without, local minimisers are put together by the partition of unity.

    Raises
    ------
    InputError
        Numbers out of range.
    """

    def __init__(
        self,
        system: KernelSystem,
        rtol: float = RTOL,
        agreement: float = math.inf,
        omega: float | Sequence[float] = 0.0,
        exchange: bool = True,
    ) -> None:
        super().__init__(system, rtol)
        if not agreement >= 0:
            raise InputError(f"the tolerance of the disagreement must be 0 or more, got {agreement}")
        self.agreement, self.exchange = agreement, exchange
        self.omegas = omegas_of(omega, len(self.operator.layout.domain))

    def prepare(self) -> None:
        """See :meth:`KernelIterations.prepare`."""
        damping = damping_of(self.omegas, self.operator.layout.domain)
        self.local = LocalSolves(self.operator, None, "plain" if self.exchange else "unity", damping)
        self.turns = Turns(self.operator, self.local.factors)
        self.system.charge(self.local.set_up_operations(0))

    def begin(self, x: PETSc.Vec) -> None:
        """See :meth:`KernelIterations.begin`."""
        if self.exchange:
            return
        with x as array:
            array[:] = self.local.solve(self.system.rows).ravel()
        self.system.charge(self.local.operations(self.system.columns))
        self.size = self.renewed(x)
        self.reason = NO_SOLUTION

    def iterate(self, x: PETSc.Vec) -> float:
        """See :meth:`KernelIterations.iterate`."""
        layout, columns = self.operator.layout, self.system.columns
        left, alpha = self.mine("left").copy(), layout.matrix(x).copy()
        change = self.turns.sweep(left, alpha)
        with x as array:
            array[:] = alpha.ravel()
        self.write("left", left)
        self._charge(columns)
        size = float(x.norm())
        self.disagreement = change / size if size else 0.0
        self.size = float(self.vectors["left"].norm())
        if self.finished or (self.iteration + 1) % RENEWED == 0:
            self.size = self.renewed(x)
        if self.finished:
            self.reason = "residual and disagreement are below their tolerances"
        return self.disagreement

    def _charge(self, columns: int) -> None:
        """Subdomains one after another: the critical path has all of their solves, and a share of what they change."""
        n, share = self.operator.layout.size, self.system.largest
        d = 0 if self.operator.keeps else self.operator.samples.shape[1]
        sizes = [len(wide) for wide in self.operator.layout.domain.sets]
        solves = float(sum(size**2 * columns for size in sizes))
        columns_of = float(sum(n * size * (columns + d) for size in sizes))
        received = float(len(sizes) * sum(sizes) * columns)  # each step goes to everybody
        self.system.charge(Operations(solves + columns_of, solves + columns_of * share), 1, received)

    @property
    def finished(self) -> bool:
        """See :attr:`KernelIterations.finished`."""
        return not self.exchange or (self.small and self.disagreement <= self.agreement)
