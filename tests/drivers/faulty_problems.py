"""Problems that go wrong while they run."""

import torch
from mpi4py import MPI

from ddml.problems import PDE

CALLS = 0


class Simple(PDE):
    domain = {"x": (0.0, 1.0)}

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        return u.xx + torch.sin(3 * x)


class RaisesOnOneRank(Simple):
    compiled = False

    def residual(self, u, x):
        global CALLS
        CALLS += 1
        if CALLS > 60 and MPI.COMM_WORLD.rank == 1:
            raise FloatingPointError("the second rank had enough")
        return super().residual(u, x)


class RunsOutOfMemory(Simple):
    """As on a card that others use, too."""

    compiled = False

    def residual(self, u, x):
        global CALLS
        CALLS += 1
        if CALLS > 90:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
                "10.21 GiB is free. Including non-PyTorch memory, this process has 68.88 GiB memory in use."
            )
        return super().residual(u, x)


class NotEverywhereDefined(Simple):
    """Not a number where the solution would go: only trials that stay away from there can be accepted."""

    def residual(self, u, x):
        return u.xx + 20 + 0 * torch.log(1.0 - u)


class BecomesNotANumber(Simple):
    """Not a number at every point from some evaluation on."""

    compiled = False

    def residual(self, u, x):
        global CALLS
        CALLS += 1
        return super().residual(u, x) * (float("nan") if CALLS > 200 else 1.0)
