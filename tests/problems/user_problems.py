"""Problems as users write them."""

import numpy as np
import torch

from ddml.problems import PDE, Face, Interior, Periodic, Points, Term


class Heat(PDE):
    domain = {"t": (0, 1), "x": (0, 1)}

    def lift(self, t, x):
        return torch.sin(torch.pi * x)

    def factor(self, t, x):
        return t * x * (1 - x)

    def residual(self, u, t, x):
        return u.t - 0.1 * u.xx

    def exact(self, t, x):
        return np.exp(-0.1 * np.pi**2 * t) * np.sin(np.pi * x)


class Waves(PDE):
    """A system of two fields; every condition is a term: Dirichlet and Neumann."""

    domain = {"t": (0, 1), "x": (0, 1)}
    fields = ("u", "v")

    def terms(self):
        return [
            Term(lambda u, v, t, x: (u.t - v.x, v.t - u.x), Interior(), name="waves"),
            Term(lambda u, v, t, x: (u - torch.sin(torch.pi * x), 1 * v), Face(t=0), 10.0, "initial"),
            Term(lambda u, v, t, x: (1 * u, v.x), Face(x=0), 10.0, "left"),
            Term(lambda u, v, t, x: (1 * u, v.x), Face(x=1), 10.0, "right"),
        ]

    def exact(self, t, x):
        return np.sin(np.pi * x) * np.cos(np.pi * t), np.cos(np.pi * x) * np.sin(np.pi * t)


class SoftPeriodic(PDE):
    """Advection on a circle, the two ends tied together by a term."""

    domain = {"t": (0, 1), "x": (-np.pi, np.pi)}

    def lift(self, t, x):
        return torch.sin(x)

    def factor(self, t, x):
        return t

    def residual(self, u, t, x):
        return u.t + u.x

    def terms(self):
        ends = Term(lambda u, t, x: (u - u.opposite, u.x - u.opposite.x), Periodic("x"), 1.0, "ends")
        return [Term(self.residual), ends]

    def exact(self, t, x):
        return np.sin(x - t)


class HardPeriodic(SoftPeriodic):
    """The same with a network that is periodic by what it is given."""

    def embed(self, t, x):
        return t, torch.cos(x), torch.sin(x)

    def terms(self):
        return [Term(self.residual)]


class Inverse(Heat):
    """The diffusion coefficient from fifty measurements."""

    coefficients = {"nu": 0.5}
    true_coefficients = {"nu": 0.1}

    def residual(self, u, t, x, nu):
        return u.t - nu * u.xx

    def terms(self):
        places = np.random.default_rng(1).uniform(0.05, 0.95, (50, 2))
        values = self.exact(*places.T)
        data = Term(lambda u, t, x, nu, measured: u - measured, Points(places, measured=values), 10.0, "data")
        return [Term(self.residual), data]


class Decay(PDE):
    """An ordinary differential equation."""

    domain = {"t": (0, 2)}

    def lift(self, t):
        return torch.ones_like(t)

    def factor(self, t):
        return t

    def residual(self, u, t):
        return u.t + u

    def exact(self, t):
        return np.exp(-t)
