"""States of solvers as ``torch.save`` keeps them: without PETSc, and the same whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout

VECTOR, ARRAY = "vector", "array"  # a state itself holds no tuples


def packed(value: Any, comm: MPI.Comm) -> Any:
    """A state with whole tensors, on every rank, in the place of distributed vectors and arrays. Collective."""
    if isinstance(value, PETSc.Vec):
        ranges = value.getOwnershipRanges()
        full = np.empty(value.getSize())
        comm.Allgatherv(value.array_r, [full, np.diff(ranges), ranges[:-1], MPI.DOUBLE])
        return VECTOR, torch.from_numpy(full)
    if isinstance(value, np.ndarray):
        return ARRAY, torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: packed(child, comm) for key, child in value.items()}
    return [packed(child, comm) for child in value] if isinstance(value, list) else value


def unpacked(value: Any, layout: ParameterLayout, made: list[PETSc.Vec]) -> Any:
    """What :func:`packed` was given, on the ranks of a layout; new vectors are appended to ``made``. Collective."""
    if isinstance(value, tuple):
        kind, tensor = value
        if kind == ARRAY:
            return tensor.cpu().numpy().copy()
        full = tensor.cpu().double().numpy()
        vec = layout.vector() if len(full) == layout.size else PETSc.Vec().createMPI(len(full), comm=layout.comm)
        made.append(vec)
        begin, end = vec.getOwnershipRange()
        vec.setArray(full[begin:end])
        return vec
    if isinstance(value, dict):
        return {key: unpacked(child, layout, made) for key, child in value.items()}
    return [unpacked(child, layout, made) for child in value] if isinstance(value, list) else value
