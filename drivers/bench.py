"""Measure: python drivers/bench.py [-seconds 60] [-only evaluation,ranks,...] [-delays 0,3,10].

Prints tables with medians and ratios; what is compared is measured side by side in the same
process, alternately where it is short. Sections: evaluation, restricted, ranks, overhead, balance,
rounding, solvers, preconditioners, and map, which is run only where -only names it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from program import run_program

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml import checkpoint, kernels, options
from ddml.decomposition import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout, owned
from ddml.jacobian import Linearisation
from ddml.loss import RestrictedLoss
from ddml.networks.tanh import TanhNetwork
from ddml.objective import Objective
from ddml.options import Option
from ddml.problems import PROBLEMS, PDELoss
from ddml.problems.accuracy import SolutionError
from ddml.residual import ResidualObjective
from ddml.state import vectors_in
from solvers import configure
from solvers.gauss_newton import PRECONDITIONERS
from solvers.preconditioners import NormalEquations
from solvers.schwarz import Schwarz

SECTIONS = ("evaluation", "restricted", "ranks", "overhead", "balance", "rounding", "solvers", "preconditioners")
OPTIONS = (
    Option("seconds", 60.0, "Budget of each solver in the section solvers.", above=0.0),
    Option("only", ",".join(SECTIONS), "Sections to run."),
    Option("delays", "0,3,10", "What a synchronisation costs more than it does here, in the section map (ms)."),
    Option("map_cases", "burgers-20x8,klein_gordon-20x4,klein_gordon-50x6", "Problems and networks of the map."),
    Option("map_seeds", "0", "Seeds of the map: medians are printed."),
    Option("delay", 0.0, "Of map_worker (ms).", minimum=0.0),
    Option("repeats", 7, "Timings of each short measurement.", minimum=1),
)
CASES = (("burgers", 20, 8), ("klein_gordon", 50, 6))
NETWORKS = ("mlp", "residual")


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
    with mock.patch.object(kernels, "library", lambda: None):
        return PDELoss(loss.problem, loss.network, loss.count)


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
            row = ", ".join(f"{t / whole:.2f} / {p.charge():.2f}" for t, p in zip(pieces, parts, strict=True))
            print(f"- {problem} {width}x{depth} {kind}: {row}", flush=True)


LAUNCH = ("mpiexec", "--oversubscribe", *(("--allow-run-as-root",) if os.geteuid() == 0 else ()))


def without_mpi() -> dict[str, str]:
    """The environment without what says that this process is a rank."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}


def ranks(settings: Any) -> None:
    """Two ranks against one, and the price of sums in a fixed order."""
    print("\n## Two ranks against one, and sums in a fixed order over 12 blocks, 10,000 points (ms)\n", flush=True)
    print("| problem | network | 1 rank | 2 ranks | speed-up | fixed order, 1 | 2 | price, 1 | 2 |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    command = [*LAUNCH, "-n", "2", sys.executable, "-m", "mpi4py", str(Path(__file__)), "-only", "ranks_worker"]
    subprocess.run([*command, "-repeats", str(settings.repeats)], check=True, env=without_mpi())


def alone(comm: MPI.Comm, work: Callable[[], object]) -> object:
    """Call a function on rank 0 while the others sleep."""
    result = work() if comm.rank == 0 else None
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)
    return comm.bcast(result)


def ranks_worker(settings: Any) -> None:
    """What the ranks of the section ranks do."""
    comm = MPI.COMM_WORLD
    for problem, width, depth in CASES:
        for kind in NETWORKS:
            loss = loss_of(problem, kind, width, depth)
            calls = []
            for blocks in (0, 12):
                for where in (MPI.COMM_SELF, comm):
                    owners = [0] + [loss.size] * where.size if blocks else None
                    objective = Objective(loss, ParameterLayout(loss.parameters, where, owners), blocks=blocks)
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
                    f"| {problem} {width}x{depth} | {kind} | {one:.0f} | {two:.0f} | {one / two:.2f}"
                    f" | {one_fixed:.0f} | {two_fixed:.0f} | {one_fixed / one:.2f} | {two_fixed / two:.2f} |",
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


@contextmanager
def delayed(seconds: float) -> Iterator[Counter[str]]:
    """Let every synchronisation of several ranks take so much longer; the number of them.

    Those are the gathering and the summing of vectors, and the two exchanges with subdomains that are treated side
    by side. Sums of single numbers are not delayed.
    """
    count: Counter[str] = Counter()

    def slow(function: Callable[..., Any], ranks: Callable[[Any], int], times: int = 1) -> Callable[..., Any]:
        def wrapper(this: Any, *args: Any) -> Any:
            if ranks(this) > 1:
                count["synchronisations"] += times
                time.sleep(times * seconds)
            return function(this, *args)

        return wrapper

    with ExitStack() as stack:
        for name in ("gather", "reduce", "reduce_rows"):
            changed = slow(getattr(ParameterLayout, name), lambda layout: layout.comm.size)
            stack.enter_context(mock.patch.object(ParameterLayout, name, changed))
        changed = slow(Schwarz._side_by_side, lambda schwarz: schwarz.objective.comm.size, 2)
        stack.enter_context(mock.patch.object(Schwarz, "_side_by_side", changed))
        yield count


