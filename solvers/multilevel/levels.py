"""The solver of one level, which goes on from wherever a cycle leaves the level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.layout import ONE_BY_ONE
from ddml.objectives.objective import Objective
from ddml.options import preset
from ddml.plugins import blamed
from ddml.states import narrowed
from solvers.base import Solver, Stepper
from solvers.registry import PETSC_TYPES, SOLVERS, configure
from solvers.trust_region.adagrad import AdaGrad
from solvers.trust_region.trust_region import TrustRegion

from .points import LevelPoint

NOT_FINITE = 83  # PETSC_ERR_USER: how PETSc's methods end where a loss is not finite
ROUNDING = 1e-10  # relative excess over a budget that counts as rounding (our choice)


class LevelSolver(LevelPoint):
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
    options
        Defaults of its options.
    linear
        Whether phases of the level have linear terms.

    Attributes
    ----------
    types : frozenset of str
        TAO type of the solver, and those of the solvers inside it.
    """

    def __init__(
        self,
        objective: Objective,
        name: str | None,
        prefix: str,
        point: PETSc.Vec | None = None,
        remembers: bool = True,
        options: Mapping[str, Any] | None = None,
        linear: bool = True,
    ) -> None:
        self.name, self.prefix, self.remembers = name, prefix, remembers
        self.options = dict(options or {})
        self.first_radius: float | None = None
        self.begun = False
        self.types: frozenset[str] = frozenset()
        self.tao: PETSc.TAO | None = None
        self.context: Solver | None = None
        with self.building():
            self.stand(objective, point, linear)
            self.wake()

    def wake(self) -> None:
        """Make the solver, if it is not there. Collective."""
        if self.tao is None and self.name is not None:
            with preset(**self.options):
                self._create(self.name)

    def rest(self) -> None:
        """Destroy the solver, and with it what it has learnt, until it is needed again. Collective."""
        if self.tao is not None:
            self.release(self.tao)
            self.tao = self.context = None
            self.begun = False

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
            tao.setUp()
        self.tao, self.context = tao, tao.getPythonContext() if tao.getType() == "python" else None
        inside = self.context.inner_types if self.context is not None else frozenset()
        self.types = frozenset((tao.getType(),)) | inside

    @property
    def trust_region(self) -> TrustRegion | None:
        """The solver, if it is a trust-region method."""
        return self.context if isinstance(self.context, TrustRegion) else None

    @property
    def radius(self) -> float | None:
        """That of the solver, if it is a trust-region method, or the one that it will begin with."""
        inside = self.trust_region
        if inside is None:
            return None
        return inside.radius.value if self.begun or self.first_radius is None else self.first_radius

    def begin_like(self, finer: LevelSolver) -> None:
        """Let a trust-region method that has not begun begin with the radius of the finer level's, of the same norm."""
        mine, other = self.trust_region, finer.trust_region
        if mine is not None and other is not None and not self.begun and mine.norm_name == other.norm_name:
            self.first_radius = finer.radius

    @property
    def leaps(self) -> bool:
        """Whether the solver can make a step without an evaluation where it ends."""
        return isinstance(self.context, Stepper) and not self.context.searches

    def renew(self) -> None:
        """Loss and gradient of other samples where the level stands; its solver judges those of before. Collective."""
        if self.tao is None or self.context is None or not self.begun:
            self.evaluate()
            return
        self.context.renew(self.x)
        self.f = self.context.f
        self.context.g.copy(self.g)

    def proceed(
        self,
        steps: int,
        room: float = math.inf,
        norm: Callable[[PETSc.Vec], float] | None = None,
        blind: bool = False,
    ) -> bool:
        """Move the level by some iterations, no farther than ``room`` in a norm; False if it cannot go on. Collective.

        What does not keep to the room by itself, as trust regions do, is shortened and evaluated there. ``blind``: loss
        and gradient where it ends are not asked for, and AdaGrad does not compute them.
        """
        if steps < 1 or self.name is None:
            return False
        self.wake()
        if blind and isinstance(self.context, AdaGrad):
            return self._blindly(self.context, steps)
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
            context.iteration = 0
            context.begin()
        return again

    def _with_ours(self, steps: int, room: float, confined: bool, norm: Callable[[PETSc.Vec], float] | None) -> bool:
        context = self.context
        assert context is not None
        again = self._hand_over(context)
        if isinstance(context, TrustRegion):
            if not again and self.first_radius is not None:
                context.radius.renew(self.f, self.first_radius / context.radius.value)
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

    def _blindly(self, context: AdaGrad, steps: int) -> bool:
        """Move the level by some steps of AdaGrad, without a gradient behind the last one."""
        if steps > 1 and not self._with_ours(steps - 1, math.inf, False, None):
            return False
        if not (self.begun and self.remembers):
            context.begin()
        self.g.copy(context.g)
        context.step(self.x)
        self.f, self.begun, self.moved = math.nan, True, True
        return True

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
        self.rest()  # PETSc's lmvm, for one, remembers scales from solve to solve
        return self.f < before

    def state(self) -> dict[str, Any]:
        """What the next call needs besides where the level stands. Collective; the vectors are this object's."""
        if self.tao is None or self.context is None or not (self.begun and self.remembers):
            return {}
        return {
            "solver": type(self.context).__name__,
            "moved": self.moved,
            "iteration": self.context.iteration,
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
        self.wake()
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
        context.iteration = state["iteration"]
        self.begun, self.moved = True, state["moved"]
