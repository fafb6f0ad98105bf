"""The solvers by name, loaded when they are asked for: a local or a coarse solver can be any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.plugins import load

from .base import Solver

PATHS = {
    "ssbroyden": "solvers.quasi_newton.self_scaled.SSBroyden",
    "ssbfgs": "solvers.quasi_newton.self_scaled.SSBFGS",
    "gauss_newton": "solvers.gauss_newton.gauss_newton.GaussNewton",
    "lbfgs": "solvers.quasi_newton.lbfgs.LBFGS",
    "aspqn": "solvers.schwarz.spqn.ASPQN",
    "mspqn": "solvers.schwarz.spqn.MSPQN",
    "mspqn_dense": "solvers.schwarz.spqn.DenseMSPQN",
    "tr": "solvers.trust_region.trust_region.TrustRegion",
    "astrom": "solvers.trust_region.astrom.ASTROM",
    "gradient": "solvers.quasi_newton.gradient.GradientDescent",
    "adam": "solvers.quasi_newton.adam.Adam",
    "newton": "solvers.gauss_newton.newton.Newton",
    "apts_weights": "solvers.schwarz.apts.APTSWeights",
    "apts_data": "solvers.schwarz.apts.APTSData",
    "napts": "solvers.schwarz.napts.NAPTS",
    "adagrad": "solvers.trust_region.adagrad.AdaGrad",
    "asadagrad": "solvers.schwarz.adagrad.SchwarzAdaGrad",
    "mladagrad": "solvers.multilevel.adagrad.MultilevelAdaGrad",
    "rmtr": "solvers.multilevel.depth.RMTR",
    "mgopt": "solvers.multilevel.depth.MGOPT",
    "cascade": "solvers.multilevel.depth.Cascade",
    "mlvr": "solvers.multilevel.samples.MLVR",
    "ssn": "solvers.multilevel.samples.SubsampledNewton",
    "svrg": "solvers.multilevel.samples.SVRG",
    "sarah": "solvers.multilevel.samples.SARAH",
}


class _Solvers(Mapping[str, type[Solver]]):
    """From names to classes."""

    def __getitem__(self, name: str) -> type[Solver]:
        module, _, kind = PATHS[name].rpartition(".")
        found: type[Solver] = vars(import_module(module))[kind]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(PATHS)

    def __len__(self) -> int:
        return len(PATHS)

    def __contains__(self, name: object) -> bool:
        return name in PATHS


SOLVERS: Mapping[str, type[Solver]] = _Solvers()

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
def solver_class(name: str) -> type[Solver]:
    """The class of a solver of ours or of a user's ``path/to/file.py:Class``.

    PETSc's types have none: of them it is :class:`solvers.base.Solver`, whose class attributes hold for them.

    Raises
    ------
    InputError
        If there is no such solver, or the user's cannot be loaded or is no subclass of :class:`solvers.base.Solver`.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    if name in PETSC_TYPES:
        return Solver
    if ":" not in name:
        raise InputError(
            f"unknown solver '{name}'; there are {', '.join(SOLVERS)}; and PETSc's {', '.join(PETSC_TYPES)}"
        )
    found = load(name, {}, "solver")
    if not (isinstance(found, type) and issubclass(found, Solver)):
        raise InputError(f"solver '{name}' must be a class that derives from solvers.base.Solver")
    return found


def configure(tao: PETSc.TAO, name: str) -> None:
    """Make a TAO object the solver of that name: ours, PETSc's, or ``path/to/file.py:Class``; options not yet read.

    Raises
    ------
    InputError
        See :func:`solver_class`.
    """
    kind = solver_class(name)
    if name in PETSC_TYPES:
        tao.setType(name)
        return
    tao.setType("python")
    if name in SOLVERS:
        tao.setPythonType(f"solvers.{kind.__name__}")
    else:
        tao.setPythonContext(kind())