# solvers of the map, by the number of ranks
MAPPED: dict[int, dict[str, Sequence[str]]] = {
    1: {"ssbroyden": ("-solver", "ssbroyden"), "mspqn_dense": ("-solver", "mspqn_dense")},
    2: {"ssbroyden": ("-solver", "ssbroyden"), "in colours": ("-solver", "mspqn_dense", "-side_by_side", "0")},
}
LEVELS = (1e-2, 1e-3, 1e-4)


def map(settings: Any) -> None:
    """Which solver is first at an error, by network, ranks and what a synchronisation costs."""
    print(
        f"\n## Seconds to a relative error of {', '.join(f'{e:g}' for e in LEVELS)}; at most {settings.seconds:.0f} s\n"
    )
    print("Seconds (work on the critical path of as many ranks as subdomains).\n")
    print("| problem | parameters | ranks | delay (ms) | solver |", " | ".join(f"{e:g}" for e in LEVELS), end="")
    print(" | end | synchronisations a second |")
    print("|---|---|---|---|---|" + "---|" * (len(LEVELS) + 2), flush=True)
    for case in settings.map_cases.split(","):
        problem, _, shape = case.partition("-")
        width, _, depth = shape.partition("x")
        for ranks, named in MAPPED.items():
            for delay in [float(d) for d in settings.delays.split(",")] if ranks > 1 else [0.0]:
                for name, given in named.items():
                    network = ("-problem", problem, "-width", width, "-depth", depth, "-delay", str(delay))
                    print_row(settings, ranks, case, name, delay, (*network, *given))


def print_row(settings: Any, ranks: int, case: str, name: str, delay: float, given: Sequence[str]) -> None:
    """Run one case for each seed; print the medians."""
    seeds = settings.map_seeds.split(",")
    columns: list[list[float]] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/run.h5"
            command = [*LAUNCH, "-n", str(ranks), sys.executable, "-m", "mpi4py", str(Path(__file__))]
            limits = ("-max_time", str(settings.seconds), "-target_error", str(LEVELS[-1]), "-max_it", "10000000")
            quiet = ("-progress", "none", "-checkpoint_interval", "0", "-output", file, "-seed", seed)
            done = subprocess.run(
                [*command, "-only", "map_worker", *given, *limits, *quiet],
                check=True, env=without_mpi(), capture_output=True, text=True,
            )  # fmt: skip
            size = checkpoint.inspect(file, MPI.COMM_SELF).size
            vec = PETSc.Vec().createSeq(size, comm=MPI.COMM_SELF)
            state, history = checkpoint.read(file, vec)
            for each in (vec, *vectors_in(state, "state", vec).values()):
                each.destroy()
        hit = [np.flatnonzero(history["error"] <= level) for level in LEVELS]
        first = [history[name][h[0]] if len(h) else np.inf for name in ("time", "work_critical") for h in hit]
        synchronisations = float(done.stdout.rsplit("synchronisations: ", 1)[1].split()[0])
        columns.append([*first, float(np.nanmin(history["error"])), synchronisations / history.last("time")])
    *first, end, rate = np.median(np.array(columns), axis=0)
    pairs = zip(first[: len(LEVELS)], first[len(LEVELS) :], strict=True)
    levels = " | ".join(f"{t:.1f} ({w:.0f})" if np.isfinite(t) else "-" for t, w in pairs)
    print(f"| {case} | {size} | {ranks} | {delay:g} | {name} | {levels} | {end:.1e} | {rate:.0f} |", flush=True)


def map_worker(settings: Any) -> None:
    """A run of drivers/pinn.py with slower synchronisations."""
    import pinn

    comm = MPI.COMM_WORLD
    with delayed(settings.delay / 1e3) as count:
        pinn.main(comm)
    if comm.rank == 0:
        print(f"synchronisations: {count['synchronisations']}")


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
    objective = Objective(loss, ParameterLayout(loss.parameters, comm))
    measure = SolutionError(loss, comm, 5000)
    x = objective.layout.vector()
    objective.initial(x)
    prefix = f"bench{time.perf_counter_ns()}_"
    for name, value in given.items():
        PETSc.Options().setValue(prefix + name, value)
    tao = PETSc.TAO().create(comm)
    tao.setOptionsPrefix(prefix)
    configure(tao, solver)
    objective.attach(tao)
    tao.setSolution(x)
    tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
    tao.setMaximumIterations(iterations)
    tao.setFromOptions()
    tao.setUp()
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
    tao.destroy()
    return Outcome(rows, evaluating, objective.parameters(x).clone())


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


