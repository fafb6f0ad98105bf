"""Small collective helpers: splitting ranges over ranks, agreeing on errors, stopping on signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from .errors import CollectiveError, InputError


def split(count: int, parts: int) -> list[int]:
    """Boundaries (parts + 1) of ``parts`` contiguous ranges of ``range(count)``, sizes differing by at most one."""
    return [count * i // parts for i in range(parts + 1)]


def own(count: int, comm: MPI.Comm, blocks: int = 0) -> list[slice]:
    """This rank's share of ``blocks`` contiguous parts of ``range(count)``; 0: one part a rank."""
    edges = split(count, blocks or comm.size)
    mine = split(len(edges) - 1, comm.size)
    return [slice(edges[i], edges[i + 1]) for i in range(mine[comm.rank], mine[comm.rank + 1])]


def summed(comm: MPI.Comm, found: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The sums (k,) over the parts of :func:`own`, in their order, of k numbers for each of this rank's. Collective."""
    rows = [row for here in comm.allgather(found) for row in here]
    total = np.zeros(len(rows[0]))
    for row in rows:  # one by one: numpy's sums are in an order of their own
        total += row
    return total


@contextmanager
def agreed(comm: MPI.Comm) -> Iterator[None]:
    """Run a block without collective calls; an exception on one rank becomes the same exception on all.

    Collective on ``comm``. An :class:`InputError` stays one; anything else that another rank
    raised appears as a RuntimeError with its text, its own rank keeps the original as the cause.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    texts = comm.allgather(None if error is None else (isinstance(error, InputError), f"{error}", type(error).__name__))
    failed = next((rank for rank, text in enumerate(texts) if text is not None), None)
    if failed is None:
        return
    if isinstance(error, InputError) and failed == comm.rank:
        raise error
    ours, text, kind = texts[failed]
    if ours:
        raise InputError(text) from error
    raise RuntimeError(f"{kind} on rank {failed}: {text}") from error


def check_memory(comm: MPI.Comm, needed: int, what: str, remedy: str) -> None:
    """Raise a CollectiveError if those of a node need more bytes than it has memory. Collective.

    ``what`` and ``remedy`` are parts of its text.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    here = node.allreduce(needed)
    node.Free()
    worst = comm.allreduce(here / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), MPI.MAX)
    if worst > 1:
        raise CollectiveError(f"{what} takes {worst:.1f} times the memory of a node: {remedy}")


def redistributed(comm: MPI.Comm, vec: PETSc.Vec, begin: int, end: int) -> NDArray[np.float64]:
    """The entries from ``begin`` to ``end`` of a distributed vector, other ones on every rank. Collective."""
    ranges = comm.allgather((*vec.getOwnershipRange(), begin, end))
    mine = vec.getOwnershipRange()
    send = [max(min(mine[1], stop) - max(mine[0], start), 0) for _, _, start, stop in ranges]
    receive = [max(min(b, end) - max(a, begin), 0) for a, b, _, _ in ranges]
    buffer = np.empty(end - begin)
    comm.Alltoallv([vec.array_r, send, MPI.DOUBLE], [buffer, receive, MPI.DOUBLE])
    return buffer


class Interrupted(Exception):
    """A signal asked the run to stop; raised on every rank of the communicator that noticed it together."""


def cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The exception of some kind that an error goes back to, if any: PETSc wraps what its callbacks raise."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, so that evaluations can stop a run on all ranks together.

    The handlers are installed by :meth:`listen`, and only there: importing ddml changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Install the handlers in this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def check(self, comm: MPI.Comm) -> None:
        """Raise :class:`Interrupted` on all ranks of ``comm`` if any of them was asked to stop. Collective."""
        if comm.allreduce(self.requested, MPI.LOR):
            raise Interrupted
