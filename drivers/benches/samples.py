"""Section samples: solvers on nested sets of samples of logistic models, by counts that are weighted by samples."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from scipy.optimize import minimize
from torch import Tensor

from ddml.data.rows import TwoClasses
from ddml.errors import InputError
from ddml.problems.logistic import LogisticLoss
from solvers import Minimisation

from .prices import loss_of

PENALTY, NORM = 1e-3, 1e-5
GAPS = (1e-2, 1e-4, 1e-6, 1e-8)
# our choices: units at which runs are given up; units at which rates of SVRG and SARAH are compared, and on which seed
MOST_WORK, TUNED_AT, HELD_OUT = 400.0, 15.0, 100
RATES = (0.8, 3.2, 8.0, 16.0)  # over L
TABLES = ("counts", "gaps")


@dataclass
class Counts:
    """Losses, gradients, Hessians set up and products with them, each times the part of the samples that it is of."""

    losses: float = 0.0
    gradients: float = 0.0
    hessians: float = 0.0
    products: float = 0.0

    @property
    def literature(self) -> float:
        """W = G + 2 C + F / 3, by reverse mode: what the literature charges."""
        return self.gradients + 2 * self.products + self.losses / 3


class CountedLoss(LogisticLoss):
    """A logistic loss that counts its evaluations, those of its parts and of what is drawn of its samples."""

    def __init__(self, samples: TwoClasses, penalty: float) -> None:
        self.counts, self.whole, self.curved = Counts(), len(samples), np.empty(0)
        super().__init__(samples, penalty)

    def on(self, samples: TwoClasses, weight: float | None = None) -> LogisticLoss:
        """See :meth:`LogisticLoss.on`."""
        other = super().on(samples, weight)
        assert isinstance(other, CountedLoss)
        other.curved = np.empty(0)
        return other

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """See :meth:`LogisticLoss.value`."""
        self.counts.losses += self.count / self.whole
        return super().value(theta, kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """See :meth:`LogisticLoss.value_gradient`."""
        self.counts.gradients += self.count / self.whole
        return super().value_gradient(theta, gradient, kept, active)

    def hessian_product(self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None) -> None:
        """See :meth:`LogisticLoss.hessian_product`; the first one at a point sets a Hessian up."""
        if not np.array_equal(self.curved, theta.numpy()):
            self.curved = theta.numpy().copy()
            self.counts.hessians += self.count / self.whole
        self.counts.products += self.count / self.whole
        super().hessian_product(theta, direction, product, kept)


class Method(NamedTuple):
    """A solver with its options; whether its runs depend on the seed of the sets; where it is given up (units)."""

    name: str
    solver: str
    given: dict[str, Any]
    seeded: bool = True
    most: float = MOST_WORK


class Point(NamedTuple):
    """Where a run was: iteration, loss, norm of the gradient, work units, processor seconds, counts."""

    iteration: int
    loss: float
    norm: float
    work: float
    seconds: float
    counts: Counts


def run(data: LogisticLoss, method: Method, seed: int, done: Callable[[Point], bool]) -> list[Point]:
    """The points of a run from 0 on, until one is what is wanted, or the method gives up."""
    loss, points = CountedLoss(data.samples, data.penalty), list[Point]()
    prefix = f"samples{time.perf_counter_ns()}_"
    given = {**method.given, **({"sample_seed": seed} if method.seeded else {})}
    for name, value in given.items():
        PETSc.Options().setValue(prefix + name, value)
    made = Minimisation(loss, method.solver, MPI.COMM_SELF, prefix)
    objective, tao = made.objective, made.tao
    aside = made.x.duplicate()
    objective.value_gradient(made.x, aside)  # which makes the matrices
    aside.destroy()
    objective.work.reset()
    loss.counts = Counts()
    for part in objective.parts:
        part.counts = loss.counts
    started = time.process_time()

    def monitor(tao: PETSc.TAO) -> None:
        iteration, f, norm, *_ = tao.getSolutionStatus()
        now = time.process_time() - started
        points.append(Point(iteration, f, norm, objective.work.total, now, replace(loss.counts)))
        if done(points[-1]) or objective.work.total > method.most or not math.isfinite(f):
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)

    tao.setMonitor(monitor)
    tao.setMaximumIterations(100_000)
    tao.solve()
    made.destroy()
    for name in given:
        PETSc.Options().delValue(prefix + name)
    return points


def samples(settings: Any) -> None:
    """The tables that are asked for."""
    nests = [int(seed) for seed in settings.seeds.split(",")]
    shares = [tuple(map(float, pair.split(":"))) for pair in settings.sample_fractions.split(",")]
    for table in settings.sample_tables.split(","):
        if table not in TABLES:
            raise InputError(f"option -sample_tables must name some of {', '.join(TABLES)}; got '{table}'")
        for name in settings.logistic_data.split(","):
            data = loss_of(name)
            label = ", ".join((Path(name.partition(":")[0]).name, *name.split(":")[1:]))
            label = f"{label}, {data.count} x {data.size}"
            if table == "counts":
                counts(data, label, nests, shares)
            else:
                to_gaps(data, label, nests, shares, settings.sample_drawn)


def subsampled(share: float, rate: float) -> Method:
    """Sub-sampled Newton on a part of the samples."""
    return Method(f"SSN {share:.0%}", "ssn", {"coarsening": 1 / share, "coarse_rate": rate})


def trust_region(rule: str) -> Method:
    """With every rule that ASTROM has by default."""
    given = {"model": "hessian", "norm": 2, "delta0": 1, "shrink": 0.25, "accept": 1e-4, "cg_rule": rule}
    return Method("TR", "tr", given, seeded=False)


def counts(data: LogisticLoss, label: str, nests: Sequence[int], shares: Sequence[tuple[float, ...]]) -> None:
    """The slides' table: what it takes to a norm of the gradient, by both rules for conjugate gradients."""

    def done(point: Point) -> bool:
        return point.norm <= NORM

    for rule in ("cap", "sqrt"):
        astrom = [Method(f"ASTROM {f:.0%}", "astrom", {"fraction": f, "cg_rule": rule}) for f, _ in shares]
        newton = [subsampled(*pair) for pair in shares] if rule == "cap" else []
        methods = [trust_region(rule), *astrom, *newton]
        found = [[run(data, m, seed, done)[-1] for seed in (nests if m.seeded else nests[:1])] for m in methods]
        charge = data.charges.hessian()
        print(
            f"\n### {label}, lambda {PENALTY:g}, |g| <= {NORM:g}, -cg_rule {rule}; a product with the Hessian is "
            f"charged {charge:.2f}, W counts it as 2; medians of nests {', '.join(map(str, nests))}\n"
        )
        row(["", *(m.name for m in methods)])
        row(["-"] * (len(methods) + 1))
        missed = [f"{sum(not done(p) for p in ends)}/{len(ends)}" for ends in found]
        quantities: dict[str, Callable[[Point], float]] = {
            "iterations": lambda p: p.iteration, "losses F": lambda p: p.counts.losses,
            "gradients G": lambda p: p.counts.gradients, "Hessians H": lambda p: p.counts.hessians,
            "CG iterations C": lambda p: p.counts.products, "W = G + 2 C + F / 3": lambda p: p.counts.literature,
            "work": lambda p: p.work,
        }  # fmt: skip
        for what, of in quantities.items():
            row([what, *(cell(statistics.median(map(of, ends))) for ends in found)])
        for what in ("Hessians H", "CG iterations C", "W = G + 2 C + F / 3", "work"):
            of, first = quantities[what], quantities[what](found[0][0])
            row([f"{what.split(' =')[0]} / TR's", *(f"{statistics.median(map(of, e)) / first:.2f}" for e in found)])
        row(["of each seed", *(" ".join(f"{p.work / found[0][0].work:.2f}" for p in ends) for ends in found)])
        row(["not reached", *missed])