# networks, errors down to which they are trained, and lambda of the systems there (our choice)
STATES = (
    ("klein_gordon", 20, 4, 8e-3, 3e-4),
    ("klein_gordon", 20, 4, 9e-5, 3e-6),
    ("burgers", 20, 8, 9e-4, 1e-5),
)
SYSTEMS: dict[str, dict[str, Any]] = {
    "none": PRECONDITIONERS["none"],
    "diagonal": PRECONDITIONERS["jacobi"],
    "additive, single layers": {**PRECONDITIONERS["schwarz"], "window": 1, "coarse": "none"},
    "additive, single layers, neurons": {**PRECONDITIONERS["schwarz"], "window": 1},
    "additive, pairs of layers": {**PRECONDITIONERS["schwarz"], "coarse": "none"},
    "additive, pairs of layers, neurons": PRECONDITIONERS["schwarz"],
    "multiplicative, pairs of layers": {**PRECONDITIONERS["multiplicative"], "coarse": "none"},
    "Nystrom, rank 300": PRECONDITIONERS["nystrom"],
    "Cholesky": PRECONDITIONERS["cholesky"],
}


def preconditioners(settings: Any) -> None:
    """Conjugate gradients on Gauss-Newton systems: iterations until the energy norm of the error has fallen."""
    print("\n## Gauss-Newton systems, 4,032 points\n")
    print("| system | preconditioner | iterations to 1e-1 | to 1e-2 | build (ms) | apply (ms) | product (ms) |")
    print("|---|---|---|---|---|---|---|")
    for problem, width, depth, error, damping in STATES:
        loss = loss_of(problem, "mlp", width, depth, 4032)
        theta = minimise(loss, "ssbroyden", 1e9, 10**6, {}, target=error).theta
        objective = ResidualObjective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF))
        x = objective.layout.vector()
        x.array[:] = theta.numpy()
        equations = NormalEquations(objective)
        equations.move(Linearisation(objective, x, True))
        equations.damping = damping
        J = np.concatenate([equations.at.transposed(i).numpy() for i in range(len(objective.parts))], axis=1).T
        A = J.T @ J + damping * np.eye(len(theta))
        right = -J.T @ np.concatenate([r.numpy() for r in equations.at.residual])
        exact = np.linalg.solve(A, right)
        for name, chosen in SYSTEMS.items():
            counts, times = conjugate_gradients(equations, chosen, right, exact, A)
            found = " | ".join(str(c) if c is not None else f"> {LIMIT}" for c in counts)
            label = f"{problem} {width}x{depth}, error {error:g}, lambda {damping:g}"
            print(f"| {label} | {name} | {found} | " + " | ".join(f"{t:.1f}" for t in times) + " |", flush=True)


LIMIT = 600  # iterations


def conjugate_gradients(
    equations: NormalEquations, chosen: dict[str, Any], right: Any, exact: Any, A: Any
) -> tuple[list[int | None], list[float]]:
    """Iterations to an energy error of 1e-1 and 1e-2; milliseconds to build, to apply, to multiply."""
    matrix = equations.matrix()
    b, y = matrix.createVecs()
    b.array[:] = right
    ksp, prefix = PETSc.KSP().create(MPI.COMM_SELF), f"bench{time.perf_counter_ns()}_"
    ksp.setOptionsPrefix(prefix)
    ksp.setOperators(matrix)
    ksp.setType("cg")
    with options.preset(**{prefix + k: v for k, v in chosen.items()}):
        ksp.setFromOptions()
    start = time.perf_counter()
    ksp.setUp()
    times = [1e3 * (time.perf_counter() - start)]
    errors: list[float] = []

    def enough(ksp: PETSc.KSP, iteration: int, norm: float) -> bool:
        e = ksp.buildSolution().array_r - exact
        errors.append(float(np.sqrt(max(e @ A @ e, 0) / (exact @ A @ exact))))
        return errors[-1] < 1e-2 or iteration == LIMIT

    ksp.setConvergenceTest(enough)
    ksp.setTolerances(max_it=LIMIT + 1)
    ksp.solve(b, y)
    times += medians(3, lambda: ksp.pc.apply(b, y), lambda: matrix.mult(b, y))
    return [next((i for i, e in enumerate(errors) if e < level), None) for level in (1e-1, 1e-2)], times


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


def main(comm: MPI.Comm) -> int:
    """Run the sections that are asked for."""
    settings = options.read(OPTIONS)
    torch.set_num_threads(1)
    for name in settings.only.split(","):
        if name not in (*SECTIONS, "map", "ranks_worker", "map_worker"):
            raise InputError(f"option -only must name some of {', '.join(SECTIONS)}, map; got '{name}'")
        globals()[name](settings)
    return 0


if __name__ == "__main__":
    run_program(main)
