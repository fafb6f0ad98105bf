"""Section tiles_schwarz: Schwarz methods on a coherent net against a trust region, by work and synchronisations."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ddml.data import files
from ddml.runs.history import History

from .tile_runs import Case, common, run
from .tools import BENCH, LAUNCH, finished_run, left_in

# Our choices: what is compared, from the same finished local and coarse phases; the first is the reference
METHODS = {
    "tr": (),
    "tr, coarse net eliminated": ("-coherent_coarse", "eliminated"),
    "apts_weights": ("-coherent_solver", "apts_weights"),
    "apts_weights, coarse phase": ("-coherent_solver", "apts_weights", "-coherent_coarse_phase"),
}
RANKS = 2


class Reached(NamedTuple):
    """Where a run is as good as the reference at its end; infinite if it never is."""

    work: float
    critical: float
    synchronisations: float
    seconds: float


class Measured(NamedTuple):
    """A run: its history, and its synchronisations."""

    history: History
    synchronisations: float

    def reached(self, loss: float) -> Reached:
        """Where the loss is that low. Synchronisations are taken to be evenly spread over the iterations."""
        history = self.history
        rows = np.flatnonzero(history["loss"] <= loss)
        if not len(rows):
            return Reached(np.inf, np.inf, np.inf, np.inf)
        first = rows[0]
        part = history["iteration"][first] / history.last("iteration")
        columns = (history[name][first] for name in ("work", "work_critical"))
        return Reached(*map(float, columns), part * self.synchronisations, float(history["time"][first]))


def tiles_schwarz(settings: Any) -> None:
    """A table of each split: loss and accuracy at the end, and where the loss is that of the reference at its end."""
    source = files.source(settings.tiles_data, MPI.COMM_SELF)
    steps, seeds = -(-source.count // settings.tiles_batch), settings.seeds.split(",")
    source.free()
    for case in (Case.parse(text) for text in settings.tiles_cases.split(",")):
        print(f"\n## {settings.tiles_data}, {case}: coherent nets on {RANKS} ranks\n")
        print(f"Behind {settings.tiles_epochs} epochs of local networks and a coarse net; all samples at a time;")
        print(
            f"{settings.tiles_schwarz_iterations} iterations; medians. Also where the loss is that of tr at its end.\n"
        )
        print("| delay (ms) | solver | loss | accuracy % | iterations | as low as tr: work | critical | ", end="")
        print("synchronisations | seconds |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for seed in seeds:
                given = ("-local_solver", "adam", "-rate", settings.tiles_rates.split(":")[1])
                run(settings, steps, int(seed), case.file(folder, int(seed)), *case.options, *given)
            for delay in settings.delays.split(","):
                reference = [_joined(settings, case, folder, seed, delay, ()) for seed in seeds]
                targets = [of_seed.history.last("loss") for of_seed in reference]
                for name, words in METHODS.items():
                    found = reference if not words else [
                        _joined(settings, case, folder, seed, delay, words) for seed in seeds
                    ]  # fmt: skip
                    print_row(delay, name, found, targets)


def print_row(delay: str, name: str, runs: Sequence[Measured], targets: Sequence[float]) -> None:
    """A method; medians over the seeds."""
    ends = [
        (r.history.last("loss"), 100 * float(r.history["accuracy"][np.isfinite(r.history["accuracy"])][-1]),
         r.history.last("iteration")) for r in runs
    ]  # fmt: skip
    loss, right, iterations = map(statistics.median, zip(*ends, strict=True))
    good = [r.reached(target) for r, target in zip(runs, targets, strict=True)]
    cells = [statistics.median(column) for column in zip(*good, strict=True)]
    written = " | ".join(f"{cell:.1f}" if cell < np.inf else "never" for cell in cells)
    print(f"| {delay} | {name} | {loss:.3g} | {right:.1f} | {iterations:.0f} | {written} |", flush=True)


def _joined(settings: Any, case: Case, folder: str, seed: str, delay: str, words: Sequence[str]) -> Measured:
    """A run of the coherent phase from finished phases, with slower synchronisations."""
    output = f"{folder}/coherent.h5"
    limit = settings.tiles_schwarz_iterations
    own = {
        **common(settings, int(seed)), "driver": "classify", "delay": delay, "phase": "coherent",
        "start": case.file(folder, int(seed)), "coherent_max_it": limit,
    }  # fmt: skip
    options = [word for name, value in own.items() for word in (f"-{name}", str(value))]
    command = [*LAUNCH, "-n", str(RANKS), sys.executable, "-m", "mpi4py", BENCH, "-only", "map_worker"]
    text = finished_run([*command, *case.options, *options, *words, "-overwrite"], output).text
    history = left_in(f"{output}.nets/coherent.h5").history
    return Measured(history, float(text.rsplit("synchronisations: ", 1)[1].split()[0]))
