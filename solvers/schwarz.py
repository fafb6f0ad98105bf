"""Schwarz corrections: minimise over each subdomain's parameters, side by side or one after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.decomposition import Decomposition, Subdomains
from ddml.objective import Objective
from ddml.options import preset
from ddml.parallel import Interrupted, cause
from ddml.restricted import RestrictedObjective, restricted
from ddml.work import WorkCounter


class LocalSolver:
    """A TAO solver of one restricted objective, any type, with its own options prefix.

    Takes a fixed number of iterations (less if it cannot go on) and starts afresh at every call.
    """

    def __init__(self, objective: RestrictedObjective, prefix: str, steps: int) -> None:
        self.objective, self.prefix, self.given_steps = objective, prefix, steps
        self.x = objective.layout.vector()
        self.g = objective.layout.vector()
        self.layers: frozenset[int] = frozenset()
        self._create()

    def _create(self) -> None:
        prefix, steps = self.prefix, self.given_steps
        self.tao = PETSc.TAO().create(self.objective.comm)
        self.tao.setOptionsPrefix(prefix)
        self.tao.setSolution(self.x)
        self.objective.attach(self.tao)
        defaults = {"tao_type": "python", "tao_python_type": "solvers.LBFGS", "momentum": 1.0, "first_step": "scaled"}
        stop = {"tao_max_it": steps, "tao_gatol": 0.0, "tao_grtol": 0.0, "tao_gttol": 0.0}
        with preset(**{prefix + name: value for name, value in {**defaults, **stop}.items()}):
            self.tao.setFromOptions()
            self.tao.setUp()
        self.steps = self.tao.getMaximumIterations()
        self.tao.setMonitor(self._before_last)

    def _before_last(self, tao: PETSc.TAO) -> None:
        if tao.getIterationNumber() == self.steps - 1:
            self.objective.also(self.layers)

    def solve(self, also: frozenset[int] = frozenset()) -> None:
        """Minimise from ``self.x``; the last iteration also computes the gradient of the layers ``also``."""
        self.layers = also
        self.objective.also(frozenset())
        try:
            self.tao.solve()
        finally:
            self.objective.also(frozenset())
        if self.tao.getType() != "python":  # PETSc's lmvm, for one, remembers scales from solve to solve
            self.tao.destroy()
            self._create()

    def destroy(self) -> None:
        """Destroy the PETSc objects."""
        for thing in (self.tao, self.x, self.g):
            thing.destroy()


class Schwarz:
    """Additive or multiplicative corrections over a decomposition.

    Parameters
    ----------
    objective
        Of the whole network.
    subdomains
        What to correct on.
    parallel
        True for :meth:`additive`: groups of ranks treat subdomains side by side. False for
        :meth:`multiplicative`: all ranks treat one subdomain after another.
    prefix
        Of the local solvers' options.
    steps
        Local iterations.
    """

    def __init__(self, objective: Objective, subdomains: Subdomains, parallel: bool, prefix: str, steps: int) -> None:
        self.objective = objective
        self.decomposition = Decomposition(subdomains, objective.layout, parallel, objective.blocks > 0)
        self.restricted = restricted(objective, self.decomposition)
        self.local = {s: LocalSolver(o, prefix, steps) for s, o in self.restricted.items()}
        self.x = [self.decomposition.vector(s) for s in range(len(subdomains))]
        self.version = objective.version
        self.layers = [objective.loss.layer_numbers(ranges) for ranges in subdomains.ranges]
        self._local_event = PETSc.Log.Event("ddml local")
        self._exchange_event = PETSc.Log.Event("ddml exchange")

    def additive(self, x: PETSc.Vec, f: float, g: PETSc.Vec, correction: PETSc.Vec) -> None:
        """Write sum_s E_s (theta_s* - R_s x) to ``correction``; f, g are the loss and gradient at x. Collective."""
        self._follow()
        with self._exchange_event:
            theta = self.objective.parameters(x)
            for s in range(len(self.x)):
                self._load(s, g, lambda local: local.g)
                self._load(s, x, lambda local: local.x)
        interrupted = False
        with self._local_event:
            try:
                for s, local in self.local.items():
                    self.restricted[s].freeze(theta)
                    self.restricted[s].know(local.x, f, local.g)
                    local.solve()
                    self.restricted[s].release()
            except Exception as error:  # of a stop request the other groups do not know yet: they wait below
                if cause(error, Interrupted) is None:
                    raise
                interrupted = True
        with self._exchange_event:
            self._count(list(self.local), interrupted)
            correction.set(0.0)
            for s, difference in enumerate(self.x):
                self._subtract(s, difference)
                self.decomposition.E[s].multAdd(difference, correction, correction)

    def multiplicative(self, x: PETSc.Vec, f: float, g: PETSc.Vec) -> None:
        """Let each subdomain in turn minimise from the x that the ones before it left; f, g as at x. Collective.

        The last local iteration in a subdomain also computes the gradient of the next one, whose
        layers its adjoint passes anyway, so that s subdomains of k iterations take s * k evaluations.
        """
        self._follow()
        known: tuple[float, NDArray[np.float64]] | None = None
        for s, local in self.local.items():
            sub, last = self.restricted[s], s + 1 == len(self.x)
            with self._exchange_event:
                if s == 0:
                    self._load(s, g, lambda local: local.g)
                self._load(s, x, lambda local: local.x)
                sub.freeze(self.objective.parameters(x))
            if s == 0:
                sub.know(local.x, f, local.g)
            elif known is not None:
                local.g.array[:] = known[1][self.decomposition.local_range(s)]
                sub.know(local.x, known[0], local.g)
            with self._local_event:
                local.solve(frozenset() if last else self.layers[s + 1])
            with self._exchange_event:
                known = None if last else sub.also_gradient(local.x, self.decomposition.subdomains.ranges[s + 1])
                sub.release()
                self._count([s], False)
                self._subtract(s, self.x[s])
                self.decomposition.R[s].multTransposeAdd(self.x[s], x, x)

    def _follow(self) -> None:
        """Restrict what the objective is now."""
        if self.version == self.objective.version:
            return
        self.version = self.objective.version
        parts = self.objective.split_over(self.decomposition.group)
        for restricted_objective in self.restricted.values():
            restricted_objective.follow(self.objective.loss, parts)

    def _load(self, s: int, vec: PETSc.Vec, target: Callable[[LocalSolver], PETSc.Vec]) -> None:
        """Restrict a global vector to subdomain s and hand it to the local solver, if it is here."""
        self.decomposition.R[s].mult(vec, self.x[s])
        if s in self.local:
            target(self.local[s]).array[:] = self.x[s].array_r

    def _subtract(self, s: int, restricted_x: PETSc.Vec) -> None:
        """Turn R_s x, which ``restricted_x`` holds, into theta_s* - R_s x."""
        restricted_x.scale(-1.0)
        if s in self.local:
            restricted_x.array[:] += self.local[s].x.array_r

    def _count(self, subdomains: list[int], interrupted: bool) -> None:
        """Charge the local work to the objective; raise Interrupted everywhere if anybody was."""
        leads = self.decomposition.group.rank == 0
        mine = {s: self.restricted[s].work for s in subdomains if leads}
        gathered = self.objective.comm.allgather((mine, interrupted))
        self.objective.work.add_parallel([work for works, _ in gathered for work in works.values()])
        for s in subdomains:
            self.restricted[s].work = WorkCounter()
        if any(flag for _, flag in gathered):
            raise Interrupted

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        for local in self.local.values():
            local.destroy()
        for vec in self.x:
            vec.destroy()
        self.decomposition.destroy()
