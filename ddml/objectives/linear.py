"""Linear terms of objectives: what makes two of them agree to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.layout import ParameterLayout


@dataclass(frozen=True)
class GatheredTerm:
    """constant + <dg, theta - theta0> on one process, with dg and theta0 (n,) in float64."""

    dg: NDArray[np.float64]
    theta0: NDArray[np.float64]
    constant: float

    def outside(self, theta: NDArray[np.float64], ranges: Sequence[slice]) -> float:
        """What the term adds at theta (n,) that does not depend on the entries in these ranges."""
        kept = np.ones(len(theta), dtype=bool)
        for r in ranges:
            kept[r] = False
        return self.constant + float(self.dg[kept] @ (theta[kept] - self.theta0[kept]))


@dataclass(eq=False)
class LinearTerm:
    """constant + <dg, theta - theta0>, for distributed vectors that are read at every evaluation."""

    dg: PETSc.Vec
    theta0: PETSc.Vec
    constant: float = 0.0

    def value(self, x: PETSc.Vec) -> float:
        """The term at x. Collective."""
        step = x.duplicate()
        step.waxpy(-1.0, self.theta0, x)
        value = float(self.dg.dot(step))
        step.destroy()
        return self.constant + value

    def gathered(self, layout: ParameterLayout) -> GatheredTerm:
        """The term on every rank. Collective."""
        dg, theta0 = (layout.gather(vec).numpy().copy() for vec in (self.dg, self.theta0))
        return GatheredTerm(dg, theta0, self.constant)

    def restrict(self, term: GatheredTerm, theta: NDArray[np.float64], ranges: Sequence[slice]) -> None:
        """Become a term as a function of the entries in some ranges, the others frozen at theta (n,)."""
        self.constant = term.outside(theta, ranges)
        for vec, full in ((self.dg, term.dg), (self.theta0, term.theta0)):
            vec.array[:] = np.concatenate([full[r] for r in ranges])[slice(*vec.getOwnershipRange())]

    def destroy(self) -> None:
        """Destroy the vectors, where they are not somebody else's."""
        self.dg.destroy()
        self.theta0.destroy()


def tilted(terms: Sequence[LinearTerm], value: float, x: PETSc.Vec) -> float:
    """A value with linear terms at x. Collective."""
    return sum((term.value(x) for term in terms), value)
