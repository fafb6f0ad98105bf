"""Burgers' equation (facts of the SPQN paper: Kopanicakova, Kothari, Karniadakis, Krause 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddml.problems.equations import references
from ddml.problems.pde.fields import Field
from ddml.problems.pde.pde import PDE, Array


class Burgers(PDE):
    """u_t + u u_x = nu u_xx with nu = 0.01 / pi, u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0.

    Hard conditions u = -sin(pi x) + t (1 - x^2) N; reference by Cole-Hopf.
    """

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    width, depth = 20, 8
    viscosity = 0.01 / math.pi

    def lift(self, t: Tensor, x: Tensor) -> Tensor:
        return -torch.sin(math.pi * x)

    def factor(self, t: Tensor, x: Tensor) -> Tensor:
        return t * (1 - x**2)

    def residual(self, u: Field, t: Tensor, x: Tensor) -> Tensor:
        return u.t + u * u.x - self.viscosity * u.xx

    def exact(self, t: Tensor, x: Tensor) -> Array:
        return references.burgers(t, x, self.viscosity)
