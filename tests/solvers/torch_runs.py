"""Runs of ``solvers.Minimizer`` that its tests share."""

import io
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.parallel import split
from solvers import Minimizer

X = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
Y = torch.sin(3 * X)
SHARES = {1: [0, 60], 2: [0, 13, 60], 3: [0, 50, 50, 60]}  # the second of three ranks has nothing
FEW = {"mspqn": 3, "aspqn": 3, "mspqn_dense": 3}  # local steps


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(dtype)


def mean_square(module: nn.Module, rows: slice) -> Tensor:
    dtype = next(module.parameters()).dtype
    return (module(X[rows].to(dtype)) - Y[rows].to(dtype)).square().sum(1).mean()


class Run:
    """A network, its optimizer and the closure on this rank's share."""

    def __init__(self, name: str, comm: MPI.Comm, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        edges = SHARES.get(comm.size) or split(len(X), comm.size)
        self.rows = slice(edges[comm.rank], edges[comm.rank + 1])
        self.network = network(dtype)
        if name in FEW:
            options = {"local_steps": FEW[name], **options}
        self.optimizer = Minimizer(self.network, name, comm, share=self.rows.stop - self.rows.start, **options)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = mean_square(self.network, self.rows)
        loss.backward()
        return loss

    def steps(self, count: int) -> list[float]:
        return [float(self.optimizer.step(self.closure)) for _ in range(count)]

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()]).clone()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save((self.network.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        return file

    def loaded(self, file: io.BytesIO) -> "Run":
        module, optimizer = torch.load(file)
        self.network.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        return self
