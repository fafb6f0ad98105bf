"""Problems in units that people use, and some of which the scales contradict each other."""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp

from ddml.problems import PDE, Face, Interior, Points, Term

ALPHA, LENGTH, END = 1e-6, 0.1, 3600.0


class Rod(PDE):
    """A rod of 10 cm that cools for an hour, in metres, seconds and kelvin."""

    domain = {"t": (0, END), "x": (0, LENGTH)}
    width, depth = 20, 3

    def lift(self, t, x):
        return 293.15 + 80 * torch.sin(torch.pi * x / LENGTH)

    def factor(self, t, x):
        return t * x * (LENGTH - x)

    def residual(self, u, t, x):
        return u.t - ALPHA * u.xx

    def exact(self, t, x):
        return 293.15 + 80 * np.exp(-ALPHA * (np.pi / LENGTH) ** 2 * t) * np.sin(np.pi * x / LENGTH)


class RodOfTerms(Rod):
    """The same with conditions that are terms: nothing but these says that the field is of some hundred kelvin."""

    lift, factor = PDE.lift, PDE.factor

    def terms(self):
        start = Term(lambda u, t, x: u - 293.15 - 80 * torch.sin(torch.pi * x / LENGTH), Face(t=0), name="start")
        ends = [Term(lambda u, t, x: u - 293.15, Face(x=end), name=f"end {end}") for end in (0, LENGTH)]
        return [Term(self.residual), start, *ends]


class People(PDE):
    """Logistic growth of a population, in persons and years of the calendar."""

    domain = {"t": (1950, 2020)}
    width, depth = 12, 2

    def lift(self, t):
        return 2.5e9 + 0 * t

    def factor(self, t):
        return t - 1950

    def residual(self, u, t):
        return u.t - 0.03 * u * (1 - u / 1e10)

    def exact(self, t):
        return 1e10 / (1 + 3 * np.exp(-0.03 * (t - 1950)))


class Wave(PDE):
    """Light of 500 nm in metres."""

    domain = {"x": (0, 5e-7)}
    width, depth = 12, 2
    k = 2 * math.pi / 5e-7

    def lift(self, x):
        return 1 + 0 * x

    def factor(self, x):
        return x**2

    def residual(self, u, x):
        return u.xx + self.k**2 * u

    def exact(self, x):
        return np.cos(self.k * x)


class Bar(PDE):
    """Displacements of micrometres under a load of 1e5 N/m: nothing but the equation says how large they are."""

    domain = {"x": (0, 2)}
    width, depth = 12, 2
    stiffness = 2e11

    def factor(self, x):
        return x * (2 - x)

    def residual(self, u, x):
        return self.stiffness * u.xx + 1e5

    def exact(self, x):
        return 1e5 / self.stiffness * x * (2 - x) / 2 + 0 * x


class Said(Bar):
    """The same, where the user says it."""

    scale = {"u": 1e-6}


class Measured(PDE):
    """A decay in nanoseconds, of measurements in volts around 1e-4."""

    domain = {"t": (0, 5e-8)}
    width, depth = 12, 2
    coefficients = {"rate": 1.0}
    true_coefficients = {"rate": 2.0}

    def residual(self, u, t, rate):
        return 1e-7 * u.t + 10 * rate * u / 2

    def terms(self):
        times = np.linspace(0, 5e-8, 40)
        data = Term(lambda u, t, rate, volts: u - volts, Points(times[:, None], volts=self.exact(times)), name="data")
        return [Term(self.residual, Interior(200)), data]

    def exact(self, t):
        return 1e-4 * np.exp(-1e8 * np.asarray(t))


class Unmatched(Rod):
    """A diffusivity in the wrong unit."""

    def residual(self, u, t, x):
        return u.t - 1e-15 * u.xx


class OwnEmbed(Rod):
    """An embed of the user's that leaves the seconds as they are."""

    def embed(self, t, x):
        return t, x / LENGTH


class Weighed(RodOfTerms):
    """Weights that the user has chosen, and that leave the equation out of scale."""

    def terms(self):
        equation, *others = super().terms()
        return [equation, *(Term(o.residual, o.where, 1e6, o.name) for o in others)]


class OnlyMeasured(PDE):
    """A curve through points, no equation."""

    domain = {"t": (0, 1)}
    width, depth = 8, 2

    def terms(self):
        times = np.linspace(0, 1, 20)
        return [Term(lambda u, t, value: u - value, Points(times[:, None], value=np.sin(times)), name="data")]


class SmallLift(Bar):
    """A lift that is no measure of the solution, which the source makes of order 1."""

    stiffness = 1e5

    def lift(self, x):
        return 1e-6 * x


class Lorenz(PDE):
    """Lorenz's system forward to t = 3: spirals of which a small slip early takes the other branch."""

    domain = {"t": (0, 3)}
    fields = ("x", "y", "z")
    width, depth = 24, 3
    start = (-8.0, 7.0, 27.0)

    def lift(self, t):
        return tuple(value + 0 * t for value in self.start)

    def factor(self, t):
        return 10 * t

    def residual(self, x, y, z, t):
        return x.t - 10 * (y - x), y.t - x * (15 - z) + y, z.t - x * y + 8 / 3 * z

    def exact(self, t):
        def slope(_, q):
            return [10 * (q[1] - q[0]), q[0] * (15 - q[2]) - q[1], q[0] * q[1] - 8 / 3 * q[2]]

        return tuple(solve_ivp(slope, (0, 3), self.start, dense_output=True, rtol=1e-11, atol=1e-11).sol(t.numpy()))


class EarlyFirst(Lorenz):
    """The same with residuals that weigh less the later they are."""

    def residual(self, x, y, z, t):
        pieces = super().residual(x, y, z, t)
        return tuple(torch.exp(-2 * t) * r for r in pieces)
