"""Schwarz-preconditioned quasi-Newton methods."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.decomposition import Subdomains
from ddml.errors import InputError
from ddml.loss import Loss
from ddml.options import Option, number_or_word, read, with_defaults
from ddml.residual import ResidualObjective
from ddml.state import vectors_in

from .quasi_newton import LBFGS
from .schwarz import Schwarz

DECOMPOSITION = (
    Option("subdomains", None, "Number of subdomains (default: one a layer).", kind=int, minimum=1),
    Option("decomposition", "layers", "Subdomains are groups of layers, of parameter tensors, of tensors at random, or "
           "all windows of neighbouring layers.", choices=("layers", "tensors", "random", "windows")),
    Option("window", None, "Layers in each window (default: 2, or 1 if there is one).", kind=int, minimum=1),
    Option("window_shift", 1, "Layers by which each window is shifted against the one before.", minimum=1),
    Option("overlap", 0, "Layers (or tensors) that neighbouring subdomains share on each side.", minimum=0),
    Option("balance", "layers", "Groups of equally many layers, or of equal cost of a local gradient.",
           choices=("layers", "cost")),
    Option("decomposition_seed", 0, "Seed of random subdomains."),
)  # fmt: skip


def subdomains(loss: Loss, prefix: str = "", table: Sequence[Option] = DECOMPOSITION) -> Subdomains:
    """The subdomains that the options of a table under a prefix ask for.

    Raises
    ------
    InputError
        More subdomains than layers or tensors, a window of more layers than there are, options that do not go together.
    """
    chosen = read(table, prefix)
    if chosen.decomposition == "windows":
        for name in ("subdomains", "overlap", "balance"):
            if getattr(chosen, name) != next(o.default for o in DECOMPOSITION if o.name == name):
                raise InputError(f"option -{prefix}{name} does not go with -{prefix}decomposition windows: use -window")
        return Subdomains.windows(loss, chosen.window or min(2, len(loss.layers)), chosen.window_shift)
    if chosen.decomposition == "layers":
        return Subdomains.by_layers(loss, chosen.subdomains or len(loss.layers), chosen.overlap, chosen.balance)
    if chosen.balance != "layers":
        raise InputError(f"option -{prefix}balance cost goes with -{prefix}decomposition layers")
    seed = chosen.decomposition_seed if chosen.decomposition == "random" else None
    return Subdomains.by_tensors(loss, chosen.subdomains or len(loss.parameters), chosen.overlap, seed)


class _SPQN(LBFGS):
    """What ASPQN and MSPQN share; after a plain L-BFGS step, every iteration begins with local solves."""

    parallel: ClassVar[bool]
    options: ClassVar[Sequence[Option]] = (
        *LBFGS.options,
        *DECOMPOSITION,
        Option("local_steps", 50, "Iterations k_s of each local solver; 0 is plain L-BFGS.", minimum=0),
        Option("local_solver", "lbfgs", "The local solver, named as for -solver."),
        Option("local_memory", "fresh", "Local solvers begin afresh in every iteration (paper), or keep the curvature "
               "that they have learnt.", choices=("fresh", "keep")),
        Option("balance_steps", False, "Where subdomains are treated side by side, give those with cheaper evaluations "
               "more local iterations, for the time that the dearest takes."),
        Option("coarse_step", False, "Minimise over the first layer of each subdomain before the local solves."),
        Option("coarse_steps", 10, "Iterations of the coarse solver (our choice).", minimum=1),
    )  # fmt: skip

    @classmethod
    def decompose(cls, loss: Loss, prefix: str = "") -> Subdomains:
        """What :func:`subdomains` makes of the options and of this solver's defaults."""
        return subdomains(loss, prefix, cls.options)

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().setUp(tao)
        self.local: list[Schwarz] = []
        self.coarse: Schwarz | None = None
        self._written: list[PETSc.Vec] = []  # what the last call of kept gave
        self.keeps = self.whole_iterations = self.settings.local_memory == "keep"
        loss = self.objective.loss
        self.subdomains = self.decompose(loss, self.prefix)
        if len(self.subdomains) == 1:
            self.notes.append("there is one subdomain: local solves are of the undivided network")
        if self.settings.local_steps > 0:
            for chosen in self._colours():
                self.local.append(self._schwarz(chosen))
            self._half = tao.getSolution().duplicate()
        if self.settings.coarse_step:
            first = {min(loss.layer_numbers(core)) for core in self.subdomains.cores}
            coarse = Subdomains.of_layers(loss, [sorted(first)])
            self.coarse = Schwarz(
                self.objective, coarse, False, f"{self.prefix}coarse_", [self.settings.coarse_steps], beside=self.local
            )

    def _colours(self) -> list[Subdomains]:
        """Subdomains that are corrected together."""
        return [self.subdomains]

    def _schwarz(self, chosen: Subdomains) -> Schwarz:
        settings = self.settings
        steps = [settings.local_steps] * len(chosen)
        if settings.balance_steps and self.parallel:
            steps = [round(settings.local_steps * max(chosen.costs) / cost) for cost in chosen.costs]
            costs = tuple(cost * count for cost, count in zip(chosen.costs, steps, strict=True))
            chosen = replace(chosen, costs=costs)  # of all local iterations: who works on what follows from them
        return Schwarz(
            self.objective, chosen, self.parallel, f"{self.prefix}sub_", steps, settings.local_solver, self.keeps,
            self.local,
        )  # fmt: skip

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        super().destroy(tao)
        self._forget_written()
        for schwarz in (*getattr(self, "local", ()), getattr(self, "coarse", None)):
            if schwarz is not None:
                schwarz.destroy()
        if hasattr(self, "_half"):
            self._half.destroy()

    @property
    def inner_types(self) -> frozenset[str]:
        """See :attr:`solvers.base.Solver.inner_types`: local and coarse solvers."""
        inside = [*self.local, *([self.coarse] if self.coarse is not None else [])]
        return frozenset().union(*(schwarz.types for schwarz in inside))

    def _forget_written(self) -> None:
        for vec in getattr(self, "_written", ()):
            vec.destroy()
        self._written = []

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """See :meth:`ddml.solvers.base.Solver.view`."""
        super().view(tao, viewer)
        if getattr(self, "local", ()):
            for line in repr(self.subdomains).splitlines():
                viewer.printfASCII(f"    {line}\n")

    def kept(self) -> dict[str, Any]:
        """See :meth:`LBFGS.kept`; also what the local solvers keep."""
        kept = super().kept()
        if self.keeps:
            self._forget_written()
            kept["local"] = [state for schwarz in self.local for state in schwarz.memory(self.g)]
            self._written = list(vectors_in(kept["local"], "local", self.g).values())
        return kept

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`LBFGS.restore`."""
        super().restore(state)
        states = iter(state.get("local", ()))
        for schwarz in self.local if self.keeps else ():
            schwarz.recall(list(islice(states, len(schwarz.x))))
        for vec in vectors_in(list(states), "local", self.g).values():  # of a run that kept more than this one
            vec.destroy()

    def _local_kinds(self) -> list[tuple[str, int]]:
        return [kind for schwarz in self.local for kind in schwarz.kinds()]

    def resume(self, state: dict[str, Any]) -> None:
        """See :meth:`ddml.solvers.base.Solver.resume`.

        Raises
        ------
        InputError
            Also if it has what other local solvers, or those of other subdomains, keep.
        """
        super().resume(state)
        if self.keeps and "local" in state:
            then = [(item["solver"], item["size"]) for item in state["local"]]
            if then != self._local_kinds():
                raise InputError(
                    "the run file keeps the memory of other local solvers or subdomains: the same -decomposition and "
                    "-local_solver go on from it, -local_memory fresh begins afresh"
                )

    def precondition(self, x: PETSc.Vec) -> float:
        """See :meth:`LBFGS.precondition`."""
        if self.iteration == 0:
            return self.f
        f = self.f
        if self.coarse is not None:
            self.coarse.multiplicative(x, f, self.g)
            f = self.objective.value_gradient(x, self.g)
        if self.local:
            f = self._correct(x, f)
        return f

    @abstractmethod
    def _correct(self, x: PETSc.Vec, f: float) -> float:
        """Improve x and ``self.g`` by local solves; the loss there."""

    def _search_correction(self, x: PETSc.Vec, f: float, local: Schwarz) -> float:
        """Search along the sum of corrections, if it is a descent direction; the loss."""
        correction = self._half
        local.additive(x, f, self.g, correction)
        if not self.g.dot(correction) < 0:
            return f
        return self.search(x, f, self.g, correction).value


class ASPQN(_SPQN):
    r"""Additively Schwarz-preconditioned quasi-Newton method (Kopanicakova et al. 2024, Algorithm of section 3).

    From theta_k, in parallel over the subdomains s: theta_s* by k_s iterations of the local solver
    on the loss as a function of subdomain s, the rest frozen at theta_k. Then

    .. math:: \theta_{k+1/2} = \theta_k + \alpha \sum_s E_s (\theta_s^* - R_s \theta_k)

    and an L-BFGS step with momentum from there (:class:`LBFGS`), whose secant pair leaves the
    preconditioner's move out. alpha comes from a strong-Wolfe search that first tries 1; undamped
    corrections have been seen to diverge. Where the sum is no descent direction, or no alpha
    decreases the loss, there is no correction (our choice).

    An iteration takes 2 + k_s evaluations on the critical path, extra ones of line searches apart:
    the loss and gradient at theta_k are known, local ones there are restrictions.

    With ``additive_step subspace`` (our choice) every subdomain has a step length of its own: with
    :math:`d_s = R_s^T (\theta_s^* - R_s \theta_k)` the columns of D, a in R^S minimises |r + J D a|^2, and the
    search goes along D a. That takes S Jacobian products more, and an objective that has residuals; with windows and
    kept matrices on Burgers it got no further per work unit than the plain search (two seeds).
    """

    parallel = True
    options: ClassVar[Sequence[Option]] = (
        *_SPQN.options,
        Option("additive_step", "search", "alpha: a strong-Wolfe search, a number, or 'subspace', one for each "
               "subdomain from a small least-squares problem."),
    )  # fmt: skip

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        super().setFromOptions(tao)
        text = self.settings.additive_step
        self.subspace = text == "subspace"
        self.alpha = number_or_word(self.prefix, "additive_step", text, "search", "subspace")

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective.

        Raises
        ------
        InputError
            If step lengths shall come from residuals and the objective has none.
        """
        super().setUp(tao)
        self._separate: list[PETSc.Vec] = []
        if self.subspace and not isinstance(self.objective, ResidualObjective):
            raise InputError(
                f"option -{self.prefix}additive_step subspace needs a loss that is a sum of squares of residuals"
            )
        if self.subspace and isinstance(self.objective, ResidualObjective):
            self.objective.check_squares()
        if self.subspace and self.local:
            self._separate = [tao.getSolution().duplicate() for _ in range(len(self.subdomains))]

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        super().destroy(tao)
        for vec in getattr(self, "_separate", ()):
            vec.destroy()

    def _correct(self, x: PETSc.Vec, f: float) -> float:
        if self.subspace:
            return self._search_subspace(x, f)
        if self.alpha is None:
            return self._search_correction(x, f, self.local[0])
        correction = self._half
        self.local[0].additive(x, f, self.g, correction)
        x.axpy(self.alpha, correction)
        value = self.objective.value_gradient(x, self.g)
        if math.isfinite(value):
            return value
        x.axpy(-self.alpha, correction)
        return self.objective.value_gradient(x, self.g)

    def _search_subspace(self, x: PETSc.Vec, f: float) -> float:
        """Search along the best combination of the corrections for linear residuals; the loss."""
        assert isinstance(self.objective, ResidualObjective)
        self.local[0].separate(x, f, self.g, self._separate)
        lengths = best_lengths(self.objective.linear_model(x, self._separate))
        self._half.set(0.0)
        self._half.maxpy(lengths, self._separate)
        if not self.g.dot(self._half) < 0:
            return f
        return self.search(x, f, self.g, self._half).value


