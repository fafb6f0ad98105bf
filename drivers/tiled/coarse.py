"""The coarse phase: a net is trained on what the local nets say of the samples, and measured beside other fusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor, nn

import solvers
from ddml.data.parting import held_out
from ddml.errors import InputError
from ddml.losses.costs import multiplications
from ddml.losses.decayed import DecayedLoss
from ddml.networks import coarse
from ddml.networks.fusions import joined
from ddml.options import Option, number_or_word
from ddml.problems.classification import cross_entropy

from . import folds
from .folds import FOLDS
from .outputs import HELD_OUT, TRAIN, Outputs, few

# Our choices (docs/results/tiles.md). Decays that are tried, until one serves worse than the one before, and the share
# of each class that says so. A minimisation has so many iterations at most, and ends where the loss has gone down by
# less than that part of itself in so many
DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
SHARE = 0.2
ITERATIONS, FLAT, WINDOW = 60, 1e-3, 5

SOLVERS: dict[str, dict[str, Any]] = {"lbfgs": {"momentum": 1, "memory": 10, "first_step": "scaled"}, "tr": {}}

OPTIONS = (
    *coarse.OPTIONS,
    Option("coarse_data", TRAIN, "Samples that the coarse net is trained on: those that the local nets were trained "
           "on, held-out ones, or both; folds: the former, with outputs of networks that were trained without them.",
           choices=(TRAIN, HELD_OUT, "both", FOLDS)),
    *folds.OPTIONS,
    Option("coarse_solver", "lbfgs", "Trains it, on all of them at a time.", choices=tuple(SOLVERS)),
    Option("coarse_decay", "auto", "Its weight decay lambda, as in lambda / 2 |W|^2: a number; or auto, from "
           f"{DECAYS[0]:g} down in powers of ten to {DECAYS[-1]:g}, until the loss grows on a fifth of each class, "
           "which the net is trained on in the end only."),
)  # fmt: skip


@dataclass(frozen=True)
class Coarse:
    """A trained coarse net; the same on every rank.

    Attributes
    ----------
    module : Module
        Of linked outputs (B, N K), with its parameters.
    words : str
        Its kind and sizes.
    theta : Tensor
        Its parameters (n,), float64.
    decay : float
        Weight decay.
    losses : ndarray
        At each iteration of the last minimisation.
    operations : float
        Of all minimisations: work units, times samples and multiplications of a forward pass for one. Over those of the
        local nets they are work units of these.
    notes : list of str
        What a user should know.
    """

    module: nn.Module
    words: str
    theta: Tensor
    decay: float
    losses: NDArray[np.float64]
    operations: float
    notes: list[str]


def check(settings: Any, splits: Sequence[str]) -> None:
    """Refuse what the options of the coarse phase ask for and there is not.

    Parameters
    ----------
    settings
        Values of :data:`OPTIONS`.
    splits
        Those that the data have.

    Raises
    ------
    InputError
        Held-out samples where there are none; a decay that is no number.
    """
    _decay(settings)
    wanted = settings.coarse_data
    if wanted in (HELD_OUT, "both") and HELD_OUT not in splits:
        raise InputError(f"option -coarse_data {wanted} is for data that have held-out samples")


def _decay(settings: Any) -> float | None:
    """The number that is given, or None for auto."""
    found = number_or_word("", "coarse_decay", settings.coarse_decay, "auto", "0")
    return 0.0 if settings.coarse_decay == "0" else found


def train(settings: Any, splits: Mapping[str, Outputs], classes: Sequence[str], comm: MPI.Comm) -> Coarse:
    """Train the coarse net, its samples dealt to all ranks; to the last bit the same on any number. Collective.

    Parameters
    ----------
    settings
        Values of :data:`OPTIONS`, ``seed`` and ``dtype``.
    splits
        Outputs of the local nets for ``train``, ``test`` and, where there are some, ``held_out`` samples and ``folds``;
        every rank passes all.
    classes
        Names of the K classes.

    Raises
    ------
    InputError
        On all ranks: see :func:`check`; folds that there are not; outputs that are not finite; a decay that is to be
        chosen where no class has samples to spare.
    """
    check(settings, list(splits))
    module, words = coarse.build_coarse(settings, len(splits[TRAIN].logits), len(classes))
    names = [TRAIN, HELD_OUT] if settings.coarse_data == "both" else [settings.coarse_data]
    if FOLDS in names and FOLDS not in splits:
        raise InputError("option -coarse_data folds needs networks that were trained again, without parts of them")
    for name in names:
        splits[name].refuse_not_finite(name)
    used = splits[names[0]] if len(names) == 1 else splits[TRAIN].with_those(splits[HELD_OUT])
    fits, decay = _Fits(module, settings, comm), _decay(settings)
    if decay is None:
        drawn = deciding(used.labels, classes, settings.seed)
        decay = fits.best_decay(used.take(~drawn), used.take(drawn))
    result = fits(used, decay)
    nn.utils.vector_to_parameters(result.theta.to(next(module.parameters())), module.parameters())
    notes = [] if settings.coarse_data in (TRAIN, FOLDS) else few(splits[HELD_OUT].labels, classes)
    return Coarse(module, words, result.theta, decay, result.losses, fits.operations, notes)


def deciding(labels: NDArray[np.int64], classes: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which of some samples (B,) a decay is chosen by: of each class its share, and never all of one.

    Raises
    ------
    InputError
        If there are too few.
    """
    try:
        _, rows = held_out(labels, str(SHARE), classes, coarse.coarse_seed(seed))
    except InputError as error:
        raise InputError(
            f"{len(labels)} samples of {len(classes)} classes are too few to choose a weight decay by: give option "
            "-coarse_decay"
        ) from error
    drawn = np.zeros(len(labels), dtype=bool)
    drawn[rows] = True
    return drawn


