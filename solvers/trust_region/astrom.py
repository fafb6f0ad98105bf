"""Trust regions with curvature from a growing set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.options import WITH_SOLVER, Option, with_defaults
from ddml.sampling.nested import NestedSets, part_of
from solvers.line_search import SearchResult

from . import accuracy, radius
from .coarse_steps import CoarseSteps
from .models import Model, Products
from .radius import TrustRadius
from .trust_region import TrustRegion


class ASTROM(TrustRegion):
    r"""Newton steps in a trust region, with all samples in loss and gradient and a growing part of them in curvature.

    The coarse samples D_1 are the first m of a random permutation of all N. A step s minimises

    .. math:: g^T s + \tfrac12 s^T H_1 s, \quad \|s\| \le \Delta

    by Steihaug's conjugate gradients, with g the gradient of the whole loss and H_1 the Hessian, or the Gauss-Newton
    matrix, of the loss on D_1: model and loss agree to first order whatever m is. With rho the ratio of the whole
    loss's decrease to that of the model the step is accepted above ``accept``, and m grows by a factor where rho is at
    most ``enlarge_below``; it never shrinks. For a quadratic loss and a step inside the region
    rho = 2 - s.H s / s.H_1 s: rho measures which curvature along s the samples have missed. The radius follows
    rho as in :class:`solvers.trust_region.trust_region.TrustRegion`.

    After the slides of Kopaničáková and Krause on adaptive sampling, where a set is enlarged by 2 when a step is
    rejected and the radius stays meanwhile: ``-enlarge_below`` as ``-accept``, ``-growth 2`` and ``-keep_radius``.
    Here every decrease is kept, and D_1 is enlarged at ratios that are still good: that, and the other constants, are
    our choice, and on small data sets took less work than the slides' rule.

    With ``coarse_steps`` above 1 the step is made of so many Newton steps on the loss on D_1 with a linear term
    (:class:`solvers.trust_region.coarse_steps.CoarseSteps`), and rho's denominator is the decrease of that.

    An iteration takes one loss and gradient: a rejected trial's gradient is wasted, and an accepted one's loss costs
    nothing beside it. That is less work than a loss first where more than about two of three steps are accepted.
    Products are charged m / N.

    When the objective changes D_1 becomes the same part of the new samples, by another permutation.

    Attributes
    ----------
    sets : NestedSets
        D_1 is its only set.
    """

    options: ClassVar[Sequence[Option]] = (
        Option("fraction", 0.1, "Of the samples, on which curvature is measured at first; at most 1.", above=0.0,
               changes=WITH_SOLVER),
        Option("enlarge_below", 0.75, "More samples from then on where the ratio of actual to predicted decrease is at "
               "most this; not less than -accept.", minimum=0.0),
        Option("growth", 4.0, "Factor by which their number grows.", above=1.0),
        Option("keep_radius", False, "A rejected step only enlarges the samples, and shrinks the radius once they are "
               "all."),
        Option("coarse_steps", 1, "Newton steps on those samples in each step; above 1 their loss predicts the "
               "decrease.", minimum=1),
        Option("sample_seed", 0, "Of the random order of the samples.", minimum=0, changes=WITH_SOLVER),
        Option("model", "hessian", "Products with the Hessian, or with the Gauss-Newton matrix.",
               choices=("hessian", "gauss_newton"), changes=WITH_SOLVER),
        Option("norm", "2", "Of the trust region.", choices=("2", "kfac"), changes=WITH_SOLVER),
        Option("curvature_fraction", None, "Of the samples, on which K-FAC factors are measured (default: 0.1).",
               kind=float, above=0.0),
        Option("curvature_interval", 10, "Steps on the same samples behind which K-FAC factors are measured again.",
               minimum=1),
        *with_defaults((accuracy.OPTION,), cg_rule="sqrt"),
        Option("delta0", 1.0, "First radius.", above=0.0),
        *(option for option in with_defaults(radius.OPTIONS, shrink=0.25) if option.name != "delta0"),
    )  # fmt: skip

    def check_model(self) -> None:
        """See :meth:`solvers.trust_region.trust_region.TrustRegion.check_model`."""
        settings = self.settings
        if not settings.fraction <= 1:
            raise InputError(f"option -{self.prefix}fraction must be at most 1, got {settings.fraction:g}")
        if not settings.enlarge_below >= settings.accept:
            raise InputError(
                f"option -{self.prefix}enlarge_below must not be less than -{self.prefix}accept, got "
                f"{settings.enlarge_below:g} and {settings.accept:g}"
            )

    def prepare(self, tao: PETSc.TAO) -> None:
        """Choose the samples, and see :meth:`solvers.trust_region.trust_region.TrustRegion.prepare`. Collective."""
        self.sets = self._drawn(tao.getAppCtx().loss.count, self.settings.fraction)
        super().prepare(tao)
        if self.sets.whole(0):
            self.notes.append("curvature is measured on all samples: the method is -solver tr with products")
        else:
            self.notes.append(
                f"curvature is measured on {self.sets.sizes[0]} of {self.sets.count} samples at first, on "
                f"{self.settings.growth:g} times as many behind each step whose ratio is at most "
                f"{self.settings.enlarge_below:g}"
            )

    def _drawn(self, count: int, fraction: float, number: int = 0) -> NestedSets:
        """Such a part of so many samples."""
        sets = NestedSets(count, [part_of(count, fraction)], self.settings.sample_seed)
        sets.draw(number)
        return sets

    def _rows(self) -> NDArray[np.int64] | None:
        """Numbers of the samples of D_1; None: all."""
        return None if self.sets.whole(0) else self.sets.rows(0)

    def make_model(self) -> Model:
        """See :meth:`solvers.trust_region.trust_region.TrustRegion.make_model`."""
        settings, objective = self.settings, self.objective
        products = Products(objective, settings.model, self._rows, self.prefix, self.norm, settings.cg_rule)
        if settings.coarse_steps == 1:
            return products

        def controller() -> TrustRadius:
            return TrustRadius(settings, self.norm_name, torch.finfo(objective.loss.dtype).eps)

        return CoarseSteps(objective, products, self._rows, controller, settings.coarse_steps)

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """Print the values in force, and the samples. Collective."""
        super().view(tao, viewer)
        viewer.printfASCII(f"    curvature: {self.sets!r}\n")

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        super().begin()
        self.sets = self._drawn(self.objective.loss.count, self.settings.fraction)

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; the part of the samples stays what it is."""
        super().renew(x)
        old = self.sets
        self.sets = self._drawn(self.objective.loss.count, old.sizes[0] / old.count, old.number + 1)

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`: one step, which is 0 where it was rejected."""
        whole, delta, rejected = self.sets.whole(0), self.radius.value, self.radius.rejected
        result = self.advance(x)
        if result.success and not whole:
            if self.settings.keep_radius and self.radius.rejected > rejected:
                self.radius.value = delta
            if not self.radius.ratio > self.settings.enlarge_below:
                self.sets.grow(0, self.settings.growth)
        return result

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {**super().inner_state(), "sets": self.sets.state()}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of another model, or of another number of samples.
        """
        kept = state["sets"]
        sets = NestedSets(kept["count"], kept["sizes"])
        sets.restore(kept)
        if sets.count != self.objective.loss.count and not state.get("outdated", True):
            raise InputError(
                f"the run file has nested sets of {sets.count} samples, there are {self.objective.loss.count}: it goes "
                "on with the same samples"
            )
        super().take_state(state)
        self.sets = sets
