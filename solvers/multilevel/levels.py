"""The solver of one level, which goes on from wherever a cycle leaves the level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import ONE_BY_ONE
from ddml.objectives.composed import shifted
from ddml.objectives.objective import Objective
from ddml.options import preset
from ddml.plugins import blamed
from ddml.states import narrowed
from solvers.base import Solver, Stepper
from solvers.owner import Owner
from solvers.registry import PETSC_TYPES, SOLVERS, configure
from solvers.trust_region.trust_region import TrustRegion

NOT_FINITE = 83  # PETSC_ERR_USER: how PETSc's methods end where a loss is not finite
ROUNDING = 1e-10  # relative excess over a budget that counts as rounding (our choice)


class LevelSolver(Owner):
    """One level: its objective, where it stands, and any solver that moves it from there by some iterations.

    A solver of ours keeps what it has learnt of curvature from one call to the next; one of PETSc's begins afresh, and
    is charged the loss and the gradient where it begins and ends.

    Parameters
    ----------
    objective
        What the level minimises.
    name
        Of the solver, see :func:`solvers.configure`; None: there is none, and the level is only moved by others.
    prefix
        Of its options.
    point
        Where the level stands, if there is a vector already.
    remembers
        Whether a solver of ours keeps what it has learnt.
    prepare
        What is done to a solver of ours between reading its options and setting it up.

    Attributes
    ----------
    x, g : PETSc.Vec
        Where the level stands, and the gradient there.
    f : float
        The objective there.
    start, slope : PETSc.Vec
        Where the phase began that :meth:`enter` began, and the vector of the linear term.
    """

    def __init__(
        self,
        objective: Objective,
        name: str | None,
        prefix: str,
        point: PETSc.Vec | None = None,
        remembers: bool = True,
        prepare: Callable[[Solver], None] = lambda _: None,
    ) -> None:
        self.loss, self.name, self.prefix, self.remembers, self.prepare = objective, name, prefix, remembers, prepare
        self.f = self.start_f = math.nan
        self.begun = self.moved = False
        with self.building():
            vector = objective.layout.vector
            self.x = self.own(vector()) if point is None else point
            self.g, self.step = self.own(vector()), self.own(vector())
            self.trial, self.trial_g = self.own(vector()), self.own(vector())
            self.objective = objective
            if point is None:
                self.slope, self.start = self.own(vector()), self.own(vector())
                self.objective = shifted(objective, self.slope, self.start)
            self.tao: PETSc.TAO | None = None
            self.context: Solver | None = None
            if name is not None:
                self._create(name)

    def _create(self, name: str) -> None:
        tao = self.own(PETSc.TAO().create(self.objective.comm))
        tao.setOptionsPrefix(self.prefix)
        tao.setSolution(self.x)
        with blamed(name, dict.fromkeys((*SOLVERS, *PETSC_TYPES)), "solver of a level"):
            configure(tao, name)
        self.objective.attach(tao)
        stop = {f"{self.prefix}tao_{kind}": 0.0 for kind in ("gatol", "grtol", "gttol")}
        with preset(**stop, **ONE_BY_ONE):
            tao.setFromOptions()
            if tao.getType() not in (*PETSC_TYPES, "python"):
                raise InputError(
                    f"option -{self.prefix}tao_type must be one of {', '.join(PETSC_TYPES)}, or python with "
                    f"-{self.prefix}tao_python_type; got '{tao.getType()}'"
                )
            self.context = tao.getPythonContext() if tao.getType() == "python" else None
            if self.context is not None:
                self.prepare(self.context)
            tao.setUp()
        self.tao = tao

    @property
    def trust_region(self) -> TrustRegion | None:
        """The solver, if it is a trust-region method."""
        return self.context if isinstance(self.context, TrustRegion) else None

    @property
    def types(self) -> frozenset[str]:
        """TAO type of the solver, and those of the solvers inside it."""
        if self.tao is None:
            return frozenset()
        inside = self.context.inner_types if self.context is not None else frozenset()
        return frozenset((self.tao.getType(),)) | inside

    def evaluate(self) -> None:
        """Loss and gradient where the level stands. Collective."""
        self.f = self.objective.value_gradient(self.x, self.g)

    def enter(self, gradient: PETSc.Vec | None) -> None:
        """Begin a phase where the level stands: from now on its objective has this gradient there. Collective.

        It takes an evaluation of the level's loss. None: the objective is the loss itself.
        """
        self.slope.set(0.0)
        self.x.copy(self.start)
        self.evaluate()
        if gradient is not None:
            self.slope.waxpy(-1.0, self.g, gradient)
            gradient.copy(self.g)
        self.start_f, self.moved = self.f, True

    @property
    def leaps(self) -> bool:
        """Whether the solver can make a step without an evaluation where it ends."""
        return isinstance(self.context, Stepper) and not self.context.searches

    def enter_unseen(self, gradient: PETSc.Vec) -> None:
        """Begin a phase of one :meth:`leap`, as :meth:`enter` but without an evaluation. Collective."""
        self.x.copy(self.start)
        gradient.copy(self.g)
        self.f = self.start_f = math.nan

    def travelled(self, norm: Callable[[PETSc.Vec], float]) -> float:
        """How far the level has moved in this phase; the displacement is written to ``step``. Collective."""
        self.step.waxpy(-1.0, self.start, self.x)
        return norm(self.step)

    def move(self, f: float) -> None:
        """Go to the trial point, whose loss and gradient are known."""
        self.trial.copy(self.x)
        self.trial_g.copy(self.g)
        self.f, self.moved = f, True

    def renew(self) -> None:
        """Loss and gradient of other samples where the level stands; its solver judges those of before. Collective."""
        if self.tao is None or self.context is None or not self.begun:
            self.evaluate()
            return
        self.context.renew(self.x)
        self.f = self.context.f
        self.context.g.copy(self.g)

    def proceed(self, steps: int, room: float = math.inf, norm: Callable[[PETSc.Vec], float] | None = None) -> bool:
        """Move the level by some iterations, no farther than ``room`` in a norm; False if it cannot go on. Collective.

        What does not keep to the room by itself, as trust regions do, is shortened and evaluated there.
        """
        if steps < 1 or self.tao is None:
            return False
        confined = room < math.inf and norm is not None and self.trust_region is None
        if confined:
            self.x.copy(self.trial)  # where it begins
        going = self._with_petsc(steps) if self.context is None else self._with_ours(steps, room, confined, norm)
        if confined:
            self._shorten(room, norm)
        return going

    def leap(self) -> bool:
        """Move the level by one iteration, without an evaluation where it ends if it can. Collective.

        False if it cannot go on. The loss and the gradient are to be evaluated behind it, on other samples.
        """
        context = self.context
        if not (self.leaps and isinstance(context, Stepper)):
            return self.proceed(1)
        self._hand_over(context)
        self.begun = self.moved = True
        context.step(self.x)
        return True

    def _hand_over(self, context: Solver) -> bool:
        """Tell the solver the loss and the gradient where the level stands; whether it goes on with what it knows."""
        context.f = self.f
        self.g.copy(context.g)
        self.g.copy(context.vectors["accepted_g"])
        again = self.begun and self.remembers
        if not again:
            context.begin()
        return again

    def _with_ours(self, steps: int, room: float, confined: bool, norm: Callable[[PETSc.Vec], float] | None) -> bool:
        context = self.context
        assert context is not None
        again = self._hand_over(context)
        if isinstance(context, TrustRegion):
            context.confine(room)
        if room < math.inf or (again and self.moved):
            context.resume(self.x)
        self.begun, self.moved = True, False
        going = True
        while going and steps > 0:
            result = context.iterate(self.x)
            going, steps = result.success, steps - 1
            if going:
                context.f = result.value
                context.g.copy(context.vectors["accepted_g"])
                context.iteration += 1
                if confined and not self._inside(room, norm):
                    break
        self.f = context.f
        context.g.copy(self.g)
        return going

    def _inside(self, room: float, norm: Callable[[PETSc.Vec], float] | None) -> bool:
        """Whether the level has not left the room around ``trial``."""
        assert norm is not None
        self.step.waxpy(-1.0, self.trial, self.x)
        return norm(self.step) <= room * (1 + ROUNDING)

    def _shorten(self, room: float, norm: Callable[[PETSc.Vec], float] | None) -> None:
        """Come back to the edge of the room around ``trial``, if the level has left it."""
        if norm is None or self._inside(room, norm):
            return
        self.step.scale(room / norm(self.step))
        self.x.waxpy(1.0, self.trial, self.step)
        self.evaluate()
        self.moved = True

    def _with_petsc(self, steps: int) -> bool:
        assert self.tao is not None and self.name is not None
        before = self.f
        self.x.copy(self.step)
        self.tao.setMaximumIterations(steps)
        try:
            with preset(**ONE_BY_ONE):
                self.tao.solve()
        except PETSc.Error as error:
            if error.ierr != NOT_FINITE or error.__cause__ is not None:
                raise
            self.step.copy(self.x)  # one of its trials was not finite
        self.evaluate()
        self.release(self.tao)  # PETSc's lmvm, for one, remembers scales from solve to solve
        self._create(self.name)
        return self.f < before

    def state(self) -> dict[str, Any]:
        """What the next call needs besides where the level stands. Collective; the vectors are this object's."""
        if self.tao is None or self.context is None or not (self.begun and self.remembers):
            return {}
        return {
            "solver": type(self.context).__name__,
            "moved": self.moved,
            "vectors": {name: self.context.vectors[name] for name in self.context.saved},
            "inner": self.context.inner_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, whose vectors are destroyed or kept. Collective.

        Raises
        ------
        InputError
            If it is that of another solver.
        """
        if not state:
            return
        context = self.context
        if context is None or type(context).__name__ != state["solver"]:
            raise InputError(
                f"the run file has a level with a solver {state['solver']}, here it is {self.name or 'none'}"
            )
        comm = self.objective.comm
        vectors = narrowed(state["vectors"], comm, self.x)
        inner = narrowed(state["inner"], comm, self.x)
        for key, vec in vectors.items():
            vec.copy(context.vectors[key])
            vec.destroy()
        context.take_state(inner)
        self.begun, self.moved = True, state["moved"]
