"""Problems as users get them wrong."""

import torch

from ddml.problems import PDE, Face, Points, Term


class Right(PDE):
    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}

    def residual(self, u, t, x):
        return u.t - u.xx


class NotAProblem:
    pass


class WrongShape(Right):
    def residual(self, u, t, x):
        return (u.t - u.xx).sum()


class NoTensor(Right):
    def residual(self, u, t, x):
        return 1.0


class UnknownDerivative(Right):
    def residual(self, u, t, x):
        return u.t - u.yy


class Raises(Right):
    def residual(self, u, t, x):
        return u.t - self.viscosity * u.xx


class NotANumber(Right):
    def residual(self, u, t, x):
        return u.t - torch.sqrt(-1 - x * x)


class Nowhere(Right):
    domain = {"t": (0.0, 1.0), "x": (1.0, 1.0)}


class LongName(Right):
    domain = {"t": (0.0, 1.0), "xi": (-1.0, 1.0)}


class NoDomain(PDE):
    def residual(self, u, t, x):
        return u.t


class Unbounded(Right):
    domain = {"t": (0.0, float("inf")), "x": (-1.0, 1.0)}


class NoInterval(Right):
    domain = {"t": 1.0, "x": (-1.0, 1.0)}


class Empty(PDE):
    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}


class NoTerms(Right):
    def terms(self):
        return []


class FaceElsewhere(Right):
    def terms(self):
        return [Term(self.residual), Term(lambda u, t, x: u.value, Face(y=0))]


class TooFewData(Right):
    def terms(self):
        return [Term(lambda u, t, x, measured: u - measured, Points([[0.0, 0.0], [1.0, 0.0]], measured=[1.0]))]


class WrongLift(Right):
    def lift(self, t, x):
        return 1.0


class WrongExact(Right):
    def exact(self, t, x):
        return t[:3]


class BadCoefficient(Right):
    coefficients = {"nu": "large"}

    def residual(self, u, t, x, nu):
        return u.t - nu * u.xx


class BadConstructor(Right):
    def __init__(self):
        raise OSError("no such table")
