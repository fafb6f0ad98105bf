"""The nonlinear Klein-Gordon equation of the SPQN paper."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddml.problems.pde.fields import Field
from ddml.problems.pde.pde import PDE, Array


class KleinGordon(PDE):
    """u_tt - u_xx + u^2 = -x cos t + x^2 cos^2 t, with u = x, u_t = 0 at t = 0 and u(t, -1) = -cos t, u(t, 1) = cos t.

    The solution is x cos t. Hard conditions u = x + x^3 (cos t - 1) + l N with l = t^2 (1 - x^2)
    over its maximum 144: a lift of our choice that meets all data, u_t included, and is not the
    solution (the published code's lift is, so that N = 0 solves the problem there).
    """

    domain = {"t": (0.0, 12.0), "x": (-1.0, 1.0)}
    width, depth = 50, 6

    def embed(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return t, x  # as in the paper: with an embed t is not mapped to [-1, 1]

    def lift(self, t: Tensor, x: Tensor) -> Tensor:
        return x + x**3 * (torch.cos(t) - 1)

    def factor(self, t: Tensor, x: Tensor) -> Tensor:
        return t**2 * (1 - x**2) / 144

    def residual(self, u: Field, t: Tensor, x: Tensor) -> Tensor:
        solution = x * torch.cos(t)
        return u.tt - u.xx + u * u + solution - solution**2

    def exact(self, t: Tensor, x: Tensor) -> Array:
        return np.asarray(x) * np.cos(np.asarray(t))
