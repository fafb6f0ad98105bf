"""Joining a loss, the ranks and a solver: what drivers, benches and tests start from, and a person in ten lines.

::

    import torch
    import ddml, solvers

    X = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    loss = ddml.ModuleLoss(net, lambda y, t: (y - t).square().sum(1), X, torch.sin(3 * X))
    result = solvers.minimise(loss, "lbfgs", iterations=200)
    print(result.loss, result.iterations, result.work)
    loss.assign(result.theta)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import ArrayLike, NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml import options as tables
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import CollectiveError, InputError, NonFiniteError
from ddml.layout import ParameterLayout
from ddml.losses.branched import BranchedLoss
from ddml.losses.loss import Loss
from ddml.losses.recorded import Recorder
from ddml.losses.residual import ResidualLoss
from ddml.objectives.branched import BranchedObjective, branched_layout
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.parallel import StopRequest, cause, together
from ddml.sampling.batches import OPTIONS as BATCHES
from ddml.sampling.batches import Batches
from ddml.summation import leaves
from ddml.vectors import home, write

from .arguments import check, compare
from .base import REASONS, Solver
from .owner import Owner
from .registry import configure, solver_class

LIMIT = 1_000_000  # parameters above which sums go by ranks (our choice)
prefixes = (f"minimise{number}_" for number in count())  # of options that nobody else reads


@dataclass(frozen=True)
class Result:
    """What :func:`minimise` found; the same on every rank.

    Attributes
    ----------
    theta : Tensor
        The parameters (n,), float64.
    loss, gradient_norm : float
        There, of the samples that the last iteration was on; of Adam on batches, where that iteration began.
    iterations : int
    success : bool
        Whether the solver stopped at a tolerance or a limit, and not because it could not go on.
    reason : str
        PETSc's name of why it stopped, such as ``CONVERGED_GATOL`` or ``DIVERGED_MAXITS``.
    work, critical : float
        Work units of all ranks, and along the critical path (:mod:`ddml.losses.work`).
    losses : ndarray
        At each iteration, from 0 on (iterations + 1,).
    """

    theta: Tensor
    loss: float
    gradient_norm: float
    iterations: int
    success: bool
    reason: str
    work: float
    critical: float
    losses: NDArray[np.float64] = field(repr=False)


class Minimisation(Owner):
    """A loss on the ranks, and the solver that is to minimise it, set up; collective, as is :meth:`destroy`.

    Parameters
    ----------
    loss
        What is minimised; every rank passes the same. Or an objective that there is already, on its own ranks.
    solver
        One of :data:`solvers.SOLVERS`, a PETSc type, or ``path/to/file.py:Class``; or a TAO context.
    comm
        The ranks.
    prefix
        Of the solver's options in PETSc's database.
    subdomains
        Of the parameters, which their ownership follows (default: the solver's); of a
        :class:`ddml.losses.branched.BranchedLoss` it follows the networks.
    blocks
        Of samples that are summed in a fixed order, see :class:`ddml.objectives.objective.Objective`; 0: by ranks.
        Default: by what an evaluation costs; 0 above a million parameters, and on another device than the CPU, where
        each block would be a pass of its own.
    samples
        Of an evaluation, where it is not of all (batches).
    limit
        Parameters above which sums go by ranks by default.
    stop, record
        See :class:`ddml.objectives.objective.Objective`.
    vectors
        Where vectors are (default: :func:`ddml.vectors.home`); of an objective they are where its layout says.
    branched
        Makes the objective of a :class:`ddml.losses.branched.BranchedLoss`, from what the constructor of
        :class:`ddml.objectives.branched.BranchedObjective` takes.
    defaults
        Of PETSc's options of the TAO object (``fmin``, say), where they are not in the database.

    Attributes
    ----------
    layout : ParameterLayout
    objective : Objective
    x : PETSc.Vec
        The parameters, at the loss's initial ones.
    tao : PETSc.TAO
        Set up.
    context : Solver or None
        That of ``tao``; None of PETSc's types.

    Raises
    ------
    InputError
        A solver that there is not, or that refuses its options or the loss.
    """

    def __init__(
        self,
        loss: Loss | Objective,
        solver: str | Solver,
        comm: MPI.Comm = MPI.COMM_WORLD,
        prefix: str = "",
        *,
        subdomains: Subdomains | None = None,
        blocks: int | None = None,
        samples: int = 0,
        limit: int = LIMIT,
        stop: StopRequest | None = None,
        record: Recorder | None = None,
        vectors: torch.device | None = None,
        branched: Callable[..., BranchedObjective] = BranchedObjective,
        **defaults: Any,
    ) -> None:
        if isinstance(loss, Objective):
            self.objective = loss
        else:
            if blocks is None:
                by_ranks = loss.size > limit or loss.device.type != "cpu"
                blocks = 0 if by_ranks else leaves(samples or loss.count, loss.enough)
            owner = solver_class(solver) if isinstance(solver, str) else type(solver)
            chosen = owner.decompose(loss, prefix) if subdomains is None else subdomains
            where = home(loss.device) if vectors is None else vectors
            if isinstance(loss, BranchedLoss):
                self.objective = branched(loss, branched_layout(loss, comm, where), stop, blocks, None, record)
            else:
                layout = ParameterLayout(loss.parameters, comm, chosen.ownership(comm.size), where)
                kind = ResidualObjective if isinstance(loss, ResidualLoss) else Objective
                self.objective = kind(loss, layout, stop, blocks, record=record)
        self.layout = self.objective.layout
        with self.building():
            self._build(solver, prefix, defaults)
        self.context: Solver | None = self.tao.getPythonContext() if self.tao.getType() == "python" else None

    def _build(self, solver: str | Solver, prefix: str, defaults: Mapping[str, Any]) -> None:
        self.x = self.own(self.layout.vector())
        self.objective.initial(self.x)
        self.tao = self.own(PETSc.TAO().create(self.objective.comm))
        self.tao.setOptionsPrefix(prefix)
        if isinstance(solver, str):
            configure(self.tao, solver)
        else:
            self.tao.setType("python")
            self.tao.setPythonContext(solver)
        self.objective.attach(self.tao)
        self.tao.setSolution(self.x)
        self.tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        with tables.understood():
            with tables.preset(**{f"{prefix}tao_{name}": value for name, value in defaults.items()}):
                self.tao.setFromOptions()
            self.tao.setUp()


def minimise(
    loss: Loss | Objective,
    solver: str | Solver = "tr",
    comm: MPI.Comm = MPI.COMM_WORLD,
    options: Mapping[str, Any] | None = None,
    *,
    iterations: int = 100,
    start: ArrayLike | Tensor | None = None,
    blocks: int | None = None,
    subdomains: Subdomains | None = None,
    seed: int = 0,
    tolerance: float = 0.0,
    monitor: Callable[[int, float, float], Any] | None = None,
    vectors: torch.device | None = None,
) -> Result:
    """Minimise a loss. Collective on ``comm``.

    Parameters
    ----------
    loss, solver, comm, blocks, subdomains, vectors
        As for :class:`Minimisation`. Modules that differ in where they begin, as without a seed they do, get the
        parameters of rank 0's.
    options
        Those of the solver, of PETSc (``tao_gatol``, say) and of batches (:data:`ddml.sampling.batches.OPTIONS`), by
        their names without a hyphen, as ``{"memory": 20, "batch_size": 500}``.
    iterations
        At most so many.
    start
        Parameters (n,) to begin at (default: those of the loss).
    seed
        Of the batches.
    tolerance
        It ends where the gradient's 2-norm is below.
    monitor
        Called on all ranks at each iteration with its number, the loss and the gradient's norm; True ends.

    Raises
    ------
    InputError
        On all ranks: a solver that there is not; options that nothing reads, or out of range; a start of another size;
        a loss without samples, or not finite where it begins; ranks that were given different things.
    """
    check(loss, solver, iterations, blocks)
    compare(
        comm, loss, solver, options=options or {}, iterations=iterations, blocks=blocks, seed=seed, tolerance=tolerance
    )
    prefix = next(prefixes)
    with given(prefix, options or {}):
        batched = tables.read(BATCHES, prefix)
        count = loss.loss.count if isinstance(loss, Objective) else loss.count
        if batched.batch_size > count:
            raise InputError(f"batch_size must be at most {count}, the samples; got {batched.batch_size}")
        if batched.batch_size == count:
            batched.batch_size = 0  # all of them, all the time
        made = Minimisation(
            loss, solver, comm, prefix, subdomains=subdomains, blocks=blocks, samples=batched.batch_size,
            vectors=vectors,
        )  # fmt: skip
        try:
            refuse_unused(prefix, solver)
            if batched.batch_size and made.context is None:
                raise InputError(f"PETSc's {solver} knows nothing of samples that change: it takes no batch_size")
            if start is not None:
                _write(made.x, torch.as_tensor(start, dtype=torch.float64).reshape(-1))
            made.tao.setMaximumIterations(max(iterations, 1))
            if tolerance:
                made.tao.setTolerances(gatol=tolerance)
            batches = Batches(made.objective, batched, seed) if batched.batch_size else None
            with together(comm):
                return _solved(made, iterations, batches, monitor)
        finally:
            made.destroy()


def _solved(
    made: Minimisation, iterations: int, batches: Batches | None, monitor: Callable[[int, float, float], Any] | None
) -> Result:
    """Solve, on all samples or batch by batch."""
    tao, x, objective = made.tao, made.x, made.objective
    losses: list[float] = []

    def watch(tao: PETSc.TAO) -> None:
        iteration, f, norm, *_ = tao.getSolutionStatus()
        if not losses and not np.isfinite(f):
            said = objective.loss.explain(objective.parameters(x))
            raise NonFiniteError(f"the loss is not finite at the initial parameters: {said}")
        if iteration < len(losses):  # some of PETSc's types report a point twice
            return
        losses.append(f)
        if iterations == 0:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)
        if monitor is not None and monitor(iteration, f, norm):
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)
        if batches is not None and iteration > 0 and iteration % batches.interval == 0:
            batches.move(objective.parameters(x))

    tao.setMonitor(watch)
    try:
        tao.solve()
    except PETSc.Error as error:
        for kind in (NonFiniteError, InputError):
            ours = cause(error, kind)
            if ours is not None:
                raise CollectiveError(str(ours)) from error
        raise
    reason = tao.getConvergedReason()
    _, f, norm, *_ = tao.getSolutionStatus()
    return Result(
        made.layout.gather(x).clone(), f, norm, tao.getIterationNumber(),
        reason > 0 or reason == PETSc.TAO.ConvergedReason.DIVERGED_MAXITS, REASONS[reason],
        objective.work.total, objective.work.critical, np.array(losses),
    )  # fmt: skip


def _write(x: PETSc.Vec, theta: Tensor) -> None:
    if theta.numel() != x.getSize():
        raise InputError(f"the start must have {x.getSize()} parameters, got {theta.numel()}")
    write(x, theta[slice(*x.getOwnershipRange())])


def refuse_unused(prefix: str, solver: str | Solver) -> None:
    """Raise an InputError where options of that prefix are in PETSc's database that the solver has not asked for."""
    left = [key.removeprefix(prefix) for key in tables.unused() if key.startswith(prefix)]
    if left:
        raise InputError(f"unknown option{'s' * (len(left) > 1)} {', '.join(left)} of solver {solver}")


@contextmanager
def given(prefix: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Put options into PETSc's database, and take out all of that prefix at the end, and of what errors say."""
    database = PETSc.Options()
    for name, value in options.items():
        database.setValue(prefix + name.removeprefix("-"), value)
    try:
        yield
    except InputError as error:
        text = re.sub(r"minimise\d+_", "", str(error))  # another rank's may have another number
        if text == str(error):
            raise
        raise (CollectiveError if isinstance(error, CollectiveError) else InputError)(text) from error
    finally:
        for key in database.getAll():
            if key.startswith(prefix):
                database.delValue(key)
