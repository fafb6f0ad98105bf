"""Section kernels_scaling: a kernel machine on 1 to 4 ranks, in the terms of D3L: strong, weak, surface over volume."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from scipy import linalg

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout
from solvers import KernelSchwarzPC, fit_kernel

from .kernel_machines import OVERLAP, Task, cell, numbers
from .kernel_rivals import Array, Problem
from .samples import row
from .tools import BENCH, LAUNCH, without_mpi

RANKS = (1, 2, 4)
SUBDOMAINS = 16  # on any number of ranks (our choice), so that all solve the same
CUTS = (4, 16, 64)  # whose surfaces are measured
PARTS = (2, 4, 8)  # of direct solves
PHASES = ("build", "set-up", "iterations")
WAITING = ("allgather", "Allgatherv", "alltoall", "Alltoallv", "allreduce", "bcast", "Ibarrier", "Barrier")


class Request(MPI.Request):
    """A request that a rank waits for with its clock stopped."""

    clock: WorkClock

    def Wait(self, status: MPI.Status | None = None) -> Any:
        """See MPI."""
        with self.clock:
            return super().Wait(status)


class WorkClock(MPI.Intracomm):
    """A communicator that counts the processor seconds spent in it: those in which ranks wait for others, mostly."""

    __module__ = MPI.__name__  # petsc4py takes communicators of that module only
    aside, began = 0.0, 0.0

    def __enter__(self) -> None:
        WorkClock.began = time.process_time()

    def __exit__(self, *_: object) -> None:
        WorkClock.aside += time.process_time() - WorkClock.began

    @classmethod
    def now(cls) -> float:
        """Processor seconds of this rank's own work so far."""
        return time.process_time() - cls.aside


def _stopped(name: str) -> Callable[..., Any]:
    method = getattr(MPI.Intracomm, name)

    def call(self: WorkClock, *arguments: Any, **named: Any) -> Any:
        with self:
            found = method(self, *arguments, **named)
        if not isinstance(found, MPI.Request):
            return found
        request = Request(found)
        request.clock = self
        return request

    return call


for _name in WAITING:
    setattr(WorkClock, _name, _stopped(_name))


class Phases(NamedTuple):
    """Seconds of build, set-up and iterations: of the rank that works longest in each, and by the clock."""

    work: list[float]
    clock: list[float]
    iterations: int


def solved(problem: Problem, comm: WorkClock) -> Phases:
    """Solve with 16 subdomains; what it takes. Collective."""
    domain = SampleDomain.by_tree(problem.X, SUBDOMAINS, OVERLAP)
    layout = SampleLayout(domain, comm)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        comm.Barrier()
        marks.append((WorkClock.now(), time.perf_counter()))

    mark()
    operator = KernelOperator(problem.kernel, problem.X, problem.shift, layout, memory=1e12)
    assert operator.kept is not None
    mark()
    context = KernelSchwarzPC()
    fit_kernel(operator, problem.Y, context, ksp_max_it=0)
    mark()
    found = fit_kernel(operator, problem.Y, context, ksp_rtol=problem.rtol)
    mark()
    differences = np.diff(np.array(marks), axis=0)
    work, clock = np.max(comm.allgather(differences), axis=0).T.tolist()
    return Phases(work, clock, found.iterations)


