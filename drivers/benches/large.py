"""Section large: an iteration of the trust-region method on ten million parameters against one of torch's Muon."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

from ddml.data import files
from ddml.sampling.batches import Batches
from ddml.linalg.compact import trim_at_once
from ddml.layout import ParameterLayout
from ddml.norms.modular import EXACT
from ddml.objectives.objective import Objective
from ddml.problems.classification import ClassificationLoss
from ddml.data.sample_sets import SampleSet, TensorSamples
from ddml.data.scaling import Samples, Scaling
from solvers import Minimisation

from .tools import BENCH, LAUNCH, alone, without_mpi

SAMPLES = 6000
ORTHOGONALISE = "torch.optim._muon._zeropower_via_newtonschulz"


def single_precision(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration as it stands in torch, without the conversion to bfloat16."""
    a, b, c = coefficients
    X = grad.T if grad.size(0) > grad.size(1) else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if grad.size(0) > grad.size(1) else X


def samples_of(name: str) -> SampleSet:
    """The first samples of a data file, or random ones of ten classes, of 784 numbers each."""
    if name:
        dataset = files.load(name, MPI.COMM_SELF, SAMPLES)
        scaling = Scaling(dataset, "standard", MPI.COMM_SELF)
        return Samples(dataset.inputs, dataset.labels, scaling, torch.float32, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (SAMPLES,), generator=draw)
    centres = torch.randn(10, 784, generator=draw)
    return TensorSamples(torch.randn(SAMPLES, 784, generator=draw) + centres[labels], labels)


def loss_of(samples: SampleSet, widths: str) -> ClassificationLoss:
    """The loss of a multilayer perceptron, float32."""
    torch.manual_seed(0)
    sizes = [samples.part(0, 1).inputs[0].numel(), *map(int, widths.split(","))]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return ClassificationLoss(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)), samples, 10)


class Muon:
    """Steps of torch's Muon on the matrices but the last, and of its Adam on the rest."""

    def __init__(self, loss: ClassificationLoss) -> None:
        self.module = loss.module
        rest = list(self.module.parameters())
        matrices = [p for p in rest if p.ndim == 2][:-1]
        rest = [p for p in rest if all(p is not m for m in matrices)]
        self.optimisers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0), torch.optim.Adam(rest, lr=3e-3)]

    def step(self, loss: ClassificationLoss, own_precision: bool) -> tuple[float, float]:
        """Make a step on a batch, in bfloat16 if that is ``own_precision``; seconds of it on the clock and of CPUs."""
        clock, cpu = time.perf_counter(), time.process_time()
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        (loss.criterion(self.module(loss.inputs), loss.targets).sum() * loss.weight).backward()
        if own_precision:
            self.optimisers[0].step()
        else:
            with mock.patch(ORTHOGONALISE, single_precision):
                self.optimisers[0].step()
        self.optimisers[1].step()
        return time.perf_counter() - clock, time.process_time() - cpu


class Run:
    """The trust-region method with default options on small batches of a loss, set up."""

    def __init__(self, loss: ClassificationLoss, batch: int, comm: MPI.Comm) -> None:
        self.objective = Objective(loss, ParameterLayout(loss.parameters, comm))
        chosen = SimpleNamespace(batch_size=batch, batch_overlap=0.01, batch_growth=1.0, batch_steps=None)
        self.moving = Batches(self.objective, chosen, 0)
        self.made = Minimisation(self.objective, "tr")
        if self.made.context is not None and self.made.context.spares_memory:
            loss.drop_initial()

    def solve(self, batches: int, watch: Callable[[int], None] = lambda _: None) -> None:
        """Iterate on so many batches; ``watch`` is called with the number of each iteration, from 0 on. Once only."""
        interval = self.moving.interval

        def monitor(tao: PETSc.TAO) -> None:
            watch(tao.getIterationNumber())
            if tao.getIterationNumber() % interval == 0 and tao.getIterationNumber():
                self.moving.move(torch.empty(0))

        self.made.tao.setMaximumIterations(batches * interval)
        self.made.tao.setMonitor(monitor)
        self.made.tao.solve()
        self.made.destroy()


def large(settings: Any) -> None:
    """An iteration of tr and one of Muon, in turn; on one rank by CPU seconds, on two by the clock."""
    name = f"784-{settings.large_widths.replace(',', '-')}-10"
    print(f"\n## An iteration on {name}, batches of {settings.large_batch}, float32, sums by ranks\n")
    print("Seconds (one rank: of the CPU), medians; Muon on as many threads as there are ranks. Memory: the largest")
    print("peak of a rank above a process with its data that has trained a small network, in vectors of float64.\n")
    print("| ranks | parameters | tr | Muon, float32 | Muon, bfloat16 | tr / Muon, float32 | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    given: list[str] = []
    for option in ("repeats", "large_data", "large_widths", "large_batch"):
        given += [f"-{option}", str(getattr(settings, option))] if getattr(settings, option) != "" else []
    for ranks in ("1", "2"):
        command = [*LAUNCH, "-n", ranks, sys.executable, "-m", "mpi4py", BENCH, "-only", "large_worker", *given]
        subprocess.run(command, check=True, env=without_mpi())


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def large_worker(settings: Any) -> None:
    """What the ranks of the section large do."""
    comm = MPI.COMM_WORLD
    trim_at_once()
    samples = samples_of(settings.large_data)
    Run(loss_of(samples, f"{EXACT + 1},{EXACT + 1}"), settings.large_batch, comm).solve(1)
    before = resident()
    loss = loss_of(samples, settings.large_widths)
    run = Run(loss, settings.large_batch, comm)
    ours: list[list[tuple[float, float]]] = []
    theirs: list[tuple[float, float, float, float]] = []
    rival: list[Muon] = []
    memory = clock = cpu = 0.0

    def muon() -> tuple[float, ...]:
        torch.set_num_threads(comm.size)
        rival[:] = rival or [Muon(loss_of(samples, settings.large_widths))]
        batch = run.objective.loss
        assert isinstance(batch, ClassificationLoss)
        taken = (*rival[0].step(batch, False), *rival[0].step(batch, True))
        torch.set_num_threads(1)
        return taken

    def watch(iteration: int) -> None:
        # the iterations on one batch are one measurement; those on the first are without Muon, for the memory
        nonlocal clock, cpu, memory
        now = time.perf_counter() - clock, time.process_time() - cpu
        if iteration > run.moving.interval:
            if (iteration - 1) % run.moving.interval == 0:
                ours.append([])
            ours[-1].append(now)
            theirs.append(alone(comm, muon))  # type: ignore[arg-type]
        elif iteration == run.moving.interval:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            memory = max(comm.allgather(peak)) / (8 * loss.size)
            alone(comm, muon)  # warms up
        comm.Barrier()
        clock, cpu = time.perf_counter(), time.process_time()

    run.solve(settings.repeats + 1, watch)
    if comm.rank:
        return
    kind = 1 if comm.size == 1 else 0  # waiting takes a rank's CPU, too
    iteration = statistics.median(sum(now[kind] for now in group) / len(group) for group in ours)
    single, own = (statistics.median(taken[kind + at] for taken in theirs) for at in (0, 2))
    print(
        f"| {comm.size} | {loss.size:,} | {iteration:.2f} | {single:.2f} | {own:.2f} | {iteration / single:.2f}"
        f" | {memory:.1f} |",
        flush=True,
    )
