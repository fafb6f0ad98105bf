r"""Kernel machines by local minimisers that exchange what they share (D3L: D'Amore 2025, made precise here).

Subdomain i minimises the regularised functional over its own coefficients, the others' latest values fixed, with a term
that asks for agreement on overlaps: with :math:`O_i` the number of other subdomains that a sample of i is in,

.. math:: (A_{ii} + \omega_i O_i) d = R_i (Y - A \alpha), \quad \alpha \leftarrow \alpha + R_i^T d,

one subdomain after another. J never increases, for any :math:`\omega_i \ge 0`, and the only fixed point is the
solution of :math:`A \alpha = Y`: that is how Theorem 18 of the paper, that local minimisers put together are the
global one, is true. Of local minimisers without exchange it is not. All subdomains at once are PETSc's Richardson
iteration with the Schwarz preconditioner: ``fit_kernel(operator, Y, ksp_type="richardson", omega=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.domain import SampleDomain
from ddml.kernel_machines.functional import descent, regularised
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.pivots import Pivots
from ddml.kernel_machines.restrictions import NONE, Rows
from ddml.parallel import agreed

from .fit import columns_of, norm
from .local import LocalSolves, solved

RENEWED = 25  # sweeps after which the residual is computed anew (our choice)


@dataclass(frozen=True)
class ExchangeFit:
    """The coefficients that local minimisers have found, and how.

    Attributes
    ----------
    coefficients : ndarray
        alpha (n, k), by sample, on every rank.
    sweeps : int
        Exchanges; 0 without any.
    residuals : ndarray
        The norm of Y - A alpha over that of Y, of all columns, before the first and after each sweep.
    disagreements : ndarray
        By how much the coefficients that a subdomain has left differ from those at the end of the sweep, over the
        norm of alpha; of each sweep.
    values : ndarray
        J, as ``residuals``.
    functional : float
        The regularised functional at the end.
    converged : bool
        Whether both stopping rules hold.
    """

    coefficients: Array
    sweeps: int
    residuals: Array
    disagreements: Array
    values: Array
    functional: float
    converged: bool

    def __repr__(self) -> str:
        found = f"residual {self.residuals[-1]:.2e}, functional {self.functional:.6g}"
        if self.converged:
            return f"solved by {self.sweeps} sweeps of exchange: {found}"
        if not self.sweeps:
            return f"local minimisers without exchange, which are NO solution of the whole: {found}"
        return (
            f"NOT solved by {self.sweeps} sweeps of exchange: {found}; without overlap, with a small lambda or an "
            "omega far above it the exchange is slow: fit_kernel solves the same system"
        )


def exchange_in_turn(
    operator: KernelOperator,
    Y: Any,
    omega: float | Sequence[float] = 0.0,
    rtol: float = 1e-6,
    agreement: float = math.inf,
    sweeps: int = 1000,
    start: Array | None = None,
) -> ExchangeFit:
    """Sweep over the subdomains until the residual and the disagreement in overlaps are small enough. Collective.

    The same bits on any number of ranks. Subdomains are treated one after another: ranks share the work of what a step
    changes, and wait for its own solve.

    Parameters
    ----------
    operator
        K + lambda I.
    Y
        (n, k) or (n,), finite, the same on all ranks.
    omega
        0 or more, one for all subdomains or one each. Once it is above lambda sweeps grow in proportion to it.
    rtol
        For the norm of the residual over that of Y.
    agreement
        For the disagreement.
    sweeps
        At most; 0: local minimisers without exchange, put together by the partition of unity.
    start
        First guess (n, k) of alpha, where there are sweeps; zero by default.

    Raises
    ------
    InputError
        On all ranks: numbers out of range, arrays of another shape; see :class:`LocalSolves`.
    """
    layout = operator.layout
    domain, p = layout.domain, len(layout.domain)
    omegas = omegas_of(omega, p)
    if not (rtol >= 0 and agreement >= 0 and sweeps >= 0):
        raise InputError(f"tolerances and sweeps must be 0 or more, got {rtol}, {agreement} and {sweeps}")
    targets = columns_of("Y", Y, domain.size)
    begun = np.zeros_like(targets) if start is None else columns_of("start", start, domain.size)
    if begun.shape != targets.shape:
        raise InputError(f"start must be {targets.shape} as Y, got {begun.shape}")
    damping = damping_of(omegas, domain)
    mine, alpha = targets[layout.rows], begun[layout.rows]
    local = LocalSolves(operator, None, "plain" if sweeps else "unity", damping)
    if not sweeps:
        alpha = local.solve(mine)
    left = operator.residual(mine, alpha)
    turns, whole = Turns(operator, local.factors), norm(operator, mine) or 1.0
    residuals, values = [norm(operator, left) / whole], [descent(operator, mine, alpha, left)]
    disagreements: list[float] = []
    converged = sweeps > 0 and residuals[0] <= rtol
    while not converged and len(disagreements) < sweeps:
        change, size = turns.sweep(left, alpha), norm(operator, alpha)
        disagreements.append(change / size if size else 0.0)
        small = norm(operator, left) <= rtol * whole and disagreements[-1] <= agreement
        if small or len(disagreements) % RENEWED == 0 or len(disagreements) == sweeps:
            left = operator.residual(mine, alpha)
        residuals.append(norm(operator, left) / whole)
        values.append(descent(operator, mine, alpha, left))
        converged = small and residuals[-1] <= rtol
    return ExchangeFit(
        layout.everywhere(alpha)[layout.places],
        len(disagreements),
        np.array(residuals),
        np.array(disagreements),
        np.array(values),
        regularised(operator, mine, alpha, left),
        converged,
    )


def omegas_of(omega: float | Sequence[float], count: int) -> list[float]:
    """An omega for each of so many subdomains.

    Raises
    ------
    InputError
        If it is negative or not finite, or there are neither one nor as many.
    """
    shape = count if np.ndim(omega) == 0 else np.shape(omega)
    found = [float(value) for value in np.broadcast_to(omega, shape).ravel()]
    if len(found) != count or not all(0 <= value < math.inf for value in found):
        raise InputError(f"omega must be 0 or more, one number or one for each of {count} subdomains; got {omega}")
    return found


def damping_of(omegas: Sequence[float], domain: SampleDomain) -> list[Array]:
    """What each subdomain's diagonal gets: omega times how many others have the sample."""
    others = domain.coverage - 1.0
    return [np.asarray(omega * others[wide]) for omega, wide in zip(omegas, domain.sets, strict=True)]


