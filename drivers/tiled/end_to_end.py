"""The coherent phase of a run: all networks of tiles and the coarse net, as one network, each where its tile is."""

from __future__ import annotations

from common import training  # first: it initialises PETSc

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn

from common.start import Start
from ddml.data.data_set import DataSet
from ddml.data.inputs import Inputs
from ddml.data.sample_sets import TensorSamples
from ddml.data.scaling import Samples, Scaling
from ddml.data.tiled import TiledSamples
from ddml.errors import InputError
from ddml.losses.branched import BranchedLoss
from ddml.networks.coherent import Coherent
from ddml.objectives.branched import BranchedObjective
from ddml.objectives.eliminated import EliminatedObjective
from ddml.runs.progress import say
from solvers import solver_class

from . import options
from .coherent import STEPS, TiledTestSet, coherent_loss, prepared, solved
from .files import COHERENT, Files
from .inner import InnerRun
from .nets import Nets, tile_of
from .whole import numbers_of

Vector = NDArray[np.float64]


class Done(NamedTuple):
    """What the phase has come to: the parameters of all networks (n,), the row of the history, and their inputs."""

    theta: Vector
    row: dict[str, float]
    inputs: list[str]


class EndToEnd:
    """The coherent net and its solver, whose options have been read once it is made; everything is collective.

    Attributes
    ----------
    coarse_theta : ndarray
        Of the coarse net before any training.
    gained : bool
        Whether it has been trained any further.
    elimination : str
        Of the coarse net, in words; empty where it is trained.
    """

    def __init__(self, nets: Nets, coarse: nn.Module, settings: Any, limits: Any, comm: MPI.Comm, start: Start) -> None:
        self.nets, self.comm, self.start, self.gained = nets, comm, start, False
        self.coarse_theta = numbers_of(coarse)
        self.flags = [(p, p.requires_grad) for net in (*(m for m, _ in nets.modules), coarse) for p in net.parameters()]
        self.settings, self.limits = options.coherent(settings, limits)
        if self.settings.batch_size > nets.source.count:
            raise InputError(f"option -coherent_batch_size must be at most {nets.source.count}, the samples")
        modules = [module for module, _ in nets.modules]
        frozen = [] if settings.freeze is None else [settings.freeze]
        where = nets.device.torch
        self.module = prepared(Coherent(modules, coarse, nets.tiles, settings.link).to(where), None, frozen)
        dtype, none = getattr(torch, settings.dtype), torch.zeros(2, dtype=torch.int64, device=where)
        few = [TensorSamples(torch.zeros(2, *s, dtype=dtype, device=where), none) for s in nets.tiles.shapes]
        self.elimination = ""
        self.branched: Callable[..., BranchedObjective] = BranchedObjective
        if self.settings.coherent_coarse == options.ELIMINATED:
            steps = self.settings.coherent_coarse_iterations or STEPS
            self.elimination = f", coarse net eliminated by {steps} iterations of L-BFGS"
            self.branched = partial(EliminatedObjective, solved(steps))
        made = self._made(self._loss(few.__getitem__, none), 0)  # its options have been read then
        spares, size = made.context is not None and made.context.spares_memory, made.layout.size
        made.destroy()
        self._melt()
        if self.elimination and spares:
            raise InputError(
                f"option -coherent_coarse {options.ELIMINATED}: of {size} parameters in float32 -coherent_solver tr "
                "spares memory and keeps no trial point; -coherent_norm 2 keeps it"
            )

    def _melt(self) -> None:
        """Freeze nothing any more: the modules are those of the local networks, too."""
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    def _loss(self, tile: Any, targets: torch.Tensor) -> BranchedLoss:
        chunk = self.settings.chunk or None
        return coherent_loss(self.module, len(self.nets.source.classes), targets, tile, self.comm, chunk)

    def _made(self, loss: BranchedLoss, samples: int) -> training.Training:
        chosen = solver_class(self.settings.solver).decompose(loss, options.COHERENT)
        return training.Training(
            self.comm, self.settings, self.start, loss, chosen, 0.0, samples, self.nets.device.vectors,
            options.COHERENT, self.branched,
        )  # fmt: skip

    def train(self, theta: Vector, files: Files, anew: bool, changed: bool) -> Done | None:
        """Train it from parameters (n,) of all networks on, or from its run file; None where a signal has stopped it.

        Parameters
        ----------
        theta
            Of all networks.
        files
            Of the run.
        anew
            Whether a run file that is there is of other parameters than these.
        changed
            Whether one that has come to its end goes on, as its options are others now.

        Raises
        ------
        InputError
            A loss that is not finite; a run file that cannot be read or written.
        """
        frozen = [] if self.settings.freeze is None else [self.settings.freeze]
        prepared(self.module, torch.from_numpy(theta), frozen)
        kept, source = dict[int, tuple[DataSet, Scaling]](), self.nets.source
        dtype, where = getattr(torch, self.settings.dtype), self.nets.device.torch

        def tile(number: int) -> Samples:
            dataset = tile_of(source, self.nets.tiles, number)
            kept[number] = dataset, Scaling(dataset, self.settings.scaling, MPI.COMM_SELF)
            return Samples(dataset.inputs, dataset.labels, kept[number][1], dtype, where)

        loss = self._loss(tile, torch.from_numpy(source.labels).to(where))
        made = self._made(loss, self.settings.batch_size)
        moving, words = made.batches(), made.summation()
        if self.comm.rank == 0:
            say(f"coherent net of {len(theta)} parameters, solver {self.settings.solver} {words}")
        tests = {
            i: Samples(found.test_inputs, found.test_labels, scaling, dtype, where)
            for i, (found, scaling) in kept.items()
        }
        measure = TiledTestSet(made.objective, TiledSamples(tests, torch.from_numpy(source.test_labels).to(where)))
        output, before = files.of(COHERENT)
        attributes = {
            "driver": "classify", "problem": "classification", "network": "coherent",
            "solver": self.settings.solver + self.elimination,  # which begins afresh where either is another
            "seed": self.settings.seed, "dtype": self.settings.dtype, "tiles": repr(self.nets.tiles), "stopped": "",
            "summation_blocks": made.blocks, "summation": "tree" if made.blocks else "by ranks",
        }  # fmt: skip
        paths = output, None if anew else before
        run = InnerRun(made, moving, self.limits, paths, attributes, measure, len(source.test_labels), changed)
        try:
            return self._outcome(run, made, theta, kept) if run.to_its_end() else None
        finally:
            self.gained = run.gained
            run.destroy()
            made.destroy()
            self._melt()

    def _outcome(
        self, run: InnerRun, made: training.Training, theta: Vector, kept: Mapping[int, tuple[DataSet, Scaling]]
    ) -> Done:
        """What a run came to that began at these parameters, and what was read of the tiles of this rank."""
        found = made.layout.gather(run.last).numpy().copy()
        row = {"time": run.history.last("time"), "loss": run.history.last("loss"), "work": made.objective.work.total,
               "work_critical": made.objective.work.critical}  # fmt: skip
        row |= run.measure(made.objective.parameters(run.last))
        whole = theta.copy()
        cut = len(theta) - len(self.coarse_theta)
        if len(found) == len(theta):
            whole = found
        elif self.settings.freeze == "local":
            whole[cut:] = found
        else:
            whole[:cut] = found
        told = self.comm.allgather({i: str(Inputs.of(*both)) for i, both in kept.items()})
        inputs = {i: text for here in told for i, text in here.items()}
        return Done(whole, row, [inputs[i] for i in range(len(self.nets))])
