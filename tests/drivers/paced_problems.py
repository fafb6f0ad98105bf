"""A problem whose run takes as long as a test wants, and says that it runs."""

import os
import time
from pathlib import Path

import torch

from ddml.problems import PDE


class Paced(PDE):
    """Slow while there is a file ``slow`` here; makes a file once some iterations of a start of a job are done."""

    domain = {"x": (0.0, 1.0)}
    compiled = False
    width, depth = 8, 2
    calls = 0

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        self.calls += 1
        if Path("slow").exists():
            time.sleep(0.05)
        if self.calls == 40:  # some for each evaluation, a few before the run
            job, number = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
            Path(f"going.{job}.{number}").touch()
        return u.xx + torch.sin(9 * x)
