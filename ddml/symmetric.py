"""Dense symmetric matrices over the ranks of a communicator."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from . import kernels
from .errors import InputError
from .parallel import redistributed, split

Array = NDArray[np.float64]


class Change(NamedTuple):
    """The matrix H <- keep H + s a^T + q b^T; it must be symmetric. Vectors (n,)."""

    keep: float
    s: Array
    q: Array
    a: Array
    b: Array


class SymmetricMatrix:
    """A symmetric n x n matrix: each rank holds some rows of the lower triangle, packed one behind the other.

    On P ranks each stores about n^2 / 2P numbers. The rows are cut into ``units`` of equal area, and a
    product is the sum of the units' contributions: summed in their order it does not depend on P.

    Parameters
    ----------
    comm
        Ranks that share the matrix.
    size
        n.
    units
        At least as many as ranks to give each some rows.
    dtype
        float64 or float32, of what is stored; sums are in double precision.

    Raises
    ------
    InputError
        If the ranks of a node would need more than its memory for the matrix.
    """

    def __init__(self, comm: MPI.Comm, size: int, units: int, dtype: str = "float64") -> None:
        self.comm, self.size = comm, size
        self.edges = [round(size * math.sqrt(u / units)) for u in range(units + 1)]
        self.shares = split(units, comm.size)  # units of each rank
        self.units = range(self.shares[comm.rank], self.shares[comm.rank + 1])
        begin, end = (self.edges[self.shares[r]] for r in (comm.rank, comm.rank + 1))
        self.rows = range(begin, end)
        self._check_memory((self._place(end) - self._place(begin)) * np.dtype(dtype).itemsize)
        self.values = np.zeros(self._place(end) - self._place(begin), dtype)
        self.products = np.zeros((len(self.units), size))

    def _check_memory(self, needed: int) -> None:
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        here = node.allreduce(needed)
        node.Free()
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        worst = self.comm.allreduce(here / there, MPI.MAX)
        if worst > 1:
            raise InputError(
                f"a symmetric matrix for {self.size} parameters takes {worst:.1f} times the memory of a node: "
                "use more nodes, matrix_dtype float32, or -solver lbfgs -memory 50"
            )

    @staticmethod
    def _place(row: int) -> int:
        """Where a row begins in the whole packed triangle."""
        return row * (row + 1) // 2

    @property
    def _diagonal(self) -> list[int]:
        """Where the diagonal is in the values of this rank."""
        start = self._place(self.rows.start)
        return [self._place(row) + row - start for row in self.rows]

    def identity(self, scale: float = 1.0) -> None:
        """Make it a multiple of the identity."""
        self.values[:] = 0
        self.values[self._diagonal] = scale

    def shift(self, amount: float) -> None:
        """Add a multiple of the identity."""
        self.values[self._diagonal] += amount

    def multiply(self, g: Array, change: Change | None = None) -> Array:
        """Change the matrix, then the units' contributions (this rank's units, n) to its product with g (n,).

        Each rank's result is overwritten by its next call.
        """
        found = kernels.library()
        function = None if found is None else getattr(found[1], f"multiply_{_SUFFIXES[self.values.dtype.str[1:]]}")
        vectors = [np.ascontiguousarray(v) for v in (*change[1:], g)] if change else [np.ascontiguousarray(g)]
        self.products[:] = 0
        for product, unit in zip(self.products, self.units, strict=True):
            begin, end = self.edges[unit], self.edges[unit + 1]
            place = self._place(begin) - self._place(self.rows.start)
            if function is None:
                self._by_rows(self.values[place:], begin, end, vectors, change.keep if change else 1.0, product)
                continue
            pointers = [_pointer(v) for v in vectors] if change else [None] * 4 + [_pointer(vectors[0])]
            function(
                ctypes.c_void_p(self.values.ctypes.data + place * self.values.itemsize),
                ctypes.c_long(begin), ctypes.c_long(end), ctypes.c_double(change.keep if change else 1.0),
                *pointers, _pointer(product),
            )  # fmt: skip
        return self.products

    @staticmethod
    def _by_rows(values: NDArray[Any], begin: int, end: int, vectors: list[Array], keep: float, product: Array) -> None:
        """What the compiled kernel does, where there is none."""
        *change, g = vectors
        place = 0
        for row in range(begin, end):
            line = values[place : place + row + 1]
            place += row + 1
            if change:
                s, q, a, b = change
                line[:] = keep * line + s[row] * a[: row + 1] + q[row] * b[: row + 1]
            product[row] += line.astype(float) @ g[: row + 1]
            product[:row] += line[:row] * g[row]

    def double(self) -> None:
        """Store double precision from now on."""
        self.values = self.values.astype(np.float64)

    def save(self) -> PETSc.Vec:
        """The packed triangle as a distributed vector in double precision; the caller destroys it. Collective."""
        values = self.values.astype(np.float64, copy=False)
        return PETSc.Vec().createWithArray(values, (len(values), PETSc.DETERMINE), comm=self.comm)

    def load(self, vec: PETSc.Vec) -> None:
        """Take over what :meth:`save` gave, from a vector of any distribution. Collective."""
        edges = self._place(self.rows.start), self._place(self.rows.stop)
        self.values[:] = redistributed(self.comm, vec, *edges)


_SUFFIXES = {"f8": "double", "f4": "float"}


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