class Turns:
    """Local solves one after another, each with what those before it have changed. Collective.

    Parameters
    ----------
    operator
        K + mu I.
    factors
        Lower Cholesky factors of the matrices of this rank's subdomains.
    """

    def __init__(self, operator: KernelOperator, factors: Sequence[Array]) -> None:
        self.operator, layout = operator, operator.layout
        self.local = dict(zip(layout.mine, factors, strict=True))
        self.places = [layout.places[wide] for wide in layout.domain.sets]
        self.rows = [
            Rows(layout.comm, layout.ranges, places if i in self.local else NONE)
            for i, places in enumerate(self.places)
        ]
        # which entries of each of this rank's subdomains a later one changes, and which entries of that they are
        self.shared = {
            (i, j): np.intersect1d(self.places[i], self.places[j], return_indices=True)[1:]
            for i, j in layout.domain.neighbours
            if i in self.local
        }

    def sweep(self, left: Array, alpha: Array) -> float:
        """Let each subdomain change this rank's rows of alpha and of the residual; the norm of the disagreement."""
        layout = self.operator.layout
        moved = {i: np.zeros((len(self.places[i]), left.shape[1])) for i in self.local}
        for j, places in enumerate(self.places):
            asked = self.rows[j].get(left)
            step = layout.comm.bcast(solved(self.local[j], asked) if j in self.local else None, layout.owners[j])
            left -= self.operator.multiply_columns(places, step)
            inside = (places >= layout.begin) & (places < layout.end)
            alpha[places[inside] - layout.begin] += step[inside]
            for i in self.local:
                if (i, j) in self.shared:
                    here, there = self.shared[i, j]
                    moved[i][here] += step[there]
        squares = layout.comm.allgather([float(np.vdot(moved[i], moved[i])) for i in layout.mine])
        return math.sqrt(sum(square for here in squares for square in here))


def omega_bound(operator: KernelOperator, pivots: Pivots | None = None) -> float:
    """An omega with which all subdomains at once converge for sure, if they do not overlap. Collective.

    The largest sum over a row of abs(K - F F^T) outside of its subdomain's block: with as much added to every block the
    preconditioner is above the matrix. It is far too careful: conjugate gradients need no omega.
    """
    layout = operator.layout
    outside = np.ones((layout.size, len(layout.domain)))
    for i, wide in enumerate(layout.domain.sets):
        outside[layout.places[wide], i] = 0
    F = None if pivots is None else layout.everywhere(pivots.mine())
    largest = 0.0
    with agreed(layout.comm):
        for block in operator.blocks():
            mine = slice(layout.begin + block.start, layout.begin + block.stop)
            rows = operator.kernel(operator.samples[mine], operator.samples).numpy()
            rows = rows if F is None else rows - F[mine] @ F.T
            largest = max(largest, float(np.where(outside[mine], 0.0, np.abs(rows) @ outside).max()))
    return float(max(layout.comm.allgather(largest)))
