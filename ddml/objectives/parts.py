"""A rank's parts of a loss, and sums over those of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.recorded import Recorded, Recorder
from ddml.numbers import Number, host, read
from ddml.parallel import Interrupted, split
from ddml.summation import Tree, leaves


class Parts(Sequence[Loss]):
    """This rank's parts of a loss; sums are collective on the layout's communicator.

    Parameters
    ----------
    loss
        The whole loss.
    layout
        Of the parameters.
    blocks
        0: each rank sums over its samples. Otherwise the samples are cut into this many blocks, the leaves of a
        :class:`ddml.summation.Tree`, so that sums are the same to the last bit on any number of ranks; each rank sums
        up the entries that it owns, and is sent little more than one vector by all of the others.
    given
        This rank's parts, if the loss has been cut already.
    record
        What records the evaluation of a part that is evaluated again (:mod:`ddml.losses.recorded`); None: nothing does.
    """

    def __init__(
        self,
        loss: Loss,
        layout: ParameterLayout,
        blocks: int,
        given: Sequence[Loss] | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.loss, self.layout, self.comm, self.blocks, self.record = loss, layout, layout.comm, blocks, record
        self._recorded: WeakKeyDictionary[Loss, Recorded | None] = WeakKeyDictionary()  # None: evaluated once
        self.own = list(self.split_over(self.comm) if given is None else given)
        self._spare: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, number: Any) -> Any:
        return self.own[number]

    def of(self, loss: Loss, given: Sequence[Loss] | None = None) -> Parts:
        """The parts of another loss, in as many blocks."""
        other = copy.copy(self)
        other.loss = loss
        other.own = list(other.split_over(self.comm) if given is None else given)
        return other

    def cut_into(self, blocks: int) -> None:
        """Cut the samples into so many blocks from now on."""
        self.blocks = blocks
        self.own = self.split_over(self.comm)

    def blocks_of(self, loss: Loss) -> int:
        """How many blocks to cut another loss into: no more than this one's, and not wastefully many."""
        return min(self.blocks, leaves(loss.count, loss.enough))

    def split_over(self, comm: MPI.Comm) -> list[Loss]:
        """This rank's blocks of the samples when the ranks of ``comm`` share them all."""
        edges = split(self.loss.count, self.blocks or comm.size)
        mine = split(len(edges) - 1, comm.size)
        return [self.loss.part(edges[i], edges[i + 1]) for i in range(mine[comm.rank], mine[comm.rank + 1])]

    def split_for(self, group: MPI.Comm) -> list[Loss]:
        """As :meth:`split_over`; where ``group`` has as many ranks as there are, these parts."""
        return list(self.own) if group.size == self.comm.size else self.split_over(group)

    @property
    def tree(self) -> Tree:
        """Over the blocks, or over the ranks where these sum for themselves."""
        return _tree(self.blocks or self.comm.size, self.comm.size)

    def value_gradient(self, number: int, theta: Tensor, gradient: Tensor) -> Number:
        """See :meth:`ddml.losses.loss.Loss.value_gradient`, of one of this rank's parts; replayed where it can be."""
        part = self.own[number]
        if self.record is None:
            return part.value_gradient(theta, gradient)
        if part not in self._recorded:
            self._recorded[part] = None
            return part.value_gradient(theta, gradient)
        replay = self._recorded[part] or Recorded(part, theta, self.record)
        self._recorded[part] = replay
        return replay(theta, gradient)

    def sum(self, values: Sequence[Number], stopped: bool = False) -> float:
        """The sum of one number for each part over all ranks; of those on a device all are read together.

        Raises
        ------
        Interrupted
            On all ranks, if any of them says that it is to be ``stopped``.
        """
        values = read(values)
        if self.comm.size == 1:
            if stopped:
                raise Interrupted
            return sum(values, 0.0)
        if self.blocks:
            counts = np.diff(self.tree.edges) + 1  # the last number of each rank is its request
            gathered = np.empty(counts.sum())
            self.comm.Allgatherv(np.array([*values, float(stopped)]), [gathered, counts])
            ends = np.cumsum(counts) - 1
            stopped = bool(gathered[ends].any())
            total = sum(np.delete(gathered, ends).tolist(), 0.0)
        else:
            pair = np.array([sum(values, 0.0), float(stopped)])
            self.comm.Allreduce(MPI.IN_PLACE, pair)
            total, stopped = float(pair[0]), pair[1] > 0
        if stopped:
            raise Interrupted
        return total

    def sum_rows(self, evaluate: Callable[[int, Tensor], None], g: PETSc.Vec) -> None:
        """Sum over all parts what ``evaluate`` adds to a vector (n,) for one of this rank's, into g."""
        self.write_rows(self.rows(evaluate), g)

    def rows(self, evaluate: Callable[[int, Tensor], None]) -> list[Tensor]:
        """What ``evaluate`` adds to a vector (n,) for each of this rank's parts, summed up over its nodes."""
        first, kept = self.tree.edges[self.comm.rank], self._spare
        dtype = torch.float32 if _numbers(self.loss) == np.float32 else torch.float64

        def leaf(number: int) -> Tensor:
            # a large one that is new takes no memory before it is written to
            row = kept.pop().zero_() if kept else torch.zeros(self.loss.size, dtype=dtype, device=self.loss.device)
            evaluate(number - first, row)
            return row

        return [self.tree.add(node, leaf, kept.append) for node in self.tree.nodes[self.comm.rank]]

    def write_rows(self, rows: list[Tensor], g: PETSc.Vec) -> None:
        """Sum the :meth:`rows` of all ranks into g; their memory serves for the next ones, unless it is large."""
        self._write(rows, g, self.layout, _numbers(self.loss))
        self._spare += rows
        if self.loss.large:
            self._spare.clear()

    def owned_rows(self, rows: list[Tensor]) -> NDArray[Any]:
        """The entries that this rank owns of the sum of the :meth:`rows` of all ranks, in their precision.

        ``rows`` is empty behind it.
        """
        given = [row.numpy() for row in host(rows)]
        rows.clear()
        if not self.blocks:
            return self.layout.summed(given[0])
        return self.layout.sum_nodes(given, self.tree, _numbers(self.loss))

    def sum_vectors(self, rows: Sequence[Tensor], g: PETSc.Vec, layout: ParameterLayout | None = None) -> None:
        """Sum vectors (n,), one for each part of this rank, over all ranks into g, of any layout; in place."""
        self._write(self._nodes(host(rows, torch.float64)), g, layout or self.layout, np.float64)

    def sum_matrices(self, product: Callable[[int], NDArray[np.float64]], width: int) -> NDArray[np.float64]:
        """Sum the matrices (n, width) that ``product`` gives for each part of this rank, over all ranks: its rows."""
        first, nodes = self.tree.edges[self.comm.rank], self.tree.nodes[self.comm.rank]
        sums = [self.tree.add(node, lambda i: product(i - first)) for node in nodes]
        return self.layout.sum_nodes(sums, self.tree, np.float64, (width,))

    def sum_everywhere(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum arrays (parts, ...), one for each part of this rank, over all ranks, on every rank."""
        sums = [node for nodes in self.comm.allgather(self._nodes(list(rows))) for node in nodes]
        return np.asarray(self.tree.total(sums))

    def _nodes(self, rows: list[Any]) -> list[Any]:
        """The sums over this rank's nodes of the tree of its parts' rows, which they are formed in."""
        first = self.tree.edges[self.comm.rank]
        return [self.tree.add(node, lambda i: rows[i - first]) for node in self.tree.nodes[self.comm.rank]]

    def _write(self, sums: list[Tensor], g: PETSc.Vec, layout: ParameterLayout, dtype: Any) -> None:
        """Write the sum over all ranks' nodes, of this type of numbers, to g; see :meth:`ParameterLayout.reduce`."""
        if not self.blocks or self.comm.size == 1:
            layout.reduce(sums[0], g)
            return
        sums = host(sums)
        with g as array:
            array[:] = layout.sum_nodes([s.numpy() for s in sums], self.tree, dtype)


def _numbers(loss: Loss) -> Any:
    """The type of numbers that the gradients of a loss are summed in."""
    return np.float32 if loss.dtype == torch.float32 else np.float64


_tree = lru_cache(maxsize=16)(Tree)