class _Fits:
    """Minimisations of a coarse net's loss.

    Attributes
    ----------
    at : Tensor or None
        Where the next one begins: where the last one has led, at first at the module's parameters.
    operations : float
        So far, see :class:`Coarse`.
    """

    def __init__(self, module: nn.Module, settings: Any, comm: MPI.Comm) -> None:
        self.module, self.settings, self.comm = module, settings, comm
        self.operations = 0.0
        self.at: Tensor | None = None

    def loss(self, outputs: Outputs, decay: float) -> DecayedLoss:
        """That of some samples."""
        x = joined(torch.from_numpy(outputs.logits), self.settings.link).to(next(self.module.parameters()))
        return DecayedLoss(self.module, cross_entropy, x, torch.from_numpy(outputs.labels), decay)

    def __call__(self, outputs: Outputs, decay: float) -> solvers.Result:
        """Minimise that of some samples. Collective."""
        loss, solver, losses = self.loss(outputs, decay), self.settings.coarse_solver, list[float]()

        def flat(iteration: int, value: float, norm: float) -> bool:
            losses.append(value)
            return iteration >= WINDOW and not losses[-1] < (1 - FLAT) * losses[-1 - WINDOW]

        result = solvers.minimise(
            loss, solver, self.comm, SOLVERS[solver], iterations=ITERATIONS, start=self.at, monitor=flat
        )
        self.at = result.theta
        self.operations += result.work * loss.count * multiplications(self.module, loss.samples.part(0, 1).inputs)
        return result

    def best_decay(self, outputs: Outputs, others: Outputs) -> float:
        """That which serves best on others than what is trained on; the next begins where it has led. Collective."""
        judged, least, begin = self.loss(others, 0.0), float("inf"), self.at
        best = DECAYS[0]
        for decay in DECAYS:
            theta = self(outputs, decay).theta
            found = self.comm.bcast(float(judged.value(theta.to(judged.dtype))) if self.comm.rank == 0 else None)
            if not found < least:
                break
            best, least, begin = decay, found, theta
        self.at = begin
        return best
