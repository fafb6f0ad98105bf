"""Small collective helpers: splitting ranges over ranks, agreeing on errors, stopping on signals."""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import numpy as np
import petsc4py
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from .errors import CollectiveError, InputError, NonFiniteError, RunFileError
from .version import refuse_old

refuse_old(petsc4py.__version__)


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
    """Run a block; an exception on one rank becomes the same exception on all, with the text of the first.

    Collective on ``comm``. The block makes no collective calls on it, but it may on parts of it (groups that work side
    by side), or calls that fail on all ranks together. :class:`InputError` becomes a CollectiveError; NonFiniteError
    and :class:`Interrupted` stay what they are, also where PETSc has wrapped them; anything else appears as a
    RuntimeError, of which its own rank keeps the original as the cause.

    A rank with an exception other than Interrupted waits 4 s (our choice) for the others: those that are still at work
    then, or wait for this one in a call of the block, cannot agree, and it raises what it has on its own.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    arrival = comm.Ibarrier()
    if error is None or cause(error, Interrupted) is not None:
        arrival.Wait()
    elif not _patiently(arrival.Test):
        raise error
    texts = comm.allgather(None if error is None else _described(error, comm.rank))
    failed = next((rank for rank, text in enumerate(texts) if text is not None), None)
    if failed is None:
        return
    kind, text = texts[failed]
    try:
        raise kind(text) from error
    finally:
        del error  # whose frames hold this one: what they know would live on, and on one rank only


def _described(error: Exception, rank: int) -> tuple[type[Exception], str]:
    """What all ranks raise for an exception of one, and the text."""
    for kind, common in ((Interrupted, Interrupted), (InputError, CollectiveError), (NonFiniteError, NonFiniteError)):
        found = cause(error, kind)
        if found is not None:
            return common, str(found)
    *_, root = _chain(error)
    return RuntimeError, f"{type(root).__name__} on rank {rank}: {root}"


def ranks_that_meet(comm: MPI.Comm) -> list[int]:
    """Ranks that call this within 4 s (our choice), this one included: for errors that should be on all of them."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sent = [comm.isend(comm.rank, rank, _MEETING) for rank in others]
    met = {comm.rank}

    def complete() -> bool:
        while comm.iprobe(tag=_MEETING):
            met.add(comm.recv(tag=_MEETING))
        return len(met) == comm.size

    if _patiently(complete):
        MPI.Request.waitall(sent)
    return sorted(met)


@contextmanager
def together(comm: MPI.Comm) -> Iterator[None]:
    """Run a block that ranks can only go on from together; no call where it ends well.

    A rank with an error of which the others have none 4 s later (our choice) raises it, and ends the whole job where it
    ends itself: the others wait for it in some call.
    """
    try:
        yield
    except Exception:
        if comm.size > 1 and len(ranks_that_meet(comm)) < comm.size:
            _LOST.append(comm.rank)
        raise


_LOST: list[int] = []


def _end() -> None:
    """End all ranks where this one ends by an error, or without the others, for whom PETSc would wait at its end."""
    unhandled = isinstance(getattr(sys, "last_value", None), Exception)
    if (_LOST or unhandled) and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


atexit.register(_end)


def _patiently(test: Callable[[], bool]) -> bool:
    """Ask until it is true or the patience is over."""
    end = time.monotonic() + _PATIENCE
    while not test():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


_PATIENCE, _MEETING = 4.0, 4711  # seconds; tag of messages

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_ECHO = 0.2  # seconds in which the terminal and mpiexec may both pass one Ctrl-C on (our choice)


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
    return next((link for link in _chain(error) if isinstance(link, kind)), None)


def words_of(error: PETSc.Error) -> str:
    """What PETSc itself says in an error of its own, without where it came from."""
    return str(error).splitlines()[-1].partition("] ")[2]


def release(error: BaseException) -> None:
    """Forget what the calls knew that an error has ended, PETSc's callbacks among them.

    The objects that these were given would live as long as the error, on some ranks longer than on others: PETSc's last
    act, in which ranks agree on what is left, would wait for ever.
    """
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it goes back to; one that was raised from what it had caused makes a ring."""
    seen: list[BaseException] = []
    while error is not None and all(error is not link for link in seen):
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


class StopRequest:
    """Remembers signals that ask to stop, so that evaluations can stop a run on all ranks together.

    They are :data:`SIGNALS`. A second SIGINT ends the process at once. The handlers are in force within
    :meth:`listening`, and only there: importing ddml changes nothing.

    Attributes
    ----------
    requested : bool
        Whether there has been one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferrals = 0
        self._interrupted = math.inf  # when the first SIGINT came

    @property
    def due(self) -> bool:
        """Whether what is running should stop now."""
        return self.requested and self._deferrals == 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Run a block that is finished before the program stops."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within a block; a SIGHUP that is ignored, as behind nohup, stays so."""
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if now > self._interrupted + _ECHO:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted = min(self._interrupted, now)

    def check(self, comm: MPI.Comm) -> None:
        """Raise :class:`Interrupted` on all ranks of ``comm`` if any of them was asked to stop. Collective."""
        if comm.allreduce(self.due, MPI.LOR):
            raise Interrupted


@contextmanager
def agreed_file(comm: MPI.Comm, action: str, advice: str) -> Iterator[None]:
    """Make an error of the file system inside the block on any rank a RunFileError on all ranks.

    Collective on `comm` at the end of the block, so the block itself must hold no collective call.

    Parameters
    ----------
    comm : MPI.Comm
        The ranks that enter the block.
    action, advice : str
        First and last part of the message that an OSError is turned into.

    Raises
    ------
    RunFileError
        On all ranks, for an OSError or InputError on any rank.
    RuntimeError
        On all ranks, for any other error on any rank.
    """
    try:
        with agreed(comm):
            try:
                yield
            except OSError as error:
                raise RunFileError(f"{action}: {error.strerror or error} (rank {comm.rank}); {advice}") from error
    except InputError as error:
        raise RunFileError(f"{error}") from error
