"""Section tiles: networks of tiles, trained side by side, and what joins them, against the undivided network."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import classify
import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from tiled import coarse
from tiled.outputs import TEST, Accuracies, Outputs, accuracies

from ddml.data import files
from ddml.data.sources import Source
from ddml.decomposition.tiles import Tiles, numbers
from ddml.errors import InputError
from ddml.losses.costs import multiplications
from ddml.networks import classifiers
from ddml.networks.coarse import build_coarse
from ddml.networks.fusions import FUSIONS
from ddml.networks.local import build_local
from ddml.runs import tile_figures
from ddml.runs.figures import new_figure
from ddml.runs.history import History

from .tools import LAUNCH, Finished, finished_run, left_in

KINDS = ("linear", "dense")


class Case(NamedTuple):
    """A split into tiles and its overlap, as options have them."""

    parts: str
    overlap: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From 4x4:8, say.

        Raises
        ------
        InputError
            For anything else.
        """
        parts, colon, overlap = text.partition(":")
        if not (parts and colon and overlap):
            raise InputError(f"option -tiles_cases must be splits and overlaps as in 4x4:8,2x2:0; got '{text}'")
        return cls(parts, overlap)

    @property
    def options(self) -> tuple[str, ...]:
        """Of drivers/classify.py."""
        return "-tiles", self.parts, "-tile_overlap", self.overlap


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


class Joined(NamedTuple):
    """A run of a coherent net: accuracies behind its epochs, seconds on one core, and on the critical path."""

    accuracies: NDArray[np.float64]
    seconds: NDArray[np.float64]
    critical: NDArray[np.float64]

    def reached(self, accuracy: float) -> float:
        """The first epoch that is as good."""
        found = np.flatnonzero(self.accuracies >= accuracy)
        return float(found[0]) if len(found) else np.inf