def to_gaps(
    data: LogisticLoss, label: str, nests: Sequence[int], shares: Sequence[tuple[float, ...]], drawn: float
) -> None:
    """Work and seconds to gaps of the loss; SVRG and SARAH are given up after so many units."""
    least, bound = minimum(data), lipschitz(data)

    def done(point: Point) -> bool:
        return point.loss - least <= GAPS[-1]

    lbfgs = Method("L-BFGS, 10 pairs", "lbfgs", {"memory": 10, "momentum": 1}, seeded=False)
    newton = {"coarse_solver": "newton", "coarse_steps": 1}
    methods = [
        lbfgs,
        trust_region("sqrt"),
        Method("ASTROM", "astrom", {}),
        *(subsampled(*pair) for pair in shares),
        *(tuned(data, name, bound, drawn) for name in ("svrg", "sarah")),
        Method("**MLVR**", "mlvr", {}),
        Method("MLVR, n / 4", "mlvr", {"coarsening": 4}),
        Method("MLVR, 3 levels", "mlvr", {"levels": 3}),
        Method("MLVR, 3 levels, n / 4", "mlvr", {"levels": 3, "coarsening": 4}),
        Method("MLVR, one Newton step", "mlvr", newton),
        Method("MLVR, one Newton step, n / 30", "mlvr", {**newton, "coarsening": 30}),
    ]
    found = {m.name: [reached(run(data, m, seed, done), least) for seed in nests] for m in methods}
    found["scipy's L-BFGS-B, 10 pairs"] = [from_scipy(data, least) for _ in nests]
    print(
        f"\n### {label}, lambda {PENALTY:g}: work units to gaps of the loss, and processor seconds over L-BFGS's; "
        f"medians of nests {', '.join(map(str, nests))}, and the worst of them\n"
    )
    gaps = [f"1e{round(math.log10(gap))}" for gap in GAPS]
    row(["", *gaps, *(f"worst to {gap}" for gap in gaps[2:]), *(f"seconds to {gap}" for gap in gaps)])
    row(["-"] * (2 * len(GAPS) + 3))
    reference = np.median([seconds for _, seconds in found[lbfgs.name]], axis=0)
    for name, each in found.items():
        work, seconds = (np.array([pair[i] for pair in each]) for i in range(2))
        ratios = np.median(seconds, axis=0) / reference
        row([name, *map(cell, [*np.median(work, axis=0), *work.max(axis=0)[2:], *ratios])])


