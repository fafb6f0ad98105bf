"""Trust-region methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.norms.build import make_norm
from ddml.norms.modular import EXACT, TOLERANCE
from ddml.norms.norm import Norm
from ddml.norms.structure import CONVOLUTIONS
from ddml.objectives.composed import sampled
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective
from ddml.options import WITH_SOLVER, Option
from solvers.base import Solver
from solvers.line_search import SearchResult
from solvers.trust_region import radius

from . import accuracy
from .frugal import Frugal
from .models import FirstOrder, Model, Products, Secant, spread
from .radius import BOUNDARY, ROUNDINGS, SMALLEST, TrustRadius, complaint

# our choice: a local solve ends when less than this part of its budget is left
LITTLE = 0.01

# our choice: curvature of the loss, in the norm of the radius, up to which a run is known to have come to rounding
STEEP = 5000.0

OPTIONS = (
    Option("model", "first", "Of the loss in the trust region: first order, secant pairs, exact Hessian products, or "
           "Gauss-Newton products.",
           choices=("first", "sr1", "lbfgs", "hessian", "gauss_newton"), changes=WITH_SOLVER),
    Option("norm", None, "Of the trust region (default: modular with the first-order model, else 2).",
           choices=("modular", "2", "infinity", "kfac"), changes=WITH_SOLVER),
    Option("momentum", 0.9, "mu of Nesterov's momentum in the first-order model; 0 is none.", minimum=0.0),
    Option("memory", 10, "Secant pairs.", minimum=1),
    Option("overlap_pairs", False, "Secant pairs from one batch to the next, too, on the samples that they share."),
    Option("convolution", "unfolded", "Modular norm of a convolution: that of a linear layer on patches, or the "
           "paper's, over its slices.", choices=CONVOLUTIONS),
    Option("masses", None, "Of the layers in the modular norm, in their order, separated by commas (default: all 1)."),
    Option("polar_tolerance", TOLERANCE, "Part of the dual norm that the direction of a large matrix may lack in the "
           "modular norm, less than 1; below 0.01 it is exact.", above=0.0),
    Option("polar_exact", EXACT, "Smaller side up to which a matrix is not large: its direction is exact.", minimum=0),
    Option("curvature_fraction", None, "Of the samples, on which curvature is measured (default: 0.1 for K-FAC "
           "factors, all for products).", kind=float, above=0.0),
    Option("curvature_interval", 10, "Steps on the same samples behind which K-FAC factors are measured again.",
           minimum=1),
    accuracy.OPTION,
    *radius.OPTIONS,
)  # fmt: skip


class TrustRegion(Solver):
    r"""A trust-region method in the modular, the K-FAC, the infinity or the 2-norm.

    From theta, where loss and gradient are known, a step s minimises a model of the loss among the steps of norm <=
    delta (:mod:`solvers.trust_region.models`), loss and gradient at theta + s come from one evaluation, and the
    controller accepts or rejects and sets the next delta (:class:`solvers.trust_region.radius.TrustRadius`). An
    accepted trial's gradient serves the next step; a rejected step is an iteration that leaves theta where it is. One
    evaluation an iteration.

    When the objective changes, as with mini-batches, let S be the displacement since it last did, g_0 the first
    gradient of the old one, g that of the new one, and :math:`q = \langle g, S\rangle / \langle g_0, S\rangle`.
    Where S was a descent direction and (1 + q) / 2 < 1/4, so that by the trapezoidal rule less than a quarter of the
    decrease that g_0 promised is left, delta is divided by sqrt 2 (our choice). With ``overlap_pairs`` secant models
    learn S and the change over it of the gradient of the samples that are in both batches (Berahas, Nocedal, Takac
    2016).

    A run ends where delta is below 1e-14: no step decreases the loss. With d the slope of the model along its step and
    e as in :class:`solvers.trust_region.radius.TrustRadius`, a loss of curvature c can decrease by d^2 / 2c: where that
    is at most e with c = 5,000 (our choice), what is left to gain is lost in rounding and the run has converged;
    elsewhere it has failed, as it does on wrong gradients.

    Models of second order need a norm that comes from a product, the 2-norm or that of K-FAC
    (:class:`ddml.norms.kronecker.KroneckerNorm`), which is measured anew on each batch: in the others the subproblem is
    a hard one of its own.

    With the first-order model it keeps seven vectors (n,): theta, the gradients at theta, at the trial point and where
    the batch began, theta there, the step, which becomes the trial point, and the momentum. Of networks from a million
    parameters in float32, in the modular norm, some of them take half of that or nothing
    (:mod:`solvers.trust_region.frugal`).
    """

    judges_batches = True
    options: ClassVar[Sequence[Option]] = OPTIONS
    local_defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.0}
    work_vectors: Sequence[str] = ("s", "trial", "trial_g", "y", "batch_x", "batch_g")
    saved: Sequence[str] = ("batch_x", "batch_g")
    moves_within: ClassVar[bool] = False  # theta, in an iteration, before its last evaluation
    failure = PETSc.TAO.ConvergedReason.DIVERGED_TR_REDUCTION

    def __init__(self) -> None:
        super().__init__()
        self.whole_norm: Norm | None = None

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective.

        Raises
        ------
        InputError
            Constants or a norm and a model that do not go together.
        """
        super().setFromOptions(tao)
        settings = self.settings
        wrong = complaint(self.prefix, settings)
        if wrong:
            raise InputError(wrong)
        self.norm_name = settings.norm or ("modular" if settings.model == "first" else "2")
        self.check_model()
        if not (settings.curvature_fraction or 0.1) <= 1:
            raise InputError(
                f"option -{self.prefix}curvature_fraction must be at most 1, got {settings.curvature_fraction:g}"
            )

    def check_model(self) -> None:
        """Refuse constants of the model that are out of range, and a norm that it does not go with.

        Raises
        ------
        InputError
            If there are some.
        """
        settings = self.settings
        if not settings.momentum < 1:
            raise InputError(f"option -{self.prefix}momentum must be less than 1, got {settings.momentum:g}")
        if settings.model != "first" and self.norm_name not in ("2", "kfac"):
            raise InputError(
                f"option -{self.prefix}model {settings.model} needs -{self.prefix}norm 2 or kfac: with -norm "
                f"{self.norm_name} there is the first-order model only"
            )
        if not settings.polar_tolerance < 1:
            raise InputError(
                f"option -{self.prefix}polar_tolerance must be less than 1, got {settings.polar_tolerance:g}"
            )

    def prepare(self, tao: PETSc.TAO) -> None:
        """Make norm, model and controller. Collective.

        Raises
        ------
        InputError
            If the loss has no modular norm, or no residuals for Gauss-Newton products.
        """
        self.spares_memory = _may_spare(self, tao.getAppCtx())
        if self.spares_memory:
            self.work_vectors, self.saved = ("s",), ()
        super().prepare(tao)
        settings, objective = self.settings, self.objective
        self.norm = make_norm(objective, self.norm_name, settings, self.prefix, self.whole_norm)
        self.radius = TrustRadius(settings, self.norm_name, torch.finfo(objective.loss.dtype).eps)
        self.model = self.own(self.make_model())
        self.frugal: Frugal | None = None
        if self.spares_memory:
            assert isinstance(self.model, FirstOrder)
            self.frugal = self.own(Frugal(objective, self.model, self.g, self.vectors["s"], self.model.m))
        self.budget = math.inf  # how far a local solve may go from where it begins
        self.point = tao.getSolution()

    def shared_vectors(self) -> Mapping[str, str]:
        """See :meth:`solvers.base.Solver.shared_vectors`."""
        if self.settings.model != "first":
            return {}
        if self.spares_memory:
            return {"trial": "s", "accepted_g": "g"}
        own = {} if self.moves_within else {"accepted_g": "g"}
        return {"trial": "s", "y": "trial_g", **own}

    def make_model(self) -> Model:
        """The model; norm and controller are there. Collective."""
        settings, objective = self.settings, self.objective
        if settings.model == "first":
            return FirstOrder(self.norm, settings.momentum, self.g)
        if settings.model in ("sr1", "lbfgs"):
            return Secant(settings.model, settings.memory, objective.layout, self.norm)
        fraction = settings.curvature_fraction or 1.0
        rows = spread(objective, fraction)
        return Products(objective, settings.model, rows, self.prefix, self.norm, settings.cg_rule)

    def inherit(self, norm: Norm) -> None:
        """Before :meth:`setUp`: that of the whole network, where the objective is on a subdomain."""
        self.whole_norm = norm

    def confine(self, budget: float, first: float | None = None) -> None:
        """Keep the next steps within this distance of where they begin; the first radius of solves to come."""
        self.budget = budget
        if first is not None:
            self.radius.first, self.radius.largest = first, budget

    def resume(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.resume`: with the radius, which is at least the smallest."""
        self.radius.renew(self.f)
        if self.budget < math.inf:
            self._mark()

    def begin(self) -> None:
        """See :meth:`solvers.base.Solver.begin`."""
        self.radius.begin(self.f)
        self.model.forget()
        self.norm.refresh(self.point)
        self._mark()

    def _mark(self) -> None:
        """Remember where the objective began to be what it is."""
        if self.frugal is not None:
            self.frugal.mark(self.g)
            return
        self.point.copy(self.vectors["batch_x"])
        self.g.copy(self.vectors["batch_g"])

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`solvers.base.Solver.inner_state`."""
        more = {} if self.frugal is None else {"frugal": self.frugal.state(self.vectors["s"])}
        return {
            **more,
            "radius": self.radius.state(),
            "model": self.settings.model,
            "model_state": self.model.state(),
            "norm": self.norm_name,
            "norm_state": self.norm.state(),
        }

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.take_state`.

        Raises
        ------
        InputError
            If it is that of another model.
        """
        for name, mine in (("model", self.settings.model), ("norm", self.norm_name)):
            if state.get(name, mine) != mine:
                raise InputError(
                    f"the run file is of -{self.prefix}{name} {state[name]}, not {mine}: the same -{name} goes on "
                    "from it"
                )
        self.radius.restore(state["radius"])
        self.norm.restore(state.get("norm_state", {}))
        self.model.restore(state["model_state"])
        batch = state.get("frugal")
        if batch is None:
            return
        if self.frugal is not None:
            self.frugal.restore(batch, self.point)
        else:  # of a run that was frugal
            self.vectors["batch_x"].waxpy(-1.0, batch["displacement"], self.point)
            batch["batch_g"].copy(self.vectors["batch_g"])
        for vec in batch.values():
            vec.destroy()

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`solvers.base.Solver.restore`; the parameters are those of the state already."""
        vectors = state["vectors"]
        if self.frugal is not None and "frugal" not in state:  # of a run that was not
            state["frugal"] = {name: vectors.pop(name) for name in ("batch_g", "batch_x")}
        super().restore(state)

    def renew(self, x: PETSc.Vec) -> None:
        """See :meth:`solvers.base.Solver.renew`; the radius shrinks if the last steps were wrong for the new one."""
        S = self.vectors["s"]
        if self.frugal is not None:
            self.f, promised, found = self.frugal.renew(x, self.g, S)
        else:
            super().renew(x)
            S.waxpy(-1.0, self.vectors["batch_x"], x)
            promised, found = float(self.vectors["batch_g"].dot(S)), float(self.g.dot(S))
        agreement = (1 + found / promised) / 2 if promised < 0 else math.nan
        if self.model.learns and self.settings.overlap_pairs and promised < 0:
            self._learn_on_overlap(x, S)
        if self.objective.replacement.report is not None:
            self.objective.replacement.report(agreement)
        self.radius.renew(self.f, math.sqrt(0.5) if agreement < 0.25 else 1.0)
        self.norm.refresh(x)
        if self.frugal is None:
            self._mark()

    def _learn_on_overlap(self, x: PETSc.Vec, S: PETSc.Vec) -> None:
        """Tell the model how the gradient of the samples that two batches share changed over the displacement S."""
        rows = self.objective.replacement.overlap
        if rows is None or not len(rows):
            return
        common = sampled(self.objective, rows)
        y, before = self.vectors["y"], self.vectors["trial_g"]
        with self.objective.uninterrupted():  # a batch begins as a whole
            common.value_gradient(self.vectors["batch_x"], before)
            common.value_gradient(x, y)
        y.axpy(-1.0, before)
        if math.isfinite(y.norm()):
            self.model.learn(S, y)

    def iterate(self, x: PETSc.Vec) -> SearchResult:
        """See :meth:`solvers.base.Solver.iterate`: one step, which is 0 where it was rejected."""
        return self.advance(x)

    def advance(self, x: PETSc.Vec) -> SearchResult:
        """Try one step from x, where the loss is ``self.f`` and the gradient ``self.g``. Collective."""
        delta = self.radius.value
        if self.frugal is not None and delta >= SMALLEST:
            return self._advance_frugally(x, self.frugal)
        s, trial = self.vectors["s"], self.vectors["trial"]
        if self.budget < math.inf:
            s.waxpy(-1.0, self.vectors["batch_x"], x)
            room = self.budget - self.norm(s)
            delta = min(delta, room if room > LITTLE * self.budget else 0.0)
        if not delta >= SMALLEST:
            if not self.radius.value >= SMALLEST:
                self.failure = self._ending(x)
            return SearchResult(self.f, 0.0, False)
        predicted, length = self.model.step(x, self.g, delta, s)
        trial_g, y = self.vectors["trial_g"], self.vectors["y"]
        if trial.handle == s.handle:
            s.axpy(1.0, x)
        else:
            trial.waxpy(1.0, x, s)
        value = self.objective.value_gradient(trial, trial_g)
        finite = math.isfinite(value) and math.isfinite(trial_g.norm())
        if self.model.learns and finite:
            y.waxpy(-1.0, self.g, trial_g)
        self.model.observe(s, y if self.model.learns and finite else None)
        accepted = self.radius.judge(
            value if finite else math.inf, predicted, length >= BOUNDARY * delta, self.model.momentum > 0, length
        )
        if accepted:
            trial.copy(x)
            trial_g.copy(self.g)
        self.norm.aged(x)
        return SearchResult(value, length, True) if accepted else SearchResult(self.f, 0.0, True)

    def _advance_frugally(self, x: PETSc.Vec, frugal: Frugal) -> SearchResult:
        """As :meth:`advance`."""
        s, delta = self.vectors["s"], self.radius.value
        trial = frugal.propose(x, self.g, delta, s)
        self.model.observe(s, None)
        length = trial.length
        accepted = self.radius.judge(
            trial.value, trial.predicted, length >= BOUNDARY * delta, self.model.momentum > 0, length
        )
        if accepted:
            frugal.accept(trial, x, self.g, delta, s)
        self.norm.aged(x)
        return SearchResult(trial.value, length, True) if accepted else SearchResult(self.f, 0.0, True)

    def _ending(self, x: PETSc.Vec) -> int:
        """PETSc's reason where no step from x decreases the loss: whether rounding hides what is left to gain."""
        predicted, length = self.model.step(x, self.g, SMALLEST, self.vectors["s"])
        slope = predicted / length if length > 0 else 0.0
        e = ROUNDINGS * self.radius.eps * max(1.0, abs(self.f))
        # (of a gradient whose square overflows the model gives no step)
        hidden = slope**2 <= 2 * STEEP * e and (length > 0 or self.g.norm() == 0)
        reasons = PETSc.TAO.ConvergedReason
        return int(reasons.CONVERGED_STEPTOL if hidden else reasons.DIVERGED_TR_REDUCTION)


def _may_spare(solver: TrustRegion, objective: Objective) -> bool:
    """Whether it may work as :class:`solvers.trust_region.frugal.Frugal` does."""
    loss = objective.loss
    alone = not (solver.moves_within or isinstance(objective, RestrictedObjective) or objective.linear)
    first = solver.settings.model == "first" and solver.norm_name == "modular"
    return alone and first and loss.dtype == torch.float32 and loss.large
