"""Training over the depth of a network: RMTR, MG/OPT and the cascade."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.hierarchy.depth import depth, depth_hierarchy
from ddml.hierarchy.hierarchy import Hierarchy
from ddml.norms.norm import TwoNorm
from ddml.objectives.objective import Objective
from ddml.options import WITH_SOLVER, Option, with_defaults
from ddml.states import narrowed
from solvers.line_search import SearchResult
from solvers.trust_region.trust_region import TrustRegion

from .acceptance import Acceptance, Always, Region, Search
from .carrying import carry
from .cycle import KINDS, Cycle
from .multilevel import Multilevel

# our choices: corrections that are tried before cycling may stop; the share of a coarsest gradient from which on
# cycles cannot pay (a cycle takes as many coarse steps as would be fine ones)
TRIED, DEAR = 20, 0.5

# factor between two levels: what lies between them was seen to cost more than it brings (our choice)
STEEPEST = 16

# of a search along a correction: trials (our choice) and Armijo's constant (Nash 2000 asks for any search)
TRIALS, ARMIJO = 4, 1e-4

LEVELS = (
    Option("levels", None, "Levels (default: as many as the blocks allow, at most 5; of rmtr and mladagrad 2).",
           kind=int, minimum=1, changes=WITH_SOLVER),
    Option("refinement", None, "Factor by which the blocks of a level are more than those of the next coarser one "
           "(default: 2; on two levels of rmtr and mladagrad the largest one up to 16).", kind=int, minimum=2,
           changes=WITH_SOLVER),
    Option("smoother", "tr", "Solver of all levels but the coarsest, named as for -solver, and with smooth_ before its "
           "options.", changes=WITH_SOLVER),
    Option("coarse_solver", None, "Solver of the coarsest level, with coarse_ before its options (default: the "
           "smoother).", kind=str, changes=WITH_SOLVER),
    Option("cascade", True, "Begin on the coarsest level, and go on to finer ones, before the finest is trained.",
           changes=WITH_SOLVER),
    Option("cascade_work", "5,0.5", "Work units of the cascade on the coarsest level, the next one, ..., separated by "
           "commas; the last number is that of all further levels; 0 leaves one out."),
    Option("prolongation", "copy", "To the next finer level in the cascade: copies of layers, or layers that "
           "are inserted with zeros and change nothing, where the network has such.", choices=("copy", "insert"),
           changes=WITH_SOLVER),
    Option("coarse_start", "projected", "Where the cascade begins: at the means over layers that come together, or at "
           "one layer of each, as it was drawn (where layers can be inserted).", choices=("projected", "drawn"),
           changes=WITH_SOLVER),
)  # fmt: skip

CYCLES = (
    Option("cycle", "V", "Kind of the cycles.", choices=tuple(KINDS)),
    Option("pre_steps", 1, "Steps of a smoother before a correction.", minimum=0),
    Option("post_steps", 1, "Steps of a smoother behind a correction.", minimum=0),
    Option("coarse_steps", 10, "Steps on the coarsest level in a cycle.", minimum=1),
    Option("descent", 0.125, "kappa: no correction where the restricted gradient is less than this part of the "
           "gradient (2-norms).", minimum=0.0),
    Option("most_refused", 0.1, "Part of the corrections: where more are refused cycling stops; 1: never.",
           minimum=0.0),
)  # fmt: skip


class DepthSolver(Multilevel):
    """What is on a hierarchy of networks of different depth; its levels know one trust region's options."""

    levels_of = "depth"
    steep: ClassVar[bool] = False  # whether there are two levels by default, the coarse one of few blocks
    judges_batches: ClassVar[bool] = True
    inherited: ClassVar[Sequence[str]] = (
        *("model", "norm", "momentum", "memory", "overlap_pairs", "convolution", "polar_tolerance", "polar_exact"),
        *("curvature_fraction", "delta0", "delta_min", "delta_max", "accept", "shrink_below", "grow_above", "shrink"),
        *("grow", "nonmonotone"),
    )

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective.

        Raises
        ------
        InputError
            Work of the cascade that is no numbers of 0 or more, the first above 0.
        """
        super().setFromOptions(tao)
        text = self.settings.cascade_work
        try:
            self.granted = [float(word) for word in text.split(",")]
        except ValueError:
            self.granted = []
        if not self.granted or not all(0 <= units < math.inf for units in self.granted) or not self.granted[0] > 0:
            raise InputError(
                f"option -{self.prefix}cascade_work must be numbers of 0 or more, the first above 0, separated by "
                f"commas; got '{text}'"
            )

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the hierarchy and the solvers of the levels. Collective."""
        super().prepare(tao)
        self.phase, self.entered, self.stuck, self.phase_began = len(self.levels) - 1, False, False, 0.0
        self.growing = False
        made, s = self.hierarchy, self.settings
        self.upwards, self.downwards = (
            made.insertions if s.cascade and inserted else made.transfers
            for inserted in (s.prolongation == "insert", s.coarse_start == "drawn")
        )
        share = self.hierarchy.levels[0].share
        self.notes.append(f"{self.hierarchy!r}")
        if len(self.levels) == 1:
            self.notes.append("there is one level: the method is that level's solver")
        elif share > DEAR:
            self.notes.append(f"a gradient on the coarsest level costs {share:.2f} of one: coarse levels cannot pay")

    def make_hierarchy(self, objective: Objective) -> Hierarchy:
        """See :meth:`.Multilevel.make_hierarchy`."""
        s = self.settings
        inserts = s.cascade and (s.prolongation == "insert" or s.coarse_start == "drawn")
        levels, refinement = s.levels, s.refinement
        if self.steep and levels is None and refinement is None:
            count, _ = depth(objective.loss)
            levels, refinement = 2, max((k for k in range(2, STEEPEST + 1) if count % k == 0), default=2)
        return depth_hierarchy(objective, levels, refinement or 2, inserts)

    def solver_of(self, number: int) -> tuple[str | None, str]:
        """See :meth:`.Multilevel.solver_of`."""
        if number == 0 and len(self.hierarchy) > 1:
            return self.settings.coarse_solver or self.settings.smoother, f"{self.prefix}coarse_"
        return self.settings.smoother, f"{self.prefix}smooth_"

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`: on the coarsest level, if there is a cascade."""
        super().begin()
        self.phase = 0 if self.settings.cascade else len(self.levels) - 1
        self.entered, self.stuck, self.phase_began = False, False, self.spent[self.phase]

    def norms(self) -> list[Callable[[PETSc.Vec], float]]:
        """Of the levels: those of their trust regions, else the 2-norm."""
        return [level.trust_region.norm if level.trust_region is not None else TwoNorm() for level in self.levels]

    def advance(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`.Multilevel.advance`: a step of the cascade, or what follows it."""
        while self.climbing and self.entered and (self.stuck or self._spent() >= self._granted()):
            self._climb()
        return self._cascade_step() if self.climbing else self.on_finest()

    def _spent(self) -> float:
        """Work units on the level that the cascade is on."""
        return self.spent[self.phase] - self.phase_began

    def _granted(self) -> float:
        """What it may spend there."""
        return self.granted[min(self.phase, len(self.granted) - 1)]

    def on_finest(self) -> SearchResult:
        """An iteration behind the cascade. Collective."""
        return self.step(1)

    def step(self, steps: int) -> SearchResult:
        """Steps of the finest level's solver alone. Collective."""
        top = self.top
        top.f = self.f
        self.g.copy(top.g)
        return self.result(top, top.proceed(steps))

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`: on the level where the cascade is."""
        if not (self.climbing and self.entered):
            super().renew(x)
            return
        self.follow()
        level = self.levels[self.phase]
        level.renew()
        self.f = level.f
        self._prolong()
        self.g.copy(self.vectors["accepted_g"])

    @property
    def climbing(self) -> bool:
        """Whether the cascade has not come to the finest level yet."""
        return self.phase < len(self.levels) - 1

    def _cascade_step(self) -> SearchResult:
        """One step on the level that the cascade is on; the run stands at its prolongation."""
        level, last = self.levels[self.phase], len(self.levels) - 1
        if not self.entered:
            for number in reversed(range(self.phase, last)):
                self.downwards[number].project(self.levels[number + 1].x, self.levels[number].x)
            level.enter(None)
            self.entered = True
        self.stuck = not level.proceed(1)
        self._prolong()
        return self.result(level, True)

    def _prolong(self) -> None:
        """Make the run stand at the prolongation of the level that the cascade is on."""
        for number in range(self.phase, len(self.levels) - 1):
            transfer, coarse, fine = self.upwards[number], self.levels[number], self.levels[number + 1]
            transfer.prolong(coarse.x, fine.x)
            transfer.prolong_step(coarse.g, fine.g)
        self.top.g.copy(self.g)

    def _climb(self) -> None:
        """Go on from the prolongation on the next finer level, with what has been learnt."""
        coarse, transfer = self.levels[self.phase], self.upwards[self.phase]
        self.phase, self.stuck = self.phase + 1, False
        self.phase_began = self.spent[self.phase]
        fine = self.levels[self.phase]
        carry(coarse, fine, transfer)
        if fine is not self.top:
            if self._granted() > 0:
                fine.enter(None)
            return
        fine.evaluate()
        self.f = fine.f
        fine.g.copy(self.g)

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        more: dict[str, Any] = {"phase": self.phase, "entered": self.entered, "phase_began": float(self.phase_began)}
        if self.climbing and self.entered:
            level = self.levels[self.phase]
            more |= {"stuck": self.stuck, "x": level.x, "f": float(level.f), "g": level.g}
        return {**super().inner_state(), **more}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of other levels.
        """
        sizes = [level.x.getSize() for level in self.levels]
        if state["sizes"] != sizes:
            raise InputError(
                f"the run file has levels of {state['sizes']} parameters, not of {sizes}: the same -levels and "
                "-refinement go on from it"
            )
        super().take_state(state)
        self.phase, self.entered, self.phase_began = state["phase"], state["entered"], state["phase_began"]
        if "x" in state:
            level = self.levels[self.phase]
            self.stuck, level.f = state["stuck"], state["f"]
            for name, vec in (("x", level.x), ("g", level.g)):
                found = narrowed(state[name], self.objective.comm, vec)
                found.copy(vec)
                found.destroy()
            self._prolong()  # the finer levels go on from there


