"""How networks are trained: PETSc TAO solvers in Python.

Everything is loaded when it is asked for: ``import solvers`` alone takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solvers.base import Solver
    from solvers.gauss_newton.gauss_newton import GaussNewton
    from solvers.gauss_newton.nystrom import NystromPC
    from solvers.gauss_newton.schwarz_pc import SchwarzPC
    from solvers.quasi_newton.lbfgs import LBFGS
    from solvers.quasi_newton.self_scaled import SSBFGS, SSBroyden
    from solvers.registry import PETSC_TYPES, SOLVERS, TO_ROUNDING, configure, solver_class
    from solvers.schwarz.apts import APTSData, APTSWeights
    from solvers.schwarz.napts import NAPTS
    from solvers.schwarz.spqn import ASPQN, MSPQN, DenseMSPQN
    from solvers.trust_region.trust_region import TrustRegion

__all__ = [
    "ASPQN",
    "LBFGS",
    "MSPQN",
    "NAPTS",
    "PETSC_TYPES",
    "SOLVERS",
    "SSBFGS",
    "TO_ROUNDING",
    "APTSData",
    "APTSWeights",
    "DenseMSPQN",
    "GaussNewton",
    "NystromPC",
    "SSBroyden",
    "SchwarzPC",
    "Solver",
    "TrustRegion",
    "configure",
    "solver_class",
]

# where they are
_MODULES = {
    "base": ("Solver",),
    "registry": ("PETSC_TYPES", "SOLVERS", "TO_ROUNDING", "configure", "solver_class"),
    "quasi_newton.lbfgs": ("LBFGS",),
    "quasi_newton.self_scaled": ("SSBFGS", "SSBroyden"),
    "gauss_newton.gauss_newton": ("GaussNewton",),
    "gauss_newton.nystrom": ("NystromPC",),
    "gauss_newton.schwarz_pc": ("SchwarzPC",),
    "trust_region.trust_region": ("TrustRegion",),
    "schwarz.spqn": ("ASPQN", "MSPQN", "DenseMSPQN"),
    "schwarz.apts": ("APTSData", "APTSWeights"),
    "schwarz.napts": ("NAPTS",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'solvers' has no attribute '{name}'")
    found = globals()[name] = vars(import_module(f"solvers.{_MODULE_OF[name]}"))[name]
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
