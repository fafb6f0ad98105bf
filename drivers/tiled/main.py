"""A classifier of divided images, from its options to what comes out: what drivers/classify.py does with -tiles."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from common import batches
from common.device import bind, short_of_memory
from common.start import Start
from ddml import plugins
from ddml.data import files
from ddml.decomposition.tiles import Tiles, numbers
from ddml.errors import InputError
from ddml.networks import classifiers
from ddml.networks.fusions import FUSIONS
from ddml.parallel import agreed, agreed_file
from ddml.parameters import Parameter
from ddml.runs import run_file
from ddml.runs.checkpoints import check_new
from ddml.runs.progress import say

from . import options
from .local import LocalPhase
from .nets import SPLITS, Nets, Outcome, file_of
from .queues import Queues
from .whole import Whole, table_of


def train(comm: MPI.Comm, settings: Any, limits: Any, start: Start, undivided: str) -> int:
    """Run what has been read; the exit code. Collective.

    ``undivided`` is the solver of an undivided network by default.
    """
    options.check(settings, undivided)
    device = bind(comm, settings.device)
    source = files.source(settings.data, comm, settings.samples)
    settings.samples = source.count
    options.batches(settings, source.count)
    batches.check(settings, source.count)
    overlap = numbers(settings.tile_overlap, "option -tile_overlap")
    tiles = Tiles(source.shape, numbers(settings.tiles, "option -tiles"), overlap, settings.tiles_padded)
    with agreed(comm), plugins.blamed(settings.network, classifiers.KNOWN, "network"), short_of_memory():
        nets = Nets.built(settings, limits, source, tiles, device)
    files_ = Files(limits.output or limits.restart, limits.restart, bool(limits.overwrite), len(nets))
    files_.check(comm)
    table = table_of([module for module, _ in nets.modules])
    whole = Whole.begun([module for module, _ in nets.modules])
    if limits.restart is not None:
        whole = Whole.read(limits.restart, table, len(nets), comm)
    again = not start.restart.changed.keys() <= options.LATER
    if again and whole.phase:
        files_.check_all(comm)
    going = again or not whole.phase
    nets = replace(nets, folder=files_.folder, before=files_.before, again=again)
    queues = Queues.of(nets.costs, comm.size)
    phase = LocalPhase(nets, comm, start, queues)
    notes = [*start.notes, *start.restart.notes, *start.restart.unread(), *start.unread()]
    _say(comm, [*header(nets, queues, phase), *start.elsewhere(), *(f"note: {note}" for note in notes)])
    if settings.check:
        phase.destroy()
        return 0
    start.stop.check(comm)
    attributes = {
        "driver": "classify", "problem": "classification", "network": f"tiles of {nets.modules[0][1]}",
        "data": settings.data, "scaling": settings.scaling, "samples": source.count,
    }  # fmt: skip
    labels = {n: found for n, of in SPLITS.items() if (found := getattr(source, f"{of}labels")) is not None}
    writer = Writer(files_, table, training.described(settings, limits, start, attributes)[1], comm)
    if going:
        files_.prepare(comm)
    if limits.restart is None or files_.fresh:
        writer.write(whole)
    if going:
        outcomes = phase.execute()
        if outcomes is None:
            phase.destroy()
            return _stopped(comm, files_.output, start, phase.gained)
        whole.take(outcomes, labels)
        _count(whole, outcomes, nets, queues, settings.fusion or "average")
        writer.write(whole)
    phase.destroy()
    source.free()
    _say(comm, [*closing(whole), *([f"run file {files_.output}"] if files_.output else [])])
    return 0


@dataclass(frozen=True)
class Files:
    """Where a run reads and writes.

    Attributes
    ----------
    output, source : str or None
        The run file, and the one that it goes on from.
    overwrite : bool
        Whether what is there already may be replaced.
    networks : int
        How many there are.
    """

    output: str | None
    source: str | None
    overwrite: bool
    networks: int

    @property
    def folder(self) -> str | None:
        """That of the run files of local networks."""
        return None if self.output is None else f"{self.output}.nets"

    @property
    def before(self) -> str | None:
        """That of those which the local networks go on from."""
        return None if self.source is None else f"{self.source}.nets"

    @property
    def fresh(self) -> bool:
        """Whether nothing in the folder is of this run."""
        return self.source is None or Path(self.output or "").resolve() != Path(self.source).resolve()

    def _there(self) -> list[str]:
        found = [] if self.folder is None else [file_of(self.folder, tile) for tile in range(self.networks)]
        return [path for path in found if Path(path).is_file()]

    def check(self, comm: MPI.Comm) -> None:
        """Refuse what is in the way, or cannot be written. Collective.

        Raises
        ------
        InputError
            If it is, or cannot.
        """
        if self.output is None:
            return
        if not self.overwrite:
            check_new(self.output, self.source, comm)
            left = comm.bcast(self._there() if comm.rank == 0 and self.fresh else [])
            if left:
                raise InputError(f"{left[0]} exists, of another run: replace it with -overwrite, or remove its folder")
        run_file.check_writable(self.output, comm)

    def check_all(self, comm: MPI.Comm) -> None:
        """Refuse to train any further where the run files of local networks have gone. Collective.

        Raises
        ------
        InputError
            If one has.
        """
        paths = [file_of(str(self.before), tile) for tile in range(self.networks)]
        gone = comm.bcast([path for path in paths if not Path(path).is_file()] if comm.rank == 0 else [])
        if gone:
            raise InputError(
                f"there is no {gone[0]} any more: local networks that have come to their end go on with other options "
                "from their own run files only"
            )

    def prepare(self, comm: MPI.Comm) -> None:
        """Make the folder, and empty it of what another run has left. Collective."""
        if self.folder is None:
            return
        with agreed_file(comm, f"cannot write {self.folder}", "give -output a file in a folder that is yours to write"):
            if comm.rank == 0:
                os.makedirs(self.folder, exist_ok=True)
                for path in self._there() if self.fresh else []:
                    os.unlink(path)
        with suppress(OSError):
            os.listdir(self.folder)  # of a file system that remembers what was not there


@dataclass(frozen=True)
class Writer:
    """Writes the run file of the whole, if there is one; collective."""

    files: Files
    table: Sequence[Parameter]
    attributes: dict[str, Any]
    comm: MPI.Comm

    def write(self, whole: Whole) -> None:
        """Write what the run has come to."""
        if self.files.output is not None:
            whole.write(self.files.output, self.table, self.attributes, self.comm)


def header(nets: Nets, queues: Queues, phase: LocalPhase) -> list[str]:
    """What is about to run, in words. Collective on the groups of the phase."""
    settings, net = nets.settings, phase.first
    assert net is not None
    batch = batches.in_words(settings, nets.source.count, net.moving)
    lines = [
        f"data {settings.data}, {nets.source!r}, scaling {settings.scaling}, of each tile its own; {batch}",
        nets.tiles.described([module for module, _ in nets.modules]),
        f"networks such as {nets.modules[0][1]}, {settings.dtype} on {settings.device}: {queues!r}",
        f"local solver {settings.local_solver} {net.training.summation()}",
    ]
    return [*lines, *nets.device.words().splitlines()]


def _count(whole: Whole, outcomes: Sequence[Outcome], nets: Nets, queues: Queues, fusion: str) -> None:
    """Add a row to the history; work units are of all networks together."""
    shares = np.array(nets.costs) / sum(nets.costs)
    spent = [share * outcome.work for share, outcome in zip(shares, outcomes, strict=True)]
    right = accuracies(whole)[fusion]["test"]
    whole.history.truncate(1)
    whole.history.append(
        iteration=1, time=queues.critical([outcome.seconds for outcome in outcomes]), work=sum(spent),
        work_critical=queues.critical(spent), accuracy=right,
    )  # fmt: skip


def accuracies(whole: Whole) -> dict[str, dict[str, float]]:
    """The fraction of each split's samples that each fusion classifies right."""
    found: dict[str, dict[str, float]] = {}
    for name, fusion in FUSIONS.items():
        said = {split: fusion(torch.from_numpy(logits)).numpy() for split, logits in whole.logits.items()}
        found[name] = {split: float((classes == whole.labels[split]).mean()) for split, classes in said.items()}
    return found


