"""Part of the section tiles: coherent nets, from random values and from finished local and coarse phases."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .tile_runs import Case, run
from .tools import left_in


class Joined(NamedTuple):
    """A run of a coherent net: accuracies before the first and behind each epoch, and seconds on the critical path."""

    accuracies: NDArray[np.float64]
    critical: NDArray[np.float64]

    def reached(self, accuracy: float) -> tuple[float, float]:
        """The first epoch that is as good, and its critical seconds."""
        found = np.flatnonzero(self.accuracies >= accuracy)
        return (float(found[0]), float(self.critical[found[0]])) if len(found) else (np.inf, np.inf)


def coherent(
    settings: Any, steps: int, seeds: Sequence[int], spent: Mapping[Case, Sequence[float]], folder: str
) -> dict[str, list[Joined]]:
    """Print a row for each split and start, medians over the seeds; the runs by what they are.

    Parameters
    ----------
    settings
        Of the bench.
    steps
        Of an epoch.
    seeds
        Of the runs.
    spent
        Critical seconds of each split's finished phases, one for each seed.
    folder
        Where the run files of local networks are.
    """
    print("\nCoherent nets. Critical seconds: those on one core times the critical work over all work; behind finished")
    print("phases with theirs. As good: the first epoch that is at least as good as the best from random values.\n")
    print("| tiles, overlap | begins at | link | best % | epoch | critical | as good: epoch | critical |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    together: dict[str, list[Joined]] = {}
    for case, before in spent.items():
        rows: dict[tuple[str, str], list[Joined]] = {}
        for link in settings.tiles_links.split(","):
            given = ("-phase", "coherent", "-link", link)
            rows["random values", link] = [
                _joined(settings, steps, seed, case, settings.tiles_epochs, folder, *given) for seed in seeds
            ]
        best = [max(float(run.accuracies.max()) for run in of_seed) for of_seed in zip(*rows.values(), strict=True)]
        rows["finished phases", "probabilities"] = []
        for seed, seconds in zip(seeds, before, strict=True):
            start = ("-phase", "coarse,coherent", "-start", case.file(folder, seed))
            found = _joined(settings, steps, seed, case, settings.tiles_transfer_epochs, folder, *start)
            rows["finished phases", "probabilities"].append(found._replace(critical=found.critical + seconds))
        for (begins, link), runs in rows.items():
            tops = [run.reached(float(run.accuracies.max())) for run in runs]
            good = [run.reached(level) for run, level in zip(runs, best, strict=True)]
            cells = [statistics.median(column) for pairs in (tops, good) for column in zip(*pairs, strict=True)]
            top = statistics.median(float(run.accuracies.max()) for run in runs)
            written = [f"{cell:.{i % 2}f}" if cell < np.inf else "never" for i, cell in enumerate(cells)]
            print(f"| {case} | {begins} | {link} | {100 * top:.1f} | {' | '.join(written)} |", flush=True)
            together[f"coherent, {case}, {begins}, {link}"] = runs
    return together


def _joined(settings: Any, steps: int, seed: int, case: Case, epochs: int, folder: str, *given: str) -> Joined:
    """A run of a coherent net, by Adam at the undivided network's rate."""
    output = f"{folder}/coherent.h5"
    own = {
        "solver": "adam", "rate": settings.tiles_rates.split(":")[0], "batch_size": settings.tiles_batch,
        "batch_steps": 1, "rate_schedule": "cosine", "max_it": epochs * steps,
    }  # fmt: skip
    words = [word for name, value in own.items() for word in (f"-coherent_{name}", str(value))]
    run(settings, steps, seed, output, *case.options, "-overwrite", *words, *given)
    history = left_in(f"{output}.nets/coherent.h5").history
    rows = np.flatnonzero(np.isfinite(history["accuracy"]))
    share = history.last("work_critical") / history.last("work")
    return Joined(history["accuracy"][rows], share * history["time"][rows])
