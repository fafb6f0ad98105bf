"""Problems: what is to be solved."""

from .allen_cahn import AllenCahn
from .burgers import Burgers
from .diffusion_advection import DiffusionAdvection
from .fields import Field
from .klein_gordon import KleinGordon
from .pde import PDE, Face, Interior, Periodic, Points, Term
from .pde_loss import PDELoss

PROBLEMS: dict[str, type[PDE]] = {
    "burgers": Burgers,
    "klein_gordon": KleinGordon,
    "diffusion_advection": DiffusionAdvection,
    "allen_cahn": AllenCahn,
}

__all__ = ["PDE", "PROBLEMS", "Face", "Field", "Interior", "PDELoss", "Periodic", "Points", "Term"]