def closing(whole: Whole) -> list[str]:
    """What came out, in words."""
    splits = list(whole.labels)
    local = {split: [net["accuracies"][split] for net in whole.nets] for split in splits}
    rows = {
        "local, least": {split: min(found) for split, found in local.items()},
        "local, mean": {split: sum(found) / len(found) for split, found in local.items()},
        "local, largest": {split: max(found) for split, found in local.items()},
        **accuracies(whole),
    }
    history, longest = whole.history, max(float(net["history"]["time"][-1]) for net in whole.nets)
    return [
        f"{'accuracy':<16}" + "".join(f"{split:>9}" for split in splits),
        *(f"{name:<16}" + "".join(f"{found[split]:>9.4f}" for split in splits) for name, found in rows.items()),
        f"work {history.last('work'):.1f} (critical {history.last('work_critical'):.1f}), in evaluations of all "
        f"networks; longest queue {history.last('time'):.1f} s, longest network {longest:.1f} s",
    ]


def _stopped(comm: MPI.Comm, output: str | None, start: Start, gained: bool) -> int:
    """Say that a signal has stopped the run; the exit code."""
    more = f"; to go on: the same driver with -restart {output}" if output else ""
    _say(comm, [f"stopped: a signal asked to stop in the local phase{more}"])
    return start.interrupted(gained)


def _say(comm: MPI.Comm, lines: Sequence[str]) -> None:
    """Print lines once."""
    if comm.rank == 0:
        for line in lines:
            say(line)
