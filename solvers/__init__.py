"""How networks are trained: PETSc TAO solvers in Python."""

from typing import TYPE_CHECKING

from ddml.lazy import lazily

if TYPE_CHECKING:
    from .base import Solver
    from .gauss_newton.gauss_newton import GaussNewton
    from .gauss_newton.newton import Newton
    from .gauss_newton.nystrom import NystromPC
    from .gauss_newton.schwarz_pc import SchwarzPC
    from .kernel_machines.exchange import exchange_in_turn
    from .kernel_machines.fit import fit_kernel
    from .kernel_machines.newton import fit_kernel_loss
    from .kernel_machines.nystrom_pc import KernelNystromPC
    from .kernel_machines.schwarz_pc import KernelSchwarzPC
    from .minimisation import Minimisation, Result, minimise
    from .multilevel.adagrad import MultilevelAdaGrad
    from .multilevel.depth import MGOPT, RMTR, Cascade
    from .multilevel.samples import MLVR, SARAH, SVRG, SubsampledNewton
    from .quasi_newton.adam import Adam
    from .quasi_newton.gradient import GradientDescent
    from .quasi_newton.lbfgs import LBFGS
    from .quasi_newton.self_scaled import SSBFGS, SSBroyden
    from .registry import PETSC_TYPES, SOLVERS, TO_ROUNDING, configure, solver_class
    from .schwarz.adagrad import SchwarzAdaGrad
    from .schwarz.apts import APTSData, APTSWeights
    from .schwarz.napts import NAPTS
    from .schwarz.spqn import ASPQN, MSPQN, DenseMSPQN
    from .torch_optimizer import Minimizer
    from .trust_region.adagrad import AdaGrad
    from .trust_region.astrom import ASTROM
    from .trust_region.trust_region import TrustRegion

_HOMES = {
    "APTSData": "solvers.schwarz.apts",
    "APTSWeights": "solvers.schwarz.apts",
    "ASPQN": "solvers.schwarz.spqn",
    "ASTROM": "solvers.trust_region.astrom",
    "AdaGrad": "solvers.trust_region.adagrad",
    "Adam": "solvers.quasi_newton.adam",
    "Cascade": "solvers.multilevel.depth",
    "DenseMSPQN": "solvers.schwarz.spqn",
    "GaussNewton": "solvers.gauss_newton.gauss_newton",
    "GradientDescent": "solvers.quasi_newton.gradient",
    "KernelNystromPC": "solvers.kernel_machines.nystrom_pc",
    "KernelSchwarzPC": "solvers.kernel_machines.schwarz_pc",
    "LBFGS": "solvers.quasi_newton.lbfgs",
    "MGOPT": "solvers.multilevel.depth",
    "MLVR": "solvers.multilevel.samples",
    "MSPQN": "solvers.schwarz.spqn",
    "Minimisation": "solvers.minimisation",
    "Minimizer": "solvers.torch_optimizer",
    "MultilevelAdaGrad": "solvers.multilevel.adagrad",
    "NAPTS": "solvers.schwarz.napts",
    "Newton": "solvers.gauss_newton.newton",
    "NystromPC": "solvers.gauss_newton.nystrom",
    "PETSC_TYPES": "solvers.registry",
    "RMTR": "solvers.multilevel.depth",
    "Result": "solvers.minimisation",
    "SARAH": "solvers.multilevel.samples",
    "SOLVERS": "solvers.registry",
    "SSBFGS": "solvers.quasi_newton.self_scaled",
    "SSBroyden": "solvers.quasi_newton.self_scaled",
    "SVRG": "solvers.multilevel.samples",
    "SchwarzAdaGrad": "solvers.schwarz.adagrad",
    "SchwarzPC": "solvers.gauss_newton.schwarz_pc",
    "Solver": "solvers.base",
    "SubsampledNewton": "solvers.multilevel.samples",
    "TO_ROUNDING": "solvers.registry",
    "TrustRegion": "solvers.trust_region.trust_region",
    "configure": "solvers.registry",
    "exchange_in_turn": "solvers.kernel_machines.exchange",
    "fit_kernel": "solvers.kernel_machines.fit",
    "fit_kernel_loss": "solvers.kernel_machines.newton",
    "minimise": "solvers.minimisation",
    "solver_class": "solvers.registry",
}

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "ASPQN", "ASTROM", "LBFGS", "MGOPT", "MLVR", "MSPQN", "NAPTS", "PETSC_TYPES", "RMTR", "SARAH", "SOLVERS",
    "SSBFGS", "SVRG", "TO_ROUNDING", "APTSData", "APTSWeights", "AdaGrad", "Adam", "Cascade", "DenseMSPQN",
    "GaussNewton", "GradientDescent", "KernelNystromPC", "KernelSchwarzPC", "Minimisation", "Minimizer",
    "MultilevelAdaGrad", "Newton", "NystromPC", "Result", "SSBroyden", "SchwarzAdaGrad", "SchwarzPC", "Solver",
    "SubsampledNewton", "TrustRegion", "configure", "exchange_in_turn", "fit_kernel", "fit_kernel_loss", "minimise",
    "solver_class",
]  # fmt: skip
