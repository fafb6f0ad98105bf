"""What one rank does alone for all: each needs what comes of it, but only one has to take the time."""

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

T = TypeVar("T")


def on_one_rank(make: Callable[[MPI.Comm], T]) -> T:
    """What ``make`` returns, or raises, on the first rank, with a communicator of its own. Collective."""
    world, found, failure = MPI.COMM_WORLD, None, None
    if world.rank == 0:
        try:
            found = make(MPI.COMM_SELF)
        except Exception as error:
            failure = error
    found, failure = world.bcast((found, failure))
    if failure is not None:
        raise failure
    return found  # type: ignore[return-value]
