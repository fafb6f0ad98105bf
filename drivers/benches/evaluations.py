"""Sections evaluation, restricted, ranks and balance: what an evaluation costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.decomposition.subdomains import Subdomains
from ddml.layout import ParameterLayout
from ddml.losses.restricted import RestrictedLoss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.objective import Objective
from ddml.problems import PROBLEMS
from ddml.problems.classification import ClassificationLoss
from ddml.data.sample_sets import TensorSamples
from ddml.summation import leaves

from .tools import (
    BENCH,
    CASES,
    LAUNCH,
    NETWORKS,
    alone,
    in_torch,
    loss_of,
    medians,
    minimise,
    new,
    without_mpi,
)


def nested_autograd(problem: str, module: TanhNetwork, x: Tensor) -> None:
    """The loss and gradient as plain torch programs write them."""
    pde = PROBLEMS[problem]()
    x = x.clone().requires_grad_()
    t, s = x[:, 0], x[:, 1]
    u = pde.lift(t, s) + pde.factor(t, s) * module(x)[:, 0]
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)[0]
    if problem == "burgers":
        r = first[:, 0] + u * first[:, 1] - pde.viscosity * second[:, 1]
    else:
        u_tt = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0][:, 0]
        solution = s * torch.cos(t)
        r = u_tt - second[:, 1] + u**2 + solution - solution**2
    torch.autograd.grad((r**2).mean(), list(module.parameters()))


def evaluation(settings: Any) -> None:
    """One loss-and-gradient evaluation against nested autograd."""
    matrix = torch.rand(768, 768, dtype=torch.float64)
    rate = 2 * 768**3 / medians(settings.repeats, partial(torch.mm, matrix, matrix))[0] / 1e6
    print("\n## A loss-and-gradient evaluation, 10,000 points, one thread (ms)\n")
    print(f"Floor: the products with the weights alone, at the {rate:.0f} Gflop/s of a large matrix product.\n")
    print(
        "| problem | network | nested autograd | torch jets | ddml | nested / ddml | floor / ddml |"
        "\n|---|---|---|---|---|---|---|"
    )
    for problem, width, depth in CASES:
        for kind in NETWORKS:
            loss = loss_of(problem, kind, width, depth)
            theta, g = loss.initial(), new(loss.size)
            points = loss.sets[0].coordinates.T.contiguous()
            plain, jets, ours = medians(
                settings.repeats,
                partial(nested_autograd, problem, loss.network, points),
                partial(in_torch(loss).value_gradient, theta, g),
                partial(loss.value_gradient, theta, g),
            )
            weights = sum(p.numel() for p in loss.network.parameters() if p.dim() == 2)
            floor = 3 * 2 * len(loss.indices) * weights * loss.count / rate / 1e6
            print(
                f"| {problem} {width}x{depth} | {kind} | {plain:.0f} | {jets:.0f} | {ours:.1f} | {plain / ours:.2f}"
                f" | {floor / ours:.2f} |",
                flush=True,
            )


def restricted(settings: Any) -> None:
    """Restricted evaluations behind the kept prefix against the whole one."""
    print("\n## A restricted evaluation behind the kept prefix, in units of a whole one: measured / charged\n")
    for problem, width, depth in CASES:
        for kind in NETWORKS:
            loss = loss_of(problem, kind, width, depth)
            theta, g = loss.initial(), new(loss.size)
            subdomains = Subdomains.by_layers(loss, depth)
            parts = [RestrictedLoss(loss, ranges) for ranges in subdomains.ranges]
            for part in parts:
                part.freeze(theta)
            calls = [partial(part.value_gradient, part.initial(), new(part.size)) for part in parts]
            whole, *pieces = medians(settings.repeats, partial(loss.value_gradient, theta, g), *calls)
            row = ", ".join(
                f"{t / whole:.2f} / {p.charges.evaluation():.2f}" for t, p in zip(pieces, parts, strict=True)
            )
            print(f"- {problem} {width}x{depth} {kind}: {row}", flush=True)


def wide(width: int) -> ClassificationLoss:
    """A classifier of 10,000 images of noise."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return ClassificationLoss(network, TensorSamples(torch.randn(10_000, 784), torch.arange(10_000) % 10), 10)


