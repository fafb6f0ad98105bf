"""Limited-memory BFGS in compact form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc
from scipy.linalg import solve_triangular


class SecantMemory:
    r"""The last m secant pairs (s, y) and the product with the inverse Hessian approximation they define.

    With S, Y the pairs in columns, R the upper triangle and D the diagonal of :math:`S^T Y`, and
    :math:`\gamma = s^T y / y^T y` of the newest pair (Byrd, Nocedal, Schnabel 1994, eq. 2.19 with 3.1):

    .. math:: H = \gamma I + [S, \gamma Y]
        \begin{bmatrix} R^{-T}(D + \gamma Y^T Y)R^{-1} & -R^{-T} \\ -R^{-1} & 0 \end{bmatrix}
        [S, \gamma Y]^T.

    Without pairs H = I. The vectors are distributed, n/P a rank and vector; a product or an update
    takes one reduction. PETSc's MATLMVMBFGS is the same matrix, but computes s and y as differences
    of accumulated points, which pairs that are no differences of iterates lose digits by, and its
    pairs cannot be saved and restored exactly.

    Parameters
    ----------
    size
        m.
    skip
        A pair is kept only if s.y is above this.
    """

    def __init__(self, size: int, skip: float) -> None:
        self.size, self.skip = size, skip
        self.S: list[PETSc.Vec] = []
        self.Y: list[PETSc.Vec] = []
        self.R: NDArray[np.float64] = np.zeros((0, 0))
        self.YY: NDArray[np.float64] = np.zeros((0, 0))

    def __len__(self) -> int:
        return len(self.S)

    def update(self, s: PETSc.Vec, y: PETSc.Vec) -> bool:
        """Store copies of a pair and forget the oldest beyond m; False if it is skipped. Collective."""
        if self.size == 0 or not s.dot(y) > self.skip:
            return False
        while len(self) > self.size:
            self.S.pop(0).destroy()
            self.Y.pop(0).destroy()
        for vec, pairs in ((s, self.S), (y, self.Y)):
            room = pairs.pop(0) if len(pairs) == self.size else vec.duplicate()
            vec.copy(room)
            pairs.append(room)
        m = len(self)
        dots = np.asarray(y.mDot(self.S + self.Y))
        R, YY = np.zeros((m, m)), np.zeros((m, m))
        kept = max(len(self.R) - m + 1, 0)
        R[:-1, :-1], YY[:-1, :-1] = self.R[kept:, kept:], self.YY[kept:, kept:]
        R[:, -1] = dots[:m]
        YY[:, -1] = YY[-1] = dots[m:]
        self.R, self.YY = R, YY
        return True

    def apply(self, g: PETSc.Vec, product: PETSc.Vec) -> None:
        """Write H g to ``product``. Collective."""
        g.copy(product)
        m = len(self)
        if m == 0:
            return
        dots = np.asarray(g.mDot(self.S + self.Y))
        gamma = self.R[-1, -1] / self.YY[-1, -1]
        u = solve_triangular(self.R, dots[:m])
        D = np.diag(np.diag(self.R))
        v = solve_triangular(self.R, (D + gamma * self.YY) @ u - gamma * dots[m:], trans="T")
        product.scale(gamma)
        product.maxpy(np.concatenate((v, -gamma * u)), self.S + self.Y)

    def clear(self) -> None:
        """Forget everything."""
        for vec in (*self.S, *self.Y):
            vec.destroy()
        self.S, self.Y = [], []
        self.R = self.YY = np.zeros((0, 0))

    def destroy(self) -> None:
        """Destroy the vectors."""
        self.clear()

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint; the vectors are this object's."""
        return {"S": list(self.S), "Y": list(self.Y), "R": self.R, "YY": self.YY}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the vectors of a checkpoint."""
        self.clear()
        self.S, self.Y = list(state["S"]), list(state["Y"])
        self.R, self.YY = np.array(state["R"]), np.array(state["YY"])
