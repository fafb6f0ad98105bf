"""An equation of your own.

A class states the problem: where it holds, what must vanish there, and which initial and boundary values the fields
have by construction (`u = lift + factor * network`). Two solvers minimise the same loss; on the left what they reach
against their work, in evaluations of loss and gradient, on the right the error of the second.
"""

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import solvers
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, PDELoss

matplotlib.use("agg")


class Heat(PDE):
    """A bar whose two ends are kept cold."""

    domain = {"t": (0, 1), "x": (0, 1)}

    def lift(self, t, x):
        return torch.sin(torch.pi * x)

    def factor(self, t, x):
        return t * x * (1 - x)

    def residual(self, u, t, x):
        return u.t - 0.1 * u.xx


figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for solver in ("lbfgs", "ssbroyden"):
    torch.manual_seed(0)
    loss = PDELoss(Heat(), TanhNetwork(2, 16, 3, 1), points=1000)
    result = solvers.minimise(loss, solver, iterations=300)
    left.semilogy(np.linspace(0, result.work, len(result.losses)), result.losses, label=solver)
    print(f"{solver}: loss {result.loss:.1e} after {result.work:.0f} evaluations")
left.set(xlabel="evaluations", ylabel="loss")
left.legend()

t, x = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101), indexing="ij")
exact = np.exp(-0.1 * np.pi**2 * t) * np.sin(np.pi * x)
found = loss.fields(result.theta, np.stack([t.ravel(), x.ravel()], axis=1))[:, 0].reshape(t.shape)
colours = right.pcolormesh(t, x, np.abs(found - exact), shading="gouraud")
figure.colorbar(colours, ax=right, label="error of ssbroyden")
right.set(xlabel="t", ylabel="x")
figure.savefig("own_pde.png", dpi=120)
