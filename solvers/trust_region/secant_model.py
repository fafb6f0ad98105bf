r"""Limited-memory Hessian approximations B for trust regions, indefinite (SR1) or positive definite (BFGS)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.norms.kronecker import KroneckerNorm

from .subproblem import Spectral

Array = NDArray[np.float64]


class SecantModel:
    r"""The last m secant pairs (s, y) and B = gamma I + Psi M Psi^T from them.

    With S, Y the pairs in columns, S^T Y = L + D + U and gamma = y^T y / s^T y of the newest pair with
    s^T y > 1e-8 \|s\| \|y\| (without that bound, our choice for ``sr1``, gamma may be so large that rounding in
    Psi swallows y):

    - ``sr1``: Psi = Y - gamma S, M = (D + L + L^T - gamma S^T S)^-1 (Byrd, Nocedal, Schnabel 1994, theorem 5.1). A
      pair takes part if \|s^T (y - B s)\| >= 1e-8 \|s\| \|y - B s\|, with B that of the pairs before it.
    - ``lbfgs``: Psi = [gamma S, Y], M = -[[gamma S^T S, L], [L^T, -D]]^-1 (theorem 2.3). Pairs with
      s^T y <= 1e-8 \|s\| \|y\| are not stored.

    Pairs are stored divided by \|s\|, which leaves B as it is. Without pairs B = 0, a first-order model. The vectors
    are distributed, n/P a rank and vector. All is collective.

    Parameters
    ----------
    size
        m.
    kind
        ``sr1`` or ``lbfgs``.
    layout
        Of the vectors.
    metric
        B is in the coordinates of this norm, and gamma is 1: the norm's matrix is the Hessian before the first pair.
    """

    SKIP = 1e-8

    def __init__(self, size: int, kind: str, layout: ParameterLayout, metric: KroneckerNorm | None = None) -> None:
        self.size, self.kind, self.layout, self.metric = size, kind, layout, metric
        self.gamma = 0.0 if metric is None else 1.0
        self.S: list[PETSc.Vec] = []
        self.Y: list[PETSc.Vec] = []
        self._paid = 0  # of these, how many were charged before a restart
        self._images: tuple[int, list[Array]] = (-1, [])  # this rank's s and y in the metric's coordinates

    def __len__(self) -> int:
        return len(self.S)

    def update(self, s: PETSc.Vec, y: PETSc.Vec) -> bool:
        """Store copies of a pair and forget the oldest beyond m; False if it is not stored."""
        curvature, length = s.dot(y), s.norm()
        scale = length * y.norm()
        curved = curvature > self.SKIP * scale
        if self.size == 0 or not scale > 0 or (self.kind == "lbfgs" and not curved):
            return False
        while len(self) >= self.size:
            self.S.pop(0).destroy()
            self.Y.pop(0).destroy()
            del self._images[1][:1]
            self._paid = max(self._paid - 1, 0)
        for vec, vectors in ((s, self.S), (y, self.Y)):
            vectors.append(vec.copy())
            vectors[-1].scale(1 / length)
        if curved and self.metric is None:
            self.gamma = y.dot(y) / curvature
        return True

    def matrix(self) -> Spectral:
        """B."""
        layout = self.layout
        if len(self) == 0:
            local = int(layout.counts[layout.comm.rank])
            return Spectral(layout, self.gamma, np.zeros(0), np.zeros((local, 0)))
        S, Y = self._columns()
        if self.kind == "lbfgs":
            products = layout.inner(S, np.hstack([S, Y]))
            SS, SY = np.hsplit(products, 2)
            L, D = np.tril(SY, -1), np.diag(np.diag(SY))
            M = -np.linalg.inv(np.block([[self.gamma * SS, L], [L.T, -D]]))
            return Spectral.of(layout, self.gamma, np.hstack([self.gamma * S, Y]), M)
        Psi = Y - self.gamma * S
        kept, M = self._regular(layout.orthonormal(Psi)[1], layout.inner(S, Psi))
        return Spectral.of(layout, self.gamma, Psi[:, kept], M)

    def _columns(self) -> tuple[Array, Array]:
        """This rank's rows of S and Y (n_local, pairs)."""
        if self.metric is None:
            return np.column_stack([v.array_r for v in self.S]), np.column_stack([v.array_r for v in self.Y])
        if self._images[0] != self.metric.version:
            self._images, self._paid = (self.metric.version, []), 0
        known, image = self._images[1], self.S[0].duplicate()
        for s, y in list(zip(self.S, self.Y, strict=True))[len(known) :]:
            with self.metric.objective.work.unpaid() if len(known) < self._paid else nullcontext():
                self.metric.coordinates(s, image)
                columns = [image.array_r.copy()]
                self.metric.covector(y, image)
            known.append(np.stack([*columns, image.array_r]))
        self._paid = 0
        image.destroy()
        S, Y = np.stack(known, axis=2)
        return S, Y

    def _regular(self, R: Array, products: Array) -> tuple[list[int], Array]:
        """The pairs that SR1 updates are defined for, and M; with Psi^T Psi = R^T R, ``products`` is S^T Psi."""
        kept, M = list[int](), np.zeros((0, 0))
        for j in range(len(self)):
            b = M @ products[j, kept]
            residual = np.zeros(len(self))  # y - B s of pair j is Psi times this
            residual[j], residual[kept] = 1.0, -b
            size, pivot = float(np.linalg.norm(R @ residual)), products[j, j] - products[j, kept] @ b
            if size > 0 and abs(pivot) >= self.SKIP * size:
                # pivot is the Schur complement of M^-1: one more row and column of the inverse
                M = np.block([[M + np.outer(b, b) / pivot, -b[:, None] / pivot], [-b[None] / pivot, 1 / pivot]])
                kept = [*kept, j]
        return kept, M

    def clear(self) -> None:
        """Forget everything."""
        for vec in (*self.S, *self.Y):
            vec.destroy()
        self.S, self.Y, self._images, self._paid = [], [], (-1, []), 0
        self.gamma = 0.0 if self.metric is None else 1.0

    def destroy(self) -> None:
        """Destroy the vectors."""
        self.clear()

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint; the vectors are this object's."""
        current = self.metric is not None and self._images[0] == self.metric.version
        return {"S": list(self.S), "Y": list(self.Y), "gamma": self.gamma, "images": len(self._images[1]) * current}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the vectors of a checkpoint; the metric is that of it already."""
        self.clear()
        self.S, self.Y, self.gamma = list(state["S"]), list(state["Y"]), state["gamma"]
        if self.metric is not None:
            self._images = self.metric.version, []
            self._paid = state.get("images", 0)  # which files of before do not know
