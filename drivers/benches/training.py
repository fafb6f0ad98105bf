"""Sections solvers, overhead and rounding: whole runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from ddml.problems import PDELoss
from ddml.problems.pde.accuracy import SolutionError

from .tools import CASES, NETWORKS, loss_of, minimise


def rival(loss: PDELoss, name: str, rate: float, seconds: float) -> list[tuple[float, ...]]:
    """Torch's Adam or L-BFGS on the same evaluation; rows as of :func:`minimise`."""
    theta = torch.nn.Parameter(loss.initial())
    measure = SolutionError(loss, MPI.COMM_SELF, 5000)
    if name == "Adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam([theta], lr=rate)
    else:
        optimizer = torch.optim.LBFGS([theta], lr=1.0, max_iter=20, history_size=3, line_search_fn="strong_wolfe")
    work, aside, rows = 0, 0.0, []
    theta.grad = torch.zeros_like(theta)

    def closure() -> float:
        nonlocal work
        work += 1
        assert theta.grad is not None
        theta.grad.zero_()
        return loss.value_gradient(theta.detach(), theta.grad)

    start = time.perf_counter()
    step = 0
    while time.perf_counter() - start - aside < seconds:
        value = optimizer.step(closure)
        step += 1
        if name == "Adam" and step % 20:
            continue
        begin = time.perf_counter()
        error = measure(theta.detach())["error"]
        rows.append((float(work), float(work), begin - start - aside, float(value or np.nan), error))
        aside += time.perf_counter() - begin
        if not np.isfinite(rows[-1][3]):
            break
    return rows


def overhead(settings: Any) -> None:
    """A solver's own time."""
    print("\n## The solvers' own time on one rank, Burgers 20x8, 10,000 points: all but evaluations\n")
    given_options: list[tuple[str, dict[str, Any]]] = [
        ("lbfgs", {}), ("aspqn", {"local_steps": 5}), ("mspqn", {"local_steps": 5}), ("ssbroyden", {}),
    ]  # fmt: skip
    for solver, given in given_options:
        rows, evaluating, _ = minimise(loss_of("burgers", "residual", 20, 8), solver, 15.0, 100, given)
        total = rows[-1][2]
        print(f"- {solver}: {100 * (1 - evaluating / total):.1f} % of {total:.1f} s", flush=True)


def rounding(settings: Any) -> None:
    """How fast rounding grows along a run."""
    print("\n## Growth of rounding: |difference of the loss| / loss by iteration; 5 local steps, Burgers, 2,000 points")
    print("\nTwo runs that differ by 1e-16 in the parameters at the start.\n")

    for solver in ("lbfgs", "aspqn", "mspqn"):
        for kind in NETWORKS:
            runs = []
            for nudge in (0.0, 1e-16):
                loss = loss_of("burgers", kind, 20, 8, 2000)
                with torch.no_grad():
                    next(iter(loss.network.parameters())).mul_(1 + 2 * nudge)
                given = {} if solver == "lbfgs" else {"local_steps": 5}
                runs.append([row[3] for row in minimise(loss, solver, 1e9, 10, given).rows])
            growth = [abs(a - b) / a for a, b in zip(*runs, strict=False)]
            print(f"- {solver} {kind}: " + ", ".join(f"{g:.0e}" for g in growth), flush=True)


def reached(rows: Sequence[tuple[float, ...]], level: float) -> str:
    """Work / critical work / seconds to an error."""
    for work, critical, seconds, _, error in rows:
        if error <= level:
            return f"{work:.0f} / {critical:.0f} / {seconds:.1f}"
    return "-"


def at_loss(rows: Sequence[tuple[float, ...]], level: float) -> tuple[float, ...] | None:
    """The first row whose loss is at most ``level``."""
    return next((row for row in rows if row[3] <= level), None)


def solvers(settings: Any) -> None:
    """ASPQN, MSPQN, L-BFGS, Adam, SSBroyden."""
    budget = settings.seconds
    print(f"\n## Solvers, one core, {budget:.0f} s each, 10,000 points, k_s = 50, one layer a block, m = 3\n")
    print("work / critical work / seconds to a relative error; all on ddml's evaluation; the critical path is")
    print("that of one subdomain a processor. At equal loss: L-BFGS over the method, above 1 the method wins.\n")
    for problem, width, depth in CASES:
        for kind in NETWORKS:
            print(f"### {problem} {width}x{depth}, {kind} network\n")
            print("| solver | 1e-1 | 1e-2 | 1e-3 | end: work, loss, error | early, late: work | critical | time |")
            print("|---|---|---|---|---|---|---|---|")
            base: list[tuple[float, ...]] = []
            rate = {"burgers": 5e-4, "klein_gordon": 1e-3}[problem]
            for name in ("lbfgs", "aspqn", "mspqn", "torch L-BFGS", "Adam", "ssbroyden"):
                loss = loss_of(problem, kind, width, depth)
                if name in ("Adam", "torch L-BFGS"):
                    rows = rival(loss, name, rate, budget)
                else:
                    rows = minimise(loss, name, budget, 10**6, {}).rows
                base = base or rows
                ratios = [["-", "-"], ["-", "-"], ["-", "-"]]
                if rows is not base:
                    for when, fraction in enumerate((0.25, 1.0)):
                        mine = [r for r in rows if r[2] <= fraction * rows[-1][2]][-1]
                        theirs = at_loss(base, mine[3])
                        for i in range(3):
                            ratios[i][when] = (
                                f"{theirs[i] / max(mine[i], 1e-9):.2f}" if theirs else f">{base[-1][i] / mine[i]:.2f}"
                            )
                levels = " | ".join(reached(rows, level) for level in (1e-1, 1e-2, 1e-3))
                end = f"{rows[-1][0]:.0f}, {rows[-1][3]:.1e}, {rows[-1][4]:.1e}"
                print(f"| {name} | {levels} | {end} | " + " | ".join(", ".join(r) for r in ratios) + " |", flush=True)
            print()
