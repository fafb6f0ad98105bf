"""Training over nested sets of samples: MLVR, and SVRG, SARAH and sub-sampled Newton as cases of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.hierarchy.hierarchy import Hierarchy, Identity, Level
from ddml.losses.work import WorkCounter
from ddml.norms.norm import TwoNorm
from ddml.objectives.composed import sampled
from ddml.objectives.objective import Objective
from ddml.options import WITH_SOLVER, Option, with_defaults
from ddml.sampling.nested import NestedSets, coarsened
from solvers.line_search import SearchResult

from .acceptance import Always, Search
from .cycle import KINDS, Cycle
from .multilevel import Multilevel

TRIALS = 15  # of a search along a correction (the authors' configuration file)
# sets are not shared by the ranks that have less than a fifth of the samples for an evaluation to be efficient (our
# choice): by its own measure nine parts in ten of the time would go into what is done once for each block
TOO_FEW = 5
REFUSALS = 5  # corrections that are refused one after the other end a run (our choice)


class SampleHierarchy(Hierarchy):
    """Nested random sets of an objective's samples; all levels have the same parameters.

    Parameters
    ----------
    objective
        Of all samples.
    sizes
        Of the sets for a number of samples, the last one all of them.
    seed
        Of the sets.
    fixed
        Whether the sets stay what they are; else each cycle has new ones.

    Raises
    ------
    InputError
        More levels than samples.
    """

    def __init__(self, objective: Objective, sizes: Callable[[int], Sequence[int]], seed: int, fixed: bool) -> None:
        self.objective, self.sizes, self.seed, self.fixed = objective, sizes, seed, fixed
        self.sets = NestedSets(objective.loss.count, sizes(objective.loss.count), seed)
        levels = []
        for number, size in enumerate(self.sets.sizes[:-1]):
            part = sampled(objective, self.sets.rows(number))
            part.work = WorkCounter()
            if part.parts.blocks and TOO_FEW * size < part.loss.enough:
                part.parts.cut_into(1)
            levels.append(Level(part, f"{size} samples", size / objective.loss.count))
        levels.append(Level(objective, f"{objective.loss.count} samples", 1.0))
        super().__init__(levels, [Identity()] * len(levels[1:]))

    def draw(self, number: int) -> None:
        """See :meth:`ddml.hierarchy.hierarchy.Hierarchy.draw`."""
        if not self.fixed and number != self.sets.number:
            self.sets.draw(number)
            self.follow()

    def follow(self) -> None:
        """See :meth:`ddml.hierarchy.hierarchy.Hierarchy.follow`: sets of a batch of another size are cut anew."""
        count = self.objective.loss.count
        if count != self.sets.count:
            number = self.sets.number
            self.sets = NestedSets(count, self.sizes(count), self.seed)
            self.sets.draw(number)
        for number, level in enumerate(self.levels[:-1]):
            self.replace(level.objective, self.sets.rows(number))

    def replace(self, objective: Objective, rows: Any) -> None:
        """Give a level other samples."""
        whole = self.objective
        loss = whole.loss.sampled(torch.as_tensor(rows))
        objective.replace(loss, whole.fraction * len(rows) / whole.loss.count)


class MLVR(Multilevel):
    r"""Multilevel variance reduction (Braglia, Kopanicakova, Krause, arXiv 2006.15602): cycles over nested samples.

    Levels are nested random sets D_1, ..., D_L of the samples, transfers the identity: a coarse gradient is that of
    SVRG, :math:`\nabla L_{D}(\vartheta) - \nabla L_{D}(\theta_0) + \nabla L(\theta_0)`. The correction is searched
    along: any decrease is taken. Two levels with one Newton step on the coarse one are sub-sampled Newton.

    The default, two levels, a tenth of the samples, drawn anew for each cycle, ten steps of L-BFGS and no smoothing, is
    what took least work among those that were measured.
    """

    levels_of = "samples"
    options: ClassVar[Sequence[Option]] = (
        Option("levels", 2, "Nested sets of samples, all samples included.", minimum=1, changes=WITH_SOLVER),
        Option("coarsening", 10.0, "Factor by which the samples of a level are more than those of the next coarser "
               "one.", above=1.0, changes=WITH_SOLVER),
        Option("coarse_samples", 0, "Samples of the coarsest level; 0: by the coarsening.", minimum=0,
               changes=WITH_SOLVER),
        Option("sample_seed", 0, "Of the sets.", minimum=0, changes=WITH_SOLVER),
        Option("fixed_sets", False, "Keep the sets; else every cycle has new ones."),
        Option("cycle", "V", "Kind of the cycles.", choices=tuple(KINDS)),
        Option("smoother", None, "Solver of all levels but the coarsest, named as for -solver, and with smooth_ before "
               "its options (default: none).", kind=str, changes=WITH_SOLVER),
        Option("pre_steps", 1, "Steps of a smoother before a correction.", minimum=0),
        Option("post_steps", 0, "Steps of a smoother behind a correction.", minimum=0),
        Option("coarse_solver", "lbfgs", "Solver of the coarsest level, with coarse_ before its options.",
               changes=WITH_SOLVER),
        Option("coarse_steps", 10, "Its steps in a cycle; 0: as many as use all samples once.", minimum=0),
        Option("search", True, "Search along corrections, else take them as they are."),
        Option("redrawn", False, "Each coarse step is on other samples."),
        Option("snapshot", "kept", "Where the gradients of samples that are drawn anew are known to agree: where the "
               "coarse phase began (SVRG), or at the step before (SARAH).", choices=("kept", "moved")),
    )  # fmt: skip

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the hierarchy and the solvers of the levels. Collective.

        Raises
        ------
        InputError
            Samples drawn anew on more than two levels.
        """
        super().prepare(tao)
        self.refusals = 0
        if self.settings.redrawn and len(self.levels) != 2:
            raise InputError(f"option -{self.prefix}redrawn is for two levels, not {len(self.levels)}")

    def make_hierarchy(self, objective: Objective) -> Hierarchy:
        """See :meth:`.Multilevel.make_hierarchy`."""
        self.samples = SampleHierarchy(objective, self._sizes, self.settings.sample_seed, self.settings.fixed_sets)
        return self.samples

    def _sizes(self, count: int) -> list[int]:
        """Of the sets of so many samples."""
        s = self.settings
        sizes = coarsened(count, s.levels, s.coarsening)
        if s.coarse_samples and s.levels > 1:
            if not s.coarse_samples < sizes[1]:
                raise InputError(
                    f"option -{self.prefix}coarse_samples must be less than the {sizes[1]} samples of the next level, "
                    f"got {s.coarse_samples}"
                )
            sizes[0] = s.coarse_samples
        return sizes

    def solver_of(self, number: int) -> tuple[str | None, str]:
        """See :meth:`.Multilevel.solver_of`."""
        if number == 0 and len(self.hierarchy) > 1:
            return self.settings.coarse_solver, f"{self.prefix}coarse_"
        return self.settings.smoother, f"{self.prefix}smooth_"

    def presets(self, number: int, name: str | None, prefix: str) -> dict[str, Any]:
        """See :meth:`.Multilevel.presets`: L-BFGS with ten pairs and without momentum."""
        return {f"{prefix}memory": 10, f"{prefix}momentum": 1.0} if name == "lbfgs" else {}

    def keeps_memory(self, number: int) -> bool:
        """See :meth:`.Multilevel.keeps_memory`: not that of samples which are drawn anew."""
        return number > 0 or bool(self.settings.fixed_sets)

    def make_cycle(self) -> Cycle:
        """See :meth:`.Multilevel.make_cycle`."""
        s = self.settings
        acceptance = Search(TRIALS, 0.0, self.eps) if s.search else Always()
        count, size = self.objective.loss.count, self.hierarchy.levels[0].objective.loss.count
        steps = s.coarse_steps or math.ceil(count / size)
        norms = [TwoNorm()] * len(self.levels)
        if s.redrawn:
            return RedrawnCycle(self.samples, self.levels, acceptance, norms, steps, s.snapshot == "moved")
        return Cycle(self.hierarchy, self.levels, acceptance, norms, s.cycle, s.pre_steps, s.post_steps, steps)

    def advance(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`.Multilevel.advance`: one cycle, on other samples than the last."""
        self.hierarchy.draw(self.iteration)
        result = self.run_cycle()
        if result.success:
            self.refusals = 0
            return result
        self.refusals += 1
        return SearchResult(result.value, 0.0, self.refusals < REFUSALS and not self.settings.fixed_sets)

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        return {**super().inner_state(), "refusals": self.refusals}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`."""
        super().take_state(state)
        self.refusals = state["refusals"]


class SubsampledNewton(MLVR):
    r"""Sub-sampled Newton: :math:`\theta - \alpha H_D^{-1} g` with the whole gradient and the Hessian of some samples.

    MLVR on two levels, a tenth of the samples on the coarse one, with one step of Newton's method there and the
    correction taken as it is; alpha is ``coarse_rate``, by default 0.1 as in the authors' slides for a tenth.
    """

    options: ClassVar[Sequence[Option]] = with_defaults(
        MLVR.options, coarse_solver="newton", coarse_steps=1, search=False
    )

    def presets(self, number: int, name: str | None, prefix: str) -> dict[str, Any]:
        """See :meth:`.Multilevel.presets`."""
        if name != "newton":
            return super().presets(number, name, prefix)
        return {f"{prefix}rate": 0.1, f"{prefix}line_search": False}


class SVRG(MLVR):
    """Stochastic variance-reduced gradients (Johnson, Zhang 2013): MLVR with gradient steps on other samples each.

    Sixteen samples a step (our choice), and as many steps in a cycle as use all samples once; the step length is
    ``coarse_rate``.
    """

    options: ClassVar[Sequence[Option]] = with_defaults(
        MLVR.options, coarse_solver="gradient", coarse_samples=16, coarse_steps=0, search=False, redrawn=True
    )

    def presets(self, number: int, name: str | None, prefix: str) -> dict[str, Any]:
        """See :meth:`.Multilevel.presets`."""
        if name != "gradient":
            return super().presets(number, name, prefix)
        return {f"{prefix}rate": 0.1, f"{prefix}line_search": False}


class SARAH(SVRG):
    """The recursive gradient method (Nguyen et al. 2017): :class:`SVRG` with a snapshot that moves with the steps."""

    options: ClassVar[Sequence[Option]] = with_defaults(SVRG.options, snapshot="moved")


class RedrawnCycle(Cycle):
    r"""Two levels, the coarse one on other samples in each of its steps.

    The samples of a cycle are cut into as many sets as there are steps. With v the estimate of the whole gradient at
    the snapshot :math:`\tilde\theta`, a step goes from :math:`\vartheta` where the objective of the samples has the
    gradient :math:`\nabla L_D(\vartheta) - \nabla L_D(\tilde\theta) + v`. A snapshot that is kept stays at the
    beginning of the phase (SVRG, Johnson, Zhang 2013); one that is moved is where the step before began, and v what was
    estimated there (SARAH, Nguyen et al. 2017).

    Parameters
    ----------
    hierarchy, levels, acceptance, norms
        See :class:`.Cycle`.
    steps
        On the coarse level.
    moved
        See above.
    """

    def __init__(
        self, hierarchy: SampleHierarchy, levels: Any, acceptance: Any, norms: Any, steps: int, moved: bool
    ) -> None:
        super().__init__(hierarchy, levels, acceptance, norms, "V", 0, 0, steps)
        self.samples, self.snapshot_moves = hierarchy, moved
        vectors = (self.own(levels[0].x.duplicate()) for _ in range(5))
        self.begin, self.snapshot, self.here, self.last, self.estimate = vectors

    def _visit(self, number: int, kind: str, room: float) -> bool:
        if number > 0:
            return self.correct(number, kind, room)
        level, size = self.levels[0], self.samples.sets.sizes[0]
        for vec in (self.begin, self.snapshot):
            level.x.copy(vec)
        level.g.copy(self.estimate)
        order, going = self.samples.sets.order, True
        for step in range(self.coarse):
            if step:
                first = step * size % (len(order) - size + 1)
                self.samples.replace(level.loss, order[first : first + size])
                level.x.copy(self.here)
                self.snapshot.copy(level.x)
                level.enter(self.estimate)
                self.here.copy(level.x)
                level.evaluate()
                if not math.isfinite(level.f):  # the step before it led here
                    self.last.copy(level.x)
                    going = False
                    break
            if self.snapshot_moves:
                level.x.copy(self.snapshot)
                level.g.copy(self.estimate)
            level.x.copy(self.last)
            going = level.leap() if step < self.coarse - 1 else level.proceed(1)
            if not going:
                break
        self.begin.copy(level.start)
        return going
