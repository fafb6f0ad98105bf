"""A torch loop of your own.

`solvers.Minimizer` is a torch optimizer: it stands where `torch.optim.LBFGS` stood, with the same closure. The
curves are the least losses so far over calls of it, on the same network with the same parameters to begin with.
`ssbfgs` keeps a dense matrix, so it is for some thousand parameters; here are 673.
"""

import copy

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from torch import nn

import solvers

matplotlib.use("agg")
torch.manual_seed(0)
x = torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
y = torch.sin(8 * x) * torch.exp(-2 * x * x)
begin = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()


def train(made, steps):
    """The network of a training loop, and the losses that its closure has given."""
    network, losses = copy.deepcopy(begin), []
    optimizer = made(network)

    def closure():
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return network, losses


WAYS = {
    "torch.optim.LBFGS": lambda net: torch.optim.LBFGS(net.parameters(), max_iter=20, line_search_fn="strong_wolfe"),
    'solvers.Minimizer, "ssbfgs"': lambda net: solvers.Minimizer(net, "ssbfgs", max_iter=20),
}
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
right.plot(x, y, color="grey", linewidth=4, alpha=0.5, label="data")
for name, made in WAYS.items():
    network, losses = train(made, steps=20)
    left.semilogy(np.minimum.accumulate(losses), label=name)
    right.plot(x, network(x).detach(), linewidth=1, label=name)
    print(f"{name}: {losses[-1]:.1e} after {len(losses)} calls")
left.set(xlabel="calls of the closure", ylabel="least loss so far")
left.legend()
right.set(xlabel="x")
right.legend(loc="lower right", fontsize=8)
figure.savefig("torch_loop.png", dpi=120)
