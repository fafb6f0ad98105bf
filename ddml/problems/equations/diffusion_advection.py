"""The diffusion-advection problem of the SPQN paper."""

from __future__ import annotations

from torch import Tensor

from ddml.problems.equations import references
from ddml.problems.pde.fields import Field
from ddml.problems.pde.pde import PDE, Array


class DiffusionAdvection(PDE):
    """-mu (u_xx + u_yy) + u_x + u_y = 1 on the unit square with mu = 0.01, u = 0 on the boundary.

    Hard conditions u = 16 x (1 - x) y (1 - y) N (our choice); reference by a spectral method. The network is 20x4 (our
    choice); the paper's is 50x10: ``-width 50 -depth 10``.
    """

    domain = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
    width, depth = 20, 4
    diffusion = 1e-2

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        return 16 * x * (1 - x) * y * (1 - y)

    def residual(self, u: Field, x: Tensor, y: Tensor) -> Tensor:
        return -self.diffusion * (u.xx + u.yy) + u.x + u.y - 1

    def exact(self, x: Tensor, y: Tensor) -> Array:
        return references.diffusion_advection(x, y, self.diffusion)
