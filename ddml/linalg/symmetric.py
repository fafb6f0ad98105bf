"""Dense symmetric matrices over the ranks of a communicator."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dense import Array, DenseMatrix, pointer


class Change(NamedTuple):
    """The matrix H <- keep H + s a^T + q b^T; it must be symmetric. Vectors (n,)."""

    keep: float
    s: Array
    q: Array
    a: Array
    b: Array


class SymmetricMatrix(DenseMatrix):
    """A symmetric n x n matrix: the rows of its lower triangle, about n^2 / 2P numbers on each of P ranks."""

    def cut(self, units: int) -> list[int]:
        """See :meth:`DenseMatrix.cut`."""
        return [round(self.size * math.sqrt(u / units)) for u in range(units + 1)]

    def place(self, row: int) -> int:
        """See :meth:`DenseMatrix.place`."""
        return row * (row + 1) // 2

    def multiply(self, g: Array, change: Change | None = None) -> Array:
        """Change the matrix, then the units' contributions (this rank's units, n) to its product with g (n,).

        Each rank's result is overwritten by its next call.
        """
        function = self.kernel("multiply_symmetric")
        vectors = [np.ascontiguousarray(v) for v in (*change[1:], g)] if change else [np.ascontiguousarray(g)]
        keep = change.keep if change else 1.0
        self.products[:] = 0
        for product, number in zip(self.products, self.units, strict=True):
            rows, values = self.unit(number)
            if function is None:
                _by_rows(values, rows, vectors, keep, product)
                continue
            pointers = [pointer(v) for v in vectors] if change else [None] * 4 + [pointer(vectors[0])]
            function(
                pointer(values), ctypes.c_long(rows.start), ctypes.c_long(rows.stop), ctypes.c_double(keep),
                *pointers, pointer(product),
            )  # fmt: skip
        return self.products


def _by_rows(values: NDArray[Any], rows: range, vectors: list[Array], keep: float, product: Array) -> None:
    """What the compiled kernel does, where there is none."""
    *change, g = vectors
    place = 0
    for row in rows:
        line = values[place : place + row + 1]
        place += row + 1
        if change:
            s, q, a, b = change
            line[:] = keep * line + s[row] * a[: row + 1] + q[row] * b[: row + 1]
        product[row] += line.astype(float) @ g[: row + 1]
        product[:row] += line[:row] * g[row]
