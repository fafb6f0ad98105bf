"""A problem whose terms the kernels evaluate in part."""

import numpy as np
import torch

from ddml.problems import PDE, Face, Periodic, Term


class Mixed(PDE):
    """A coefficient from a table, a term that moves its coordinate, a periodic pair, and one that is compiled."""

    domain = {"t": (0.0, 1.0), "x": (0.0, 1.0)}

    def terms(self):
        return [
            Term(self.layered),
            Term(lambda u, t, x: u - torch.sin(2 * torch.pi * x), Face(t=0), name="start"),
            Term(self.shifted, Face(x=0), name="left"),
            Term(lambda u, t, x: u - u.opposite, Periodic("x"), name="ends"),
        ]

    def layered(self, u, t, x):
        return u.t - torch.as_tensor(np.interp(x.numpy(), [0, 0.4, 0.6, 1], [0.1, 0.1, 2, 2])) * u.xx

    def shifted(self, u, t, x):
        t -= 0.5
        return 1 * u - t


class Dispersion(PDE):
    """A third derivative, which the kernels do not have."""

    domain = {"t": (0, 1), "x": (0, 1)}

    def residual(self, u, t, x):
        return u.t + u * u.x + 0.01 * u.xxx
