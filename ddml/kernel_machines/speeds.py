"""How fast ranks are, measured in products of a kernel machine, and what each should have of the samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddml.errors import InputError

from .cuts import Array
from .layout import SampleLayout
from .operator import KernelOperator


@dataclass(frozen=True)
class Speeds:
    """What ranks took for their rows of products.

    Attributes
    ----------
    rows : tuple of int
        Samples of each rank.
    seconds : tuple of float
        What each took for a column of a product, without waiting for others.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def measured(cls, operator: KernelOperator) -> Speeds:
        """From the products that an operator has made so far. Collective.

        Raises
        ------
        InputError
            If it has made none.
        """
        if not operator.products:
            raise InputError("the operator has made no products yet: the speeds of ranks are not known")
        seconds = operator.layout.comm.allgather(operator.seconds / operator.products)
        return cls(tuple(np.diff(operator.layout.ranges).tolist()), tuple(seconds))

    @property
    def rates(self) -> Array:
        """Rows that each rank multiplies in a second (P,).

        Of a rank without rows it is not known, and taken to be the mean of the others' (our choice).
        """
        rows, seconds = np.array(self.rows), np.array(self.seconds)
        found = np.divide(rows, seconds, out=np.zeros(len(rows)), where=rows > 0)
        return np.where(rows > 0, found, found.sum() / np.count_nonzero(rows))

    @property
    def shares(self) -> list[float]:
        """What part of the samples each rank is to have, for a new :class:`.SampleLayout`."""
        return [float(share) for share in self.rates / self.rates.sum()]

    @property
    def balance(self) -> float:
        """The least time of a rank over the longest."""
        return min(self.seconds) / max(self.seconds)

    @property
    def gain(self) -> float:
        """The time of a product with the rows dealt by :attr:`shares`, over that of now; 1 if nothing is gained."""
        return float(sum(self.rows) / self.rates.sum() / max(self.seconds))

    def subdomains(self, layout: SampleLayout) -> Array:
        """The speed (p,) of the rank that each subdomain is on, for :func:`~ddml.kernel_machines.balance.balanced`."""
        return np.asarray(self.rates[layout.owners])

    def __repr__(self) -> str:
        least, most = min(self.seconds), max(self.seconds)
        return (
            f"{least:.3g} to {most:.3g} s a column and rank (balance {self.balance:.3f}): with shares of "
            f"{', '.join(f'{share:.3f}' for share in self.shares)} a product would take {self.gain:.3f} of the time"
        )
