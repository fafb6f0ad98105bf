"""Additively preconditioned trust-region strategies."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from petsc4py import PETSc

from ddml.decomposition.options import DECOMPOSITION
from ddml.objectives.consistent import sample_parts, whole_copies
from ddml.options import WITH_SOLVER, Option, with_defaults
from solvers.line_search import SearchResult
from solvers.trust_region.radius import BOUNDARY, SMALLEST
from solvers.trust_region.trust_region import TrustRegion

from .coarse_phase import CoarsePhase
from .confined import ConfinedSchwarz

# of a forced decrease (Trotti et al. 2023): halvings, and what each adds to the part of steepest descent
HALVINGS, BLEND = 5, 0.2

LOCAL = (
    Option("local_steps", 3, "Steps of each local solver at most; 0 leaves the global ones only.", minimum=0),
    Option("local_solver", "tr", "The local solver, named as for -solver."),
    Option("global_steps", 1, "Trust-region steps of the whole network in each iteration.", minimum=1),
    Option("forced_decrease", False, "While the sum of the corrections increases the loss, halve it and blend it with "
           "steepest descent, at most five times."),
)  # fmt: skip


class _APTS(TrustRegion):
    r"""What both methods share.

    From theta_k with radius delta, in parallel: each subdomain minimises its local objective h_s by a few steps of a
    trust-region method (or any solver) that stay within a part of delta. The sum s of the corrections, which is not
    longer than delta, is accepted or not by the ratio

    .. math:: \rho = (L(\theta_k) - L(\theta_k + s)) / \sum_s (h_s(\theta_k) - h_s(\theta_k + s_s))

    as a trust-region step is, delta follows, and a step of the global trust-region method ends the iteration. Its
    gradient is the one that the next local phase begins with: an iteration with k local steps takes two
    evaluations of the whole network and k of a subdomain on the critical path. With one subdomain the local phase would
    do what the global step does, and is left out: the method is then the trust-region method itself.
    """

    work_vectors = (*TrustRegion.work_vectors, "correction", "steepest")
    moves_within = True

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().prepare(tao)
        self.whole_iterations = True
        self.corrections_refused = 0
        self.local: ConfinedSchwarz | None = None
        if self.count() == 1:
            self.notes.append("there is one subdomain: the method is the undivided trust-region method")
        if self.settings.local_steps > 0 and self.count() > 1:
            self.local = self.own(self._make_local())

    @property
    def inner_types(self) -> frozenset[str]:
        """See :attr:`solvers.base.Solver.inner_types`: local solvers."""
        return self.local.types if self.local is not None else frozenset()

    @abstractmethod
    def count(self) -> int:
        """Number of subdomains."""

    @abstractmethod
    def _make_local(self) -> ConfinedSchwarz:
        """The local solvers."""

    @abstractmethod
    def _correction(self, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        """Write the sum of the corrections to s; the decrease it promises."""

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`: the local phase and the global steps."""
        moved = 0.0
        if self.local is not None:
            moved = self.correct(x)
        return self._global_steps(x, moved)

    def _global_steps(self, x: PETSc.Vec, moved: float) -> SearchResult:
        for _ in range(self.settings.global_steps):
            result = self.advance(x)
            self.f = result.value
            moved += result.step
            if not result.success:
                return SearchResult(self.f, moved, moved > 0)
        return SearchResult(self.f, moved, True)

    def correct(self, x: PETSc.Vec) -> float:
        """Move x, ``self.f`` and ``self.g`` by the sum of the corrections; its length, 0 if it is refused. Collective.

        The sum can be longer than delta where subdomains share a matrix: then it is shortened.
        """
        s, delta = self.vectors["correction"], self.radius.value
        if not delta >= SMALLEST:
            return 0.0
        predicted = self._correction(x, delta, s)
        size = self.norm(s)
        if size > delta:
            s.scale(delta / size)
            predicted, size = predicted * delta / size, delta
        if not predicted > 0:
            return 0.0
        return self.try_correction(x, s, size, predicted)

    def try_correction(self, x: PETSc.Vec, s: PETSc.Vec, size: float, predicted: float) -> float:
        """Accept or refuse a correction of that norm, whose promise is ``predicted``; what x moved by."""
        trial, trial_g, y, delta = self.vectors["trial"], self.vectors["trial_g"], self.vectors["y"], self.radius.value
        value = self._evaluate(x, s)
        if self.settings.forced_decrease and not value <= self.f:
            steepest = self.vectors["steepest"]
            dual = self.norm.steepest(self.g, steepest)
            blend, length = 0.0, 1.0
            for _ in range(HALVINGS):
                if value <= self.f:
                    break
                # (1 - blend) of the correction and blend of steepest descent, of which there is some already
                share = BLEND / (1 - blend)
                s.axpby(-0.5 * share * length * size, 0.5 * (1 - share), steepest)
                predicted = 0.5 * ((1 - share) * predicted + share * length * size * dual)
                blend, length = blend + BLEND, 0.5 * length
                value = self._evaluate(x, s)
            size = self.norm(s)
        if self.model.learns and math.isfinite(value):
            y.waxpy(-1.0, self.g, trial_g)
            self.model.learn(s, y)
        if not self.radius.judge(value, predicted, size >= BOUNDARY * delta, size=size):
            self.corrections_refused += 1
            return 0.0
        trial.copy(x)
        trial_g.copy(self.g)
        self.f = value
        return size

    def _evaluate(self, x: PETSc.Vec, s: PETSc.Vec) -> float:
        """Loss at x + s, infinite where it or its gradient is not finite; both stay in the trial vectors."""
        trial, trial_g = self.vectors["trial"], self.vectors["trial_g"]
        trial.waxpy(1.0, x, s)
        value = self.objective.value_gradient(trial, trial_g)
        return value if math.isfinite(value) and math.isfinite(trial_g.norm()) else math.inf


