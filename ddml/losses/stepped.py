"""Step lengths of networks side by side, and the net behind them, from kept outputs only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.parameters import parameter_table

from .branched import BranchedLoss
from .loss import Loss
from .work import CRITERION, Besides


class SteppedLoss(Loss):
    r"""A loss where network i gives :math:`f_i + a_i (f_i^+ - f_i)`, as a function of the lengths a and the coarse net.

    f_i are its outputs before a step and :math:`f_i^+` those behind it, so that what it gives is right at 0 and 1 and
    interpolated between. No network is evaluated.

    Parameters
    ----------
    loss
        Of the whole; none of its tiles is needed.
    theta
        Its parameters (n,), of which those of the coarse net are read.
    before, behind
        Outputs (N, S, K) of the networks.
    length
        At which all lengths begin.

    Attributes
    ----------
    share : float
        Work units of the whole loss in one of this one.
    """

    hessian = False

    def __init__(self, loss: BranchedLoss, theta: Tensor, before: Tensor, behind: Tensor, length: float) -> None:
        self.loss, self.theta, self.before, self.change = loss, theta, before, behind - before
        self.length, self.count, self.dtype, self.device = length, loss.count, loss.dtype, loss.device
        coarse = [(p.name, p.shape) for p in loss.coarse.parameters]
        self.parameters = parameter_table([("lengths", (len(before),)), *coarse])
        self.layers = (tuple(range(len(self.parameters))),)
        head = loss.branches.head
        self.costs = (sum(loss.costs[n] for n in head),)
        pointwise = sum(loss.besides.pointwise[n] for n in head)
        self.besides = Besides((pointwise,), (), max(loss.besides.criterion, CRITERION))
        self.share = self.charges.operations / loss.charges.operations

    def part(self, begin: int, end: int) -> SteppedLoss:
        """See :meth:`.Loss.part`."""
        loss = self.loss.on(self.loss.samples.part(begin, end), self.loss.weight)
        behind = self.before + self.change
        return SteppedLoss(loss, self.theta, self.before[:, begin:end], behind[:, begin:end], self.length)

    def sampled(self, rows: Tensor) -> SteppedLoss:
        """It is of all samples.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError("step lengths are found on all samples that the outputs are of")

    def initial(self) -> Tensor:
        """See :meth:`.Loss.initial`."""
        lengths = torch.full((len(self.before),), self.length, dtype=self.dtype, device=self.device)
        return torch.cat([lengths, self.theta[self.loss.coarse.place]])

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`: one, of all samples."""
        lengths, place = theta[: len(self.before)], self.loss.coarse.place
        full = torch.cat([self.theta[: place.start], theta[len(lengths) :], self.theta[place.stop :]])
        yield self.loss.term_behind(full, list(self.before + lengths[:, None, None] * self.change))