def sizes_of(n: int, ranks: int) -> dict[str, int]:
    """Samples for so many ranks: of strong scaling, and of both kinds of weak scaling, which end at n."""
    most = max(RANKS)
    return {"strong": n, "n^2 / p": round(n * (ranks / most) ** 0.5), "n / p": n * ranks // most}


def kernels_scaling(settings: Any) -> None:
    """All tables."""
    n = numbers(settings, "kernels_sizes")[0]
    task = _task(settings, n)
    given: list[str] = []
    for option in ("data", "sizes", "kernel", "width", "lambda", "repeats"):
        given += [f"-kernels_{option}", str(getattr(settings, f"kernels_{option}"))]
    found: dict[int, dict[str, Phases]] = {}
    for ranks in RANKS:
        command = [*LAUNCH, "-n", str(ranks), sys.executable, "-m", "mpi4py", BENCH, "-only", "kernels_scaling_worker"]
        done = subprocess.run([*command, *given], env=without_mpi(), capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{ranks} ranks fail: {done.stderr.strip().splitlines()[-1]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        found[ranks] = {kind: Phases(*phases) for kind, phases in measured.items()}
    print(
        f"\n### Scaling, {n} samples, {SUBDOMAINS} subdomains, overlap {OVERLAP:g}; {task.problem.kernel}, lambda "
        f"{task.problem.shift:g}\n\nProcessor seconds of the rank that works longest in a phase, without communication "
        f"and waiting (critical path), and seconds by the clock; medians of {settings.kernels_repeats}.\n"
    )
    row(["scaling", "ranks", "samples", "work of a rank, n^2 / p", *PHASES, "sum", "of one rank / sum",
         "clock: build", "set-up", "iterations", "count"])  # fmt: skip
    row(["-"] * 13)
    for kind in sizes_of(n, 1):
        first = sum(found[1][kind].work)
        for ranks in RANKS:
            phases, samples = found[ranks][kind], sizes_of(n, ranks)[kind]
            growth = samples**2 / ranks / sizes_of(n, 1)[kind] ** 2
            row([kind, str(ranks), str(samples), f"{growth:.2f}", *map(cell, phases.work), cell(sum(phases.work)),
                 f"{first / sum(phases.work):.2f}", *map(cell, phases.clock), str(phases.iterations)])  # fmt: skip
    modelled([found[ranks]["strong"].work for ranks in RANKS])
    surfaces(task.problem.X)
    scale_up(task.problem, settings.kernels_repeats, found)


def kernels_scaling_worker(settings: Any) -> None:
    """What the ranks of the section do: the medians of all phases as JSON."""
    comm = WorkClock(MPI.COMM_WORLD)
    n = numbers(settings, "kernels_sizes")[0]
    measured: dict[str, Phases] = {}
    for kind, size in sizes_of(n, comm.size).items():
        problem = _task(settings, size).problem
        runs = [solved(problem, comm) for _ in range(settings.kernels_repeats)]
        work, clock = (np.median([run[i] for run in runs], axis=0).tolist() for i in range(2))
        measured[kind] = Phases(work, clock, runs[0].iterations)
    if comm.rank == 0:
        print(json.dumps(measured), flush=True)


def _task(settings: Any, size: int) -> Task:
    return Task.of(settings.kernels_data, size, settings.kernels_kernel, settings.kernels_width,
                   settings.kernels_lambda, 1)  # fmt: skip


def modelled(seconds: Sequence[Sequence[float]]) -> None:
    """T = a / p + c of each phase, from the first two numbers of ranks, and what it says of the last one."""
    print("\nModel of strong scaling: a / p + c of each phase, fitted on 1 and 2 ranks, for 4:\n")
    row(["", "a", "c", "modelled", "measured", "modelled / measured"])
    row(["-"] * 6)
    one, two, four = (np.array([*phases, sum(phases)]) for phases in seconds)
    a, c = 2 * (one - two), 2 * two - one
    for name, share, rest, real in zip((*PHASES, "sum"), a, c, four, strict=True):
        guess = share / RANKS[-1] + rest
        row([name, f"{share:.3g}", f"{rest:.3g}", cell(guess), cell(real), f"{guess / real:.2f}"])


def surfaces(X: Array) -> None:
    """Surface over volume, and the formula of a tree's overlap."""
    print("\nSurface over volume: samples from beyond a core, over those in it\n")
    row(["p", "mean", "at most", "(1 + overlap)^(log2 p) - 1"])
    row(["-"] * 4)
    for count in CUTS:
        mean, most = SampleDomain.by_tree(X, count, OVERLAP).surface_over_volume
        row([str(count), f"{mean:.3f}", f"{most:.3f}", f"{(1 + OVERLAP) ** np.log2(count) - 1:.3f}"])


def scale_up(problem: Problem, repeats: int, found: dict[int, dict[str, Phases]]) -> None:
    """Sc_p = T(N) / (p T(N / p)): of Cholesky factorisations; and of the whole method, from a direct solve and itself.

    T(N / p) of the whole method is what a rank of p does, as above.
    """
    A = problem.gram()
    A[np.diag_indices(len(A))] += problem.shift
    n = len(A)

    def seconds(size: int) -> float:
        taken = []
        for _ in range(max(repeats, 3)):
            begin = time.process_time()
            linalg.cholesky(A[:size, :size], lower=True, check_finite=False)
            taken.append(time.process_time() - begin)
        return statistics.median(taken)

    begin = time.process_time()
    problem.gram()
    direct = seconds(n) + time.process_time() - begin
    print("\nScale-up factors T(N) / (p T(N / p))\n")
    row(["p", "Cholesky factorisations", "p^2"])
    row(["-"] * 3)
    for parts in PARTS:
        row([str(parts), f"{seconds(n) / (parts * seconds(n // parts)):.2f}", str(parts**2)])
    print("\nThe same of the whole method, which iterates: its critical path on p ranks in the place of T(N / p)\n")
    row(["p", "from a direct solve, kernel matrix included", "from itself on one rank"])
    row(["-"] * 3)
    one = sum(found[1]["strong"].work)
    for ranks in RANKS[1:]:
        here = ranks * sum(found[ranks]["strong"].work)
        row([str(ranks), f"{direct / here:.2f}", f"{one / here:.2f}"])