def best_lengths(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """The a (k,) of least norm, in units of the columns' lengths, that minimises |r + W a|.

    ``products`` is [W, r]^T [W, r] (k + 1, k + 1). Combinations of columns of unit length whose squared norm is below
    1e-12 of the largest count as zero (our choice).
    """
    size = np.sqrt(np.diag(products)[:-1])
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    if not np.isfinite(products).all():
        return np.zeros_like(size)
    values, vectors = np.linalg.eigh(products[:-1, :-1] * np.outer(scale, scale))
    kept = values > 1e-12 * max(values[-1], 0.0)
    basis = vectors[:, kept]
    return np.asarray(-scale * (basis @ ((basis.T @ (scale * products[:-1, -1])) / values[kept])))


class MSPQN(_SPQN):
    r"""Multiplicatively Schwarz-preconditioned quasi-Newton method (Kopanicakova et al. 2024).

    As :class:`ASPQN`, but each subdomain starts from what the ones before it reached, and
    theta_{k+1/2} is what the last one left: alpha = 1, since every local solve was searched.
    All ranks work on one subdomain at a time. An iteration takes 2 + S k_s evaluations.

    With ``side_by_side`` above one (our choice) subdomains that share no parameters are treated together
    (:meth:`ddml.decomposition.Subdomains.colours`): all from the same point, on groups of ranks as in the additive
    method, which exchange nothing meanwhile, and followed by a strong-Wolfe search along the sum of the
    corrections that first tries 1. An iteration with C colours takes 1 + C (1 + k_s) evaluations on the critical
    path, extra ones of searches apart.
    """

    options: ClassVar[Sequence[Option]] = (
        *_SPQN.options,
        Option("side_by_side", 1, "Subdomains without common parameters that are treated together, at most; "
               "0 is as many as there are.", minimum=0),
    )  # fmt: skip

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """Whether groups of ranks treat subdomains side by side."""
        return self.settings.side_by_side != 1

    def _colours(self) -> list[Subdomains]:
        if not self.parallel:
            return [self.subdomains]
        limit = self.settings.side_by_side or len(self.subdomains)
        return [self.subdomains.subset(colour) for colour in self.subdomains.colours(limit)]

    def _correct(self, x: PETSc.Vec, f: float) -> float:
        if self.parallel:
            for colour in self.local:
                f = self._search_correction(x, f, colour)
            return f
        x.copy(self._half)
        start_g = self.g.copy()
        self.local[0].multiplicative(x, f, self.g)
        value = self.objective.value_gradient(x, self.g)
        if not math.isfinite(value):
            self._half.copy(x)
            start_g.copy(self.g)
            value = f
        start_g.destroy()
        return value


class DenseMSPQN(MSPQN):
    """:class:`MSPQN` with other defaults: overlapping windows of two layers, whose dense self-scaled matrices are kept.

    The matrices of L layers of n / L parameters take about 4 / L of the memory of :class:`SSBroyden`'s. Windows, kept
    matrices and the numbers of local steps are our choices. As an iteration takes many evaluations, points move often.
    """

    options: ClassVar[Sequence[Option]] = with_defaults(
        MSPQN.options, decomposition="windows", local_solver="ssbroyden", local_memory="keep", local_steps=20,
        balance_steps=True,
    )  # fmt: skip
    moves_points = 1
