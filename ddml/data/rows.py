"""Rows of numbers, stored sparse or dense, and samples of two classes among them: what a linear model is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from ddml.errors import InputError

Array = NDArray[Any]
Index = slice | NDArray[np.int64]

# part of the entries that are not zero above which products with a dense matrix are faster (measured on one core: a
# multiply-add takes 0.29 ns in a dense product, 0.55 ns in a sparse one)
DENSE = 0.5
_LOOKED_AT = 4096  # rows whose zeros are counted, of those that are stored dense


class Table(Protocol):
    """Rows of numbers and a label for each.

    Attributes
    ----------
    labels : ndarray, shape (N,)
    features : int
        d, the length of a row.
    density : float
        The part of the entries that is not zero, or stored.
    """

    @property
    def labels(self) -> Array: ...

    @property
    def features(self) -> int: ...

    @property
    def density(self) -> float: ...

    def matrix(self, rows: Index) -> Any:
        """Some rows as numbers in double precision: a CSR array up to the density :data:`DENSE`, else an ndarray."""

    def free(self) -> None:
        """Give shared memory back. Collective."""


class SparseRows:
    """The rows of a matrix in compressed form (CSR), which each node holds once.

    Parameters
    ----------
    data, indices, indptr
        float64 (nnz,), and integers (nnz,) and (N + 1,) of one type, as scipy has them.
    labels
        float64 (N,).
    features
        d, the number of columns.
    origin
        Where they come from, in words.
    windows
        Shared memory that the arrays lie in, if they do.
    """

    def __init__(
        self,
        data: Array,
        indices: Array,
        indptr: Array,
        labels: Array,
        features: int,
        origin: str,
        windows: Sequence[MPI.Win] = (),
    ) -> None:
        self.data, self.indices, self.indptr, self.labels = data, indices, indptr, labels
        self.features, self.origin, self._windows = features, origin, list(windows)

    def __repr__(self) -> str:
        return (
            f"{self.origin}: {len(self.labels)} samples of {self.features} features, {self.density:.1%} of them stored"
        )

    @property
    def density(self) -> float:
        """The part of the entries that is stored."""
        return len(self.data) / max(len(self.labels) * self.features, 1)

    @cached_property
    def _whole(self) -> Any:
        return self._csr(self.data, self.indices, self.indptr)

    def _csr(self, data: Array, indices: Array, indptr: Array) -> Any:
        return sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, self.features))

    def matrix(self, rows: Index) -> Any:
        """See :meth:`Table.matrix`; consecutive rows of a sparse one are no copy."""
        if isinstance(rows, slice):
            pointers = self.indptr[rows.start : rows.stop + 1]
            begin, end = int(pointers[0]), int(pointers[-1])
            found = self._csr(self.data[begin:end], self.indices[begin:end], pointers - pointers[0])
        else:
            found = self._whole[rows]
        return found.toarray() if self.density > DENSE else found

    def free(self) -> None:
        """See :meth:`Table.free`; samples that were made before must not be used any more."""
        self.__dict__.pop("_whole", None)
        self.data, self.indices, self.indptr, self.labels = (np.empty(0) for _ in range(4))
        for window in self._windows:
            window.Free()
        self._windows = []


class DenseRows:
    """The rows of an array as a data set has them, flattened and divided by what stands for 1.

    Parameters
    ----------
    values
        (N, ...), of any type.
    labels
        (N,).
    maximum
        The value that becomes 1.
    """

    def __init__(self, values: Array, labels: Array, maximum: float = 1.0) -> None:
        self.values, self.labels, self.maximum = values, labels, maximum
        self.features = int(np.prod(values.shape[1:], dtype=int))

    @cached_property
    def density(self) -> float:
        """The part of the entries that is not zero, among the first rows."""
        few = self.values[:_LOOKED_AT]
        return float(np.count_nonzero(few)) / max(few.size, 1)

    def matrix(self, rows: Index) -> Any:
        """See :meth:`Table.matrix`."""
        stored = self.values[rows]
        numbers = np.divide(stored.reshape(len(stored), self.features), self.maximum, dtype=np.float64)
        return numbers if self.density > DENSE else sparse.csr_array(numbers)

    def free(self) -> None:
        """See :meth:`Table.free`: the data set does."""


class TwoClasses:
    """Samples of two classes among the rows of a table, see :class:`ddml.data.sample_sets.SampleSet`.

    Matrices are made when they are first asked for, of these samples only.

    Parameters
    ----------
    table
        The rows.
    classes
        The labels that become -1 and +1.
    rows
        Numbers of the samples (default: all rows with one of these labels).
    """

    def __init__(
        self, table: Table, classes: tuple[float, float], rows: range | NDArray[np.int64] | None = None
    ) -> None:
        self.table, self.classes = table, classes
        if rows is None:
            found = np.flatnonzero(np.isin(table.labels, classes))
            rows = range(len(found)) if len(found) == len(table.labels) else found
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def features(self) -> int:
        """Length d of a row."""
        return self.table.features

    @property
    def products(self) -> float:
        """Multiply-adds of a product with one row, in the mean over the table."""
        return float(self.features if self.dense else self.features * self.table.density)

    @property
    def dense(self) -> bool:
        """Whether matrices are."""
        return self.table.density > DENSE

    def part(self, begin: int, end: int) -> TwoClasses:
        """Those from ``begin`` to ``end``."""
        return TwoClasses(self.table, self.classes, self.rows[begin:end])

    def take(self, rows: Tensor) -> TwoClasses:
        """Those of these numbers (int64), counted among these samples."""
        mine = np.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, range) else self.rows
        return TwoClasses(self.table, self.classes, mine[rows.cpu().numpy()])

    @property
    def _index(self) -> Index:
        return slice(self.rows.start, self.rows.stop) if isinstance(self.rows, range) else self.rows

    @cached_property
    def matrix(self) -> Any:
        """X (B, d), a CSR array or an ndarray."""
        return self.table.matrix(self._index)

    @cached_property
    def transposed(self) -> Any:
        """X^T, which shares the memory of X."""
        return self.matrix.T

    @cached_property
    def signs(self) -> NDArray[np.float64]:
        """The classes (B,), -1 and +1."""
        return np.where(self.table.labels[self._index] == self.classes[1], 1.0, -1.0)


def two_labels(labels: Array, what: str, remedy: str = "") -> tuple[float, float]:
    """The two labels that there are, the lower one first.

    Raises
    ------
    InputError
        If there are fewer or more; ``what`` has them, and ``remedy`` is the end of its text.
    """
    found = np.unique(labels)
    if len(found) != 2:
        shown = ", ".join(f"{v:g}" for v in found[:5]) + ", ..." * (len(found) > 5)
        one = len(found) == 1
        raise InputError(
            f"{what} has {len(found)} class{'es' * (not one)}, label{'s' * (not one)} {shown}: a logistic model has two"
            + (remedy if not one else "")
        )
    return float(found[0]), float(found[1])
