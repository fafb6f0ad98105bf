"""Problems of the kind that people report of other programs, small slips in them."""

import numpy as np
import torch

from ddml.problems import PDE, Face, Points, Term


class Base(PDE):
    """u'' = -pi^2 sin(pi x), u = sin(pi x)"""

    domain = {"x": (0, 1)}
    width, depth = 12, 2

    def factor(self, x):
        return x * (1 - x)

    def residual(self, u, x):
        return u.xx + torch.pi**2 * torch.sin(torch.pi * x)

    def exact(self, x):
        return np.sin(np.pi * x)


class ShiftsItsCoordinate(Base):
    """x -= 0.5 inside: u'' = -pi^2 cos(pi (x - 1/2)), which is the same problem"""

    def residual(self, u, x):
        x -= 0.5
        return u.xx + torch.pi**2 * torch.cos(torch.pi * x)


class FaceOutside(Base):
    """a wall at x = 2, where there is no domain (meant: x = 1)"""

    def factor(self, x):
        return x

    def terms(self):
        return [Term(self.residual), Term(lambda u, x: u.value, Face(x=2), 10.0, "wall")]


class WeightNegative(Base):
    def terms(self):
        return [Term(self.residual, weight=-1.0)]


class MaskedExact(Base):
    """the solution is known in half of the domain only"""

    def exact(self, x):
        return np.where(x < 0.5, np.sin(np.pi * x), np.nan)


class ScaledInput(Base):
    """what the network sees is scaled to (-1, 1); one coordinate, so one tensor"""

    def embed(self, x):
        return 2 * x - 1


class TenDimensions(PDE):
    """Laplace u = 2 for u = the sum of x_i^2 / 10, given at points of the boundary"""

    domain = dict.fromkeys("abcdefghij", (0, 1))
    width, depth = 20, 2

    def residual(self, u, *x):
        return sum(getattr(u, 2 * c) for c in self.domain) - 2

    def terms(self):
        p = np.random.default_rng(0).uniform(size=(800, 10))
        p[np.arange(800), np.arange(800) % 10] = np.arange(800) // 10 % 2
        return [Term(self.residual), Term(self.wall, Points(p, given=(p**2).mean(axis=1)), 10.0, "wall")]

    def wall(self, u, *x, given):
        return u - given

    def exact(self, *x):
        return sum(c * c for c in x) / 10


class Complex(PDE):
    """A plane wave exp(i k x) of Helmholtz's equation, its residual written with complex numbers"""

    domain = {"x": (0, 1)}
    fields = ("a", "b")
    width, depth = 16, 3
    k = 4.0

    def lift(self, x):
        return 1 + 0 * x, self.k * x

    def factor(self, x):
        return x**2

    def residual(self, a, b, x):
        return torch.complex(a.xx, b.xx) / self.k**2 + torch.complex(a.value, b.value)

    def exact(self, x):
        return np.cos(self.k * x), np.sin(self.k * x)


class ExactTurned(Base):
    """a system whose solution comes as a table (fields, points), as solve_ivp gives it"""

    domain = {"t": (0, 1)}
    fields = ("a", "b")

    def factor(self, t):
        return t

    def residual(self, a, b, t):
        return a.t - 1, b.t + 1

    def exact(self, t):
        return np.stack([t, -t])
