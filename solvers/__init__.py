"""How networks are trained: PETSc TAO solvers in Python."""

from functools import cache
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.plugins import load

from .apts import APTSData, APTSWeights
from .base import Solver
from .gauss_newton import GaussNewton
from .napts import NAPTS
from .nystrom import NystromPC
from .quasi_newton import LBFGS
from .schwarz_pc import SchwarzPC
from .self_scaled import SSBFGS, SSBroyden
from .spqn import ASPQN, MSPQN, DenseMSPQN
from .trust_region import TrustRegion

SOLVERS: dict[str, type[Solver]] = {
    "ssbroyden": SSBroyden,
    "ssbfgs": SSBFGS,
    "gauss_newton": GaussNewton,
    "lbfgs": LBFGS,
    "aspqn": ASPQN,
    "mspqn": MSPQN,
    "mspqn_dense": DenseMSPQN,
    "tr": TrustRegion,
    "apts_weights": APTSWeights,
    "apts_data": APTSData,
    "napts": NAPTS,
}

# PETSc's types for unconstrained minimisation, which take our objectives as they are; not bqnkls, which shifts a
# quasi-Newton matrix that PETSc cannot solve with then, nor ntl, which crashes where the search along a Newton step
# fails: it then solves with a quasi-Newton matrix that it has not made
PETSC_TYPES = (
    *("lmvm", "cg", "bncg", "blmvm", "bqnls", "bqnktr", "bqnktl", "nm"),
    *("nls", "ntr", "bnls", "bntr", "bntl"),  # with Hessian products
)

# those whose limited-memory matrices sum by ranks: the same on any number of ranks to rounding only
TO_ROUNDING = ("lmvm", "bncg", "blmvm", "bqnls", "bqnktr", "bqnktl", "bnls", "bntr", "bntl")


@cache
def solver_class(name: str) -> Any:
    """The class of a solver of ours or of a user's ``path/to/file.py:Class``; None for others.

    Raises
    ------
    InputError
        If the user's cannot be loaded.
    """
    return load(name, {}, "solver") if ":" in name else SOLVERS.get(name)


def configure(tao: PETSc.TAO, name: str) -> None:
    """Make a TAO object the solver of that name: ours, PETSc's, or ``path/to/file.py:Class``; options not yet read.

    Raises
    ------
    InputError
        If there is no such solver.
    """
    if name in SOLVERS:
        tao.setType("python")
        tao.setPythonType(f"solvers.{SOLVERS[name].__name__}")
    elif name in PETSC_TYPES:
        tao.setType(name)
    elif ":" in name:
        tao.setType("python")
        tao.setPythonContext(solver_class(name)())
    else:
        raise InputError(
            f"unknown solver '{name}'; there are {', '.join(SOLVERS)}; and PETSc's {', '.join(PETSC_TYPES)}"
        )


__all__ = [
    *(
        "APTSData",
        "APTSWeights",
        "ASPQN",
        "LBFGS",
        "MSPQN",
        "DenseMSPQN",
        "GaussNewton",
        "SSBFGS",
        "SSBroyden",
        "Solver",
        "TrustRegion",
    ),
    "NystromPC",
    "SchwarzPC",
    *("PETSC_TYPES", "SOLVERS", "TO_ROUNDING", "configure", "solver_class"),
]
