"""The Allen-Cahn equation of the SPQN paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddml.problems.equations import references
from ddml.problems.pde.fields import Field
from ddml.problems.pde.pde import PDE, Array


class AllenCahn(PDE):
    """u_t - D u_xx - 5 (u - u^3) = 0 with D = 0.001, u(0, x) = x^2 cos(pi x), u(t, -1) = u(t, 1) = -1.

    Hard conditions u = x^2 cos(pi x) + t (1 - x^2) N (our choice); reference by a spectral method. The network is 20x4
    (our choice); the paper's is 64x6: ``-width 64 -depth 6``.
    """

    domain = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    width, depth = 20, 4
    diffusion = 1e-3

    def lift(self, t: Tensor, x: Tensor) -> Tensor:
        return x**2 * torch.cos(math.pi * x)

    def factor(self, t: Tensor, x: Tensor) -> Tensor:
        return t * (1 - x**2)

    def residual(self, u: Field, t: Tensor, x: Tensor) -> Tensor:
        return u.t - self.diffusion * u.xx - 5 * (u - u * u * u)

    def exact(self, t: Tensor, x: Tensor) -> Array:
        return references.allen_cahn(t, x, self.diffusion)
