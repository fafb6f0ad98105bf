"""Problems of which the training stalls."""

import torch

from ddml.problems import PDE, Face, Term


class Contradiction(PDE):
    """A value at an end, and another one."""

    domain = {"x": (0, 1)}
    width, depth = 6, 2

    def residual(self, u, x):
        return u.x

    def terms(self):
        ends = [Term(lambda u, x, value=value: u - value, Face(x=0), name=f"u = {value}") for value in (0, 1)]
        return [Term(self.residual), *ends]


class Overfitted(PDE):
    """Five points for a solution with ten waves."""

    domain = {"x": (0, 1)}
    width, depth = 12, 2

    def factor(self, x):
        return x

    def residual(self, u, x):
        return u.x - 30 * torch.cos(30 * x)


class Cancels(PDE):
    """A field of 1e8 whose changes are of order 1: single precision rounds them to multiples of 8."""

    domain = {"x": (0, 1)}
    width, depth = 6, 2
    scale = {"u": 1.0}

    def lift(self, x):
        return 1e8 * (1 + x)

    def factor(self, x):
        return x

    def residual(self, u, x):
        return u.x - 1e8 + u - 1e8 - 1e8 * x
