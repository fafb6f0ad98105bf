r"""Exact solution of trust-region subproblems in the 2-norm with a matrix gamma I + Psi M Psi^T.

.. math:: \min_p\; g^T p + \tfrac12 p^T B p, \quad \|p\|_2 \le \Delta

(Burdakov, Gong, Yuan, Zikrin 2017; Brust, Erway, Marcia 2017). With Psi = Q R and R M R^T = U diag(l) U^T,
the eigenvalues of B are l + gamma, with eigenvectors P = Q U, and gamma on the complement of P: the problem has as
many unknowns as Psi has columns, and one more. Q comes from orthogonal factorisations of pieces of the rows and one of
their triangles, so that no digits are lost to Psi^T Psi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.layout import ParameterLayout

Array = NDArray[np.float64]
EPS = float(np.finfo(float).eps)
ITERATIONS = 200


def diagonal_step(values: Array, a: Array, radius: float) -> tuple[Array, float, float]:
    r"""The v (k,) that minimises a.v + sum values v^2 / 2 with \|v\| <= radius; sigma, and the decrease.

    sigma >= 0 with (values + sigma) v = -a, values + sigma >= 0 and sigma (radius - \|v\|) = 0 (More, Sorensen
    1983). The unknown is mu = sigma + min(values), so that nothing cancels near the smallest eigenvalue: Newton's
    method for 1 / \|v\| = 1 / radius, which converges from below without safeguards. In the hard case (a has no
    part in the eigenspace of a smallest value that is not positive, and what is left is shorter than the radius) a
    vector of that eigenspace leads to the boundary.
    """
    low, scale = float(values.min()), float(np.abs(values).max())
    omega = values - low
    omega[omega <= EPS * scale] = 0.0
    floor = max(low, 0.0)

    def step(mu: float) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(a == 0, 0.0, -a / (omega + mu))

    mu = floor
    v = step(mu)
    if not float(np.linalg.norm(v)) <= radius:
        mu = max(floor, float((np.abs(a) / radius - omega).max()))
        for _ in range(ITERATIONS):
            v = step(mu)
            size = float(np.linalg.norm(v))
            if size <= radius * (1 + 2 * EPS):
                break
            slope = float((v**2 / (omega + mu))[v != 0].sum())
            better = mu + (size - radius) / radius * size**2 / slope
            if not better > mu:
                break
            mu = better
        v *= min(1.0, radius / float(np.linalg.norm(v)))
    elif low <= 0 and low < 0 < radius:
        v[int(np.flatnonzero(omega == 0)[-1])] += math.sqrt(max(radius**2 - float(v @ v), 0.0))
    sigma = mu - low
    return v, sigma, 0.5 * float(((omega + mu) * v) @ v) + 0.5 * sigma * float(v @ v)


@dataclass(frozen=True)
class Spectral:
    """B = gamma I + P diag(values - gamma) P^T on distributed vectors.

    Attributes
    ----------
    layout : ParameterLayout
        Of the vectors.
    gamma : float
    values : array (k,)
        Eigenvalues.
    P : array (n_local, k)
        This rank's rows of their eigenvectors.
    """

    layout: ParameterLayout
    gamma: float
    values: Array
    P: Array

    @classmethod
    def of(cls, layout: ParameterLayout, gamma: float, Psi: Array, M: Array) -> Spectral:
        """Of gamma I + Psi M Psi^T; Psi (n_local, k) are this rank's rows, M (k, k) is symmetric. Collective."""
        Q, R = layout.orthonormal(Psi)
        small = R @ M @ R.T
        values, U = np.linalg.eigh((small + small.T) / 2)
        return cls(layout, gamma, values + gamma, layout.times(Q, U))

    def _coefficients(self, local: Array) -> Array:
        """P^T x (k,) for this rank's entries of x."""
        return self.layout.inner(self.P, local[:, None])[:, 0]

    def _project(self, g: Array) -> tuple[Array, Array]:
        """Coefficients (k,) of g, and what is orthogonal to P: projected twice, as the first leaves rounding errors."""
        a = self._coefficients(g)
        rest = g - self.layout.times(self.P, a)
        again = self._coefficients(rest)
        return a + again, rest - self.layout.times(self.P, again)

    def _length(self, local: Array) -> float:
        return math.sqrt(float(self.layout.inner(local[:, None], local[:, None])[0, 0]))

    def multiply(self, x: PETSc.Vec, product: PETSc.Vec) -> None:
        """Write B x to ``product``. Collective."""
        local = x.array_r
        a = self._coefficients(local)
        product.array[:] = self.gamma * local + self.layout.times(self.P, (self.values - self.gamma) * a)

    def solve(self, g: PETSc.Vec, radius: float, p: PETSc.Vec) -> tuple[float, float]:
        """Write the minimiser in the ball of that radius to p; the decrease of the model, and sigma. Collective."""
        local = g.array_r
        a, rest = self._project(local)
        whole = self.layout.size > len(self.values)
        length = self._length(rest) if whole else 0.0
        if length <= 10 * EPS * math.sqrt(float(a @ a) + length**2):  # rounding errors, not a direction
            length = 0.0
        values = np.append(self.values, self.gamma) if whole else self.values
        v, sigma, decrease = diagonal_step(values, np.append(a, length) if whole else a, radius)
        step = self.layout.times(self.P, v[: len(self.values)])
        if whole and length > 0:
            step += rest * (v[-1] / length)
        elif whole and v[-1] != 0:
            step += self._complement(p) * v[-1]
        p.array[:] = step
        return decrease, sigma

    def _complement(self, like: PETSc.Vec) -> Array:
        """This rank's part of a unit vector orthogonal to P: the coordinate that is farthest from its span."""
        begin, _ = like.getOwnershipRange()
        inside = (self.P**2).sum(axis=1)
        here = int(inside.argmin()) if len(inside) else -1
        candidates = self.layout.comm.allgather((float(inside[here]), begin + here) if here >= 0 else (math.inf, -1))
        chosen = min(candidates)[1]
        unit = np.zeros(len(inside))
        if begin <= chosen < begin + len(inside):
            unit[chosen - begin] = 1.0
        _, rest = self._project(unit)
        return rest / self._length(rest)
