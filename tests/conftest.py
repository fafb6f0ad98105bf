"""What all tests share; the suite runs on any number of ranks, the same tests in the same order on each."""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.layout import ParameterLayout
from ddml.loss import Loss, parameter_table
from ddml.objective import Objective
from ddml.residual import ResidualLoss, ResidualObjective
from solvers import configure

torch.set_num_threads(1)

# what knows nothing of ranks runs on one only
if MPI.COMM_WORLD.size > 1:
    collect_ignore = [
        "networks", "problems/test_references.py", "problems/test_program.py",
        "test_history.py", "test_kronecker.py", "test_loss.py", "test_modular.py", "test_options.py", "test_plot.py",
        "test_polar.py", "test_prepare.py", "test_samples.py",
    ]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out long tests, and say so in a line."""
    long = [item for item in items if item.get_closest_marker("long") is not None]
    if not long or os.environ.get("DDML_LONG"):
        return
    for item in long:
        item.add_marker(pytest.mark.skip(reason="long: set DDML_LONG"))
    if MPI.COMM_WORLD.rank == 0:
        print(f"\n{len(long)} long tests are skipped: DDML_LONG=1 runs them", file=sys.__stderr__, flush=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show at once what failed on one of several ranks: the others may wait for it until the time is up."""
    if report.failed and MPI.COMM_WORLD.size > 1:
        print(f"\nrank {MPI.COMM_WORLD.rank}: {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


_prefixes = (f"test{number}_" for number in itertools.count())


class SumOverRows(Loss):
    """The sum over the rows of a table (N, k) of ``function(theta, rows)`` (N,); one parameter tensor a layer."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], rows: Any, layers: list[int], start: Any) -> None:
        self.function, self.rows, self.start = function, torch.as_tensor(rows), torch.as_tensor(start)
        self.parameters = parameter_table([(f"layer {i}", (size,)) for i, size in enumerate(layers)])
        self.layers = tuple((i,) for i in range(len(layers)))
        self.costs = tuple(float(i + 2) for i in range(len(layers)))
        self.count, self.dtype, self.device = len(self.rows), torch.float64, torch.device("cpu")

    def part(self, begin: int, end: int) -> "SumOverRows":
        return self.sampled(slice(begin, end))

    def sampled(self, rows: Any) -> "SumOverRows":
        return SumOverRows(self.function, self.rows[rows], [p.size for p in self.parameters], self.start)

    def initial(self) -> Tensor:
        return self.start

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        yield self.function(theta, self.rows).sum()


@pytest.fixture
def comm() -> MPI.Comm:
    """All ranks."""
    return MPI.COMM_WORLD


@pytest.fixture
def shared_tmp(comm: MPI.Comm) -> Iterator[Path]:
    """A folder that all ranks see."""
    folder = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    yield Path(comm.bcast(folder.name if folder else None))
    comm.barrier()
    if folder:
        folder.cleanup()


@pytest.fixture
def prefix() -> Iterator[str]:
    """A prefix of PETSc options that nobody else uses; what is set under it is removed."""
    name = next(_prefixes)
    yield name
    database = PETSc.Options()
    for key in database.getAll():
        if key.startswith(name):
            database.delValue(key)


@pytest.fixture
def sum_over_rows() -> type[SumOverRows]:
    """A loss of any function."""
    return SumOverRows


@pytest.fixture
def least_squares() -> Callable[..., SumOverRows]:
    """Make the loss 1/2 |A x + bend (A x)^3 - b|^2 with a random, well-conditioned A (rows, n)."""

    def make(layers: list[int], rows: int = 40, bend: float = 0.0, seed: int = 0) -> SumOverRows:
        rng, n = np.random.default_rng(seed), sum(layers)
        A = np.linalg.qr(rng.standard_normal((rows, n)))[0] * np.linspace(1, 2, n)
        A = A @ np.linalg.qr(rng.standard_normal((n, n)))[0]

        def squares(theta: Tensor, table: Tensor) -> Tensor:
            z = table[:, :-1] @ theta
            return (z + bend * z**3 - table[:, -1]) ** 2 / 2

        table = np.column_stack([A, rng.standard_normal(rows)])
        return SumOverRows(squares, table, layers, rng.standard_normal(n))

    return make


def _copied(state: Any) -> Any:
    if isinstance(state, PETSc.Vec | np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


@pytest.fixture
def copied() -> Callable[[Any], Any]:
    """Copy a solver's state, vectors and all."""
    return _copied


@pytest.fixture
def train() -> Callable[..., SimpleNamespace]:
    """Run a solver; what the monitor saw, iteration by iteration, is the same on all ranks."""

    def run(
        loss: Loss,
        solver: Any,
        iterations: int,
        comm: MPI.Comm = MPI.COMM_WORLD,
        blocks: int = 0,
        start: Any = None,
        state: dict[str, Any] | None = None,
        watch: Callable[[Any, int], None] | None = None,
        **settings: Any,
    ) -> SimpleNamespace:
        name, database = next(_prefixes), PETSc.Options()
        layout = ParameterLayout(loss.parameters, comm)
        kind = ResidualObjective if isinstance(loss, ResidualLoss) else Objective
        objective = kind(loss, layout, blocks=blocks)
        x, tao = layout.vector(), PETSc.TAO().create(comm)
        objective.initial(x)
        begin, end = x.getOwnershipRange()
        if start is not None:
            x.setArray(start[begin:end])
        for key, value in settings.items():
            database.setValue(name + key, value)
        tao.setOptionsPrefix(name)
        if isinstance(solver, str):
            configure(tao, solver)
        else:
            tao.setType("python")
            tao.setPythonContext(solver)
        objective.attach(tao)
        tao.setSolution(x)
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        tao.setMaximumIterations(iterations)
        tao.setFromOptions()
        tao.setUp()
        context = tao.getPythonContext() if tao.getType() == "python" else None
        seen = SimpleNamespace(losses=[], norms=[], steps=[], theta=[], total=[], critical=[], gradients=[])

        def monitor(tao: PETSc.TAO) -> None:
            _, f, norm, _, step, _ = tao.getSolutionStatus()
            work = objective.work
            now = f, norm, step, layout.gather(x).numpy().copy(), work.total, work.critical, work.gradients
            for column, value in zip(vars(seen).values(), now, strict=True):
                column.append(value)
            if watch is not None:
                watch(context, tao.getIterationNumber())

        tao.setMonitor(monitor)
        if state is not None:
            context.resume(state)
        tao.solve()
        reason = tao.getConvergedReason()
        tao.destroy()
        x.destroy()
        for key in settings:
            database.delValue(name + key)
        return SimpleNamespace(**{key: np.array(column) for key, column in vars(seen).items()}, reason=reason)

    return run
