"""Positive semidefinite matrices F^T F over the ranks of a communicator, as their factor F."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ddml.parallel import split

from .dense import Array, DenseMatrix, pointer


class FactorChange(NamedTuple):
    """The factor F <- keep F + alpha a^T + beta b^T: alpha and beta (this rank's rows,), a and b (n,)."""

    keep: float
    alpha: Array
    beta: Array
    a: Array
    b: Array


class FactoredMatrix(DenseMatrix):
    """The matrix H = F^T F: the rows of F, n^2 / P numbers on each of P ranks.

    However F is rounded, H stays positive semidefinite, and its eigenvalues may lie twice as many
    orders of magnitude apart as those of a matrix whose entries are stored.

    Attributes
    ----------
    image : ndarray
        F g of the last product, of this rank's rows.
    """

    image: Array

    def cut(self, units: int) -> list[int]:
        """See :meth:`DenseMatrix.cut`."""
        return split(self.size, units)

    def place(self, row: int) -> int:
        """See :meth:`DenseMatrix.place`."""
        return row * self.size

    def multiply(self, g: Array, change: FactorChange | None = None) -> Array:
        """Change F, then the units' contributions (this rank's units, n) to F^T F g with g (n,).

        Each rank's result is overwritten by its next call.
        """
        function = self.kernel("multiply_factored")
        g = np.ascontiguousarray(g)
        sides = [np.ascontiguousarray(v) for v in change[3:]] if change else []
        self.image = np.empty(len(self.rows))
        self.products[:] = 0
        for product, number in zip(self.products, self.units, strict=True):
            rows, values = self.unit(number)
            mine = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
            left = [np.ascontiguousarray(v[mine]) for v in change[1:3]] if change else []
            image = self.image[mine]
            if function is None:
                lines = values.reshape(len(rows), self.size)
                if change:
                    lines[:] = change.keep * lines + np.outer(left[0], sides[0]) + np.outer(left[1], sides[1])
                image[:] = lines.astype(float) @ g
                product += image @ lines
                continue
            function(
                pointer(values), ctypes.c_long(len(rows)), ctypes.c_long(self.size),
                ctypes.c_double(change.keep if change else 1.0),
                *([pointer(v) for v in (*left, *sides)] if change else [None] * 4),
                pointer(g), pointer(image), pointer(product),
            )  # fmt: skip
        return self.products

    def dots(self, *pairs: tuple[Array, Array]) -> list[float]:
        """Inner products of vectors of which each rank has the entries of its rows. Collective.

        They are summed over the units in their order, so that they do not depend on the number of ranks.
        """
        start = self.rows.start
        edges = [self.edges[u] - start for u in (*self.units, self.units.stop)]
        parts = [[float(u[b:e] @ v[b:e]) for u, v in pairs] for b, e in pairwise(edges)]
        everything = np.array(parts).reshape(-1, len(pairs))
        if self.comm.size > 1:
            mine, counts = everything, len(pairs) * np.diff(self.shares)
            everything = np.empty((self.shares[-1], len(pairs)))
            self.comm.Allgatherv(mine, [everything, counts])
        return [sum(column, 0.0) for column in everything.T.tolist()]
