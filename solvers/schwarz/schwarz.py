"""Schwarz corrections: minimise over each subdomain's parameters, side by side or one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ONE_BY_ONE
from ddml.losses.outputs import Outputs
from ddml.objectives.branched import BranchedObjective
from ddml.objectives.linear import GatheredTerm
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective, restricted
from ddml.options import preset, understood
from ddml.parallel import agreed, check_memory
from ddml.plugins import blamed
from ddml.states import narrowed, widened
from solvers.base import Solver
from solvers.line_search import at_rounding
from solvers.owner import Owner
from solvers.registry import PETSC_TYPES, SOLVERS, configure

LOCAL_REMEDY = "use more nodes, smaller subdomains, -sub_matrix_dtype float32, or another -local_solver"


class LocalSolver(Owner):
    """A TAO solver of one restricted objective, any type, with its own options prefix.

    Takes a fixed number of iterations (less if it cannot go on) and starts afresh at every call, or with
    ``remembers``, from the curvature that the calls before have learnt: the parameters that are frozen
    have moved since, which quasi-Newton matrices bear as they bear other nonlinearity.

    Parameters
    ----------
    objective
        What is minimised.
    prefix
        Of the options.
    steps
        Iterations.
    solver
        Name, see :func:`solvers.configure`; ``-<prefix>tao_type`` wins.
    remembers
        See above.
    prepare
        What is done to a solver of ours between reading its options and setting it up.

    Raises
    ------
    InputError
        If a solver of PETSc is to remember.
    """

    def __init__(
        self,
        objective: RestrictedObjective,
        prefix: str,
        steps: int,
        solver: str = "lbfgs",
        remembers: bool = False,
        prepare: Callable[[Solver], None] = lambda _: None,
    ) -> None:
        self.objective, self.prefix, self.given_steps = objective, prefix, steps
        self.solver, self.remembers, self.prepare = solver, remembers, prepare
        self.layers: frozenset[int] = frozenset()
        with self.building():
            self.x = self.own(objective.layout.vector())
            self.g = self.own(objective.layout.vector())
            self._create()

    def _create(self) -> None:
        prefix, steps = self.prefix, self.given_steps
        self.tao = self.own(PETSc.TAO().create(self.objective.comm))
        self.tao.setOptionsPrefix(prefix)
        self.tao.setSolution(self.x)
        with blamed(self.solver, dict.fromkeys((*SOLVERS, *PETSC_TYPES)), "local solver"):
            configure(self.tao, self.solver)
        self.objective.attach(self.tao)
        stop = {"tao_max_it": steps, "tao_gatol": 0.0, "tao_grtol": 0.0, "tao_gttol": 0.0}
        own = {prefix + name: value for name, value in stop.items()}
        with preset(**own, **ONE_BY_ONE):
            self.tao.setFromOptions()
            kind = self.tao.getType()
            if kind not in (*PETSC_TYPES, "python"):
                raise InputError(
                    f"option -{prefix}tao_type must be one of {', '.join(PETSC_TYPES)}, or python with "
                    f"-{prefix}tao_python_type; got '{kind}'"
                )
            if isinstance(self.context, Solver):
                self.prepare(self.context)
            self.tao.setUp()
        self.steps = self.tao.getMaximumIterations()
        self.tao.setMonitor(self._before_last)
        if self.remembers and self.context is None:
            raise InputError(f"a local solver that keeps its memory must be one of ours, not '{self.tao.getType()}'")

    @property
    def needed(self) -> int:
        """Bytes of the dense matrices of this solver on this rank."""
        return self.context.needed if self.context is not None else 0

    @property
    def context(self) -> Solver | None:
        """The solver itself, if it is one of ours."""
        context = self.tao.getPythonContext() if self.tao.getType() == "python" else None
        return context if isinstance(context, Solver) else None

    @property
    def types(self) -> frozenset[str]:
        """TAO type of this solver, and those of the solvers inside it."""
        inside = self.context.inner_types if isinstance(self.context, Solver) else frozenset()
        return frozenset((self.tao.getType(),)) | inside

    def _before_last(self, tao: PETSc.TAO) -> None:
        if tao.getIterationNumber() == self.steps - 1:
            self.objective.also(self.layers)

    def solve(self, also: frozenset[int] = frozenset()) -> float:
        """Minimise from ``self.x``: the loss there; the last iteration also computes the gradient of layers ``also``.

        Collective on the objective's communicator.
        """
        self.layers = also
        self.objective.also(frozenset())
        try:
            with preset(**ONE_BY_ONE):
                self.tao.solve()
        except PETSc.Error as error:  # a search of PETSc's own minimisers, which leaves x at the last iterate
            if self.context is not None or not at_rounding(error):
                raise
        finally:
            self.objective.also(frozenset())
        reached = float(self.tao.getSolutionStatus()[1])
        if self.context is not None:
            self.context.remembers = self.remembers
        else:  # PETSc's lmvm, for one, remembers scales from solve to solve
            self.release(self.tao)
            self._create()
        return reached


class Schwarz(Owner):
    """Additive or multiplicative corrections over a decomposition.

    Parameters
    ----------
    objective
        Of the whole network.
    subdomains
        What to correct on.
    parallel
        True for :meth:`additive`: groups of ranks treat subdomains side by side, or all ranks one after another where
        the loss is not divisible. False for
        :meth:`multiplicative`: all ranks treat one subdomain after another, or where networks are dealt over the ranks
        those that have it.
    prefix
        Of the local solvers' options.
    steps
        Iterations of each local solver.
    solver, remembers
        Of each :class:`LocalSolver`; those that remember finish what they have begun when a run is to stop.
    beside
        Other corrections, whose local solvers keep their matrices at the same time.
    whole
        Whether a run does not stop within local solves; it never does within those of solvers that remember.

    Raises
    ------
    CollectiveError
        What any local solver refuses; more dense matrices of all of them than a node has memory.

    Attributes
    ----------
    needed : int
        Bytes of the dense matrices of the local solvers on this rank.
    """

    def __init__(
        self,
        objective: Objective,
        subdomains: Subdomains,
        parallel: bool,
        prefix: str,
        steps: Sequence[int],
        solver: str = "lbfgs",
        remembers: bool = False,
        beside: Sequence[Schwarz] = (),
        whole: bool = False,
    ) -> None:
        self.objective, self.whole = objective, whole or remembers
        self.version = objective.version
        self.layers = [objective.loss.layer_numbers(ranges) for ranges in subdomains.ranges]
        self._local_event = PETSc.Log.Event("ddml local")
        self._exchange_event = PETSc.Log.Event("ddml exchange")
        with self.building():
            # tiles are on the ranks of their networks only
            self.apart = (parallel and objective.loss.divisible) or isinstance(objective, BranchedObjective)
            self.decomposition = self.own(Decomposition(subdomains, objective.layout, self.apart))
            with agreed(objective.comm), understood():
                self.restricted = self._restrict()
                for restricted_objective in self.restricted.values():
                    self.own(restricted_objective)
                self.local = {
                    s: self.own(LocalSolver(o, prefix, steps[s], solver, remembers, self._prepare))
                    for s, o in self.restricted.items()
                }
            self.needed = sum(local.needed for local in self.local.values())
            everything = self.needed + sum(other.needed for other in beside)
            check_memory(objective.comm, everything, "what the local solvers keep in dense matrices", LOCAL_REMEDY)
            self.x = [self.own(self.decomposition.vector(s)) for s in range(len(subdomains))]

    def _restrict(self) -> dict[int, RestrictedObjective]:
        """The objective of each subdomain that this rank works on."""
        return dict(restricted(self.objective, self.decomposition))

    def _prepare(self, context: Solver) -> None:
        """What is done to a local solver of ours before it is set up."""
        return

    def _stopping(self) -> AbstractContextManager[None]:
        """A block of local solves."""
        return self.objective.uninterrupted() if self.whole else nullcontext()

    def additive(self, x: PETSc.Vec, f: float, g: PETSc.Vec, correction: PETSc.Vec) -> None:
        """Write sum_s E_s (theta_s* - R_s x) to ``correction``; f, g are the loss and gradient at x. Collective."""
        self._side_by_side(x, f, g)
        with self._exchange_event:
            correction.set(0.0)
            for s, difference in enumerate(self.x):
                self.decomposition.E[s].multAdd(difference, correction, correction)

    def separate(self, x: PETSc.Vec, f: float, g: PETSc.Vec, corrections: Sequence[PETSc.Vec]) -> None:
        """As :meth:`additive`, but write R_s^T (theta_s* - R_s x) of each subdomain to a vector of its own."""
        self._side_by_side(x, f, g)
        with self._exchange_event:
            for s, (difference, correction) in enumerate(zip(self.x, corrections, strict=True)):
                self.decomposition.R[s].multTranspose(difference, correction)

    def _side_by_side(self, x: PETSc.Vec, f: float, g: PETSc.Vec) -> None:
        """Solve in all subdomains from x, and leave theta_s* - R_s x in their vectors."""
        self._follow()
        with self._exchange_event:
            frozen = self._frozen_at(x)
            for s in range(len(self.x)):
                self._load(s, g, lambda local: local.g)
                self._load(s, x, lambda local: local.x)
        with (
            self._local_event,
            self._stopping(),
            agreed(self.objective.comm),
        ):  # on errors, and on a stop that one group has noticed
            for s, local in self.local.items():
                self.restricted[s].freeze(*frozen)
                self.restricted[s].know(local.x, f, local.g)
                self._finish(s, local.solve())
                self.restricted[s].release()
        with self._exchange_event:
            self._count(list(self.local))
            for s, difference in enumerate(self.x):
                self._subtract(s, difference)

    def _finish(self, s: int, reached: float) -> None:
        """What follows a local solve of the additive kind that ended with this loss. Collective on the group."""
        return

    def multiplicative(self, x: PETSc.Vec, f: float, g: PETSc.Vec) -> None:
        """Let each subdomain in turn minimise from the x that the ones before it left; f, g as at x. Collective.

        The last local iteration in a subdomain also computes the gradient of the next one, whose
        layers its adjoint passes anyway, so that s subdomains of k iterations take s * k evaluations.
        """
        self._follow()
        known: tuple[float, NDArray[np.float64]] | None = None
        for s in range(len(self.x)):
            sub, local, last = self.restricted.get(s), self.local.get(s), s + 1 == len(self.x)
            with self._exchange_event:
                if s == 0:
                    self._load(s, g, lambda local: local.g)
                self._load(s, x, lambda local: local.x)
                frozen = self._frozen_at(x, self.layers[s - 1] if s else frozenset())
            with self._local_event, self._stopping(), agreed(self.objective.comm):
                if sub is not None and local is not None:
                    sub.freeze(*frozen)
                    if s == 0:
                        sub.know(local.x, f, local.g)
                    elif known is not None:
                        local.g.array[:] = known[1][self.decomposition.local_range(s)]
                        sub.know(local.x, known[0], local.g)
                    local.solve(frozenset() if last or self.apart else self.layers[s + 1])
            with self._exchange_event:
                known = None
                if sub is not None and local is not None:
                    if not (last or self.apart):
                        known = sub.also_gradient(local.x, self.decomposition.subdomains.ranges[s + 1])
                    sub.release()
                self._count([s])
                self._subtract(s, self.x[s])
                self.decomposition.R[s].multTransposeAdd(self.x[s], x, x)

    def _frozen_at(
        self, x: PETSc.Vec, moved: frozenset[int] = frozenset()
    ) -> tuple[Tensor, list[GatheredTerm], Outputs | None]:
        """What the subdomains' objectives are frozen at, where layers may have moved since the last one. Collective."""
        objective = self.objective
        terms = objective.linear_terms()
        outputs = objective.outputs_at(x, moved) if isinstance(objective, BranchedObjective) else None
        return objective.layout.gather(x, device=objective.loss.device), terms, outputs

    def _follow(self) -> None:
        """Restrict what the objective is now."""
        if self.version == self.objective.version:
            return
        self.version = self.objective.version
        with agreed(self.objective.comm):
            parts = self.objective.parts.split_for(self.decomposition.group)
            for restricted_objective in self.restricted.values():
                restricted_objective.follow(self.objective, parts)

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

    def _count(self, subdomains: list[int]) -> None:
        """Charge the local work to the objective."""
        leads = self.decomposition.group.rank == 0
        here = {s: self.restricted[s].work for s in subdomains if s in self.restricted}
        gathered = self.objective.comm.allgather(here if leads else {})
        self.objective.work.add_parallel([work for works in gathered for work in works.values()])
        for work in here.values():
            work.reset()  # objectives that were made of it charge the same counter

    @property
    def types(self) -> frozenset[str]:
        """TAO types of the local solvers on this rank, and of the solvers inside them."""
        return frozenset().union(*(local.types for local in self.local.values()))

    def kinds(self) -> list[tuple[str, int]]:
        """Class of the local solver, and size, of each subdomain. Collective."""
        mine = {s: type(local.context).__name__ for s, local in self.local.items()}
        names = {s: name for found in self.objective.comm.allgather(mine) for s, name in found.items()}
        return [(names[s], vec.getSize()) for s, vec in enumerate(self.x)]

    def state(self, theta: PETSc.Vec) -> list[dict[str, Any]]:
        """What the local solvers remember, subdomain by subdomain, as a state of all ranks. Collective.

        theta is any vector in the objective's layout. The caller destroys the vectors.
        """
        states = []
        for s, (name, size) in enumerate(self.kinds()):
            context = self.local[s].context if s in self.local else None
            mine = context.state() if context is not None and context.remembers else None
            memory = widened(mine, self.objective.comm, theta, self.decomposition.workers[s][0])
            states.append({"solver": name, "size": size, "memory": memory})
        return states

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Make the local solvers remember what :meth:`state` gave, on any number of ranks. Collective.

        It must be of as many subdomains of the same sizes. Its vectors are destroyed.

        Raises
        ------
        CollectiveError
            What a local solver refuses.
        """
        comm = self.objective.comm
        here = [self.local.get(s) for s in range(len(states))]
        memories = [
            narrowed(state["memory"], comm, local.x if local else None)
            for state, local in zip(states, here, strict=True)
        ]
        with agreed(comm):
            for local, memory in zip(here, memories, strict=True):
                if local is not None and local.context is not None and memory is not None:
                    local.context.restore(memory)
