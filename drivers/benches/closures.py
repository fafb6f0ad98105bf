"""What optimizers with the interface of torch take beside the closure."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from solvers import Minimizer

ITERATIONS = 5  # a step


def closures(settings: Any) -> None:
    """Milliseconds a call of the closure, outside of it, of torch's L-BFGS and ours with as many secant pairs."""
    print("\n## Beside the closure (ms a call): torch's LBFGS with strong_wolfe and without a search, Minimizer lbfgs")
    print("\n| parameters | precision | pairs | torch, strong Wolfe | torch, none | lbfgs | ratio |")
    print("|---|---|---|---|---|---|---|")
    for widths in ([784, 100, 64, 10], [784, 1024, 300, 10]):
        for dtype in (torch.float64, torch.float32):
            for pairs in (3, 10):
                runs = [_Run(widths, dtype, make) for make in _optimizers(pairs)]
                for _ in range(settings.repeats):
                    for run in runs:
                        run.step()
                wolfe, none, ours = (median(run.times) for run in runs)
                name = str(dtype).removeprefix("torch.")
                numbers = " | ".join(f"{number:.2f}" for number in (wolfe, none, ours, ours / wolfe))
                print(f"| {runs[0].size} | {name} | {pairs} | {numbers} |")


def _optimizers(pairs: int) -> tuple[Callable[[nn.Module], torch.optim.Optimizer], ...]:
    common: dict[str, Any] = {"max_iter": ITERATIONS, "history_size": pairs, "tolerance_change": 0, "tolerance_grad": 0}
    return (
        lambda network: torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe", **common),
        lambda network: torch.optim.LBFGS(network.parameters(), lr=0.3, **common),
        lambda network: Minimizer(network, "lbfgs", MPI.COMM_SELF, max_iter=ITERATIONS, memory=pairs, momentum=1.0),
    )


class _Run:
    """A network on random samples; the first steps, where memory is made, are not measured."""

    def __init__(
        self, widths: list[int], dtype: torch.dtype, make: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> None:
        torch.manual_seed(0)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*layers[:-1]).to(dtype)
        self.size = sum(p.numel() for p in self.network.parameters())
        self.inputs, self.targets = (torch.randn(400, width, dtype=dtype) for width in (widths[0], widths[-1]))
        self.optimizer = make(self.network)
        self.inside, self.calls = 0.0, 0
        for _ in range(3):
            self.times: list[float] = []
            self.step()
        self.times.clear()

    def closure(self) -> Tensor:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = (self.network(self.inputs) - self.targets).square().mean()
        loss.backward()
        self.inside += time.perf_counter() - start
        self.calls += 1
        return loss

    def step(self) -> None:
        self.inside, self.calls, start = 0.0, 0, time.perf_counter()
        self.optimizer.step(self.closure)
        self.times.append(1e3 * (time.perf_counter() - start - self.inside) / self.calls)
