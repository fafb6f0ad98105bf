"""Section map: which solver is first, by what a synchronisation costs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from mpi4py import MPI

from ddml.layout import ParameterLayout
from solvers.schwarz import Schwarz

from .tools import BENCH, LAUNCH, finished_run


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


def solver_map(settings: Any) -> None:
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
    seeds = settings.seeds.split(",")
    columns: list[list[float]] = []
    for seed in seeds:
        command = [*LAUNCH, "-n", str(ranks), sys.executable, "-m", "mpi4py", BENCH, "-only", "map_worker", *given]
        limits = ("-max_time", str(settings.seconds), "-target_error", str(LEVELS[-1]), "-max_it", "10000000")
        quiet = ("-progress", "none", "-checkpoint_interval", "0", "-seed", seed)
        history, size, text, _ = finished_run([*command, *limits, *quiet])
        hit = [np.flatnonzero(history["error"] <= level) for level in LEVELS]
        first = [history[name][h[0]] if len(h) else np.inf for name in ("time", "work_critical") for h in hit]
        synchronisations = float(text.rsplit("synchronisations: ", 1)[1].split()[0])
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