def tiles(settings: Any) -> None:
    """Accuracies and seconds on the critical path, medians over the seeds."""
    cases = [Case.parse(text) for text in settings.tiles_cases.split(",")]
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    source = files.source(settings.tiles_data, MPI.COMM_SELF)
    steps = -(-source.count // settings.tiles_batch)  # an epoch
    rate, local_rate = settings.tiles_rates.split(":")
    print(f"\n## {source!r}; {settings.tiles_epochs} epochs of Adam, rates {rate}, local {local_rate}; medians\n")
    whole = [_run(settings, steps, seed, None, "-solver", "adam", "-rate", rate).history for seed in seeds]
    curve = zip(*_medians(whole), strict=True)
    print("Undivided, by epochs: " + ", ".join(f"{100 * a:.1f} % ({t:.1f} s)" for t, a in curve) + "\n")
    print("Seconds of one core a network. Ratios: the undivided network's seconds, of all epochs and until it is first")
    print("as good, over those of the slowest local network and the coarse net; its multiplications over theirs.\n")
    print(
        "| tiles, overlap | local networks, mean | average | majority | coarse net | % | slowest local | coarse |",
        end="",
    )
    print(
        " critical | all epochs | as good | multiplications |\n|---|---|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    found: dict[Case, list[Divided]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found[case] = []
            for seed in seeds:
                options = (*case.options, "-phase", "local", "-local_solver", "adam", "-rate", local_rate)
                done = _run(settings, steps, seed, f"{folder}/{case.parts}-{case.overlap}-{seed}.h5", *options)
                found[case].append(_divided(source, done.state, seed))
            for kind in KINDS:
                print_row(case, kind, found[case], whole, _fewer(settings, source, case, kind))
        if settings.tiles_transfer_epochs:
            _coherent(settings, steps, found, Path(folder))
    if settings.tiles_figures:
        draw(Path(settings.tiles_figures), found, whole)


def _run(settings: Any, steps: int, seed: int, output: str | None, *given: str) -> Finished:
    """A run of drivers/classify.py on one rank, tested once an epoch."""
    limits = {"max_it": settings.tiles_epochs * steps, "error_interval": steps, "checkpoint_interval": 0}
    chosen = {
        "data": settings.tiles_data, "network": settings.tiles_network, "batch_size": settings.tiles_batch,
        "batch_steps": 1, "rate_schedule": "cosine", "seed": seed, "progress": "none", **limits,
    }  # fmt: skip
    words = [word for name, value in chosen.items() for word in (f"-{name}", str(value))]
    program = str(Path(classify.__file__))
    return finished_run([*LAUNCH, "-n", "1", sys.executable, "-m", "mpi4py", program, *words, *given], output)


def _coherent(settings: Any, steps: int, found: Mapping[Case, Sequence[Divided]], folder: Path) -> None:
    """Coherent nets from random values, with the links that are asked for, and from finished phases."""
    print("\nCoherent nets. Critical seconds: those on one core times the critical work over all work; behind finished")
    print("phases with theirs. As good: the first epoch that is at least as good as the best from random values.\n")
    print("| tiles, overlap | begins at | link | best % | epoch | critical (s) | as good: epoch | critical (s) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    for case, divided in found.items():
        starts = [folder / f"{case.parts}-{case.overlap}-{seed}.h5" for seed in seeds]
        rows: dict[tuple[str, str], list[Joined]] = {}
        for link in settings.tiles_links.split(","):
            rows["random values", link] = [
                _joined(settings, steps, seed, case, "coherent", settings.tiles_epochs, folder, "-link", link)
                for seed in seeds
            ]
        rows["local and coarse phase", "probabilities"] = [
            _joined(
                settings, steps, seed, case, "coarse,coherent", settings.tiles_transfer_epochs, folder,
                "-start", str(start), before=run.critical(KINDS[0]),
            )
            for seed, start, run in zip(seeds, starts, divided, strict=True)
        ]  # fmt: skip
        best = [
            max(each)
            for each in zip(
                *([r.accuracies.max() for r in rows[key]] for key in rows if key[0] == "random values"), strict=True
            )
        ]
        for (begins, link), runs in rows.items():
            cells = [(float(r.accuracies.max()), float(r.accuracies.argmax()), r) for r in runs]
            top, epoch = (statistics.median(column) for column in list(zip(*cells, strict=True))[:2])
            seconds = statistics.median(float(r.critical[int(at)]) for _, at, r in cells)
            good = [r.reached(b) for r, b in zip(runs, best, strict=True)]
            until = statistics.median(
                float(r.critical[int(g)]) if g < np.inf else np.inf for g, r in zip(good, runs, strict=True)
            )
            print(
                f"| {case.parts}, {case.overlap} | {begins} | {link} | {100 * top:.1f} | {epoch:.0f} | {seconds:.1f} | "
                f"{statistics.median(good):.0f} | {until:.1f} |",
                flush=True,
            )


def _joined(
    settings: Any,
    steps: int,
    seed: int,
    case: Case,
    phase: str,
    epochs: int,
    folder: Path,
    *given: str,
    before: float = 0.0,
) -> Joined:
    """A run of a coherent net, by Adam at the undivided network's rate; ``before`` it critical seconds were spent."""
    output = folder / "coherent.h5"
    own = {
        "solver": "adam", "rate": settings.tiles_rates.split(":")[0], "batch_size": settings.tiles_batch,
        "batch_steps": 1, "rate_schedule": "cosine", "max_it": epochs * steps,
    }  # fmt: skip
    words = [word for name, value in own.items() for word in (f"-coherent_{name}", str(value))]
    _run(settings, steps, seed, str(output), *case.options, "-phase", phase, "-overwrite", *words, *given)
    history = left_in(f"{output}.nets/coherent.h5").history
    rows = np.flatnonzero(np.isfinite(history["accuracy"]))
    seconds = history["time"][rows]
    share = history.last("work_critical") / history.last("work")
    return Joined(history["accuracy"][rows], seconds, before + share * seconds)


def _divided(source: Source, state: Mapping[str, Any], seed: int) -> Divided:
    """What a run of local networks has left, with a coarse net of each kind that is trained here."""
    splits = {name: Outputs(state["logits"][name], state["labels"][name]) for name in state["labels"]}
    right, seconds = {}, {}
    for kind in KINDS:
        chosen = {o.name: o.default for o in coarse.OPTIONS} | {"coarse_net": kind, "seed": seed, "dtype": "float32"}
        begin = time.perf_counter()
        net = coarse.train(SimpleNamespace(**chosen), splits, source.classes, MPI.COMM_SELF)
        seconds[kind] = time.perf_counter() - begin
        right[kind] = accuracies(splits[TEST], chosen["link"], net.module).coarse
    measured = {name: accuracies(found) for name, found in splits.items()}
    return Divided(measured, right, [float(net["history"]["time"][-1]) for net in state["nets"]], seconds)


def _fewer(settings: Any, source: Source, case: Case, kind: str) -> float:
    """Multiplications of a pass through the undivided network over those of the largest local one and a coarse net."""
    chosen = SimpleNamespace(
        **{o.name: o.default for o in (*classifiers.OPTIONS, *coarse.OPTIONS)},
    )
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
        f"| {case.parts}, {case.overlap} | {100 * np.median(local.min(1)):.1f} to {100 * np.median(local.max(1)):.1f}, "
        f"{100 * np.median(local.mean(1)):.1f} | {fused[0]:.1f} | {fused[1]:.1f} | {kind} | {100 * right:.1f} | "
        f"{slowest:.1f} | {behind:.2f} | {critical:.1f} | {schedule / critical:.1f} | "
        f"{f'{good / critical:.1f}' if good < np.inf else 'never'} | {fewer:.0f} |",
        flush=True,
    )


def draw(folder: Path, found: Mapping[Case, Sequence[Divided]], whole: Sequence[History]) -> None:
    """Figures: fusions against the overlap, of the first split, and all against the critical time."""
    best = float(np.median([np.nanmax(history["accuracy"]) for history in whole]))
    parts = next(iter(found)).parts
    same = {case: runs for case, runs in found.items() if case.parts == parts}
    fused = {
        **{
            name: [np.median([getattr(r.measured[TEST], name) for r in runs]) for runs in same.values()]
            for name in FUSIONS
        },
        **{
            f"coarse net, {kind}": [np.median([r.coarse[kind] for r in runs]) for runs in same.values()]
            for kind in KINDS
        },
    }
    local = [np.median([_range(r.measured[TEST].local) for r in runs], axis=0) for runs in same.values()]
    drawn = new_figure(), new_figure()
    overlaps = [int(case.overlap.partition("x")[0]) for case in same]
    tile_figures.fusions(drawn[0], overlaps, fused, local, best)
    seconds, right = _medians(whole)
    points = [
        (f"{case.parts} tiles, {case.overlap}, {KINDS[0]}", [np.median([r.critical(KINDS[0]) for r in runs])],
         [np.median([r.coarse[KINDS[0]] for r in runs])])
        for case, runs in found.items()
    ]  # fmt: skip
    tile_figures.against_time(drawn[1], [("undivided", seconds, right), *points])
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(("fusions", "time"), drawn, strict=True):
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
