"""Linearised residuals: the Jacobian of a residual objective at a point, each rank with the rows of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from scipy.linalg import blas
from torch import Tensor

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import length
from ddml.losses.residual import ResidualLoss
from ddml.numbers import host
from ddml.parallel import check_memory
from ddml.vectors import CPU

from .residual import ResidualObjective

Array = NDArray[np.float64]


class Linearisation:
    """The residual r and its Jacobian J (m, n) at a point; all collective on the objective's communicator.

    Vectors of residual space are lists of tensors in double precision, one for each part of the
    samples that this rank has; vectors of parameters are (n,), the same on every rank. Charged as
    a loss, and where the rows are stored as :meth:`ddml.losses.charges.ResidualCharges.rows` says.

    Parameters
    ----------
    objective
        Whose residual.
    x
        The point.
    assembled
        Whether the rows of J are stored, m n numbers in all, which then pass by in every product. Without,
        every product is one pass through the network.

    Attributes
    ----------
    value : float
        |r|^2.
    residual : list of Tensor
        r.
    count : int
        m, the number of residuals.
    device : torch.device
        Where products take vectors from: where the rows are stored the host.

    Raises
    ------
    InputError
        If the ranks of a node would need more than its memory for the rows; if the objective has linear terms.
    """

    def __init__(self, objective: ResidualObjective, x: PETSc.Vec, assembled: bool) -> None:
        objective.check_squares()
        self.objective, self.comm, self.size = objective, objective.comm, objective.layout.size
        self.theta = objective.parameters(x).clone()
        self.parts = [objective.part(i) for i in range(len(objective.parts))]
        objective.work.add(objective.fraction * objective.loss.charges.evaluation(gradient=False), losses=1)
        self.residual = self._residual(self.theta)
        self.count = int(self.comm.allreduce(sum(map(len, self.residual))))
        self.value = self.total([float(r @ r) for r in self.residual])
        self._rows: list[Tensor] | None = None
        self.device = CPU if assembled else self.theta.device
        if assembled:
            check_memory(
                self.comm, 8 * self.size * sum(map(len, self.residual)),
                f"the Jacobian of {self.count} residuals by {self.size} parameters", "use more nodes or -jacobian free",
            )  # fmt: skip
            self._charge_rows()
            self._rows = [self._columns(part) for part in self.parts]

    def residual_at(self, x: PETSc.Vec) -> list[Tensor]:
        """The residual at another point; charged as a loss."""
        objective = self.objective
        theta = objective.parameters(x)
        objective.work.add(objective.fraction * objective.loss.charges.evaluation(gradient=False), losses=1)
        return self._residual(theta)

    def _residual(self, theta: Tensor) -> list[Tensor]:
        return host([part.residual(theta) for part in self.parts], torch.float64)

    def total(self, values: list[float]) -> float:
        """The sum of the parts' numbers over all ranks, in a fixed order if the objective sums so."""
        return self.objective.sum_parts(values)

    def _columns(self, part: ResidualLoss) -> Tensor:
        return host([part.jacobian(self.theta).T], torch.float64)[0].contiguous()

    def _charge_rows(self) -> None:
        self.objective.work.add(self.objective.fraction * self.objective.loss.charges.rows(self.count))

    def _pass(self, operations: float = 0.0, ranges: Sequence[slice] = (slice(None),)) -> None:
        """Charge what is done with all rows once: multiply-adds, and the numbers that pass by."""
        if self._rows is None:
            self._charge_rows()
        self.objective.compute(operations, self.count * sum(len(range(*r.indices(self.size))) for r in ranges))

    def transposed(self, number: int) -> Tensor:
        """J^T (n, m_p) of a part of this rank's samples, computed anew if it is not stored; not collective."""
        return self._columns(self.parts[number]) if self._rows is None else self._rows[number]

    def product(self, v: Tensor, ranges: Sequence[slice] = (slice(None),)) -> list[Tensor]:
        """J v for v (n,) that is zero outside of some ranges."""
        if self._rows is not None:
            self._pass(ranges=ranges)
            return [sum(torch.mv(rows[r].T, v[r]) for r in ranges) for rows in self._rows]  # type: ignore[misc]
        self._charge(self.objective.loss.charges.jacobian())
        v = v.to(device=self.theta.device, dtype=self.theta.dtype)
        return host([part.jacobian_product(self.theta, v) for part in self.parts], torch.float64)

    def transpose_product(self, w: Sequence[Tensor], vec: PETSc.Vec, ranges: Sequence[slice] = (slice(None),)) -> None:
        """Write J^T w to ``vec``; only the entries in ``ranges`` are needed, the others are any."""
        if self._rows is not None:
            self._pass(ranges=ranges)
            # each in memory of its own: what a product rounds may depend on how it is aligned
            sums = [torch.zeros(self.size, dtype=torch.float64) for _ in self.parts]
            for rows, weights, into in zip(self._rows, w, sums, strict=True):
                for r in ranges:
                    torch.mv(rows[r], weights, out=into[r])
        else:
            self._charge(self.objective.loss.charges.transpose())
            sums = [torch.zeros_like(self.theta) for _ in self.parts]
            for part, weights, into in zip(self.parts, w, sums, strict=True):
                part.jacobian_transpose_product(self.theta, weights.to(self.theta), into)
        self.objective.parts.sum_vectors(sums, vec)

    def _charge(self, units: float) -> None:
        self.objective.work.add(self.objective.fraction * units, products=1)

    def diagonal(self, vec: PETSc.Vec) -> None:
        """Write the diagonal of J^T J to ``vec``."""
        self._pass()
        squares = (self.transposed(i) for i in range(len(self.parts)))
        self.objective.parts.sum_vectors([(rows * rows).sum(1) for rows in squares], vec)

    def gram_product(self, columns: Any) -> Array:
        """The rows of J^T J Y (n_local, k) that belong to this rank's parameters, for Y (n, k) on every rank.

        Y is a numpy array or a sparse matrix of scipy.
        """
        found = []
        for begin in range(0, columns.shape[1], _COLUMNS):  # a few at a time, to bound the memory
            y = columns[:, begin : begin + _COLUMNS]
            self._pass(2 * self.count * self.size * y.shape[1])

            def product(number: int, y: Any = y) -> Array:
                row = self.transposed(number).numpy()
                return np.asarray(row @ (y.T @ row).T)

            found.append(self.objective.parts.sum_matrices(product, y.shape[1]))
        return np.concatenate(found, axis=1)

    def gram_blocks(self, decomposition: Decomposition) -> dict[int, Array]:
        """R_s J^T J R_s^T (n_s, n_s), the lower triangle, for the subdomains whose group this rank leads.

        The columns of J go to the ranks that have the subdomains: a block is summed over the samples
        in their order.
        """
        ranges, leaders = decomposition.subdomains.ranges, [workers[0] for workers in decomposition.workers]
        led = [[s for s, leader in enumerate(leaders) if leader == rank] for rank in range(self.comm.size)]
        widths = self.comm.allgather([len(r) for r in self.residual])
        blocks = {}
        for own in ranges:  # half of a symmetric product
            self._pass(self.count * length(own) ** 2 / 2, own)
        for turn in range(max(map(len, led))):
            now = [mine[turn] if turn < len(mine) else None for mine in led]
            pieces = self._columns_to([() if s is None else ranges[s] for s in now], widths)
            s = now[self.comm.rank]
            if s is None:
                continue
            block = np.zeros((length(ranges[s]),) * 2, order="F")
            for piece in pieces:
                block = blas.dsyrk(1.0, piece.T, beta=1.0, c=block, trans=1, lower=1, overwrite_c=1)
            blocks[s] = block
        return blocks

    def _columns_to(self, wanted: Sequence[Sequence[slice]], widths: list[list[int]]) -> list[Array]:
        """Columns of J, for each rank those that it wants, transposed (n_s, m_p) for each part of all ranks."""
        send = []
        for ranges in wanted:
            rows = [self.transposed(i) for i in range(len(self.parts))] if ranges else []
            send.append([np.concatenate([row[r].numpy() for r in ranges]) for row in rows])
        if self.comm.size == 1:
            return send[0]
        counts = [sum(piece.size for piece in pieces) for pieces in send]
        flat = np.concatenate([piece.ravel() for pieces in send for piece in pieces] or [np.zeros(0)])
        height = length(wanted[self.comm.rank])
        sizes = [height * sum(w) for w in widths]
        received = np.empty(sum(sizes))
        self.comm.Alltoallv([flat, counts, MPI.DOUBLE], [received, sizes, MPI.DOUBLE])
        edges = np.cumsum([height * width for w in widths for width in w])[:-1]
        return [piece.reshape(height, -1) for piece in np.split(received, edges)] if height else []

    def dual_gram(self) -> Array | None:
        """J J^T (m, m), its lower triangle, on rank 0, None elsewhere.

        One part of the rows after another goes round; each pair of parts is multiplied once, by the
        owner of the first, half of all others to each.
        """
        widths = self.comm.allgather([len(r) for r in self.residual])
        flat = [width for w in widths for width in w]
        owners = [rank for rank, w in enumerate(widths) for _ in w]
        first = owners.index(self.comm.rank) if self.comm.rank in owners else 0
        edges, count = np.concatenate([[0], np.cumsum(flat)]), len(flat)
        self._pass(self.count**2 * self.size / 2)
        products = {}
        for q, width in enumerate(flat):
            mine = owners[q] == self.comm.rank
            rows = self.transposed(q - first) if mine else torch.empty(self.size, width, dtype=torch.float64)
            self.comm.Bcast(rows.numpy(), owners[q])
            for i in range(len(self.parts)):
                p, ahead = first + i, (q - first - i) % count
                if 2 * ahead < count or (2 * ahead == count and p < q):
                    products[max(p, q), min(p, q)] = self._pair(i, rows, p > q)
        gathered = self.comm.gather(products)
        if gathered is None:
            return None
        gram = np.zeros((edges[-1],) * 2, order="F")
        for found in gathered:
            for (p, q), block in found.items():
                gram[edges[p] : edges[p + 1], edges[q] : edges[q + 1]] = block
        return gram

    def _pair(self, number: int, rows: Tensor, below: bool) -> Array:
        """J_p J_q^T of a part of this rank and another one, or its transpose."""
        product = (self.transposed(number).T @ rows).numpy()
        return np.asarray(product if below else product.T)


_COLUMNS = 64
