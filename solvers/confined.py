"""Schwarz corrections of bounded length, with the decrease that they promise."""

from __future__ import annotations

import math
from typing import Any

from petsc4py import PETSc

from ddml.consistent import ConsistentObjective
from ddml.decomposition import Subdomains
from ddml.norms import Norm
from ddml.objective import Objective
from ddml.options import preset
from ddml.restricted import RestrictedObjective
from ddml.work import WorkCounter

from .schwarz import Schwarz
from .trust_region import TrustRegion, make_norm


class ConfinedSchwarz(Schwarz):
    """Additive corrections over a decomposition, each within a budget of a norm.

    Local solvers that are trust-region methods keep the budget themselves: they begin with a radius of budget over
    steps and never go farther than the budget, in the norm, the model and the memory of the global method unless
    options with ``sub_`` say otherwise. What others do is shortened (our choice), and the decrease they found with it.

    Parameters
    ----------
    objective, subdomains, steps
        See :class:`solvers.schwarz.Schwarz`.
    prefix, settings
        Of the global method.
    norm_name
        Of the global method's norm.
    solver
        Name of the local solver.
    samples
        (overlap, seed) of sample subdomains, if it is those: ``subdomains`` are then
        :func:`ddml.consistent.whole_copies`.
    """

    def __init__(
        self,
        objective: Objective,
        subdomains: Subdomains,
        steps: int,
        prefix: str,
        settings: Any,
        norm_name: str,
        solver: str,
        samples: tuple[float, int] | None = None,
    ) -> None:
        self.samples, self.budget, self.f = samples, math.inf, 0.0
        self.decreases: dict[int, float] = {}
        self.slopes: dict[int, float] = {}
        own = {"model": settings.model, "norm": norm_name, "memory": settings.memory, "momentum": 0.0,
               "convolution": settings.convolution}  # fmt: skip
        for name in ("masses", "curvature_fraction"):
            if getattr(settings, name) is not None:
                own[name] = getattr(settings, name)
        with preset(**{f"{prefix}sub_{name}": value for name, value in own.items()} if solver == "tr" else {}):
            super().__init__(objective, subdomains, True, f"{prefix}sub_", [steps] * len(subdomains), solver)
        self.norms: dict[int, Norm] = {}
        for s, local_objective in self.restricted.items():
            local_objective.stop = None  # an iteration of the global method is finished before a run stops
            self.norms[s] = make_norm(local_objective, norm_name, settings, prefix)

    def _restrict(self) -> dict[int, RestrictedObjective]:
        if self.samples is None:
            return super()._restrict()
        overlap, seed = self.samples
        here = self.decomposition
        return {s: ConsistentObjective(self.objective, here, s, overlap, seed) for s in here.mine}

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
        gathered = self.objective.comm.allgather((self.decreases, self.slopes, works) if leads else ({}, {}, {}))
        # of the norms of the corrections
        self.objective.work.add_parallel([work for *_, found in gathered for work in found.values()])
        for restricted_objective in self.restricted.values():
            restricted_objective.work = WorkCounter()
        sums = [0.0, 0.0]
        for kind in (0, 1):
            values = {s: value for found in gathered for s, value in found[kind].items()}
            sums[kind] = math.fsum(values[s] for s in sorted(values))
        slope = float(g.dot(correction))
        return sums[0] * slope / sums[1] if sums[1] < 0 and slope < 0 else 0.0

    def _subtract(self, s: int, restricted_x: PETSc.Vec) -> None:
        super()._subtract(s, restricted_x)
        local = self.local.get(s)
        if local is None:
            return
        sub = self.restricted[s]
        start = sub.start if isinstance(sub, ConsistentObjective) else self.f
        # the gradient that was loaded before the solve has served
        gradient, step = local.g, local.x
        step.array[:] = restricted_x.array_r
        decrease, size = start - float(local.tao.getSolutionStatus()[1]), self.norms[s](step)
        factor = 1.0 if size <= self.budget else self.budget / size
        if not (math.isfinite(decrease) and math.isfinite(size)):
            decrease = factor = 0.0
            step.set(0.0)
        step.scale(factor)
        restricted_x.array[:] = step.array_r
        self.decreases[s] = factor * decrease
        self.slopes[s] = float(gradient.dot(step))

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        for sub in self.restricted.values():
            if isinstance(sub, ConsistentObjective):
                sub.destroy()
        super().destroy()
