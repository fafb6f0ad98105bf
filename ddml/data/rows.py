"""Rows of numbers, stored sparse or dense, and samples of two classes among them: what a linear model is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from ddml.errors import InputError
from ddml.parallel import split

from .data_set import shared_arrays

Array = NDArray[Any]
Index = slice | NDArray[np.int64]

# part of the entries that are not zero above which products with a dense matrix are faster (measured on one core: a
# multiply-add takes 0.29 ns in a dense product, 0.55 ns in a sparse one)
DENSE = 0.5
# entries up to which a matrix is dense in any case: what scipy does besides takes longer (measured, our choice)
SMALL = 1 << 13
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
        """Some rows in double precision: an ndarray above the density :data:`DENSE`, a CSR array or either below."""

    def free(self) -> None:
        """Give shared memory back. Collective."""


@dataclass
class Entries:
    """A rank's rows before they are joined: what is stored of them.

    Attributes
    ----------
    labels, counts : ndarray
        Of each row (B,): its label, and how many values it has.
    indices, values : ndarray
        int64 and float64, of all of them one behind the other.
    """

    labels: Array
    counts: Array
    indices: Array
    values: Array

    @classmethod
    def joined(cls, pieces: Sequence[Entries]) -> Entries:
        """Those of several pieces."""
        nothing = cls(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        columns = zip(*((p.labels, p.counts, p.indices, p.values) for p in (nothing, *pieces)), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    @property
    def lowest(self) -> int:
        """The lowest index; of none one that no other is above."""
        return int(self.indices.min()) if len(self.indices) else np.iinfo(np.int64).max

    @property
    def highest(self) -> int:
        """The highest index; of none -1."""
        return int(self.indices.max()) if len(self.indices) else -1


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
        number = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        small = number * self.features <= SMALL
        if not (small or self.density > DENSE or isinstance(rows, slice)):
            return self._whole[rows]
        places: Any
        if isinstance(rows, slice):
            pointers = self.indptr[rows.start : rows.stop + 1]
            counts, places = np.diff(pointers), slice(pointers[0], pointers[-1])
            ends = pointers[1:] - pointers[0]
        else:
            starts = self.indptr[rows]
            counts = self.indptr[rows + 1] - starts
            ends = np.cumsum(counts)
            places = np.repeat(starts - ends + counts, counts) + np.arange(counts.sum())
        data, indices = self.data[places], self.indices[places]
        if not (small or self.density > DENSE):
            return self._csr(data, indices, np.concatenate(([0], ends)).astype(indices.dtype))
        found = np.zeros((number, self.features))
        found[np.repeat(np.arange(number), counts), indices] = data
        return found

    def free(self) -> None:
        """See :meth:`Table.free`; samples that were made before must not be used any more."""
        self.__dict__.pop("_whole", None)
        self.data, self.indices, self.indptr, self.labels = (np.empty(0) for _ in range(4))
        for window in self._windows:
            window.Free()
        self._windows = []


def gathered(mine: Entries, comm: MPI.Comm, node: MPI.Comm, first: int, features: int, origin: str) -> SparseRows:
    """The rows of all ranks, in their order, once in each ``node``; its indices begin with ``first``. Collective."""
    sizes = np.array(comm.allgather((len(mine.labels), len(mine.indices))))
    ends = np.concatenate(([[0, 0]], np.cumsum(sizes, axis=0)))
    count, stored = (int(n) for n in ends[-1])
    integers = np.int32 if max(stored, features) < 2**31 else np.int64  # as scipy chooses them
    arrays, windows = shared_arrays(
        {
            "data": ((stored,), np.float64), "indices": ((stored,), integers), "indptr": ((count + 1,), integers),
            "labels": ((count,), np.float64),
        }, node,
    )  # fmt: skip

    def share(rank: int) -> dict[str, Array]:
        (a, b), (c, d) = ends[rank], ends[rank + 1]
        places = {"data": slice(b, d), "indices": slice(b, d), "indptr": slice(a + 1, c + 1), "labels": slice(a, c)}
        return {name: arrays[name][where] for name, where in places.items()}

    values = {
        "data": mine.values, "indices": mine.indices - first, "labels": mine.labels,
        "indptr": ends[comm.rank, 1] + np.cumsum(mine.counts),
    }  # fmt: skip
    for name, here in share(comm.rank).items():
        here[:] = values[name]
    if node.rank == 0:
        arrays["indptr"][0] = 0
    for window in windows:
        window.Fence()
    leaders = comm.Split(0 if node.rank == 0 else MPI.UNDEFINED, comm.rank)
    homes = comm.allgather(node.bcast(leaders.rank if leaders != MPI.COMM_NULL else None))
    if leaders != MPI.COMM_NULL:
        for rank, home in enumerate(homes if leaders.size > 1 else ()):
            for here in share(rank).values():
                leaders.Bcast(here, home)
        leaders.Free()
    for window in windows:
        window.Fence()
    return SparseRows(**arrays, features=features, origin=origin, windows=windows)


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
        """See :meth:`Table.matrix`: an ndarray."""
        stored = self.values[rows]
        return np.divide(stored.reshape(len(stored), self.features), self.maximum, dtype=np.float64)

    def compressed(self, rows: NDArray[np.int64], comm: MPI.Comm) -> SparseRows:
        """Some rows in compressed form, of which each rank makes a share. Collective."""
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        edges = split(len(rows), comm.size)
        pieces = []
        for begin in range(edges[comm.rank], edges[comm.rank + 1], _LOOKED_AT):
            some = rows[begin : min(begin + _LOOKED_AT, edges[comm.rank + 1])]
            x = sparse.csr_array(self.matrix(some))
            labels, counts = self.labels[some].astype(np.float64), np.diff(x.indptr)
            pieces.append(Entries(labels, counts.astype(np.int64), x.indices.astype(np.int64), x.data))
        found = gathered(Entries.joined(pieces), comm, node, 0, self.features, "rows of a data set")
        node.Free()
        return found

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
        """Whether matrices are, small ones apart."""
        return isinstance(self.table, DenseRows) or self.table.density > DENSE

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
