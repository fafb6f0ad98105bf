"""A request to stop that reaches all ranks without a collective call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from ddml.parallel import StopRequest

_TAG = 4712  # of messages


class Relay(StopRequest):
    """Knows of signals to this rank, and of those to others of ``comm``, which tell it as soon as they look.

    Looking takes no other rank's part. :meth:`end` is collective.
    """

    def __init__(self, own: StopRequest, comm: MPI.Comm) -> None:
        super().__init__()
        self.own, self.comm = own, comm
        self._heard = 0
        self._sent: list[MPI.Request] = []

    @property
    def requested(self) -> bool:
        """Whether any rank has been asked to stop, as far as this one knows."""
        if self.own.requested and not self._sent:
            self._sent = [self.comm.isend(None, rank, _TAG) for rank in range(self.comm.size) if rank != self.comm.rank]
        while self.comm.iprobe(tag=_TAG):
            self._receive()
        return self.own.requested or self._heard > 0

    @requested.setter
    def requested(self, value: bool) -> None:
        """Nothing: signals are noted by the request of this rank."""

    def _receive(self) -> None:
        self.comm.recv(tag=_TAG)
        self._heard += 1

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """See :meth:`ddml.parallel.StopRequest.deferred`; also of the request of this rank."""
        with super().deferred(), self.own.deferred():
            yield

    def end(self) -> bool:
        """Whether any rank was asked to stop; all that was sent has been received. Collective."""
        said = self.comm.allgather((len(self._sent) > 0, self.own.requested))
        while self._heard < sum(sent for sent, _ in said) - (len(self._sent) > 0):
            self._receive()
        MPI.Request.waitall(self._sent)
        return any(asked for _, asked in said)
