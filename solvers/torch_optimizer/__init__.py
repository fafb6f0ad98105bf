"""Our solvers as a torch optimizer."""

from .minimizer import Minimizer

__all__ = ["Minimizer"]
