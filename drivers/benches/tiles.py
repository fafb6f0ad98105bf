"""Section tiles: networks of tiles, trained side by side, and what joins them, against the undivided network."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import ArrayLike, NDArray
from tiled import coarse
from tiled.outputs import TEST, Accuracies, Outputs, accuracies

from ddml.data import files
from ddml.data.sources import Source
from ddml.decomposition.tiles import Tiles, numbers
from ddml.losses.costs import multiplications
from ddml.networks import classifiers
from ddml.networks.coarse import build_coarse
from ddml.networks.fusions import FUSIONS
from ddml.networks.local import build_local
from ddml.runs import tile_figures
from ddml.runs.figures import new_figure
from ddml.runs.history import History

from .coherent import Joined, coherent
from .tile_runs import Case, run

KINDS = ("linear", "dense")


class Divided(NamedTuple):
    """A run of local networks, and of coarse nets behind them.

    Attributes
    ----------
    measured : dict of str to Accuracies
        By split; without a coarse net.
    coarse : dict of str to float
        Test accuracy of each kind of coarse net.
    local : list of float
        Seconds of each local network.
    behind : dict of str to float
        Seconds of each kind of coarse net.
    """

    measured: dict[str, Accuracies]
    coarse: dict[str, float]
    local: list[float]
    behind: dict[str, float]

    def critical(self, kind: str) -> float:
        """Seconds of one core a network: of the slowest one, and of the coarse net."""
        return max(self.local) + self.behind[kind]


def tiles(settings: Any) -> None:
    """Accuracies and seconds on the critical path, medians over the seeds."""
    cases = [Case.parse(text) for text in settings.tiles_cases.split(",")]
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    source = files.source(settings.tiles_data, MPI.COMM_SELF)
    steps = -(-source.count // settings.tiles_batch)  # an epoch
    rate, local_rate = settings.tiles_rates.split(":")
    print(f"\n## {source!r}; {settings.tiles_epochs} epochs of Adam, rates {rate}, local {local_rate}; medians\n")
    fewer = {(case, kind): _fewer(settings, source, case, kind) for case in cases for kind in KINDS}  # or it is refused
    whole = [run(settings, steps, seed, None, "-solver", "adam", "-rate", rate).history for seed in seeds]
    curve = zip(*_medians(whole), strict=True)
    print("Undivided, by epochs: " + ", ".join(f"{100 * a:.1f} % ({t:.1f} s)" for t, a in curve) + "\n")
    print("Seconds of one core a network. Ratios: the undivided network's seconds, of all epochs and until it is first")
    print("as good, over those of the slowest local network and the coarse net; its multiplications over theirs.\n")
    print("| tiles, overlap | local networks, mean | average | majority | coarse net | % | slowest local |", end="")
    print(" coarse | critical | all epochs | as good | multiplications |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    found: dict[Case, list[Divided]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found[case] = []
            for seed in seeds:
                options = (*case.options, "-phase", "local", "-local_solver", "adam", "-rate", local_rate)
                done = run(settings, steps, seed, case.file(folder, seed), *options)
                found[case].append(_divided(source, done.state, seed))
            for kind in KINDS:
                print_row(case, kind, found[case], whole, fewer[case, kind])
        joined: dict[str, list[Joined]] = {}
        if settings.tiles_transfer_epochs:
            spent = {case: [one.critical(KINDS[0]) for one in runs] for case, runs in found.items()}
            joined = coherent(settings, steps, seeds, spent, folder)
    if settings.tiles_figures:
        draw(Path(settings.tiles_figures), found, whole, joined)


def _divided(source: Source, state: Mapping[str, Any], seed: int) -> Divided:
    """What a run of local networks has left, with a coarse net of each kind that is trained here."""
    splits = {name: Outputs(state["logits"][name], state["labels"][name]) for name in state["labels"]}
    right, seconds = {}, {}
    for kind in (KINDS[0], *KINDS):  # the first one warms up
        chosen = {o.name: o.default for o in coarse.OPTIONS} | {"coarse_net": kind, "seed": seed, "dtype": "float32"}
        begin = time.perf_counter()
        net = coarse.train(SimpleNamespace(**chosen), splits, source.classes, MPI.COMM_SELF)
        seconds[kind] = time.perf_counter() - begin
        right[kind] = accuracies(splits[TEST], chosen["link"], net.module).coarse
    measured = {name: accuracies(found) for name, found in splits.items()}
    return Divided(measured, right, [float(net["history"]["time"][-1]) for net in state["nets"]], seconds)


def _fewer(settings: Any, source: Source, case: Case, kind: str) -> float:
    """Multiplications of a pass through the undivided network over those of the largest local one and a coarse net."""
    chosen = SimpleNamespace(**{o.name: o.default for o in (*classifiers.OPTIONS, *coarse.OPTIONS)})
    chosen.network, chosen.seed, chosen.dtype, chosen.coarse_net = settings.tiles_network, 0, "float32", kind
    made = Tiles(source.shape, numbers(case.parts, "tiles"), numbers(case.overlap, "overlap"))
    classes = len(source.classes)
    whole, _ = classifiers.build_classifier(chosen, source.shape, classes)
    local = [module for module, _ in build_local(chosen, made.shapes, classes, made.narrowing)]
    behind, _ = build_coarse(chosen, len(local), classes)
    largest = max(multiplications(m, torch.zeros(1, *s)) for m, s in zip(local, made.shapes, strict=True))
    joined = multiplications(behind, torch.zeros(1, len(local) * classes))
    return multiplications(whole, torch.zeros(1, *source.shape)) / (largest + joined)


def print_row(case: Case, kind: str, runs: Sequence[Divided], whole: Sequence[History], fewer: float) -> None:
    """A split into tiles, with a kind of coarse net."""
    local = np.array([run.measured[TEST].local for run in runs])
    fused = [100 * statistics.median(getattr(run.measured[TEST], name) for run in runs) for name in FUSIONS]
    critical = statistics.median(run.critical(kind) for run in runs)
    schedule = statistics.median(history.last("time") for history in whole)
    right = statistics.median(run.coarse[kind] for run in runs)
    good = statistics.median(_first(history, right) for history in whole)
    slowest, behind = (
        statistics.median(of(run) for run in runs) for of in (lambda r: max(r.local), lambda r: r.behind[kind])
    )
    print(
        f"| {case} | {100 * np.median(local.min(1)):.1f} to {100 * np.median(local.max(1)):.1f}, "
        f"{100 * np.median(local.mean(1)):.1f} | {fused[0]:.1f} | {fused[1]:.1f} | {kind} | {100 * right:.1f} | "
        f"{slowest:.1f} | {behind:.2f} | {critical:.1f} | {schedule / critical:.1f} | "
        f"{f'{good / critical:.1f}' if good < np.inf else 'never'} | {fewer:.0f} |",
        flush=True,
    )


def draw(
    folder: Path,
    found: Mapping[Case, Sequence[Divided]],
    whole: Sequence[History],
    joined: Mapping[str, Sequence[Joined]],
) -> None:
    """Figures: fusions against the overlap, of the first split, and all against the critical time."""

    def median(runs: Sequence[Divided], of: Callable[[Divided], float]) -> float:
        return statistics.median(map(of, runs))

    parts = next(iter(found)).parts
    same = {int(case.overlap.partition("x")[0]): runs for case, runs in found.items() if case.parts == parts}
    fused = {
        name: [median(runs, lambda r, n=name: getattr(r.measured[TEST], n)) for runs in same.values()]
        for name in FUSIONS
    }
    for kind in KINDS:
        fused[f"coarse net, {kind}"] = [median(runs, lambda r, k=kind: r.coarse[k]) for runs in same.values()]
    local = [np.median([_range(r.measured[TEST].local) for r in runs], axis=0) for runs in same.values()]
    best = statistics.median(float(np.nanmax(history["accuracy"])) for history in whole)
    lines: list[tuple[str, ArrayLike, ArrayLike]] = [("undivided", *_medians(whole))]
    for case, runs in found.items():
        seconds, right = median(runs, lambda r: r.critical(KINDS[0])), median(runs, lambda r: r.coarse[KINDS[0]])
        lines.append((f"tiles {case}", [seconds], [right]))
    for name, each in joined.items():
        lines.append((name, *np.median([(run.critical, run.accuracies) for run in each], axis=0)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fusions", "time"):
        figure = new_figure()
        if name == "fusions":
            tile_figures.fusions(figure, list(same), fused, local, best)
        else:
            tile_figures.against_time(figure, lines)
        figure.savefig(folder / f"tiles_{name}.png")
        print(f"wrote {folder / f'tiles_{name}.png'}")


def _range(local: Sequence[float]) -> tuple[float, float, float]:
    return min(local), sum(local) / len(local), max(local)


def _first(history: History, accuracy: float) -> float:
    """Seconds until a run is first as good."""
    reached = np.flatnonzero(history["accuracy"] >= accuracy)
    return float(history["time"][reached[0]]) if len(reached) else np.inf


def _medians(whole: Sequence[History]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds and accuracies behind each epoch."""
    rows = [np.flatnonzero(np.isfinite(history["accuracy"]) & (history["iteration"] > 0)) for history in whole]
    seconds, right = (
        np.median([h[name][r] for h, r in zip(whole, rows, strict=True)], axis=0) for name in ("time", "accuracy")
    )
    return seconds, right
