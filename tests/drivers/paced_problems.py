"""A problem whose run takes as long as a test wants, and says that it runs."""

import os
import signal
import time
from pathlib import Path

import torch

from ddml.problems import PDE


def wait_for_sigterm() -> None:
    """Return when it has come, and whoever handles it has done so."""
    came, handler = [], signal.getsignal(signal.SIGTERM)

    def noted(number, frame):
        handler(number, frame)
        came.append(number)

    signal.signal(signal.SIGTERM, noted)
    while not came:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, handler)


class Paced(PDE):
    """After some iterations of a start of a job it makes a file, and is slow while there is a file ``slow`` here.

    Where there is a file ``stuck``, the first iteration of each start waits until it is asked to stop.
    """

    domain = {"x": (0.0, 1.0)}
    compiled = False
    width, depth = 8, 2
    calls = 0

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        self.calls += 1
        if self.calls == 14 and Path("stuck").exists():  # its line search takes 16, what is before it up to 13
            wait_for_sigterm()
        if self.calls >= 40 and Path("slow").exists():
            time.sleep(0.5)
        if self.calls == 40:  # four for each evaluation on one rank, a few before the run
            task, number = os.environ.get("SLURM_ARRAY_TASK_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
            Path(f"going{task}.{number}").touch()
        return u.xx + torch.sin(9 * x)
