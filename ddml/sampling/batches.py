"""Mini-batches: other samples every few iterations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddml.errors import InputError
from ddml.objectives.objective import Objective
from ddml.options import WITH_SOLVER, Option
from ddml.parallel import split

OPTIONS = (
    Option("batch_size", 0, "Samples of a batch, at most: each epoch is shuffled and cut into equal batches; 0: all "
           "samples, all the time.", minimum=0, changes=WITH_SOLVER),
    Option("batch_overlap", 0.01, "Samples that a batch shares with the one before, as a fraction of a batch.",
           minimum=0.0),
    Option("batch_growth", 1.0, "Factor by which batches grow where a new batch belies what the solver did on the old "
           "one, up to all samples; 1: they stay. For trust regions.", minimum=1.0),
    Option("batch_steps", None, "Iterations on each batch (default: 5 on batches of more than 2,500 samples, else 2).",
           kind=int, minimum=1),
)  # fmt: skip

GROW_BELOW = 0.25  # as a trust region shrinks below this ratio


class Batches:
    """Gives an objective one batch of its samples after the other; everything is collective.

    An epoch e is a permutation of all N samples, drawn from the seed and e, and cut into ceil(N / size) batches whose
    sizes differ by at most one. In front of these new samples a batch has some of the new samples of the batch before,
    at random, so that at least the fraction ``batch_overlap`` is common to both. All is drawn for the whole set: the
    batches do not depend on the number of ranks.

    With ``batch_growth`` above 1, where ``agreement`` is below 1/4 when a batch ends, a new epoch
    begins with batches that are larger by this factor: what the solver gained on its batch has not been there on the
    next one, so that batches of this size say too little. Once a batch holds all samples it stays (our choice; after
    Byrd, Chin, Nocedal, Wu 2012, whose test is of the gradients' variance).

    The objective's loss is the mean over the batch, and so is what solvers report and the history keeps as ``loss``;
    its fraction is that of the batch, so that N samples cost a work unit. The numbers of iterations on a batch were
    seen to do well with trust regions on MNIST, and are our choice; so is the form of the overlap.

    Parameters
    ----------
    objective
        Of all samples; its loss is replaced by that of the first batch.
    settings
        Values of :data:`OPTIONS`, with ``batch_size`` from 1 to N - 1.
    seed
        Of the permutations.

    Attributes
    ----------
    interval : int
        Iterations on each batch.
    per_epoch : int
        Batches of an epoch.
    rows : ndarray of int64
        Numbers of the batch's samples in the whole set, in increasing order.
    shared : ndarray of int64
        Those of them that the batch before had, too; none in the first batch. The ``overlap`` of the objective's
        :class:`ddml.objectives.objective.Replacement` has their places in ``rows``.
    agreement : float
        Which part of the decrease that the solver promised itself of its steps on a batch there was on the next one, as
        it last said; NaN if it never did.

    Raises
    ------
    InputError
        If the overlap is above 1.
    """

    def __init__(self, objective: Objective, settings: Any, seed: int) -> None:
        if not settings.batch_overlap <= 1:
            raise InputError(f"option -batch_overlap must be at most 1, got {settings.batch_overlap}")
        self.objective, self.seed, self.settings = objective, seed, settings
        self.loss, self.total = objective.loss, objective.loss.count
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self.number = self.epoch = self.index = 0  # of this batch since the beginning, its epoch, and its place there
        self.rows = self.shared = self._fresh = np.empty(0, np.int64)
        self.agreement = math.nan
        self._resize(settings.batch_size)
        self._draw()

    def _resize(self, size: float) -> None:
        self.size = size
        self.per_epoch = max(math.ceil(self.total / size), 1)
        each = -(-self.total // self.per_epoch)
        self.interval: int = self.settings.batch_steps or (5 if each > 2500 else 2)
        self.wanted = round(self.settings.batch_overlap * each)

    def move(self, theta: Tensor) -> None:
        """Go on to the next batch, whatever the parameters theta (n,) are."""
        if self.per_epoch == 1:
            return
        self.number, self.index = self.number + 1, self.index + 1
        grows = self.settings.batch_growth > 1 and self.agreement < GROW_BELOW
        if grows:
            self._resize(self.size * self.settings.batch_growth)
        if grows or self.index == self.per_epoch:
            self.epoch, self.index = self.epoch + 1, 0
        self._draw()

    def _draw(self) -> None:
        if self._order[0] != self.epoch:
            self._order = self.epoch, np.random.default_rng([self.seed, 0, self.epoch]).permutation(self.total)
        edges = split(self.total, self.per_epoch)
        fresh = self._order[1][edges[self.index] : edges[self.index + 1]]
        chosen = np.zeros(self.total, dtype=bool)
        chosen[fresh] = True
        others = self._fresh[~chosen[self._fresh]]
        missing = min(self.wanted - (len(self._fresh) - len(others)), len(others))
        if missing > 0:
            again = np.random.default_rng([self.seed, 1, self.number]).choice(others, missing, replace=False)
            chosen[again] = True
        self._take(np.flatnonzero(chosen), self.rows[chosen[self.rows]], np.sort(fresh))

    def _take(self, rows: NDArray[np.int64], shared: NDArray[np.int64], fresh: NDArray[np.int64]) -> None:
        self.rows, self.shared, self._fresh = rows, shared, fresh
        loss = self.loss.sampled(torch.as_tensor(rows))
        self.objective.replace(loss, len(rows) / self.total, np.searchsorted(rows, shared), self.judge)

    def judge(self, agreement: float) -> None:
        """Take a solver's word for which part of the decrease promised on the batch before there is on this one."""
        self.agreement = agreement

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "total": self.total, "number": self.number, "epoch": self.epoch, "index": self.index, "size": self.size,
            "rows": self.rows, "shared": self.shared, "fresh": self._fresh, "agreement": self.agreement,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the batch of a :meth:`state`.

        Raises
        ------
        InputError
            If the state is of another number of samples, or of no batches.
        """
        if state.get("total") != self.total:
            raise InputError(
                f"the run file has batches of {state.get('total', 'no')} samples, there are {self.total}: "
                "it goes on with the same -data and -samples"
            )
        if "epoch" not in state:  # of an older ddml
            state = {**state, "size": self.size, "agreement": math.nan}
            state["epoch"], state["index"] = divmod(state["number"], self.per_epoch)
        self._resize(state["size"])
        self.number, self.epoch, self.index = state["number"], state["epoch"], state["index"]
        self._take(state["rows"], state["shared"], state["fresh"])
        self.agreement = state["agreement"]
