"""What networks of tiles say together: their outputs as inputs of a coarse net, and two ways to do without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LINKS = ("probabilities", "log_probabilities", "logits")
LEAST = -12.0  # of log-probabilities: what is below is cut off (our choice)
EQUAL = 1e-12  # means of probabilities that differ by less do so by rounding (our choice)


def linked(logits: Tensor, link: str) -> Tensor:
    """What a coarse net is given of logits (..., K), number by number: in their precision, of the same shape.

    Parameters
    ----------
    logits
        Outputs of a network, or of several, one number for each class.
    link
        One of :data:`LINKS`; log-probabilities are not below :data:`LEAST`.
    """
    if link == "probabilities":
        return logits.softmax(dim=-1)
    if link == "log_probabilities":
        return logits.log_softmax(dim=-1).clamp(min=LEAST)
    if link == "logits":
        return logits
    raise ValueError(f"no link {link}: {LINKS}")


def joined(logits: Tensor, link: str) -> Tensor:
    """The inputs (B, N K) of a coarse net from the logits (N, B, K) of N networks: the K numbers of each in turn."""
    return linked(logits, link).transpose(0, 1).flatten(1)


def average(logits: Tensor) -> Tensor:
    """The classes (B,) with the largest mean of the probabilities of N networks, from their logits (N, B, K).

    In float64; of classes with equal means, to :data:`EQUAL`, it is the first. A sample for which a network gives a
    number that is not finite has the class -1, which is none.
    """
    return _largest(logits, _means(logits))


def majority(logits: Tensor) -> Tensor:
    """The classes (B,) that most of N networks say, from their logits (N, B, K).

    A network says the first of its largest outputs. Of classes with as many votes it is the one with the largest mean
    of probabilities; that, and what has no class, is as in :func:`average`.
    """
    votes = _votes(logits)
    most = votes == votes.amax(dim=1, keepdim=True)
    return _largest(logits, _means(logits).masked_fill(~most, -1.0))


FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {"average": average, "majority": majority}


def chances(logits: Tensor, fusion: str) -> Tensor:
    """The probabilities (B, K), float64, that a fusion gives the classes; its own class is the first of the largest.

    Those of ``average`` are the means of the networks' probabilities, those of ``majority`` the parts that the classes
    have of N + 1 votes, the means being one more, which is split (our choice). All are NaN where there is no class.

    Parameters
    ----------
    logits
        Of N networks, (N, B, K).
    fusion
        One of :data:`FUSIONS`.
    """
    classes, found = FUSIONS[fusion](logits)[:, None], _means(logits)
    if fusion == "majority":
        found = (_votes(logits) + found) / (len(logits) + 1)
    found = found.scatter(1, classes.clamp(min=0), found.amax(dim=1, keepdim=True))  # of those that are equal
    return found.where(classes >= 0, torch.nan)


def _votes(logits: Tensor) -> Tensor:
    """How many of the networks say each class, (B, K), int64."""
    votes = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
    for said in logits.argmax(dim=2):
        votes.scatter_add_(1, said[:, None], torch.ones_like(said[:, None]))
    return votes


def _means(logits: Tensor) -> Tensor:
    """Of the probabilities, (B, K)."""
    return logits.double().softmax(dim=2).mean(dim=0)


def _largest(logits: Tensor, means: Tensor) -> Tensor:
    largest = means >= means.amax(dim=1, keepdim=True) - EQUAL
    return largest.byte().argmax(dim=1).where(logits.isfinite().all(dim=2).all(dim=0), -1)
