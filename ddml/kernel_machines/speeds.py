"""How fast ranks are, measured in products of a kernel machine, and what each should have; what subdomains cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from ddml.errors import InputError
from ddml.linalg.small import cholesky
from ddml.parallel import agreed

from .cuts import Array
from .domain import SampleDomain
from .functions import Kernel
from .layout import SampleLayout
from .operator import KernelOperator

LEAST = 0.1  # of a rank's time grows with its rows, at least, whatever was measured (our choice)
WARM = 100  # samples of a factor before those that are measured (our choice)


@dataclass(frozen=True)
class Speeds:
    """What ranks took for their rows of products, and a model of it: so much, and so much for each row.

    Attributes
    ----------
    rows : tuple of int
        Samples of each rank.
    seconds : tuple of float
        What each took for a column of a product, without waiting for others.
    fixed, each : tuple of float
        Of that, what does not depend on its rows, and what a row takes.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    fixed: tuple[float, ...]
    each: tuple[float, ...]

    @classmethod
    def measured(cls, operator: KernelOperator, before: Speeds | None = None) -> Speeds:
        """From the products that an operator has made so far, the median of each rank; see :meth:`of`. Collective.

        Raises
        ------
        InputError
            If it has made none.
        """
        if not operator.products:
            raise InputError("the operator has made no products yet: the speeds of ranks are not known")
        seconds = operator.layout.comm.allgather(float(np.median(operator.seconds)))
        return cls.of(np.diff(operator.layout.ranges).tolist(), seconds, before)

    @classmethod
    def of(cls, rows: Sequence[int], seconds: Sequence[float], before: Speeds | None = None) -> Speeds:
        """From what ranks took with their rows, and what they took with others before.

        All grows with the rows where that is the only measurement. A rank that has no rows now is taken to be what it
        was before, or the mean of the others.

        Raises
        ------
        InputError
            If a rank took no time for its rows, or there were other ranks before.
        """
        m, t = np.array(rows, dtype=np.float64), np.array(seconds, dtype=np.float64)
        if not (t[m > 0] > 0).all() or (before is not None and len(before.rows) != len(m)):
            raise InputError(f"{len(m)} ranks need seconds above 0 each for their rows, now and before; got {seconds}")
        each = np.divide(t, m, out=np.zeros(len(m)), where=m > 0)
        if before is not None:
            other, took = np.array(before.rows), np.array(before.seconds)
            both = (m > 0) & (other > 0) & (m != other)
            slope = np.divide(t - took, m - other, out=np.zeros(len(m)), where=both)
            each = np.where(both, np.clip(slope, LEAST * each, each), each)
        fixed = t - each * m
        for r in np.flatnonzero(m == 0):
            fixed[r], each[r] = (before.fixed[r], before.each[r]) if before else (0.0, each[m > 0].mean())
        return cls(tuple(rows), tuple(seconds), tuple(fixed.tolist()), tuple(each.tolist()))

    def _dealt(self) -> tuple[Array, float]:
        """The rows of each rank with which the slowest takes the least time, and that time."""
        fixed, each = np.array(self.fixed), np.array(self.each)
        some = np.argsort(fixed, kind="stable")
        while True:
            took = (sum(self.rows) + (fixed[some] / each[some]).sum()) / (1 / each[some]).sum()
            if took >= fixed[some[-1]] or len(some) == 1:
                break
            some = some[:-1]  # the rank is slower without any row than the others with all
        rows = np.zeros(len(each))
        rows[some] = (took - fixed[some]) / each[some]
        return rows, float(took)

    @property
    def shares(self) -> list[float]:
        """What part of the samples each rank is to have, for a new :class:`SampleLayout`."""
        return [float(rows) for rows in self._dealt()[0] / sum(self.rows)]

    @property
    def balance(self) -> float:
        """The least time of a rank over the longest."""
        return min(self.seconds) / max(self.seconds)

    @property
    def gain(self) -> float:
        """The time of a product with the rows dealt by :attr:`shares`, over that of now; 1 if nothing is gained."""
        return self._dealt()[1] / max(self.seconds)

    def subdomains(self, layout: SampleLayout) -> Array:
        """Speeds (p,) of subdomains, for :func:`~ddml.kernel_machines.balance.balanced`.

        With them the cores of each rank have its share of the samples, or next to nothing if that is 0.
        """
        shares = np.maximum(self.shares, 1 / layout.size)
        return np.asarray((shares / np.maximum(np.bincount(layout.owners, minlength=len(shares)), 1))[layout.owners])

    def __repr__(self) -> str:
        least, most = min(self.seconds), max(self.seconds)
        return (
            f"{least:.3g} to {most:.3g} s a column and rank (balance {self.balance:.3f}): with shares of "
            f"{', '.join(f'{share:.3f}' for share in self.shares)} a product would take {self.gain:.3f} of the time"
        )


def seconds_of(domain: SampleDomain, kernel: Kernel, samples: Array, shift: float, comm: MPI.Comm) -> Array:
    """What each subdomain takes for its matrix and factor: seconds (p,), the same on all ranks. Collective.

    Each is measured by one rank, once, for :func:`~ddml.kernel_machines.balance.balanced`.

    Parameters
    ----------
    domain
        Of the samples.
    samples
        (n, d).
    shift
        What stands on the diagonals beside the kernel's.
    """
    points, mine = torch.as_tensor(samples), np.zeros(len(domain))
    warm = points[: min(len(points), WARM)]
    with agreed(comm):
        cholesky(kernel(warm, warm.clone()).numpy(), shift)
        for i in range(comm.rank, len(domain), comm.size):
            here = points[domain.sets[i]]
            begun = time.perf_counter()
            if len(here):
                cholesky(kernel(here, here.clone()).numpy(), shift)
            mine[i] = time.perf_counter() - begun
    seconds = np.empty_like(mine)
    comm.Allreduce(mine, seconds)
    return seconds
