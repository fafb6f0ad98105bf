"""What a solver has learnt on a level, for the next finer one."""

from __future__ import annotations

from typing import Any

import numpy as np
from petsc4py import PETSc

from ddml.hierarchy.hierarchy import Transfer
from solvers.quasi_newton.self_scaled import SelfScaled

from .levels import LevelSolver


class _Bound(Exception):
    """A state has something that belongs to its level."""


def carry(coarse: LevelSolver, fine: LevelSolver, transfer: Transfer) -> bool:
    """Let the solver of a level begin with the prolongation of what that of the coarser one has learnt. Collective.

    Radius, momentum and secant pairs are prolonged, and the dense matrix of a self-scaled method where parameters are
    inserted; where a solver's memory is else more than vectors of the parameters' size and numbers, or the two levels
    have different solvers, the finer one begins afresh. True if it was prolonged.
    """
    state = coarse.state()
    fine.wake()
    if not state or type(fine.context) is not type(coarse.context):
        return False
    made: list[PETSc.Vec] = []
    if isinstance(fine.context, SelfScaled) and transfer.places is not None:
        state["inner"] = fine.context.enlarged(state["inner"], transfer.places)
        made += [vec for vec in state["inner"].values() if isinstance(vec, PETSc.Vec)]
    try:
        prolonged = _prolonged(state, coarse.x.getSize(), fine.x, transfer, made)
    except _Bound:
        for vec in made:
            vec.destroy()
        return False
    fine.restore({**prolonged, "moved": True})
    return True


def _prolonged(value: Any, size: int, like: PETSc.Vec, transfer: Transfer, made: list[PETSc.Vec]) -> Any:
    """A state with the prolongations of its vectors, which are appended to ``made``, too."""
    if isinstance(value, PETSc.Vec):
        if any(value is vec for vec in made):
            return value
        if value.getSize() != size:
            raise _Bound
        made.append(like.duplicate())
        transfer.prolong_step(value, made[-1])
        return made[-1]
    if isinstance(value, dict):
        return {name: _prolonged(child, size, like, transfer, made) for name, child in value.items()}
    if isinstance(value, list):
        return [_prolonged(child, size, like, transfer, made) for child in value]
    if isinstance(value, np.ndarray):
        raise _Bound
    return value