def reached(points: Sequence[Point], least: float) -> tuple[list[float], list[float]]:
    """Work units and seconds to each gap; inf where it was not reached."""
    first = [next((p for p in points if p.loss - least <= gap), None) for gap in GAPS]
    return [p.work if p else math.inf for p in first], [p.seconds if p else math.inf for p in first]


def tuned(data: LogisticLoss, name: str, bound: float, most: float) -> Method:
    """Stochastic gradients with the rate that comes nearest to the minimum, on a seed that is not measured."""

    def with_rate(part: float, most: float) -> Method:
        return Method(f"{name.upper()}, rate {part:g} / L", name, {"coarse_rate": part / bound}, most=most)

    def lowest(part: float) -> float:
        found = [p.loss for p in run(data, with_rate(part, TUNED_AT), HELD_OUT, lambda _: False)]
        return found[-1] if math.isfinite(found[-1]) else math.inf

    return with_rate(min(RATES, key=lowest), most)


def lipschitz(data: LogisticLoss) -> float:
    """L of the gradients of all samples: max |x_i|^2 / 4 + lambda."""
    X = data.samples.matrix
    squares = X.power(2) if hasattr(X, "power") else X**2
    return float(np.asarray(squares.sum(axis=1)).max()) / 4 + data.penalty


def derivatives(data: LogisticLoss, theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], Any]:
    """Loss, gradient and the weights of the Hessian, by NumPy."""
    X, y = data.samples.matrix, data.samples.signs
    margins = y * (X @ theta)
    p = 1 / (1 + np.exp(np.clip(margins, -700, 700)))
    value = float(np.logaddexp(0.0, -margins).mean()) + data.penalty / 2 * float(theta @ theta)
    return value, data.penalty * theta - X.T @ (y * p) / len(y), p * (1 - p) / len(y)


def minimum(data: LogisticLoss) -> float:
    """The least loss, by Newton's method with dense matrices."""
    theta = np.zeros(data.size)
    value, g, weights = derivatives(data, theta)
    for _ in range(100):
        X = data.samples.matrix
        scaled = X.multiply(weights[:, None]).tocsr() if hasattr(X, "multiply") else X * weights[:, None]
        H = X.T @ scaled
        H = (H.toarray() if hasattr(H, "toarray") else H) + data.penalty * np.eye(data.size)
        step = np.linalg.solve(H, g)
        if float(g @ step) < 1e-26:
            break
        length = 1.0
        while derivatives(data, theta - length * step)[0] > value and length > 1e-3:
            length /= 2
        theta = theta - length * step
        value, g, weights = derivatives(data, theta)
    return value


def from_scipy(data: LogisticLoss, least: float) -> tuple[list[float], list[float]]:
    """See :func:`reached`: of scipy's L-BFGS-B, a work unit an evaluation."""
    loss = CountedLoss(data.samples, data.penalty)
    points = list[Point]()
    started = time.process_time()

    def evaluate(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        g = loss.initial()
        return loss.value_gradient(Tensor.new_tensor(g, theta), g), g.numpy()

    def keep(intermediate_result: Any) -> None:
        seconds, units = time.process_time() - started, loss.counts.gradients
        points.append(Point(len(points), float(intermediate_result.fun), math.nan, units, seconds, loss.counts))

    options = {"maxcor": 10, "ftol": 0.0, "gtol": 1e-9, "maxiter": 1000, "maxfun": int(MOST_WORK)}
    minimize(evaluate, np.zeros(data.size), jac=True, method="L-BFGS-B", callback=keep, options=options)
    return reached(points, least)


def cell(number: float) -> str:
    """Three digits; - for what was not reached."""
    if not math.isfinite(number):
        return "-"
    return f"{number:.0f}" if number >= 99.95 else f"{number:.{1 if number >= 9.995 else 2}f}"


def row(cells: Sequence[str]) -> None:
    """A line of a table."""
    print(f"| {' | '.join(cells)} |" if set(cells) != {"-"} else f"|{'---|' * len(cells)}", flush=True)
