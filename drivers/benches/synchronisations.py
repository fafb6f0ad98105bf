"""Section map: which solver is first, by what a synchronisation costs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ddml.runs.history import History
from ddml.layout import ParameterLayout
from ddml.objectives.branched import BranchedObjective
from solvers.schwarz.schwarz import Schwarz

from .classifiers import case_options
from .tools import BENCH, LAUNCH, finished_run


@contextmanager
def delayed(seconds: float) -> Iterator[Counter[str]]:
    """Let every synchronisation of several ranks take so much longer; the number of them.

    Those are the gathering and the summing of vectors, the gathering of outputs of networks of tiles, and the two
    exchanges with subdomains that are treated side by side. Sums of single numbers are not delayed.
    """
    count: Counter[str] = Counter()

    def slow(function: Callable[..., Any], ranks: Callable[[Any], int], times: int = 1) -> Callable[..., Any]:
        def wrapper(this: Any, *args: Any, **named: Any) -> Any:
            if ranks(this) > 1:
                count["synchronisations"] += times
                time.sleep(times * seconds)
            return function(this, *args, **named)

        return wrapper

    with ExitStack() as stack:
        for name in ("gather", "reduce", "sum_nodes"):
            changed = slow(getattr(ParameterLayout, name), lambda layout: layout.comm.size)
            stack.enter_context(mock.patch.object(ParameterLayout, name, changed))
        changed = slow(BranchedObjective._gathered, lambda objective: objective.comm.size)
        stack.enter_context(mock.patch.object(BranchedObjective, "_gathered", changed))
        changed = slow(Schwarz._side_by_side, lambda schwarz: schwarz.objective.comm.size, 2)
        stack.enter_context(mock.patch.object(Schwarz, "_side_by_side", changed))
        yield count


class Kind(NamedTuple):
    """What the map asks of a driver: its module, what is measured, the levels of it, options by ranks and name."""

    driver: str
    measured: str
    levels: tuple[float, ...]
    solvers: dict[int, dict[str, Sequence[str]]]

    def reached(self, history: History, level: float) -> NDArray[np.intp]:
        """The iterations at which that level is reached."""
        values = history[self.measured]
        return np.flatnonzero(values <= level if self.measured == "error" else values >= level)


EQUATIONS = Kind("pinn", "error", (1e-2, 1e-3, 1e-4), {
    1: {"ssbroyden": ("-solver", "ssbroyden"), "mspqn_dense": ("-solver", "mspqn_dense")},
    2: {"ssbroyden": ("-solver", "ssbroyden"), "in colours": ("-solver", "mspqn_dense", "-side_by_side", "0")},
})  # fmt: skip
CLASSIFIERS = Kind("classify", "accuracy", (0.9, 0.95, 0.96), {
    1: {"tr": ("-solver", "tr"), "napts": ("-solver", "napts")},
    2: {"tr": ("-solver", "tr"), "napts": ("-solver", "napts"), "apts_data": ("-solver", "apts_data")},
    4: {
        "tr": ("-solver", "tr"),
        "napts": ("-solver", "napts", "-decomposition", "random", "-subdomains", "4"),
        "apts_data": ("-solver", "apts_data", "-subdomains", "4"),
    },
})  # fmt: skip


def solver_map(settings: Any) -> None:
    """Which solver is first at a level, by network, ranks and what a synchronisation costs."""
    cases = settings.map_cases.split(",")
    _map(settings, EQUATIONS, {case: _equation(case) for case in cases if ":" not in case})
    _map(settings, CLASSIFIERS, {case: case_options(case) for case in cases if ":" in case})


def _equation(case: str) -> tuple[str, ...]:
    problem, _, shape = case.partition("-")
    width, _, depth = shape.partition("x")
    return "-problem", problem, "-width", width, "-depth", depth


def _map(settings: Any, kind: Kind, cases: dict[str, tuple[str, ...]]) -> None:
    if not cases:
        return
    levels = [f"{level:g}" for level in kind.levels]
    print(f"\n## Seconds to {kind.measured} {', '.join(levels)}; at most {settings.seconds:.0f} s\n")
    print("Seconds (work on the critical path of as many ranks as subdomains).\n")
    print("| case | parameters | ranks | delay (ms) | solver |", " | ".join(levels), end="")
    print(" | end | synchronisations a second |")
    print("|---|---|---|---|---|" + "---|" * (len(levels) + 2), flush=True)
    for case, chosen in cases.items():
        for ranks, named in kind.solvers.items():
            for delay in settings.delays.split(",") if ranks > 1 else ["0"]:
                for name, given in named.items():
                    print_row(settings, kind, ranks, case, name, float(delay), (*chosen, *given))


def print_row(settings: Any, kind: Kind, ranks: int, case: str, name: str, delay: float, given: Sequence[str]) -> None:
    """Run one case for each seed; print the medians."""
    columns: list[list[float]] = []
    for seed in settings.seeds.split(","):
        command = [*LAUNCH, "-n", str(ranks), sys.executable, "-m", "mpi4py", BENCH, "-only", "map_worker", *given]
        limits = ("-max_time", str(settings.seconds), "-max_it", "10000000")
        quiet = ("-progress", "none", "-checkpoint_interval", "0", "-seed", seed)
        mapped = ("-driver", kind.driver, "-delay", str(delay), f"-target_{kind.measured}", str(kind.levels[-1]))
        history, size, text, _ = finished_run([*command, *limits, *quiet, *mapped])
        hit = [kind.reached(history, level) for level in kind.levels]
        first = [history[name][h[0]] if len(h) else np.inf for name in ("time", "work_critical") for h in hit]
        synchronisations = float(text.rsplit("synchronisations: ", 1)[1].split()[0])
        values = history[kind.measured]
        end = float(np.nanmin(values) if kind.measured == "error" else np.nanmax(values))
        columns.append([*first, end, synchronisations / history.last("time")])
    *first, end, rate = np.median(np.array(columns), axis=0)
    pairs = zip(first[: len(kind.levels)], first[len(kind.levels) :], strict=True)
    levels = " | ".join(f"{t:.1f} ({w:.0f})" if np.isfinite(t) else "-" for t, w in pairs)
    print(f"| {case} | {size} | {ranks} | {delay:g} | {name} | {levels} | {end:.3g} | {rate:.0f} |", flush=True)


def map_worker(settings: Any) -> None:
    """A run of a driver with slower synchronisations."""
    driver = import_module(settings.driver)
    comm = MPI.COMM_WORLD
    with delayed(settings.delay / 1e3) as count:
        driver.main(comm)
    if comm.rank == 0:
        print(f"synchronisations: {count['synchronisations']}")