class Cascade(DepthSolver):
    r"""Coarse to fine: each level of a network's depth is trained for a while, from the prolongation of the one below.

    Radius, momentum and secant pairs are prolonged with the parameters. Behind the cascade an iteration is one step of
    the undivided network's solver. While it is on a coarse level the loss is that of the coarse network, and the run
    stands at its prolongation. A level is left when it has taken ``cascade_work`` units, or when its solver cannot go
    on.
    """

    options: ClassVar[Sequence[Option]] = (*LEVELS, *with_defaults(TrustRegion.options, model="lbfgs"))

    corrects = False

    def make_cycle(self) -> Cycle:
        """See :meth:`.Multilevel.make_cycle`: none is run."""
        return Cycle(self.hierarchy, self.levels, Always(), [TwoNorm()] * len(self.levels), "V", 0, 0, 0)

    def _climb(self) -> None:
        before = self.levels[self.phase]
        super()._climb()
        before.rest()

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`DepthSolver.take_state`."""
        super().take_state(state)
        for level in self.levels[: self.phase]:
            level.rest()


class CyclingSolver(DepthSolver):
    """What runs cycles behind its cascade, until too many corrections are refused.

    Without a cascade a trust region on the finest level first takes steps as long as each enlarges its radius: a
    coarse phase costs as much in a radius that is too small as in one that suits (our choice).
    """

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        super().begin()
        smoothing = self.settings.pre_steps + self.settings.post_steps > 0
        self.growing = smoothing and not self.settings.cascade and self.top.trust_region is not None

    def on_finest(self) -> SearchResult:
        """See :meth:`DepthSolver.on_finest`: a cycle."""
        cycle, settings = self.cycle, self.settings
        if len(self.levels) == 1:
            return self.step(1)
        if self.growing:
            before = self.top.radius or 0.0
            result = self.step(1)
            self.growing = (self.top.radius or 0.0) > before
            return result
        if cycle.tried >= TRIED and cycle.refused > settings.most_refused * cycle.tried:
            return self.step(max(settings.pre_steps + settings.post_steps, 1))
        return self.run_cycle()

    def make_cycle(self) -> Cycle:
        """See :meth:`.Multilevel.make_cycle`."""
        s, norms = self.settings, self.norms()
        return Cycle(
            self.hierarchy, self.levels, self.make_acceptance(norms), norms, s.cycle, s.pre_steps, s.post_steps,
            s.coarse_steps, s.descent,
        )  # fmt: skip

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {**super().inner_state(), "growing": bool(self.growing)}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of other levels.
        """
        super().take_state(state)
        self.growing = state["growing"]

    @abstractmethod
    def make_acceptance(self, norms: Sequence[Callable[[PETSc.Vec], float]]) -> Acceptance:
        """The globalisation. Collective."""


