"""Train neural networks with domain decomposition and multilevel methods on MPI and PETSc."""

from typing import TYPE_CHECKING

from .lazy import lazily
from .version import __version__

if TYPE_CHECKING:
    from . import networks, problems
    from .data.data_set import DataSet
    from .decomposition.decomposition import Decomposition
    from .decomposition.subdomains import Subdomains
    from .errors import InputError
    from .layout import ParameterLayout
    from .losses.decayed import DecayedLoss
    from .losses.loss import Loss
    from .losses.module import ModuleLoss
    from .losses.residual import ResidualLoss
    from .objectives.composed import sampled, shifted
    from .objectives.objective import Objective
    from .objectives.residual import ResidualObjective
    from .objectives.restricted import restricted
    from .runs.exported import open_network
    from .runs.history import History
    from .runs.opened import open_run

_HOMES = {
    "DataSet": "ddml.data.data_set",
    "Decomposition": "ddml.decomposition.decomposition",
    "DecayedLoss": "ddml.losses.decayed",
    "History": "ddml.runs.history",
    "InputError": "ddml.errors",
    "Loss": "ddml.losses.loss",
    "ModuleLoss": "ddml.losses.module",
    "Objective": "ddml.objectives.objective",
    "ParameterLayout": "ddml.layout",
    "ResidualLoss": "ddml.losses.residual",
    "ResidualObjective": "ddml.objectives.residual",
    "Subdomains": "ddml.decomposition.subdomains",
    "open_network": "ddml.runs.exported",
    "open_run": "ddml.runs.opened",
    "restricted": "ddml.objectives.restricted",
    "sampled": "ddml.objectives.composed",
    "shifted": "ddml.objectives.composed",
}
_ROOMS = ("networks", "problems")

__getattr__ = lazily(__name__, _HOMES, _ROOMS)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_ROOMS])


__all__ = [
    "DataSet", "DecayedLoss", "Decomposition", "History", "InputError", "Loss", "ModuleLoss", "Objective",
    "ParameterLayout", "ResidualLoss", "ResidualObjective", "Subdomains", "__version__", "networks", "open_network",
    "open_run", "problems", "restricted", "sampled", "shifted",
]  # fmt: skip
