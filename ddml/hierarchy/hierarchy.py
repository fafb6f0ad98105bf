"""Levels of a problem, from the coarsest to the finest, and the transfers between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.objectives.objective import Objective


@dataclass(frozen=True)
class Level:
    """One member of a hierarchy.

    Attributes
    ----------
    objective : Objective
        On all ranks. That of a coarse level charges a counter of its own, in work units of the finest one.
    words : str
        What it is, as in ``8 blocks`` or ``1000 samples``.
    share : float
        What a gradient costs, over that of the finest level.
    """

    objective: Objective
    words: str
    share: float


class Transfer(ABC):
    """Between a level and the next finer one; everything is collective on their ranks.

    Attributes
    ----------
    stretch : float
        The largest 2-norm of a prolongation, over that of what is prolonged.
    places : ndarray of int (n coarse,) or None
        Where :meth:`prolong_step` puts each coarse entry, increasing, if it does no more than that.
    """

    stretch: float = 1.0
    places: NDArray[np.int64] | None = None

    @abstractmethod
    def prolong(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """Write I s to ``fine``, s the coarse parameters or step."""

    def prolong_step(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """Write to ``fine`` the prolongation of a difference of coarse parameters, where that is another one."""
        self.prolong(coarse, fine)

    @abstractmethod
    def restrict(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """Write R g = I^T g to ``coarse``, g the fine gradient."""

    @abstractmethod
    def project(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """Write P theta to ``coarse``, theta the fine parameters; P I is the identity."""

    def bound(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """Write to ``coarse`` how far each coarse entry may go, for bounds of the fine entries that it moves.

        The largest of these bounds, each over the size of the entry of I.

        Raises
        ------
        InputError
            Where a fine entry is moved by several coarse ones.
        """
        raise InputError("bounds are for transfers that copy parameters")

    def destroy(self) -> None:
        """Destroy the matrices."""
        return


class Identity(Transfer):
    """Between levels that have the same parameters."""

    def prolong(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """See :meth:`Transfer.prolong`."""
        coarse.copy(fine)

    def restrict(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`Transfer.restrict`."""
        fine.copy(coarse)

    def project(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`Transfer.project`."""
        fine.copy(coarse)

    def bound(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`Transfer.bound`."""
        fine.copy(coarse)


class Hierarchy:
    """Levels, the coarsest first, and the transfers between them.

    The objective of the finest level is the one that is minimised; it stays its owner's.

    Parameters
    ----------
    levels
        The coarsest first.
    transfers
        ``transfers[l]`` is between levels l and l + 1.

    Attributes
    ----------
    insertions : list of Transfer
        As ``transfers``, those that keep what a network computes; empty where there are none.
    """

    def __init__(self, levels: Sequence[Level], transfers: Sequence[Transfer]) -> None:
        assert len(transfers) == len(levels) - 1
        self.levels, self.transfers = list(levels), list(transfers)
        self.insertions: list[Transfer] = []

    def __len__(self) -> int:
        return len(self.levels)

    def __repr__(self) -> str:
        lines = [f"{len(self)} levels"]
        for number in reversed(range(len(self))):
            level = self.levels[number]
            loss = level.objective.loss
            lines.append(
                f"  level {number}: {level.words}, {loss.size} parameters, {loss.count} samples, a gradient costs "
                f"{level.share:.3g}"
            )
        return "\n".join(lines)

    def follow(self) -> None:
        """Give the coarse levels the samples that the finest objective has now. Collective."""
        return

    def draw(self, number: int) -> None:
        """Make the coarse levels what they are in the cycle of that number. Collective."""
        return

    def destroy(self) -> None:
        """Destroy the transfers. Collective."""
        for transfer in (*self.transfers, *self.insertions):
            transfer.destroy()
