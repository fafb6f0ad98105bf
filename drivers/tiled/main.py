"""A classifier of divided images, from its options to what comes out: what drivers/classify.py does with -tiles."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from common import batches
from common.device import Device, bind, short_of_memory
from common.start import Start
from ddml import options as tables
from ddml import plugins
from ddml.data import files as data
from ddml.data.inputs import Inputs
from ddml.decomposition.tiles import build_tiles
from ddml.errors import InputError
from ddml.networks import classifiers
from ddml.networks.coarse import build_coarse
from ddml.parallel import Interrupted, agreed
from ddml.runs.progress import say
from solvers import solver_class

from . import coarse, options, outputs
from .end_to_end import EndToEnd
from .files import Files
from .folds import FOLDS, NONE, Folds
from .local import LocalPhase
from .nets import SPLITS, Nets
from .queues import Queues
from .whole import Whole


def train(comm: MPI.Comm, settings: Any, limits: Any, start: Start, undivided: str) -> int:
    """Run what has been read; the exit code. Collective.

    ``undivided`` is the solver of an undivided network by default.
    """
    phases = options.check(settings, undivided)
    device = bind(comm, settings.device)
    source = data.source(settings.data, comm, settings.samples)
    settings.samples = source.count
    options.batches(settings, source.count)
    batches.check(settings, source.count)
    tiles = build_tiles(settings, source.shape)
    with agreed(comm), plugins.blamed(settings.network, classifiers.KNOWN, "network"), short_of_memory():
        nets = Nets.built(settings, limits, source, tiles, device)
    run = Phases(comm, settings, limits, start, nets, phases, device)
    code = run.execute()
    source.free()
    return code


class Phases:
    """A run of phases, from what is there already; everything is collective.

    Parameters
    ----------
    comm, settings, limits, start
        Of the run.
    nets
        The local networks.
    phases
        Those that are asked for, in their order.
    device
        Where this rank computes.

    Attributes
    ----------
    whole : Whole
        What the run has come to.
    going : list of str
        Phases that are to be done.
    gained : bool
        Whether anything has been trained any further.

    Raises
    ------
    InputError
        What the options ask for and cannot be; run files that are in the way, damaged or of other networks.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        settings: Any,
        limits: Any,
        start: Start,
        nets: Nets,
        phases: Sequence[str],
        device: Device,
    ) -> None:
        self.comm, self.settings, self.limits, self.start, self.device = comm, settings, limits, start, device
        self.gained = False
        self.labels: dict[str, NDArray[np.int64]] = {
            name: found for name, of in SPLITS.items() if (found := getattr(nets.source, f"{of}labels")) is not None
        }
        modules = [module for module, _ in nets.modules]
        self.coarse, self.coarse_words = build_coarse(settings, len(nets), len(nets.source.classes))
        if "coarse" in phases:
            coarse.check(settings, list(self.labels))
        self.files = Files(limits.output or limits.restart, limits.restart, bool(limits.overwrite), len(nets))
        self.files.check(comm)
        self.attributes = {
            "driver": "classify", "problem": "classification", "network": f"tiles of {nets.modules[0][1]}",
            "data": settings.data, "scaling": settings.scaling, "samples": nets.source.count,
            "tiles": repr(nets.tiles), "classes": "\n".join(nets.source.classes),
        }  # fmt: skip
        self.whole, before = Whole.begun(modules), limits.restart or settings.start
        if before is not None:
            self.whole = Whole.read(before, modules, comm)
            self.whole.check_like(before, self.attributes, self.labels, comm)
        if settings.start is not None:
            self.whole.forget(phases[0])
        folds = NONE
        if settings.coarse_data == FOLDS:
            folds = Folds.drawn(settings.folds, nets.source.labels, nets.source.classes, settings.seed)
        self.going = self._going(phases, folds.number)
        nets = replace(nets, folder=self.files.folder, before=self.files.before, again=self.again, folds=folds)
        self.nets, self.queues = nets, Queues.of(nets.job_costs, comm.size)
        self.local: LocalPhase | None = None
        if "local" in self.going:
            self.local = LocalPhase(nets, comm, start, self.queues)
        else:
            tables.read(solver_class(settings.local_solver).options)  # of the phase that is over
        self.coherent: EndToEnd | None = None
        if "coherent" in phases:
            self.coherent = EndToEnd(nets, copy.deepcopy(self.coarse), settings, limits, comm, start)

    @property
    def anew(self) -> bool:
        """Whether the coherent phase begins with other parameters than a run file of it that is there."""
        return self.going != ["coherent"] or self.settings.start is not None

    @property
    def again(self) -> bool:
        """Whether local networks that have come to their end go on."""
        return any(not options.later(name) for name in self.start.restart.changed)

    def _going(self, phases: Sequence[str], folds: int) -> list[str]:
        """Which of the phases that are asked for are to be done, with so many folds.

        Raises
        ------
        InputError
            A coarse phase without a local one, or one of these folds; local networks that are to go on, whose run files
            have gone; another coarse net than the one that is trained, without its phase.
        """
        done, changed = self.whole.phases, self.start.restart.changed.keys()
        found = list[str]()
        if "local" in phases and (self.again or "local" not in done or folds not in (0, self.whole.folds)):
            if "local" in done:
                self.files.check_all(self.comm)
            found.append("local")
        if "coarse" in phases and (found or "coarse" not in done or changed & options.COARSE):
            if not found and "local" not in done:
                raise InputError(
                    "option -phase coarse needs a local phase that is finished: -phase local,coarse, or -start local.h5"
                )
            if not found and folds not in (0, self.whole.folds):
                had = f"{self.whole.folds} folds" if self.whole.folds else "all samples only"
                raise InputError(
                    f"option -coarse_data folds needs networks that were trained on {folds} folds, and these were on "
                    f"{had}: -phase local,coarse, or their number as -folds"
                )
            found.append("coarse")
        if "coarse" not in phases and {"coarse", "coherent"} & set(done):
            trained = self.whole.coarse.get("link", self.settings.link)
            kept = changed & options.COARSE | ({"link"} if trained != self.settings.link else set())
            if kept:
                raise InputError(
                    f"option -{min(kept)} is of the coarse net, which is trained already, with -link {trained}: leave "
                    "it as it was, or train another one with coarse in -phase"
                )
        of_coherent = any(name.startswith(options.COHERENT) or name == "freeze" for name in changed)
        if "coherent" in phases and (found or "coherent" not in done or of_coherent):
            found.append("coherent")
        return found

    def execute(self) -> int:
        """Do all phases; the exit code."""
        notes = [*self.start.notes, *self.start.restart.notes, *self.start.restart.unread(), *self.start.unread()]
        self._say([*self._header(), *self.start.elsewhere(), *(f"note: {note}" for note in notes)])
        if self.settings.check:
            return 0
        self.start.stop.check(self.comm)
        described = training.described(self.settings, self.limits, self.start, self.attributes)[1]
        if self.going:
            self.files.prepare(self.comm, self.anew, self.nets.folds.number if self.again else None)
        if self.files.fresh:
            self._write(described)
        for phase in self.going:
            if not self._done(phase):
                more = f"; to go on: the same driver with -restart {self.files.output}" if self.files.output else ""
                self._say([f"stopped: a signal asked to stop in the {phase} phase{more}"])
                return self.start.interrupted(self.gained)
            self._write(described)
        if self.start.restart.changed and not self.going:
            self._accuracy()
            self._write(described)
        self._say([*self._closing(), *([f"run file {self.files.output}"] if self.files.output else [])])
        return 0

    def _done(self, phase: str) -> bool:
        """Do a phase; whether no signal has stopped it."""
        try:
            self.start.stop.check(self.comm)
            return {"local": self._local, "coarse": self._coarse, "coherent": self._coherent}[phase]()
        except Interrupted:  # between runs
            return False

    def _local(self) -> bool:
        phase = self.local
        assert phase is not None
        outcomes = phase.execute()
        self.gained = phase.gained
        phase.destroy()
        if outcomes is None:
            return False
        self.whole.take(outcomes, self.labels, self.nets.folds)
        self._describe([outcome.inputs for outcome in outcomes if not outcome.job.fold])
        spent = self.nets.work(outcomes)
        seconds = self.queues.critical([outcome.seconds for outcome in outcomes])
        self.whole.finish("local", time=seconds, work=sum(spent), work_critical=self.queues.critical(spent))
        self._accuracy()
        return True

    def _coarse(self) -> bool:
        self.gained = True
        begin = time.perf_counter()
        made = coarse.train(self.settings, self.whole.splits, self.nets.source.classes, self.comm)
        seconds = float(self.comm.bcast(time.perf_counter() - begin))
        self._say(f"note: {note}" for note in made.notes)
        self.whole.coarse_theta = made.theta.numpy().copy()
        self.whole.coarse = {
            "words": made.words, "link": self.settings.link, "decay": made.decay, "losses": made.losses,
        }  # fmt: skip
        work = made.operations / (sum(self.nets.costs) * self.nets.source.count)
        self.whole.finish("coarse", time=seconds, work=work, work_critical=work)
        self._accuracy()
        return True

    def _coherent(self) -> bool:
        assert self.coherent is not None
        theta = np.concatenate([self.whole.local, self.whole.coarse_theta])
        if not len(self.whole.coarse_theta):
            theta = np.concatenate([theta, self.coherent.coarse_theta])
        run = self.coherent.train(theta, self.files, self.anew, "coherent" in self.whole.phases)
        self.gained |= self.coherent.gained
        if run is None:
            return False
        self.whole.finish("coherent", **run.row)
        self.whole.coherent = run.theta
        self._describe(run.inputs)
        self._accuracy()
        return True

    def _describe(self, tiles: list[str]) -> None:
        """Note what the networks are given, for who opens the run file without the data."""
        source = self.nets.source
        image = Inputs(tuple(source.shape), tuple(source.classes), "none", (0.0,), (1.0,))
        self.whole.inputs = {"image": str(image), "tiles": tiles}

    def _accuracy(self) -> None:
        """Write to the history how often the fusion that is asked for is right behind the local and coarse phase."""
        for phase in ("local", "coarse"):
            if phase in self.whole.phases:
                trained = phase == "coarse"
                wanted = self.settings.fusion or ("coarse" if trained else "average")
                found = self._accuracies()["test"]
                self.whole.complete(phase, getattr(found, wanted if trained or wanted != "coarse" else "average"))

    def _accuracies(self) -> dict[str, outputs.Accuracies]:
        """How often local networks and fusions are right on each split."""
        net = None
        if len(self.whole.coarse_theta):
            net, theta = self.coarse, torch.from_numpy(self.whole.coarse_theta)
            torch.nn.utils.vector_to_parameters(theta.to(next(net.parameters())), net.parameters())
        link = self.whole.coarse.get("link", self.settings.link)
        return {name: outputs.accuracies(split, link, net) for name, split in self.whole.splits.items()}

    def _write(self, attributes: dict[str, Any]) -> None:
        """Write what the run has come to, if there is a run file."""
        if self.files.output is not None:
            modules = [module for module, _ in self.nets.modules]
            self.whole.write(self.files.output, modules, self.coarse, attributes, self.comm)

    def _header(self) -> list[str]:
        """What is about to run, in words."""
        settings, nets = self.settings, self.nets
        lines = [
            f"data {settings.data}, {nets.source!r}, scaling {settings.scaling}, of each tile its own",
            nets.tiles.described([module for module, _ in nets.modules]),
            f"networks such as {nets.modules[0][1]}, {settings.dtype} on {settings.device}: {self.queues!r}",
        ]
        if nets.folds.number:
            lines.append(f"of them {len(nets)} on all samples, and as many without each of {nets.folds.number} folds")
        if self.local is not None and self.local.first is not None:
            made = self.local.first
            batch = batches.in_words(settings, nets.source.count, made.moving)
            lines.append(f"local solver {settings.local_solver} {made.training.summation()}; {batch}")
        if {"coarse", "coherent"} & set(self.going):
            lines.append(f"coarse net {self.coarse_words} of {settings.link}")
        if self.coherent is not None:
            lines.append(f"coherent solver {settings.coherent_solver}{self.coherent.elimination}")
        lines.append(f"phases: {', '.join(self.going) or 'none is left'}")
        return [*lines, *self.device.words().splitlines()]

    def _closing(self) -> list[str]:
        """What came out, in words."""
        found, lines = self._accuracies(), list[str]()
        if found:
            local = {split: one.local for split, one in found.items()}
            rows = {
                "local, least": {split: min(each) for split, each in local.items()},
                "local, mean": {split: sum(each) / len(each) for split, each in local.items()},
                "local, largest": {split: max(each) for split, each in local.items()},
                **{name: {s: getattr(one, name) for s, one in found.items()} for name in ("average", "majority")},
            }
            if len(self.whole.coarse_theta):
                rows["coarse"] = {split: one.coarse for split, one in found.items()}
            lines.append(f"{'accuracy':<16}" + "".join(f"{split:>9}" for split in found))
            lines += [f"{name:<16}" + "".join(f"{row[s]:>9.4f}" for s in found) for name, row in rows.items()]
            lines.append(outputs.gap(found))
            if self.settings.coarse_data in (outputs.TRAIN, "both"):
                lines += [f"note: {note}" for note in outputs.by_heart(found)]
        history = self.whole.history
        if "coherent" in self.whole.phases:
            lines.append(f"{'coherent':<16}" + " " * 9 * ("train" in found) + f"{history.last('accuracy'):>9.4f}")
        times = [float(net["history"]["time"][-1]) for net in self.whole.nets]
        longest = f", longest local network {max(times):.1f} s" if times else ""
        lines.append(
            f"work {history.last('work'):.1f} (critical {history.last('work_critical'):.1f}), in evaluations of all "
            f"networks; critical path {history.last('time'):.1f} s{longest}"
        )
        return lines

    def _say(self, lines: Any) -> None:
        """Print lines once."""
        for line in lines if self.comm.rank == 0 else ():
            say(line)
