"""What dense matrices over the ranks of a communicator have in common."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml import kernels
from ddml.parallel import check_memory, redistributed
from ddml.summation import Tree

Array = NDArray[np.float64]
REMEDY = "use more nodes, matrix_form symmetric, matrix_dtype float32, or -solver lbfgs -memory 50"


class DenseMatrix(ABC):
    """An n x n matrix of which each rank holds some rows, one behind the other.

    The rows are cut into ``units``, and a product is the sum of the units' contributions: added along the
    :attr:`tree` it does not depend on the number of ranks.

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

    Attributes
    ----------
    needed : int
        Bytes of what is stored on this rank; they are taken at the first use.
    """

    def __init__(self, comm: MPI.Comm, size: int, units: int, dtype: str = "float64") -> None:
        self.comm, self.size = comm, size
        self.edges = self.cut(units)
        self.tree = Tree(units, comm.size)
        self.shares = self.tree.edges  # units of each rank
        self.units = range(self.shares[comm.rank], self.shares[comm.rank + 1])
        begin, end = (self.edges[self.shares[r]] for r in (comm.rank, comm.rank + 1))
        self.rows = range(begin, end)
        self.count, self.dtype = self.place(end) - self.place(begin), dtype
        self.needed = self.count * np.dtype(dtype).itemsize
        check_memory(comm, self.needed, f"a dense matrix for {size} parameters", REMEDY)
        self.products = np.zeros((len(self.units), size))

    @cached_property
    def values(self) -> NDArray[Any]:
        """What is stored: zeros at first. The memory is taken here, so that several matrices can be summed before."""
        return np.zeros(self.count, self.dtype)

    @abstractmethod
    def cut(self, units: int) -> list[int]:
        """The first rows of all units, and n: units of equal memory."""

    @abstractmethod
    def place(self, row: int) -> int:
        """Where a row begins in the memory of the whole matrix."""

    def unit(self, number: int) -> tuple[range, NDArray[Any]]:
        """Rows and stored values of one of this rank's units."""
        begin, end = self.edges[number], self.edges[number + 1]
        start = self.place(self.rows.start)
        return range(begin, end), self.values[self.place(begin) - start : self.place(end) - start]

    def identity(self, scale: float = 1.0) -> None:
        """Make it a multiple of the identity."""
        self.values[:] = 0
        self.shift(scale)

    def shift(self, amount: float) -> None:
        """Add a multiple of the identity to what is stored."""
        start = self.place(self.rows.start)
        self.values[[self.place(row) + row - start for row in self.rows]] += amount

    def double(self) -> None:
        """Store double precision from now on."""
        self.values = self.values.astype(np.float64)

    def save(self) -> PETSc.Vec:
        """What is stored as a distributed vector in double precision; the caller destroys it. Collective."""
        values = self.values.astype(np.float64, copy=False)
        return PETSc.Vec().createWithArray(values, (len(values), PETSc.DETERMINE), comm=self.comm)

    def load(self, vec: PETSc.Vec) -> None:
        """Take over what :meth:`save` gave, from a vector of any distribution. Collective."""
        edges = self.place(self.rows.start), self.place(self.rows.stop)
        self.values[:] = redistributed(self.comm, vec, *edges)

    def enlarged(self, vec: PETSc.Vec, places: NDArray[np.int64]) -> PETSc.Vec:
        """What :meth:`save` would give of a smaller matrix's rows and columns at these places of an identity matrix.

        Collective; the caller destroys it.

        Parameters
        ----------
        vec
            What the smaller matrix gave.
        places
            Of its rows, increasing.
        """
        smaller = type(self)(self.comm, len(places), self.comm.size)
        first, last = (int(edge) for edge in np.searchsorted(places, [self.rows.start, self.rows.stop]))
        start, begin = self.place(self.rows.start), smaller.place(first)
        known = redistributed(self.comm, vec, begin, smaller.place(last))
        values = np.zeros(self.count)
        values[[self.place(row) + row - start for row in self.rows]] = 1.0
        for number in range(first, last):
            line = known[smaller.place(number) - begin : smaller.place(number + 1) - begin]
            values[self.place(int(places[number])) - start + places[: len(line)]] = line
        return PETSc.Vec().createWithArray(values, (len(values), PETSc.DETERMINE), comm=self.comm)

    def kernel(self, name: str) -> Any:
        """The compiled function of that name for what is stored, None where there is none."""
        found = kernels.library()
        return None if found is None else getattr(found[1], f"{name}_{_SUFFIXES[self.values.dtype.str[1:]]}")


_SUFFIXES = {"f8": "double", "f4": "float"}


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Where an array is, for a compiled function."""
    return ctypes.c_void_p(array.__array_interface__["data"][0])  # a tenth of the time of array.ctypes
