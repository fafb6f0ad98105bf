"""Local networks: what each is, and how one is trained on its tile by ranks that need no others."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor, nn

from common.device import Device
from common.start import Start
from ddml.data.data_set import DataSet
from ddml.data.inputs import Inputs
from ddml.data.scaling import Samples, Scaling
from ddml.data.sources import Source
from ddml.decomposition.tiles import Tiles
from ddml.errors import RunFileError
from ddml.losses.costs import multiplications
from ddml.networks.local import build_local, local_seeds
from ddml.parallel import own
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.runs import run_file
from ddml.sampling.batches import Batches
from solvers import solver_class

from .folds import NONE, Folds, Job
from .inner import InnerRun

# Samples of a block, and blocks, of an evaluation of a local network: few, as small networks take no less time for
# fewer samples (our choices)
LEAST, MOST = 64, 8
SPLITS = {"train": "", "test": "test_", "held_out": "held_"}  # and how the arrays of a data set begin


def tile_of(source: Source, tiles: Tiles, tile: int) -> DataSet:
    """A tile of all samples, with its zeros, in memory of this process."""
    found = source.tile(tiles.ranges[tile])
    if not tiles.padded:
        return found
    arrays = {n: a if n.endswith("labels") else tiles.pad(a, tile) for n, a in found.arrays().items()}
    return DataSet(**arrays, classes=found.classes, origin=found.origin, maximum=found.maximum)


@dataclass(frozen=True)
class Nets:
    """All local networks, of which nothing has been trained.

    Attributes
    ----------
    settings, limits : namespace
        Of the run. Those of a network are the same, but for its solver and seed.
    source : Source
        Of the samples' tiles.
    tiles : Tiles
    modules : list of (Module, str)
        The networks and their descriptions.
    device : Device
        Where this rank computes.
    folder, before : str or None
        Where the run files of the networks are written, and where those are that they go on from.
    again : bool
        Whether networks that had come to their end go on, as their options are others now.
    folds : Folds
        Without which each is trained again.
    """

    settings: Any
    limits: Any
    source: Source
    tiles: Tiles
    modules: list[tuple[nn.Module, str]]
    device: Device
    folder: str | None = None
    before: str | None = None
    again: bool = False
    folds: Folds = NONE

    @classmethod
    def built(cls, settings: Any, limits: Any, source: Source, tiles: Tiles, device: Device) -> Nets:
        """The networks that the settings ask for.

        Raises
        ------
        InputError
            See :func:`ddml.networks.local.build_local`.
        """
        modules = build_local(settings, tiles.shapes, len(source.classes), tiles.narrowing, settings.local_width)
        named = [(module, re.sub(r"^\S*/", "", words)) for module, words in modules]  # users' files may move
        return cls(settings, limits, source, tiles, named, device)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def costs(self) -> list[int]:
        """Multiplications of each network for a sample."""
        dtype = getattr(torch, self.settings.dtype)
        shapes = self.tiles.shapes
        return [
            multiplications(m, torch.zeros(1, *s, dtype=dtype)) for (m, _), s in zip(self.modules, shapes, strict=True)
        ]

    @property
    def jobs(self) -> list[Job]:
        """All that is to be trained."""
        return self.folds.jobs(len(self))

    @property
    def job_costs(self) -> list[int]:
        """Of each job those of its network: with batches all have as much to do."""
        costs = self.costs
        return [costs[job.tile] for job in self.jobs]

    def samples(self, job: Job) -> int:
        """How many it is trained on."""
        return self.source.count - (int((self.folds.left_out == job.fold).sum()) if job.fold else 0)

    def work(self, outcomes: Sequence[Outcome]) -> list[float]:
        """What networks have taken, in evaluations of all networks of tiles together, on all samples."""
        costs, count = self.costs, self.source.count
        return [costs[o.job.tile] * o.work / sum(costs) * (self.samples(o.job) / count) for o in outcomes]

    def named(self, job: Job) -> dict[str, Any]:
        """What the run file of a network says of it alone."""
        seed = local_seeds(self.settings.seed, len(self))[job.tile]
        words = {"tile": job.tile, "seed": seed, "network": self.modules[job.tile][1], "samples": self.samples(job)}
        return words | ({"fold": f"{job.fold} of {job.folds}"} if job.fold else {})

    def file(self, job: Job) -> str | None:
        """The run file of a network, if there is to be one."""
        return None if self.folder is None else f"{self.folder}/{job.file}"

    def earlier(self, job: Job) -> str | None:
        """The run file that a network goes on from, if there is one."""
        path = None if self.before is None else f"{self.before}/{job.file}"
        return path if path is not None and Path(path).is_file() else None


@dataclass(frozen=True)
class Outcome:
    """A trained local network.

    Attributes
    ----------
    job : Job
    theta : ndarray
        Its parameters (n,), float64.
    history : dict of str to ndarray
        The columns of its history that have values.
    reason : str
        Why it stopped.
    logits : dict of str to ndarray
        Of the samples of each split, (B, K); of a network of a fold of those left out, which it is tested on.
    accuracies : dict of str to float
        Fractions of them that are classified right.
    inputs : str
        What it is given, see :class:`ddml.data.inputs.Inputs`.
    """

    job: Job
    theta: NDArray[np.float64]
    history: Mapping[str, NDArray[np.float64]]
    reason: str
    logits: Mapping[str, NDArray[Any]]
    accuracies: Mapping[str, float]
    inputs: str

    @property
    def tile(self) -> int:
        """Its number."""
        return self.job.tile

    @property
    def work(self) -> float:
        """In its own work units."""
        return float(self.history["work"][-1])

    @property
    def seconds(self) -> float:
        """That its training took."""
        return float(self.history["time"][-1])

    def line(self) -> str:
        """What came out, in words."""
        iterations, loss = int(self.history["iteration"][-1]), self.history["loss"][-1]
        return (
            f"tile {self.tile:>2}{self.job.without}: {self.reason}. {iterations} iterations, loss {loss:.3e}, accuracy "
            f"{self.accuracies['test']:.4f} ({self.accuracies['train']:.4f} of what it was trained on), work "
            f"{self.work:.1f}, {self.seconds:.1f} s"
        )


class LocalNet:
    """A local network on the ranks that train it; everything is collective on them, and on no others.

    Parameters
    ----------
    nets
        All networks.
    job
        Which one it is.
    dataset
        Its tile of all samples.
    comm
        The ranks that train it.
    start
        Of the run.

    Attributes
    ----------
    gained : bool
        Whether it has been trained any further.

    Raises
    ------
    InputError
        A solver that there is not, or that refuses its options or the network.
    """

    def __init__(self, nets: Nets, job: Job, dataset: DataSet, comm: MPI.Comm, start: Start) -> None:
        self.nets, self.job, self.comm = nets, job, comm
        self.gained = False
        network, named = nets.modules[job.tile][0], nets.named(job)
        settings = SimpleNamespace(
            **vars(nets.settings) | {"solver": nets.settings.local_solver, "seed": named["seed"]}
        )
        scaling, where = Scaling(dataset, settings.scaling, comm), nets.device.torch
        self.inputs = str(Inputs.of(dataset, scaling))
        dtype = getattr(torch, settings.dtype)
        self.splits = {
            name: Samples(getattr(dataset, f"{of}inputs"), labels, scaling, dtype, where)
            for name, of in SPLITS.items()
            if (labels := getattr(dataset, f"{of}labels")) is not None
        }
        if job.fold:
            out = torch.from_numpy(nets.folds.left_out == job.fold)
            whole = self.splits["train"]
            self.splits = {name: whole.take(rows.nonzero()[:, 0]) for name, rows in (("train", ~out), ("test", out))}
        self.loss = ClassificationLoss(
            network.to(where), self.splits["train"], len(dataset.classes), settings.chunk or None
        )
        if settings.summation_blocks is None and self.loss.size <= settings.summation_limit and where.type == "cpu":
            settings.summation_blocks = max(min((settings.batch_size or self.loss.count) // LEAST, MOST), 1)
        chosen = solver_class(settings.solver).decompose(self.loss)
        self.training = training.Training(
            comm, settings, start, self.loss, chosen, 0.0, settings.batch_size, nets.device.vectors
        )
        self.settings = settings
        self.moving: Batches | None = self.training.batches()

    def destroy(self) -> None:
        """Destroy what PETSc has."""
        self.training.destroy()

    def attributes(self) -> dict[str, Any]:
        """Of its run file: what must be the same where it goes on."""
        settings, blocks = self.settings, self.training.blocks
        return {
            **self.nets.named(self.job), "driver": "classify", "problem": "classification",
            "solver": settings.solver, "dtype": settings.dtype, "summation_blocks": blocks,
            "summation": "tree" if blocks else "by ranks", "tiles": repr(self.nets.tiles),
            "data": settings.data, "scaling": settings.scaling, "stopped": "",
        }  # fmt: skip

    def train(self) -> Outcome | None:
        """Train it to its end, or from its run file on; None where a signal has stopped it.

        Raises
        ------
        InputError
            A loss that is not finite; a run file that cannot be read, is of another network, or cannot be written.
        """
        made, tests, limits = self.training, self.splits["test"], SimpleNamespace(**vars(self.nets.limits))
        limits.progress = "none"
        if limits.tensorboard:
            limits.tensorboard = f"{limits.tensorboard}/{Path(self.job.file).stem}"
        files = self.nets.file(self.job), self.nets.earlier(self.job)
        measure = TestSet(self.loss, tests, self.comm, made.blocks)
        run = InnerRun(made, self.moving, limits, files, self.attributes(), measure, len(tests), self.nets.again)
        try:
            return self._outcome(run) if run.to_its_end() else None
        finally:
            self.gained = run.gained
            run.destroy()

    def _outcome(self, run: InnerRun) -> Outcome:
        """What a run came to; the outputs are on the first rank."""
        theta = self.training.objective.parameters(run.last).clone()
        exact = self.training.layout.gather(run.last).numpy().copy()
        logits, accuracies = dict[str, NDArray[Any]](), dict[str, float]()
        for name, samples in self.splits.items():
            logits[name] = self.outputs(samples, theta)
            if self.comm.rank == 0:
                accuracies[name] = float((logits[name].argmax(axis=1) == samples.targets.cpu().numpy()).mean())
        history = {name: run.history[name] for name in run.history.used()}
        if self.job.fold:
            del logits["train"]
        return Outcome(self.job, exact, history, run.reason, logits, accuracies, self.inputs)

    def outputs(self, samples: Samples, theta: Tensor) -> NDArray[Any]:
        """The outputs (B, K) for some samples, on the first rank: block by block, the same on any number of ranks."""
        count, found = len(samples), list[Tensor]()
        for part in own(count, self.comm, self.training.blocks or 1):
            loss = self.loss.on(samples.part(part.start, part.stop), 1 / count)
            found += [outputs.cpu() for outputs, _ in loss.outputs(theta)]
        rows = self.comm.gather(found)
        together = [row for here in rows or [] for row in here]
        return torch.cat(together).numpy() if together else np.empty((0, 0))


def check_file(path: str, expected: Mapping[str, Any], comm: MPI.Comm) -> None:
    """Refuse a run file of another network than the one of these attributes. Collective.

    Raises
    ------
    RunFileError
        If it is, or is damaged.
    """
    found = run_file.inspect(path, comm).attributes
    for name in ("tile", "tiles", "seed", "network", "dtype", "fold", "samples", "scaling"):
        if found.get(name) != expected.get(name):
            raise RunFileError(
                f"{path} is of {name} {found.get(name)}, not {expected.get(name)}: it is of another run; give another "
                "-output, or remove its folder"
            )