def ranks(settings: Any) -> None:
    """Two ranks against one, and the price of sums in a fixed order."""
    print("\n## Two ranks against one, and sums in a fixed order over blocks, 10,000 points (ms)\n", flush=True)
    print("| problem | network | 1 rank | 2 ranks | speed-up | fixed order, 1 | 2 | price, 1 | 2 |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    command = [*LAUNCH, "-n", "2", sys.executable, "-m", "mpi4py", BENCH, "-only", "ranks_worker"]
    subprocess.run([*command, "-repeats", str(settings.repeats)], check=True, env=without_mpi())


def ranks_worker(settings: Any) -> None:
    """What the ranks of the section ranks do."""
    comm = MPI.COMM_WORLD
    losses = [
        (f"{problem} {width}x{depth}", kind, partial(loss_of, problem, kind, width, depth))
        for problem, width, depth in CASES
        for kind in NETWORKS
    ]
    losses += [(f"784-{width}-{width}-10, float32", "classifier", partial(wide, width)) for width in (32, 512)]
    for title, kind, make in losses:
        loss = make()
        calls = []
        for blocks in (0, leaves(loss.count, loss.enough)):
            for where in (MPI.COMM_SELF, comm):
                objective = Objective(loss, ParameterLayout(loss.parameters, where), blocks=blocks)
                x, g = objective.layout.vector(), objective.layout.vector()
                objective.initial(x)
                calls.append((where, lambda o=objective, x=x, g=g: o.value_gradient(x, g)))
        times: list[list[float]] = [[] for _ in calls]
        for repeat in range(settings.repeats + 1):
            for (where, call), taken in zip(calls, times, strict=True):
                comm.Barrier()
                start = time.perf_counter()
                if where.size > 1 or comm.rank == 0:
                    call()
                if repeat:
                    taken.append(1e3 * (time.perf_counter() - start))
                alone(comm, lambda: None)
        if comm.rank == 0:
            one, two, one_fixed, two_fixed = (statistics.median(t) for t in times)
            print(
                f"| {title} | {kind} | {one:.1f} | {two:.1f} | {one / two:.2f}"
                f" | {one_fixed:.1f} | {two_fixed:.1f} | {one_fixed / one:.2f} | {two_fixed / two:.2f} |",
                flush=True,
            )
    for problem, width, depth in CASES:
        spent = []
        for where in (MPI.COMM_SELF, comm):
            loss = loss_of(problem, "mlp", width, depth)
            run = partial(minimise, loss, "ssbroyden", 1e9, 50, {}, where)
            outcome = alone(comm, run) if where.size == 1 else run()
            spent.append(outcome.rows[-1][2])  # type: ignore[attr-defined]
        if comm.rank == 0:
            print(f"\n50 iterations of ssbroyden, {problem}: {spent[0]:.1f} s and {spent[1]:.1f} s, "
                  f"{spent[0] / spent[1]:.2f} times as fast", flush=True)  # fmt: skip


def balance(settings: Any) -> None:
    """Blocks balanced by cost against equal numbers of layers."""
    print("\n## Critical path of an additive phase: blocks of equally many layers, or of equal cost\n")
    print(
        "| network | subdomains | dearest block, layers | by cost | ratio | measured ratio |\n|---|---|---|---|---|---|"
    )
    for problem, width, depth in CASES:
        loss = loss_of(problem, "residual", width, depth)
        theta = loss.initial()
        for count in (2, 3, 4):
            by = {b: Subdomains.by_layers(loss, count, balance=b) for b in ("layers", "cost")}
            slowest = {}
            for name, subdomains in by.items():
                parts = [RestrictedLoss(loss, r) for r in subdomains.ranges]
                for part in parts:
                    part.freeze(theta)
                calls = [partial(part.value_gradient, part.initial(), new(part.size)) for part in parts]
                slowest[name] = max(medians(settings.repeats, *calls))
            layers, cost = (max(by[b].costs) for b in ("layers", "cost"))
            print(
                f"| {problem} {width}x{depth} | {count} | {layers:.2f} | {cost:.2f} | {layers / cost:.2f} |"
                f" {slowest['layers'] / slowest['cost']:.2f} |",
                flush=True,
            )
