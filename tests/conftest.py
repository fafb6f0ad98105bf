"""What all tests share; the suite runs on any number of ranks, the same tests in the same order on each."""

import gc
import itertools
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answers
import numpy as np
import pytest
import suites
import torch
from mpi4py import MPI
from one_rank import on_one_rank
from petsc4py import PETSc
from torch import Tensor

import ddml.hdf5
from ddml.decomposition.subdomains import Subdomains
from ddml.losses.loss import Loss
from ddml.parameters import parameter_table
from solvers import Minimisation

torch.set_num_threads(1)

_command = ddml.hdf5.command
if not os.environ.get("DDML_LONG"):
    ddml.hdf5.command = answers.command


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks into HDF5 files is started as users have it, for a test of that."""
    monkeypatch.setattr(ddml.hdf5, "command", _command)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "long" if os.environ.get("DDML_LONG") else "test"
    parser.addoption("--suite", choices=suites.SUITES, default=default, help=f"how much runs (now {default})")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files that run on one rank only are not even imported on several."""
    several = MPI.COMM_WORLD.size > 1
    return True if several and str(collection_path.relative_to(suites.HERE)) in suites.SERIAL else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not run in this suite on this number of ranks."""
    suite = config.getoption("suite")
    runs = suites.chosen(items, suite, MPI.COMM_WORLD.size)
    kept = set(runs)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = runs
    if suite != "long":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: DDML_LONG=1 runs it"))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass by what thousands of tests and their imports hold: 0.4 s each time otherwise."""
    gc.collect()
    gc.freeze()


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


def _shared_folder() -> Iterator[Path]:
    """A folder that all ranks see."""
    comm = MPI.COMM_WORLD
    folder = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    yield Path(comm.bcast(folder.name if folder else None))
    comm.barrier()
    if folder:
        folder.cleanup()


shared_tmp = pytest.fixture(_shared_folder, name="shared_tmp")
module_tmp = pytest.fixture(_shared_folder, scope="module", name="module_tmp")  # one for all tests of a file


@pytest.fixture(scope="module")
def below_a_gigabyte() -> Iterator[None]:
    """The tests of a file do not take 1 GB, here or in a process that it starts."""

    def peaks() -> list[int]:
        return [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]

    before = peaks()
    yield
    here, started = peaks()
    assert here - before[0] < 1 << 20  # kB
    assert started < max(before[1] + 1, 1 << 20)


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
    """Run a solver; what the monitor saw, iteration by iteration, is the same on all ranks.

    With ``MPI.COMM_SELF`` the first rank makes the run, and calls ``watch``, alone for all.
    """

    def run(loss: Loss, solver: Any, iterations: int, comm: MPI.Comm = MPI.COMM_WORLD, *more: Any, **named: Any) -> Any:
        if comm == MPI.COMM_SELF:
            return on_one_rank(lambda one: made(loss, solver, iterations, one, *more, **named))
        return made(loss, solver, iterations, comm, *more, **named)

    def made(
        loss: Loss,
        solver: Any,
        iterations: int,
        comm: MPI.Comm,
        blocks: int = 0,
        start: Any = None,
        state: dict[str, Any] | None = None,
        watch: Callable[[Any, int], None] | None = None,
        **settings: Any,
    ) -> SimpleNamespace:
        name, database = next(_prefixes), PETSc.Options()
        for key, value in settings.items():
            database.setValue(name + key, value)
        whole = Subdomains.by_layers(loss, 1)
        parts = Minimisation(loss, solver, comm, name, subdomains=whole, blocks=blocks)
        layout, objective, x, tao, context = parts.layout, parts.objective, parts.x, parts.tao, parts.context
        if start is not None:
            begin, end = x.getOwnershipRange()
            x.setArray(start[begin:end])
        tao.setMaximumIterations(iterations)
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
            context.restore(state)
        tao.solve()
        reason = tao.getConvergedReason()
        parts.destroy()
        for key in settings:
            database.delValue(name + key)
        return SimpleNamespace(**{key: np.array(column) for key, column in vars(seen).items()}, reason=reason)

    return run
