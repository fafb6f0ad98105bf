"""Classification by coherent nets, whose networks are dealt over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.data.sample_sets import SampleSet
from ddml.data.tiled import TiledSamples
from ddml.errors import InputError
from ddml.losses.branched import BranchedLoss
from ddml.networks.coherent import Coherent
from ddml.objectives.branched import BranchedObjective, tiles_of_ranks
from ddml.parallel import agreed
from ddml.vectors import write

from .classification import cross_entropy

FREEZABLE = ("local", "coarse")


def prepared(module: Coherent, theta: Tensor | None = None, frozen: Collection[str] = ()) -> Coherent:
    """A coherent net that begins at some parameters (n,), with some of its parts frozen; the same object.

    Parameters
    ----------
    theta
        Of all networks in the order of the tiles, and then of the coarse net, without those that the networks hold
        fixed themselves (default: as they are).
    frozen
        Some of :data:`FREEZABLE`.

    Raises
    ------
    InputError
        Another number of parameters; parts that there are not, or all of them.
    """
    size = sum(p.numel() for p in module.learnt)
    if theta is not None:
        if theta.numel() != size:
            raise InputError(f"the coherent net has {size} parameters, and there are {theta.numel()} to begin with")
        nn.utils.vector_to_parameters(theta.reshape(-1).to(next(module.parameters())), module.learnt)
    wrong = sorted(set(frozen) - set(FREEZABLE))
    if wrong or set(frozen) == set(FREEZABLE):
        raise InputError(f"one of {', '.join(FREEZABLE)} can be frozen, got {', '.join(wrong or frozen)}")
    still = {id(p) for name in frozen for p in {"local": module.nets, "coarse": module.coarse}[name].parameters()}
    for parameter in module.learnt:
        parameter.requires_grad_(id(parameter) not in still)
    return module


def coherent_loss(
    module: Coherent,
    classes: int,
    targets: Tensor,
    tile: Callable[[int], SampleSet],
    comm: MPI.Comm,
    batch: int | None = None,
) -> BranchedLoss:
    """Mean cross entropy of a coherent net on samples in tiles; each rank has those of its networks. Collective.

    Parameters
    ----------
    module
        The same on every rank.
    classes
        How many there are.
    targets
        Classes (N,) of the samples, int64.
    tile
        Called for the networks of this rank only, gives the samples of the tile.
    batch
        See :class:`ddml.losses.branched.BranchedLoss`.

    Raises
    ------
    InputError
        On all ranks, also what ``tile`` raises on one: outputs that are not one for each class, other numbers of
        samples.
    """
    with agreed(comm):
        loss = BranchedLoss(module, cross_entropy, TiledSamples({}, targets), batch)
        if loss.answers != classes:
            raise InputError(
                f"the coarse net gives {loss.answers} numbers for a sample, and there are {classes} classes"
            )
        tiles = {i: tile(i) for i in tiles_of_ranks(loss, comm.size)[comm.rank]}
        return loss.on(TiledSamples(tiles, targets))


class TiledTestSet:
    """Accuracy and loss of a coherent net on other samples in tiles.

    Parameters
    ----------
    objective
        Of the training set.
    samples
        In the tiles of this rank, as the training samples are.

    Attributes
    ----------
    logits : Tensor
        (N, S, K), what the networks gave when it was last asked.
    """

    def __init__(self, objective: BranchedObjective, samples: TiledSamples) -> None:
        self.loss = objective.loss.on(samples)
        self.objective = BranchedObjective(self.loss, objective.layout, objective.stop, objective.parts.blocks)
        self.logits = torch.empty(0)

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """``accuracy``, the fraction that is classified right, and ``test_loss``, the mean. Collective.

        A sample with an output that is not finite counts as wrong; of equal outputs the first decides.
        """
        loss, objective = self.loss, self.objective
        x = objective.layout.vector()
        write(x, theta[slice(*x.getOwnershipRange())].double())
        self.logits = objective.outputs_at(x).logits
        x.destroy()
        at = theta.to(device=loss.device, dtype=loss.dtype)
        outputs = loss.outputs_behind(at, dict(enumerate(self.logits)))
        hits = (outputs.argmax(dim=1) == loss.targets) & outputs.isfinite().all(dim=1)
        found = np.array([float(hits.double().mean()), float(cross_entropy(outputs, loss.targets).double().mean())])
        objective.comm.Bcast(found)  # as the first rank has rounded them
        return {"accuracy": float(found[0]), "test_loss": float(found[1])}
