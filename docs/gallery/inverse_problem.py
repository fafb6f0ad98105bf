"""An inverse problem.

How fast does the bar conduct heat? Fifty noisy measurements of its temperature are one term of the loss, the equation
is another, and the conductivity `k` is trained with the network, beginning at a value that is five times too large.
"""

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import solvers
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDE, PDELoss, Points, Term

matplotlib.use("agg")
K, NOISE = 0.1, 0.02
draws = np.random.default_rng(0)
places = draws.uniform(0.05, 0.95, (50, 2))  # t and x
measured = np.exp(-K * np.pi**2 * places[:, 0]) * np.sin(np.pi * places[:, 1]) + NOISE * draws.standard_normal(50)


class Bar(PDE):
    """A bar that conducts heat nobody knows how fast."""

    domain = {"t": (0, 1), "x": (0, 1)}
    coefficients = {"k": 0.5}

    def lift(self, t, x):
        return torch.sin(torch.pi * x)

    def factor(self, t, x):
        return t * x * (1 - x)

    def residual(self, u, t, x, k):
        return u.t - k * u.xx

    def difference(self, u, t, x, k, measured):
        return u - measured

    def terms(self):
        return [Term(self.residual), Term(self.difference, Points(places, measured=measured), weight=10.0)]


torch.manual_seed(0)
loss = PDELoss(Bar(), TanhNetwork(2, 16, 3, 1), points=500)
theta, losses, found = loss.initial(), [], []
for _ in range(30):  # pieces of ten iterations, to see where the coefficient goes
    result = solvers.minimise(loss, "lbfgs", iterations=10, start=theta)
    theta = result.theta
    found.append(float(theta[-1]))  # coefficients stand behind the network's parameters
print(f"k = {found[-1]:.4f}, the measurements were made with {K}")

figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(10 * np.arange(31), [0.5, *found])
left.axhline(K, color="grey", linestyle="--", label="true")
left.set(xlabel="iterations", ylabel="k")
left.legend()
t, x = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101), indexing="ij")
u = loss.fields(theta, np.stack([t.ravel(), x.ravel()], axis=1))[:, 0].reshape(t.shape)
colours = right.pcolormesh(t, x, u, vmin=0, vmax=1, shading="gouraud")
right.scatter(*places.T, c=measured, vmin=0, vmax=1, edgecolors="white", label="measured")
figure.colorbar(colours, ax=right, label="u")
right.set(xlabel="t", ylabel="x")
figure.savefig("inverse_problem.png", dpi=120)
