"""Problems whose runs take as long as a test wants."""

import os
import time
from pathlib import Path

import torch

from ddml.problems import PDE


class Paced(PDE):
    """An evaluation takes its time while there is a file ``slow`` in the folder that the variable PACED names."""

    domain = {"x": (0.0, 1.0)}
    compiled = False
    width, depth = 8, 2

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        if (Path(os.environ["PACED"]) / "slow").exists():
            time.sleep(0.05)
        return u.xx + torch.sin(9 * x)
