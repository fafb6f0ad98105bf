"""Solvers by name, loaded when they are asked for, so that a local or a coarse solver can be any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.plugins import load

from .base import Solver

# where every TAO context lives, by its class name
CONTEXTS = {
    "SSBFGS": "solvers.quasi_newton.self_scaled",
    "SSBroyden": "solvers.quasi_newton.self_scaled",
    "LBFGS": "solvers.quasi_newton.lbfgs",
    "GaussNewton": "solvers.gauss_newton.gauss_newton",
    "TrustRegion": "solvers.trust_region.trust_region",
    "ASPQN": "solvers.schwarz.spqn",
    "MSPQN": "solvers.schwarz.spqn",
    "DenseMSPQN": "solvers.schwarz.spqn",
    "APTSData": "solvers.schwarz.apts",
    "APTSWeights": "solvers.schwarz.apts",
    "NAPTS": "solvers.schwarz.napts",
}


class _Solvers(Mapping[str, type[Solver]]):
    """Classes of solvers by the names of ``-solver``."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> type[Solver]:
        context = self._names[name]
        return getattr(import_module(CONTEXTS[context]), context)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def context(self, name: str) -> str:
        """The name of the class, without loading it."""
        return self._names[name]


SOLVERS = _Solvers(
    {
        "ssbroyden": "SSBroyden",
        "ssbfgs": "SSBFGS",
        "gauss_newton": "GaussNewton",
        "lbfgs": "LBFGS",
        "aspqn": "ASPQN",
        "mspqn": "MSPQN",
        "mspqn_dense": "DenseMSPQN",
        "tr": "TrustRegion",
        "apts_weights": "APTSWeights",
        "apts_data": "APTSData",
        "napts": "NAPTS",
    }
)

# PETSc's types for unconstrained minimisation, which take our objectives as they are; not bqnkls, which shifts a
# quasi-Newton matrix that PETSc cannot solve with then
PETSC_TYPES = (
    *("lmvm", "cg", "bncg", "blmvm", "bqnls", "bqnktr", "bqnktl", "nm"),
    *("nls", "ntr", "ntl", "bnls", "bntr", "bntl"),  # with Hessian products
)

# those whose limited-memory matrices sum by ranks: the same on any number of ranks to rounding only
TO_ROUNDING = ("lmvm", "bncg", "blmvm", "bqnls", "bqnktr", "bqnktl", "bnls", "bntr", "bntl")


@cache
def solver_class(name: str) -> type[Solver]:
    """The class of a solver of ours or of a user's ``path/to/file.py:Class``; :class:`Solver` itself of PETSc's types.

    Raises
    ------
    InputError
        If there is no such solver, or a user's cannot be loaded or is no :class:`Solver`.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    if name in PETSC_TYPES:
        return Solver
    if ":" not in name:
        raise InputError(
            f"unknown solver '{name}'; there are {', '.join(SOLVERS)}; and PETSc's {', '.join(PETSC_TYPES)}"
        )
    found: Any = load(name, {}, "solver")
    if not (isinstance(found, type) and issubclass(found, Solver)):
        raise InputError(f"solver '{name}' is no subclass of solvers.base.Solver")
    return found


def configure(tao: PETSc.TAO, name: str) -> None:
    """Make a TAO object the solver of that name: ours, PETSc's, or ``path/to/file.py:Class``; options not yet read.

    Raises
    ------
    InputError
        If there is no such solver.
    """
    kind = solver_class(name)
    if name in PETSC_TYPES:
        tao.setType(name)
        return
    tao.setType("python")
    if name in SOLVERS:
        tao.setPythonType(f"solvers.{SOLVERS.context(name)}")
    else:
        tao.setPythonContext(kind())
