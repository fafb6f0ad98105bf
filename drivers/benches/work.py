"""Section work: processor time of a charged work unit, over that of a loss-and-gradient evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import classify
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from ddml.sampling.batches import Batches
from ddml.data.data_set import DataSet
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.objectives.objective import Objective
from ddml.options import Option
from ddml.problems.pde import collocation
from ddml.losses.residual import ResidualLoss
from ddml.objectives.residual import ResidualObjective
from ddml.data.scaling import Scaling
from ddml.summation import leaves
from solvers import Minimisation, solver_class

from .tools import loss_of

IMAGES, PIXELS, BATCH = 60_000, (1, 28, 28), 10_000  # noise, as much as MNIST has
CLASSIFIER = "784-32-32-10"
BESIDE = 0.05  # of a solver's time that evaluations beside it take at least
PLAIN, MOVED = "burgers 20x8, 10,000 points", "burgers 20x8, 5,000 points that move"
WIDE = "klein_gordon 50x6, 2,000 points that move"
EQUATIONS = {
    PLAIN: ("burgers", 20, 8, 10_000),
    MOVED: ("burgers", 20, 8, 5_000),
    WIDE: ("klein_gordon", 50, 6, 2_000),
}


class Row(NamedTuple):
    """A solver of the README's tables: what it trains, its options, and the iterations that are measured."""

    label: str
    case: str
    solver: str
    given: dict[str, Any]
    iterations: int


ROWS = (
    Row("tr", CLASSIFIER, "tr", {}, 90),
    Row("tr kfac lbfgs", CLASSIFIER, "tr", {"norm": "kfac", "model": "lbfgs", "memory": 1}, 90),
    Row("apts_weights", CLASSIFIER, "apts_weights", {}, 25),
    Row("apts_data, 4 parts", CLASSIFIER, "apts_data", {"subdomains": 4}, 25),
    Row("napts", CLASSIFIER, "napts", {}, 25),
    Row("lbfgs", CLASSIFIER, "lbfgs", {}, 60),
    Row("ssbroyden", MOVED, "ssbroyden", {}, 500),
    Row("lbfgs", PLAIN, "lbfgs", {}, 150),
    Row("mspqn", PLAIN, "mspqn", {}, 4),
    Row("aspqn", PLAIN, "aspqn", {}, 4),
    Row("mspqn_dense", MOVED, "mspqn_dense", {}, 15),
    Row("gauss_newton", MOVED, "gauss_newton", {}, 10),
    Row("ssbroyden", WIDE, "ssbroyden", {}, 120),
    Row("mspqn_dense", WIDE, "mspqn_dense", {}, 8),
)


class Measured(NamedTuple):
    """Work units that a run was charged, its processor seconds, and those of a unit of evaluations beside it."""

    units: float
    seconds: float
    evaluation: float


def work(_: Any) -> None:
    """Every solver of the README on one rank."""
    print("\n## Processor time of a work unit, over that of a loss-and-gradient evaluation in the same run\n")
    print("| solver | case | units | ratio, median of three | least | largest |\n|---|---|---|---|---|---|", flush=True)
    for row in ROWS:
        found = [measured(row) for _ in range(3)]
        low, ratio, high = sorted(one.seconds / one.units / one.evaluation for one in found)
        print(f"| {row.label} | {row.case} | {found[0].units:.1f} | {ratio:.2f} | {low:.2f} | {high:.2f} |", flush=True)


def measured(row: Row) -> Measured:
    """Run a solver; after every iteration its samples are evaluated again on the side, for a twentieth of its time."""
    loss = _classifier() if row.case == CLASSIFIER else _equation(*EQUATIONS[row.case])
    kind = ResidualObjective if isinstance(loss, ResidualLoss) else Objective
    samples = BATCH if row.case == CLASSIFIER else loss.count
    blocks = leaves(samples, loss.enough)  # as the drivers choose them
    objective = kind(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF), blocks=blocks)
    moving = _moving(row, objective)
    prefix = f"work{time.perf_counter_ns()}_"
    for name, value in row.given.items():
        PETSc.Options().setValue(prefix + name, value)
    made = Minimisation(objective, row.solver, prefix=prefix)
    x, tao, g = made.x, made.tao, made.x.duplicate()
    tao.setMaximumIterations(row.iterations)
    solver, beside, started = [0.0], [0.0, 0.0], [time.process_time()]  # seconds; seconds and units; since when

    def monitor(tao: PETSc.TAO) -> None:
        spent = time.process_time() - started[0]
        solver[0] += spent
        pure = kind(objective.loss, objective.layout, blocks=blocks, parts=objective.parts)
        begin = time.process_time()
        while True:
            pure.value_gradient(x, g)
            beside[1] += objective.fraction
            started[0] = time.process_time()
            if started[0] - begin >= BESIDE * spent:
                break
        beside[0] += started[0] - begin
        iteration = tao.getIterationNumber()
        if moving is not None and 0 < iteration < row.iterations and iteration % moving.interval == 0:
            moving.move(objective.parameters(x))

    tao.setMonitor(monitor)
    tao.solve()
    for thing in (made, g):
        thing.destroy()
    for name in row.given:
        PETSc.Options().delValue(prefix + name)
    return Measured(objective.work.total, solver[0], beside[0] / beside[1])


def _defaults(table: Sequence[Option], **chosen: Any) -> Any:
    return SimpleNamespace(**{option.name: option.default for option in table} | chosen)


def _equation(problem: str, width: int, depth: int, points: int) -> Loss:
    return loss_of(problem, "mlp", width, depth, points)


def _classifier() -> Loss:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (IMAGES, *PIXELS), dtype=np.uint8), rng.integers(0, 10, IMAGES)
    dataset = DataSet(images, labels, images[:10], labels[:10])
    settings = _defaults(classify.OPTIONS)
    return classify.build(settings, dataset, Scaling(dataset, settings.scaling, MPI.COMM_SELF))[0]


def _moving(row: Row, objective: Objective) -> Any:
    """What changes the samples between iterations, as a driver does it by default."""
    if row.case == CLASSIFIER:
        return Batches(objective, _defaults(classify.OPTIONS, batch_size=BATCH), 0)
    if row.case == PLAIN:
        return None
    interval = solver_class(row.solver).moves_points
    settings = _defaults(collocation.OPTIONS, resample="residual", resample_interval=interval)
    return collocation.MovingPoints(objective, settings, 0)
