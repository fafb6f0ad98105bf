"""Problems that get in the way of the run that they are in: by signals, and so that its file cannot be written."""

import os
import resource
import signal
import time
from pathlib import Path

import torch
from mpi4py import MPI

from ddml.problems import PDE

WHO = MPI.COMM_WORLD.size - 1  # the rank that does it, where one is enough
SOFT, HARD = resource.getrlimit(resource.RLIMIT_FSIZE)


class Hindering(PDE):
    """Does something at one call of its residual and takes it back at a later one."""

    domain = {"x": (0.0, 1.0)}
    compiled = False
    calls, first, last = 0, 60, 110

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        self.calls += 1
        if self.calls == self.first:
            self.hinder()
        if self.calls == self.last:
            self.relent()
        return u.xx + torch.sin(3 * x)

    def hinder(self):
        pass

    def relent(self):
        pass


class Interrupted(Hindering):
    def hinder(self):
        if MPI.COMM_WORLD.rank == WHO:
            os.kill(os.getpid(), signal.SIGINT)


class HungUp(Hindering):
    def hinder(self):
        if MPI.COMM_WORLD.rank == WHO:
            os.kill(os.getpid(), signal.SIGHUP)


class InterruptedAtOnce(Hindering):
    """Before there is a first value."""

    first = 1

    def hinder(self):
        if MPI.COMM_WORLD.rank == WHO:
            os.kill(os.getpid(), signal.SIGINT)


class InterruptedInItsConstructor(Hindering):
    def __init__(self):
        if MPI.COMM_WORLD.rank == WHO:
            os.kill(os.getpid(), signal.SIGINT)


class SleepsInItsConstructor(Hindering):
    def __init__(self):
        print("asleep", flush=True)
        time.sleep(60)


class SmallFiles(Hindering):
    """A limit of 8 kB on the size of files."""

    def hinder(self):
        if MPI.COMM_WORLD.rank == WHO:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, HARD))

    def relent(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (SOFT, HARD))


class SmallFilesForEver(SmallFiles):
    last = 0


class SmallFilesOfRank0(SmallFiles):
    def hinder(self):
        if MPI.COMM_WORLD.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, HARD))


class FolderGone(Hindering):
    """The folder of the run file has another name for some time."""

    def hinder(self):
        if MPI.COMM_WORLD.rank == 0:
            folder = Path(os.environ["HINDERED"])
            folder.rename(folder.with_name("elsewhere"))

    def relent(self):
        if MPI.COMM_WORLD.rank == 0:
            folder = Path(os.environ["HINDERED"])
            folder.with_name("elsewhere").rename(folder)


class FileInItsPlace(FolderGone):
    """And a file has its name."""

    def hinder(self):
        super().hinder()
        if MPI.COMM_WORLD.rank == 0:
            Path(os.environ["HINDERED"]).write_text("in the way")

    def relent(self):
        if MPI.COMM_WORLD.rank == 0:
            Path(os.environ["HINDERED"]).unlink()
        super().relent()