class APTSWeights(_APTS):
    r"""Additively preconditioned trust-region strategy in the weights (Trotti et al. 2023), see :class:`_APTS`.

    Subdomains are sets of parameters, the others frozen at theta_k: h_s is the loss itself. Local budgets are
    delta in the modular and the infinity norm, where steps of disjoint layers add up to one as long as the longest,
    and delta / sqrt N in the 2-norm. The default, overlapping windows of two layers, is our choice: of the layers of
    784-32-32-10 on MNIST each alone is 1 % less accurate after 30 work units.

    Networks of tiles (:class:`ddml.losses.branched.BranchedLoss`) are subdomains each, and the coarse net is one more:
    then that is the default. All of them correct the same residual, so that sums overshoot; with ``coarse_phase`` a
    length for each is found together with the coarse net (:class:`solvers.schwarz.coarse_phase.CoarsePhase`).
    """

    options: ClassVar[Sequence[Option]] = (
        *TrustRegion.options,
        *with_defaults(DECOMPOSITION, decomposition="windows"),
        *LOCAL,
        Option("coarse_phase", False, "Of networks of tiles: how far each goes along its correction is found together "
               "with the coarse net, from their outputs."),
        Option("coarse_phase_steps", 20, "L-BFGS steps that find it (our choice).", minimum=1),
    )  # fmt: skip
    subdomains_of = "parameters"

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        self.subdomains = self.decompose(tao.getAppCtx().loss, self.prefix)
        super().prepare(tao)
        self.phase: CoarsePhase | None = None
        if self.settings.coarse_phase:
            name = f"-{self.prefix}coarse_phase"
            self.phase = CoarsePhase(self.objective, self.settings.coarse_phase_steps, name)

    def correct(self, x: PETSc.Vec) -> float:
        """See :meth:`_APTS.correct`; with a coarse phase the coarse net's change is not bounded by delta."""
        if self.phase is None:
            return super().correct(x)
        s, delta = self.vectors["correction"], self.radius.value
        if not delta >= SMALLEST:
            return 0.0
        self._correction(x, delta, s)
        predicted, size = self.phase.combine(x, self.f, s, self.norm)
        return self.try_correction(x, s, size, predicted) if predicted > 0 else 0.0

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """See :meth:`solvers.base.Solver.view`."""
        super().view(tao, viewer)
        for line in repr(self.subdomains).splitlines():
            viewer.printfASCII(f"    {line}\n")

    def count(self) -> int:
        """See :meth:`_APTS.count`."""
        return len(self.subdomains)

    def _make_local(self) -> ConfinedSchwarz:
        settings = self.settings
        return ConfinedSchwarz(
            self.objective, self.subdomains, settings.local_steps, self.prefix, settings, self.norm_name,
            self.norm, settings.local_solver,
        )  # fmt: skip

    def _correction(self, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        assert self.local is not None
        budget = delta if self.norm.is_maximum else delta / math.sqrt(self.count())
        return self.local.confined(x, self.f, self.g, budget, s)


class APTSData(_APTS):
    r"""Additively preconditioned trust-region strategy in the data (arXiv 2502.05133), see :class:`_APTS`.

    Subdomains are N sets of samples, dealt at random, which may overlap; L_p is the mean over one of them, and

    .. math:: h_p(\theta) = L_p(\theta) + \langle \nabla L(\theta_k) - \nabla L_p(\theta_k), \theta - \theta_k\rangle

    has at theta_k the gradient of L. In the 2-norm each has the budget delta / N and the corrections are summed; in
    the other norms it has delta, and corrections and decreases are averaged. h_p(theta_k) takes one more
    evaluation of a part of the samples.
    """

    options: ClassVar[Sequence[Option]] = (
        *TrustRegion.options,
        Option("subdomains", 2, "Number N of sample subdomains.", minimum=1),
        Option("sample_overlap", 0.01, "Fraction of its samples by which each is widened.", minimum=0.0),
        Option("sample_seed", 0, "Of the deal.", minimum=0, changes=WITH_SOLVER),
        *LOCAL,
    )  # fmt: skip
    subdomains_of = "samples"

    def count(self) -> int:
        """See :meth:`_APTS.count`."""
        return int(self.settings.subdomains)

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective.

        Raises
        ------
        InputError
            More subdomains than samples, or an overlap above 1.
        """
        sample_parts(tao.getAppCtx().loss.count, self.count(), self.settings.sample_overlap)
        super().prepare(tao)

    def _make_local(self) -> ConfinedSchwarz:
        settings = self.settings
        return ConfinedSchwarz(
            self.objective, whole_copies(self.objective.loss, self.count()), settings.local_steps, self.prefix,
            settings, self.norm_name, self.norm, settings.local_solver, (settings.sample_overlap, settings.sample_seed),
        )  # fmt: skip

    def _correction(self, x: PETSc.Vec, delta: float, s: PETSc.Vec) -> float:
        assert self.local is not None
        if self.norm.is_maximum:
            return self.local.confined(x, self.f, self.g, delta, s)
        predicted = self.local.confined(x, self.f, self.g, delta / self.count(), s)
        s.scale(float(self.count()))
        return predicted * self.count()
