"""What local nets say of samples, how often they and their fusions are right, and what a user should know of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.networks.fusions import FUSIONS, joined

TRAIN, HELD_OUT, TEST = "train", "held_out", "test"  # splits
# Held-out samples of a class that are few; the part of its training samples that a local net has right which knows
# nearly all (our choices)
FEW, NEARLY = 10, 0.99


class Outputs(NamedTuple):
    """What the local nets say of some samples.

    Attributes
    ----------
    logits : ndarray
        (N, B, K), in the precision of the nets.
    labels : ndarray of int64
        (B,).
    """

    logits: NDArray[Any]
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.bool_]) -> Outputs:
        """Of these samples."""
        return Outputs(self.logits[:, rows], self.labels[rows])

    def with_those(self, other: Outputs) -> Outputs:
        """Of these samples and others."""
        logits = np.concatenate([self.logits, other.logits], axis=1)
        return Outputs(logits, np.concatenate([self.labels, other.labels]))

    def refuse_not_finite(self, split: str) -> None:
        """Raise an InputError where a net says no number of a sample of the split of that name."""
        wrong = np.argwhere(~np.isfinite(self.logits).all(axis=2))
        if len(wrong):
            net, sample = wrong[0]
            raise InputError(
                f"local network {net} gives NaN or infinity for sample {sample} of the {split} samples: a coarse net "
                "needs numbers"
            )


class Accuracies(NamedTuple):
    """Fractions of some samples that are classified right: by each local net, and by the fusions.

    That of a coarse net is NaN where there is none.
    """

    local: tuple[float, ...]
    average: float
    majority: float
    coarse: float = float("nan")


@torch.no_grad()
def accuracies(outputs: Outputs, link: str = "", coarse: nn.Module | None = None) -> Accuracies:
    """How often local nets, the fusions and a coarse net, which is given linked outputs, are right.

    Whoever says a number that is not finite is wrong.
    """
    logits, labels = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels)

    def right(classes: Tensor) -> float:
        return float((classes == labels).double().mean())

    found = Accuracies(tuple(right(said(each)) for each in logits), *(right(fuse(logits)) for fuse in FUSIONS.values()))
    if coarse is None:
        return found
    return found._replace(coarse=right(said(coarse(joined(logits, link).to(next(coarse.parameters()))))))


def said(outputs: Tensor) -> Tensor:
    """The classes (B,) with the largest outputs (B, K); -1 where one is not finite."""
    return outputs.argmax(dim=1).where(outputs.isfinite().all(dim=1), -1)


def gap(found: Mapping[str, Accuracies]) -> str:
    """How much better local nets are on what they were trained on, in words."""
    train, test = (np.array(found[split].local) for split in (TRAIN, TEST))
    widest = int((train - test).argmax())
    return (
        f"local networks have {100 * train.mean():.1f} % of the training samples right on average and "
        f"{100 * test.mean():.1f} % of the test samples; the widest gap is that of tile {widest}, "
        f"{100 * train[widest]:.1f} and {100 * test[widest]:.1f} %"
    )


def by_heart(found: Mapping[str, Accuracies]) -> list[str]:
    """A note where local nets know nearly all of their training samples."""
    train = np.array(found[TRAIN].local)
    if not (train >= NEARLY).any():
        return []
    return [
        f"{int((train >= NEARLY).sum())} of {len(train)} local networks have {100 * NEARLY:.0f} % of their training "
        "samples right or more: of those they are surer than of others, and a coarse net that is trained on them "
        "trusts them too much; -coarse_data folds, or held_out with samples enough, does not"
    ]


def few(labels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """A note where there are classes of which few samples are held out, which a coarse net is to be trained on."""
    counts = np.bincount(labels, minlength=len(classes))
    least = int(counts.argmin())
    if counts[least] >= FEW:
        return []
    return [
        f"{int((counts < FEW).sum())} of {len(classes)} classes have fewer than {FEW} held-out samples, "
        f"{classes[least]} has {counts[least]}: trained on so few alone, a coarse net was worse than the average of "
        "probabilities; -coarse_data train"
    ]
