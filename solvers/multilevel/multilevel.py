"""Solvers on a hierarchy of levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from petsc4py import PETSc

from ddml.hierarchy.hierarchy import Hierarchy
from ddml.objectives.objective import Objective
from ddml.parallel import agreed
from solvers.base import Solver
from solvers.line_search import SearchResult

from .cycle import Cycle
from .levels import LevelSolver


class Multilevel(Solver):
    """What all solvers on levels share: the hierarchy, the solvers of its levels, their work and their checkpoints.

    An iteration is a cycle. Work of coarse levels is charged to the objective in work units of the finest network.

    Attributes
    ----------
    hierarchy : Hierarchy
    levels : list of LevelSolver
        The coarsest first; the last one stands where the run does.
    spent : list of float
        Work units on each level so far.
    """

    failure = PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION
    corrects: ClassVar[bool] = True  # whether levels correct finer ones
    inheriting: ClassVar[str] = "tr"  # solvers of levels that take over these options
    inherited: ClassVar[Sequence[str]] = ()

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the hierarchy and the solvers of the levels. Collective."""
        super().prepare(tao)
        self.whole_iterations = True
        self.eps = torch.finfo(self.objective.loss.dtype).eps
        with agreed(self.objective.comm):
            self.hierarchy: Hierarchy = self.own(self.make_hierarchy(self.objective))
        self.levels = list[LevelSolver]()
        last = len(self.hierarchy) - 1
        for number, level in enumerate(self.hierarchy.levels):
            point = tao.getSolution() if number == last else None
            name, prefix = self.solver_of(number)
            given = self.presets(number, name, prefix)
            made = LevelSolver(level.objective, name, prefix, point, self.keeps_memory(number), given, self.corrects)
            self.levels.append(self.own(made))
            if not self.corrects:  # the solver has been seen to be possible: one at a time will do
                made.rest()
        self.spent, self.followed = [0.0] * len(self.levels), self.objective.version
        self.cycle = self.own(self.make_cycle())

    @abstractmethod
    def make_hierarchy(self, objective: Objective) -> Hierarchy:
        """The levels below an objective. Collective."""

    @abstractmethod
    def make_cycle(self) -> Cycle:
        """The cycle over the levels. Collective."""

    @abstractmethod
    def solver_of(self, number: int) -> tuple[str | None, str]:
        """Name of a level's solver, None for none, and the prefix of its options."""

    def presets(self, number: int, name: str | None, prefix: str) -> dict[str, Any]:
        """Defaults of the options of a level's solver."""
        if name != self.inheriting:
            return {}
        values = {option: getattr(self.settings, option) for option in self.inherited}
        return {f"{prefix}{option}": value for option, value in values.items() if value is not None}

    def keeps_memory(self, number: int) -> bool:
        """Whether a level's solver goes on, from cycle to cycle, with what it has learnt."""
        return True

    @property
    def top(self) -> LevelSolver:
        """The finest level."""
        return self.levels[-1]

    @property
    def inner_types(self) -> frozenset[str]:
        """See :attr:`solvers.base.Solver.inner_types`."""
        return frozenset().union(*(level.types for level in self.levels))

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """See :meth:`solvers.base.Solver.view`: with the hierarchy, and the solvers of the levels."""
        super().view(tao, viewer)
        for line in repr(self.hierarchy).splitlines():
            viewer.printfASCII(f"    {line}\n")
        for number, level in enumerate(self.levels):
            name, prefix = self.solver_of(number)
            viewer.printfASCII(f"    level {number}: solver {name or 'none'}, options -{prefix}...\n")
            if level.context is not None:
                level.context.view(level.tao, viewer)

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; the finest level's solver judges the samples of before, if it can."""
        self.top.renew()
        self.f = self.top.f
        self.top.g.copy(self.g)
        self.g.copy(self.vectors["accepted_g"])

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`: one cycle."""
        self.follow()
        result = self.advance(x)
        self._charge()
        return result

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.spent = [0.0] * len(self.levels)
        self._charge()

    def follow(self) -> None:
        """Give the coarse levels the samples that the objective has now. Collective."""
        if self.followed != self.objective.version:
            self.hierarchy.follow()
            self.followed = self.objective.version

    @abstractmethod
    def advance(self, x: PETSc.Vec) -> SearchResult:
        """Move x, ``self.g`` and the levels by one iteration. Collective."""

    def run_cycle(self) -> SearchResult:
        """Move the finest level, which stands where the run does, by a cycle. Collective."""
        self.top.f = self.f
        self.g.copy(self.top.g)
        going = self.cycle.run()
        return self.result(self.top, going)

    def result(self, level: LevelSolver, going: bool) -> SearchResult:
        """What an iteration ends with that ends on this level: its loss, and its radius if it has one."""
        inside = level.trust_region
        if level is self.top:
            level.g.copy(self.g)
        if not going and inside is not None:
            self.failure = inside.failure
        return SearchResult(level.f, inside.radius.value if inside is not None else float(going), going)

    def _charge(self) -> None:
        """Charge the objective what the coarse levels have spent."""
        for number, level in enumerate(self.levels[:-1]):
            work = level.loss.work
            self.spent[number] += work.total
            self.objective.work.critical += work.critical
            self.objective.work.total += work.total
            self.objective.work.gradients += work.gradients
            self.objective.work.losses += work.losses
            self.objective.work.products += work.products
            work.reset()
        self.spent[-1] = self.objective.work.total - sum(self.spent[:-1])

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {
            "sizes": [level.x.getSize() for level in self.levels],
            "levels": [level.state() for level in self.levels],
            "cycle": self.cycle.state(),
            "spent": [float(units) for units in self.spent],
        }

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of other levels.
        """
        for level, known in zip(self.levels, state["levels"], strict=True):
            level.restore(known)
        self.cycle.restore(state["cycle"])
        self.spent = list(state["spent"])
