"""AdaGrad over the depth of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from petsc4py import PETSc

from ddml.options import Option, with_defaults
from solvers.trust_region.adagrad import AdaGrad

from .acceptance import Acceptance, Bounds
from .depth import CYCLES, LEVELS, CyclingSolver


class MultilevelAdaGrad(CyclingSolver):
    r"""AdaGrad over depth, a globalisation without loss values (Gratton, Kopanicakova, Toint, arXiv 2302.07049).

    Cycles of :class:`solvers.trust_region.adagrad.AdaGrad` on all levels; corrections are taken as they are, within
    bounds that come from the gradients (:class:`solvers.multilevel.acceptance.Bounds`). It tolerates noise. Constants
    are our choice.
    """

    steep = True
    options: ClassVar[Sequence[Option]] = (
        *with_defaults(LEVELS, smoother="adagrad", cascade=False),
        *with_defaults(CYCLES, post_steps=0, coarse_steps=5),
        *AdaGrad.options,
    )
    inherited = ("rate", "sigma")
    inheriting = "adagrad"
    judges_batches = False

    def make_acceptance(self, norms: Sequence[Callable[[PETSc.Vec], float]]) -> Acceptance:
        """See :meth:`.CyclingSolver.make_acceptance`."""
        return self.own(Bounds(self.levels, self.hierarchy.transfers, float(self.settings.coarse_steps)))
