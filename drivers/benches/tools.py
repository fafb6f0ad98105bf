"""What the sections of the bench share: losses, timings, runs of a solver."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.runs import run_file
from ddml.runs.history import History
from ddml.losses.restricted import RestrictedLoss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.objective import Objective
from ddml.problems import PROBLEMS, PDELoss
from ddml.problems.pde.accuracy import SolutionError
from ddml.states import vectors_in
from ddml.decomposition.subdomains import Subdomains
from ddml.vectors import owned
from solvers import Minimisation

CASES = (("burgers", 20, 8), ("klein_gordon", 50, 6))
NETWORKS = ("mlp", "residual")
# unbound: of programs side by side each would have the first core
LAUNCH = ("mpiexec", "--oversubscribe", "--bind-to", "none", *(("--allow-run-as-root",) if os.geteuid() == 0 else ()))
BENCH = str(Path(__file__).parents[1] / "bench.py")


def network(kind: str, width: int, depth: int, seed: int = 0) -> TanhNetwork:
    """One of the two networks of the bench, float64."""
    paper = kind == "residual"
    made = TanhNetwork(2, width, depth, 1, residual=paper, adaptive=paper).double()
    made.reset_parameters(torch.Generator().manual_seed(seed))
    return made


def loss_of(problem: str, kind: str, width: int, depth: int, points: int = 10_000, seed: int = 0) -> PDELoss:
    """A problem's loss on one of the networks."""
    return PDELoss(PROBLEMS[problem](), network(kind, width, depth, seed), points)


def in_torch(loss: PDELoss) -> PDELoss:
    """The same loss without compiled kernels."""
    return PDELoss(loss.problem, loss.network, loss.count, compiled=False)


new = partial(torch.zeros, dtype=torch.float64)


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of functions that are called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat:  # the first call warms up
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t) for t in times]


def without_mpi() -> dict[str, str]:
    """The environment without what says that this process is a rank."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}


def alone(comm: MPI.Comm, work: Callable[[], object]) -> object:
    """Call a function on rank 0 while the others sleep."""
    result = work() if comm.rank == 0 else None
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)
    return comm.bcast(result)


class Finished(NamedTuple):
    """What a driver's run leaves: its history, the number of parameters, what it printed, the state of its run file."""

    history: History
    size: int
    text: str
    state: dict[str, Any]

    @property
    def solver(self) -> dict[str, Any]:
        """The solver's part of the state."""
        return self.state["solver"] or {}


def finished_run(command: Sequence[str], output: str | None = None) -> Finished:
    """Run a driver, on one rank or several; its run file stays where an output is given.

    Raises
    ------
    InputError
        What it says where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = output or f"{folder}/run.h5"
        done = subprocess.run([*command, "-output", file], env=without_mpi(), capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [done.stderr]
            raise InputError(f"{' '.join(command)} fails: {said[0].removeprefix('error: ')}")
        return left_in(file, done.stdout)


def left_in(file: str, text: str = "") -> Finished:
    """What a run file holds; the vectors of the state are destroyed."""
    size = run_file.inspect(file, MPI.COMM_SELF).size
    vec = PETSc.Vec().createSeq(size, comm=MPI.COMM_SELF)
    state, history = run_file.read(file, vec)
    for each in (vec, *vectors_in(state, "state", vec).values()):
        each.destroy()
    return Finished(history, size, text, state)


class Outcome(NamedTuple):
    """Rows (work, critical, seconds but for errors, loss, error), the seconds in evaluations, the parameters (n,)."""

    rows: list[tuple[float, ...]]
    evaluating: float
    theta: Tensor


def minimise(
    loss: PDELoss,
    solver: str,
    seconds: float,
    iterations: int,
    given: dict[str, Any],
    comm: MPI.Comm = MPI.COMM_SELF,
    target: float = 0.0,
) -> Outcome:
    """Run a solver, at most until its error is below a target."""
    measure = SolutionError(loss, comm, 5000)
    prefix = f"bench{time.perf_counter_ns()}_"
    for name, value in given.items():
        PETSc.Options().setValue(prefix + name, value)
    made = Minimisation(loss, solver, comm, prefix, subdomains=Subdomains.by_layers(loss, 1), blocks=0)
    objective, x, tao = made.objective, made.x, made.tao
    tao.setMaximumIterations(iterations)
    rows: list[tuple[float, ...]] = []
    evaluating = aside = 0.0
    original = Objective.value_gradient  # with what it takes to gather parameters and to sum gradients
    freeze = RestrictedLoss.freeze

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluating
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                evaluating += time.perf_counter() - begin

        return wrapper

    def monitor(tao: PETSc.TAO) -> None:
        nonlocal aside
        begin = time.perf_counter()
        now = begin - start - aside
        error = measure(owned(x)).get("error", np.nan) if comm.size == 1 else np.nan
        rows.append((objective.work.total, objective.work.critical, now, tao.getObjectiveValue(), error))
        aside += time.perf_counter() - begin
        if now > seconds or error < target:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)

    tao.setMonitor(monitor)
    Objective.value_gradient, RestrictedLoss.freeze = timed(original), timed(freeze)  # type: ignore[method-assign]
    start = time.perf_counter()
    try:
        tao.solve()
    finally:
        Objective.value_gradient, RestrictedLoss.freeze = original, freeze  # type: ignore[method-assign]
        for name in given:
            PETSc.Options().delValue(prefix + name)
    theta = objective.parameters(x).clone()
    made.destroy()
    return Outcome(rows, evaluating, theta)