class RMTR(CyclingSolver):
    r"""The recursive multilevel trust-region method over depth (Gratton, Sartenaer, Toint 2008; Kopanicakova, Krause
    2022).

    Cycles (:class:`solvers.multilevel.cycle.Cycle`) of trust-region steps on networks whose depth is halved from level
    to level. A coarse phase stays in a ball around the point where it began, whose radius is that of the prolonged
    step; the correction is taken or not by the ratio of the decrease of the fine objective to that of the coarse one.
    With one level it is the trust-region method itself. Secant pairs, radii and momentum of each level are kept from
    cycle to cycle.
    """

    steep = True
    options: ClassVar[Sequence[Option]] = (
        *LEVELS,
        *CYCLES,
        Option("correction_radius", "own", "Of coarse corrections: one of their own, or that of the steps, as "
               "published.", choices=("own", "shared"), changes=WITH_SOLVER),
        *with_defaults(TrustRegion.options, model="sr1"),
    )  # fmt: skip

    def make_acceptance(self, norms: Sequence[Callable[[PETSc.Vec], float]]) -> Acceptance:
        """See :meth:`CyclingSolver.make_acceptance`."""
        s = self.settings
        name = s.norm or ("modular" if s.model == "first" else "2")
        return Region(self.levels, norms, s, name, self.eps, s.correction_radius == "shared")


class MGOPT(CyclingSolver):
    r"""MG/OPT over depth (Nash 2000): cycles whose corrections are searched along, by halving from 1 on.

    As :class:`RMTR`, but coarse phases may go as far as their solvers take them, and a correction of slope d is
    shortened until the decrease is at least 1e-4 |d| of its length, four times at most.
    """

    options: ClassVar[Sequence[Option]] = (*LEVELS, *CYCLES, *with_defaults(TrustRegion.options, model="lbfgs"))

    def make_acceptance(self, norms: Sequence[Callable[[PETSc.Vec], float]]) -> Acceptance:
        """See :meth:`CyclingSolver.make_acceptance`."""
        return Search(TRIALS, ARMIJO, self.eps)
