"""Schwarz corrections of bounded length, with the decrease that they promise."""

from __future__ import annotations

import math
from typing import Any

from petsc4py import PETSc

from ddml.decomposition.subdomains import Subdomains
from ddml.norms.build import make_norm
from ddml.norms.norm import Norm
from ddml.objectives.consistent import ConsistentObjective
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective
from ddml.options import preset
from ddml.parallel import agreed
from solvers.base import Solver
from solvers.trust_region.trust_region import TrustRegion

from .schwarz import Schwarz

ROUNDING = 1e-10  # relative excess over a budget that counts as rounding (our choice)


class ConfinedSchwarz(Schwarz):
    """Additive corrections over a decomposition, each within a budget of a norm.

    Local solvers that are trust-region methods keep the budget themselves: they begin with a radius of budget over
    steps and never go farther than the budget, in the norm, the model and the memory of the global method unless
    options with ``sub_`` say otherwise. What others do is shortened (our choice), and the loss evaluated there: one
    local evaluation more.

    Parameters
    ----------
    objective, subdomains, steps
        See :class:`solvers.schwarz.schwarz.Schwarz`.
    prefix, settings
        Of the global method.
    norm_name, norm
        The global method's norm; what of K-FAC's is measured serves the local ones.
    solver
        Name of the local solver.
    samples
        (overlap, seed) of sample subdomains, if it is those: ``subdomains`` are then
        :func:`ddml.objectives.consistent.whole_copies`.

    Attributes
    ----------
    decreases, slopes : dict of float
        h_s(R_s x) - h_s(theta_s*) and <R_s g, theta_s* - R_s x> of every subdomain s in the last call of
        :meth:`confined`, the same on all ranks.
    promise : float
        What that call returned.
    """

    def __init__(
        self,
        objective: Objective,
        subdomains: Subdomains,
        steps: int,
        prefix: str,
        settings: Any,
        norm_name: str,
        norm: Norm,
        solver: str,
        samples: tuple[float, int] | None = None,
    ) -> None:
        self.samples, self.norm, self.budget, self.f, self.promise = samples, norm, math.inf, 0.0, 0.0
        self.decreases: dict[int, float] = {}
        self.slopes: dict[int, float] = {}
        own = {"model": settings.model, "norm": norm_name, "memory": settings.memory, "momentum": 0.0,
               "convolution": settings.convolution, "polar_tolerance": settings.polar_tolerance,
               "polar_exact": settings.polar_exact}  # fmt: skip
        for name in ("masses", "curvature_fraction"):
            if getattr(settings, name) is not None:
                own[name] = getattr(settings, name)
        with preset(**{f"{prefix}sub_{name}": value for name, value in own.items()} if solver == "tr" else {}):
            super().__init__(
                objective, subdomains, True, f"{prefix}sub_", [steps] * len(subdomains), solver, whole=True
            )
        self.norms: dict[int, Norm] = {}
        with self.building():
            with agreed(objective.comm):
                for s, local_objective in self.restricted.items():
                    self.norms[s] = make_norm(local_objective, norm_name, settings, prefix, norm)
            self.steps = {s: self.own(local.x.duplicate()) for s, local in self.local.items()}

    def _restrict(self) -> dict[int, RestrictedObjective]:
        if self.samples is None:
            return super()._restrict()
        overlap, seed = self.samples
        here = self.decomposition
        return {s: ConsistentObjective(self.objective, here, s, overlap, seed) for s in here.mine}

    def _prepare(self, context: Solver) -> None:
        if isinstance(context, TrustRegion):
            context.inherit(self.norm)

    def confined(self, x: PETSc.Vec, f: float, g: PETSc.Vec, budget: float, correction: PETSc.Vec) -> float:
        """Write sum_s E_s (theta_s* - R_s x) to ``correction``; the decrease that it promises. Collective.

        f and g are the loss and the gradient at x. The promise is the sum of the local decreases, times
        <g, correction> / sum_s <R_s g, theta_s* - R_s x>, which is 1 where subdomains are disjoint and 1 / N where
        they are N copies of the whole.
        """
        self.budget, self.f = budget, f
        self.decreases, self.slopes = {}, {}
        for local in self.local.values():
            if isinstance(local.context, TrustRegion):
                local.context.confine(budget, budget / local.steps)
        self.additive(x, f, g, correction)
        leads = self.decomposition.group.rank == 0
        works = {s: restricted_objective.work for s, restricted_objective in self.restricted.items()}
        mine = (self.decreases, self.slopes, works) if leads else ({}, {}, {})
        gathered = self.objective.comm.allgather(mine)
        # of the norms of the corrections
        self.objective.work.add_parallel([work for *_, found in gathered for work in found.values()])
        for restricted_objective in self.restricted.values():
            restricted_objective.work.reset()
        self.decreases, self.slopes = ({s: v for found in gathered for s, v in found[kind].items()} for kind in (0, 1))
        decrease, slopes = (math.fsum(v[s] for s in sorted(v)) for v in (self.decreases, self.slopes))
        slope = float(g.dot(correction))
        self.promise = decrease * slope / slopes if slopes < 0 and slope < 0 else 0.0
        return self.promise

    def _finish(self, s: int, reached: float) -> None:
        """Keep the step within the budget, and note what it brings; one that is not finite counts as zero."""
        local, sub, step = self.local[s], self.restricted[s], self.steps[s]
        start = sub.start if isinstance(sub, ConsistentObjective) else self.f
        begin = self.x[s].array_r  # R_s x
        step.array[:] = local.x.array_r - begin
        if not (math.isfinite(reached) and math.isfinite(step.norm())):
            step.set(0.0)
            local.x.array[:] = begin
            reached = start
        size = self.norms[s](step)
        if size > self.budget * (1 + ROUNDING):
            step.scale(self.budget / size)
            local.x.array[:] = begin + step.array_r
            reached = sub.value(local.x)
        self.decreases[s] = start - reached
        self.slopes[s] = float(local.g.dot(step))  # the whole's gradient, which was loaded before the solve
