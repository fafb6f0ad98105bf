"""Problems: what is to be solved."""

from ddml.problems.equations.allen_cahn import AllenCahn
from ddml.problems.equations.burgers import Burgers
from ddml.problems.equations.diffusion_advection import DiffusionAdvection
from ddml.problems.equations.klein_gordon import KleinGordon
from ddml.problems.pde.fields import Field
from ddml.problems.pde.loss import PDELoss
from ddml.problems.pde.pde import PDE, Face, Interior, Periodic, Points, Term

PROBLEMS: dict[str, type[PDE]] = {
    "burgers": Burgers,
    "klein_gordon": KleinGordon,
    "diffusion_advection": DiffusionAdvection,
    "allen_cahn": AllenCahn,
}

__all__ = ["PDE", "PROBLEMS", "Face", "Field", "Interior", "PDELoss", "Periodic", "Points", "Term"]
