"""States of solvers that outlive their solver."""

from typing import Any

from petsc4py import PETSc


def copied(value: Any) -> Any:
    """A state with copies of its vectors."""
    if isinstance(value, PETSc.Vec):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(child) for key, child in value.items()}
    return [copied(child) for child in value] if isinstance(value, list) else value
