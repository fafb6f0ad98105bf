"""Dense inverse Hessians of self-scaled quasi-Newton methods, as a matrix or as its factor, over the ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.linalg.dense import DenseMatrix
from ddml.linalg.factored import FactorChange, FactoredMatrix
from ddml.linalg.small import cholesky
from ddml.linalg.symmetric import Change, SymmetricMatrix
from ddml.objectives.objective import Objective
from ddml.parallel import redistributed
from ddml.summation import leaves
from solvers.owner import Owner

_PARALLEL = 1e-12  # our choice: sine of an angle below which two vectors span a line
ROWS = 128  # our choice: of H that are worth a vector of their own for what they give to a product


class Scaling(NamedTuple):
    """How an update scales: H+ = (H - q q^T / y.q + phi (y.q) v v^T) / tau + rho s s^T."""

    tau: float
    phi: float


Rule = Callable[[float, float, int], Scaling]
"""Gives the scaling from h = y.Hy / s.y, b = s.Bs / s.y with B the inverse of H, and n."""


class InverseHessian(Owner, ABC):
    """H of a method whose directions are p = -H g.

    As p = -H g, q = H y = H g_+ + p: each iteration multiplies H by g_+ and nothing else, and the same
    pass over its memory applies the update of the iteration before.

    Parameters
    ----------
    objective
        Whose parameters and ranks it has.
    vectors
        Those of the solver: ``g``, ``accepted_g`` and ``direction``, and ``s``, ``q``, ``y`` and ``product``, which
        are written here.
    dtype
        float64 or float32, of what is stored.

    Attributes
    ----------
    spread : float
        Ratio of Rayleigh quotients of H below which single precision does not hold it (our choice).
    """

    kind: ClassVar[type[DenseMatrix]]
    spread: ClassVar[float]

    def __init__(self, objective: Objective, vectors: dict[str, PETSc.Vec], dtype: str) -> None:
        self.objective, self.vectors = objective, vectors
        comm = objective.comm
        units = leaves(objective.layout.size, ROWS) if objective.parts.blocks else comm.size
        self.matrix: Any = self.kind(comm, objective.layout.size, units, dtype)
        self.pending: tuple[float, ...] | None = None

    def reset(self) -> None:
        """Make H the identity and the direction that of steepest descent."""
        self.matrix.identity()
        self.pending = None
        self.vectors["accepted_g"].copy(self.vectors["direction"])
        self.vectors["direction"].scale(-1.0)

    def renew(self) -> None:
        """Make the direction -H g for another gradient. Collective."""
        self._multiply(self.vectors["g"], self.vectors["direction"])
        self.pending = None
        self.vectors["direction"].scale(-1.0)

    def update(self, step: float, rule: Rule, skip: float) -> bool:
        """From a step along the direction and the gradient there to the next direction. Collective.

        True if H changes: not where s.y is at most ``skip``.
        """
        g, accepted, direction, s, q, y, product = (
            self.vectors[name] for name in ("g", "accepted_g", "direction", "s", "q", "y", "product")
        )
        self._multiply(g, product)
        y.waxpy(-1.0, accepted, g)
        direction.copy(s)
        s.scale(step)
        q.waxpy(1.0, direction, product)
        changed = self._learn(step, rule, skip)
        direction.scale(-1.0)
        return changed

    @abstractmethod
    def _learn(self, step: float, rule: Rule, skip: float) -> bool:
        """Write H g with the H after this update to the direction; True if it differs from the one before."""

    @abstractmethod
    def _change(self) -> Any:
        """The update that the matrix waits for."""

    def _multiply(self, g: PETSc.Vec, product: PETSc.Vec) -> None:
        """H g, after the update that H waits for."""
        layout = self.objective.layout
        change = None if self.pending is None else self._change()
        self.objective.compute(0.0, self.matrix.place(self.matrix.size))
        rows, tree = self.matrix.multiply(layout.gather(g).numpy(), change), self.matrix.tree
        first, nodes = self.matrix.units.start, tree.nodes[layout.comm.rank]
        with product as array:
            sums = [tree.add(node, lambda unit: rows[unit - first]) for node in nodes]
            array[:] = layout.sum_nodes(sums, tree, np.float64)

    def _gathered(self, *names: str) -> list[NDArray[np.float64]]:
        return [self.objective.layout.gather(self.vectors[name]).numpy().copy() for name in names]

    def repair(self, slope: float) -> float:
        """Make the direction, whose slope is not negative, one of descent if that is possible; the new slope."""
        return slope

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides the solver's direction, s and q. Collective.

        The vectors are this object's, until the next call: it owns no other.
        """
        self.destroy()
        return {
            "dtype": str(self.matrix.values.dtype),
            "matrix": self.own(self.matrix.save()),
            "pending": None if self.pending is None else list(self.pending),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`. Collective."""
        self.pending = None if state["pending"] is None else tuple(state["pending"])
        if state["dtype"] != str(self.matrix.values.dtype):
            self.matrix.double()
        self.matrix.load(state["matrix"])
        state["matrix"].destroy()

    def enlarged(self, state: dict[str, Any], places: NDArray[np.int64]) -> dict[str, Any]:
        """A :meth:`state` of fewer parameters, which come to these places, increasing, as one of ours. Collective.

        H is the identity on the others. The caller destroys the new vectors.
        """
        return {**state, "matrix": self.matrix.enlarged(state["matrix"], places)}


class Symmetric(InverseHessian):
    """H as its lower triangle, n^2 / 2P numbers on each of P ranks.

    Its small eigenvalues drown in the rounding of the large ones once they are about 1e14 apart (1e5 in
    single precision): then p may be no descent direction, and the least multiple of the identity that
    makes it one is added to H.
    """

    kind = SymmetricMatrix
    spread = 1e-5

    def _learn(self, step: float, rule: Rule, skip: float) -> bool:
        g, accepted, direction, s, q, y, product = (
            self.vectors[name] for name in ("g", "accepted_g", "direction", "s", "q", "y", "product")
        )
        slope = step * accepted.dot(direction)
        product.copy(direction)
        sy, yq = s.dot(y), y.dot(q)
        self.pending = None
        if not (sy > skip and yq > 0):
            return False
        rho = 1 / sy
        tau, phi = rule(rho * yq, -step * rho * slope, g.getSize())
        ss, sq, qq = yq * phi * rho**2 / tau + rho, -phi * rho / tau, (phi - 1) / (tau * yq)
        self.pending = 1 / tau, ss, sq, qq
        sg, qg = s.dot(g), q.dot(g)
        direction.scale(1 / tau)
        direction.maxpy([ss * sg + sq * qg, sq * sg + qq * qg], [s, q])
        return True

    def _change(self) -> Change:
        assert self.pending is not None
        keep, ss, sq, qq = self.pending
        s, q = self._gathered("s", "q")
        return Change(keep, s, q, ss * s + sq * q, sq * s + qq * q)

    def repair(self, slope: float) -> float:
        """See :meth:`InverseHessian.repair`."""
        g, direction = self.vectors["g"], self.vectors["direction"]
        squares = max(g.dot(g), np.finfo(float).tiny)
        keep = 1.0 if self.pending is None else self.pending[0]
        amount = 2 * slope / squares
        self.matrix.shift(amount / keep)
        direction.axpy(-amount, g)
        return slope - amount * squares


class Factored(InverseHessian):
    r"""H = F^T F as its factor F, n^2 / P numbers on each of P ranks (Davidon 1975; Powell 1987 for BFGS).

    In the coordinates of F everything is known without a solve: :math:`\hat y = F y`, and as
    :math:`s = -t F^T F g` is F^T times it, :math:`\hat s = -t F g`. There the update changes a multiple
    of the identity on the plane of these two only,

    .. math:: H_+ = F^T \hat H_+ F, \quad \hat H_+ = I / \tau + U (C - I / \tau) U^T,

    U (n, 2) an orthonormal basis of the plane and C (2, 2) the update in it, and the new factor is
    :math:`F_+ = \hat H_+^{1/2} F`, a change of rank two.

    H is positive definite however F is rounded, and holds eigenvalues that are 1e28 apart (1e10 in single
    precision): on PINNs the error goes on falling where that of :class:`Symmetric` stalls.
    """

    kind = FactoredMatrix
    spread = 1e-10

    def __init__(self, objective: Objective, vectors: dict[str, PETSc.Vec], dtype: str) -> None:
        super().__init__(objective, vectors, dtype)
        self.image = np.zeros(
            len(self.matrix.rows)
        )  # F g with the factor after the pending update; of this rank's rows
        self.plane = np.zeros((2, len(self.matrix.rows)))  # alpha and beta of the pending update

    def reset(self) -> None:
        """See :meth:`InverseHessian.reset`."""
        super().reset()
        self.image = self._gathered("accepted_g")[0][self._mine]

    def renew(self) -> None:
        """See :meth:`InverseHessian.renew`."""
        super().renew()
        self.image = self.matrix.image

    def take(self, other: Symmetric) -> None:
        """Become the Cholesky factor of another form's H, shifted where it is not positive definite. Collective.

        Rank 0 factorises: it needs memory for n^2 numbers, three times.
        """
        if other.pending is not None:  # the product's pass applies it
            other.renew()
        comm, matrix = self.matrix.comm, self.matrix
        packed = comm.gather(other.matrix.values)
        rows = None
        if comm.rank == 0:
            whole = np.zeros((matrix.size, matrix.size))
            whole[np.tril_indices(matrix.size)] = np.concatenate(packed)
            factor = np.ascontiguousarray(cholesky(whole, 0.0).T)
            edges = [matrix.edges[share] for share in matrix.shares]
            rows = [factor[begin:end].ravel() for begin, end in pairwise(edges)]
        matrix.values[:] = comm.scatter(rows)
        self.renew()

    @property
    def _mine(self) -> slice:
        return slice(self.matrix.rows.start, self.matrix.rows.stop)

    def _learn(self, step: float, rule: Rule, skip: float) -> bool:
        direction, product = self.vectors["direction"], self.vectors["product"]
        product.copy(direction)
        old, new = self.image, self.matrix.image
        y, s = new - old, -step * old
        self.image, self.pending = new, None
        ss, sy, yy, sg = self.matrix.dots((s, s), (s, y), (y, y), (s, new))
        if not (sy > skip and ss > 0 and math.isfinite(yy)):
            return False
        length, along = math.sqrt(ss), sy / math.sqrt(ss)
        w = y - (sy / ss) * s
        ws, ww, wg = self.matrix.dots((w, s), (w, w), (w, new))
        w -= (ws / ss) * s
        along += ws / length
        wg -= ws / ss * sg
        across = math.sqrt(max(ww - ws**2 / ss, 0.0))
        tau, phi = rule(yy / sy, ss / sy, self.matrix.size)
        # coordinates in the plane: u_0 = s / |s|, u_1 = w / |w|
        if across <= _PARALLEL * math.sqrt(yy):
            basis, coordinates, R = s[None] / length, np.array([sg / length]), np.array([[length]])
            C = np.array([[ss / sy]])
        else:
            basis, coordinates = np.stack([s / length, w / across]), np.array([sg / length, wg / across])
            R = np.array([[length, along], [0.0, across]])
            C = _plane(R, tau, phi)
        count, keep = len(R), 1 / math.sqrt(tau)
        values, turn = np.linalg.eigh(C)
        root = (turn * np.sqrt(np.maximum(values, 0.0))) @ turn.T
        excess = root - keep * np.eye(count)
        inverse = np.linalg.inv(R)
        weights = np.zeros(2)
        weights[:count] = inverse @ ((C - np.eye(count) / tau) @ coordinates)
        direction.scale(1 / tau)
        direction.maxpy(weights.tolist(), [self.vectors["s"], self.vectors["q"]])
        self.plane = np.zeros_like(self.plane)
        for i, row in enumerate(inverse @ excess):
            self.plane[i] = _combination(row, basis)
        self.image = keep * new + _combination(excess @ coordinates, basis)
        self.pending = (keep,)
        return True

    def _change(self) -> FactorChange:
        assert self.pending is not None
        return FactorChange(self.pending[0], *self.plane, *self._gathered("s", "q"))

    def state(self) -> dict[str, Any]:
        """See :meth:`InverseHessian.state`."""
        state = super().state()
        columns = np.stack([self.image, *self.plane], axis=1).ravel()
        rows = PETSc.Vec().createWithArray(columns, (len(columns), PETSc.DETERMINE), comm=self.matrix.comm)
        return {**state, "rows": self.own(rows)}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`InverseHessian.restore`."""
        super().restore(state)
        edges = 3 * self.matrix.rows.start, 3 * self.matrix.rows.stop
        columns = redistributed(self.matrix.comm, state["rows"], *edges).reshape(-1, 3).T
        self.image, self.plane = columns[0].copy(), columns[1:].copy()
        state["rows"].destroy()

    def enlarged(self, state: dict[str, Any], places: NDArray[np.int64]) -> dict[str, Any]:
        """See :meth:`InverseHessian.enlarged`; what the image of the gradient is has to be computed anew."""
        comm, rows = self.matrix.comm, self.matrix.rows
        first, last = (int(edge) for edge in np.searchsorted(places, [rows.start, rows.stop]))
        columns = np.zeros((len(rows), 3))
        columns[places[first:last] - rows.start] = redistributed(comm, state["rows"], 3 * first, 3 * last).reshape(
            -1, 3
        )
        vec = PETSc.Vec().createWithArray(columns.ravel(), (columns.size, PETSc.DETERMINE), comm=comm)
        return {**super().enlarged(state, places), "rows": vec}


def _combination(weights: NDArray[np.float64], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of weights (k,) times vectors (k, rows), rounded alike for any number of rows: BLAS is not."""
    return np.asarray(sum(w * v for w, v in zip(weights, vectors, strict=True)))


def _plane(R: NDArray[np.float64], tau: float, phi: float) -> NDArray[np.float64]:
    """The update of the identity by the two columns of R (2, 2), s and y."""
    s, y = R.T
    rho, yy = 1 / (s @ y), y @ y
    v = rho * s - y / yy
    flat = np.eye(2) - np.outer(y, y) / yy + phi * yy * np.outer(v, v)
    return np.asarray(flat / tau + rho * np.outer(s, s))


FORMS: dict[str, type[InverseHessian]] = {"symmetric": Symmetric, "factored": Factored}
