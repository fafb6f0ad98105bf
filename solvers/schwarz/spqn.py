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

from ddml.decomposition.options import DECOMPOSITION
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.objectives.residual import ResidualObjective
from ddml.options import Option, number_or_word, with_defaults
from ddml.states import vectors_in
from solvers.owner import Owner
from solvers.quasi_newton.lbfgs import LBFGS

from .schwarz import Schwarz


class _SPQN(LBFGS):
    """What ASPQN and MSPQN share; after a plain L-BFGS step, every iteration begins with local solves."""

    parallel: ClassVar[bool]
    subdomains_of = "parameters"
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

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().prepare(tao)
        self.local: list[Schwarz] = []
        self.coarse: Schwarz | None = None
        self.written = self.own(Owner())  # what the local solvers' states became in the last state of this one
        self.keeps = self.whole_iterations = self.settings.local_memory == "keep"
        loss = self.objective.loss
        self.subdomains = self.decompose(loss, self.prefix)
        if len(self.subdomains) == 1:
            self.notes.append("there is one subdomain: local solves are of the undivided network")
        if self.settings.local_steps > 0:
            for chosen in self._colours():
                self.local.append(self.own(self._schwarz(chosen)))
            self._half = self.own(tao.getSolution().duplicate())
        if self.settings.coarse_step:
            first = {min(loss.layer_numbers(core)) for core in self.subdomains.cores}
            coarse = Subdomains.of_layers(loss, [sorted(first)])
            steps = [self.settings.coarse_steps]
            self.coarse = self.own(
                Schwarz(self.objective, coarse, False, f"{self.prefix}coarse_", steps, beside=self.local)
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

    @property
    def inner_types(self) -> frozenset[str]:
        """See :attr:`solvers.base.Solver.inner_types`: local and coarse solvers."""
        inside = [*self.local, *([self.coarse] if self.coarse is not None else [])]
        return frozenset().union(*(schwarz.types for schwarz in inside))

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """See :meth:`solvers.base.Solver.view`."""
        super().view(tao, viewer)
        if self.settings.local_steps > 0:
            for line in repr(self.subdomains).splitlines():
                viewer.printfASCII(f"    {line}\n")

    def inner_state(self) -> dict[str, Any]:
        """See :meth:`LBFGS.inner_state`; also what the local solvers keep."""
        state = super().inner_state()
        if self.keeps:
            self.written.destroy()
            state["local"] = [found for schwarz in self.local for found in schwarz.state(self.g)]
            for vec in vectors_in(state["local"], "local", self.g).values():
                self.written.own(vec)
        return state

    def take_state(self, state: dict[str, Any]) -> None:
        """See :meth:`LBFGS.take_state`.

        Raises
        ------
        InputError
            If it has what other local solvers, or those of other subdomains, keep.
        """
        states = iter(state.get("local", ()))
        if self.keeps and "local" in state:
            then = [(item["solver"], item["size"]) for item in state["local"]]
            if then != [kind for schwarz in self.local for kind in schwarz.kinds()]:
                raise InputError(
                    "the run file keeps the memory of other local solvers or subdomains: the same -decomposition and "
                    "-local_solver go on from it, -local_memory fresh begins afresh"
                )
            for schwarz in self.local:
                schwarz.restore(list(islice(states, len(schwarz.x))))
        super().take_state(state)
        for vec in vectors_in(list(states), "local", self.g).values():  # of a run that kept more than this one
            vec.destroy()

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

    def prepare(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective.

        Raises
        ------
        InputError
            If step lengths shall come from residuals and the objective has none.
        """
        super().prepare(tao)
        self._separate: list[PETSc.Vec] = []
        if self.subspace and not isinstance(self.objective, ResidualObjective):
            raise InputError(
                f"option -{self.prefix}additive_step subspace needs a loss that is a sum of squares of residuals"
            )
        if self.subspace and isinstance(self.objective, ResidualObjective):
            self.objective.check_squares()
        if self.subspace and self.local:
            self._separate = [self.own(tao.getSolution().duplicate()) for _ in range(len(self.subdomains))]

    def _correct(self, x: PETSc.Vec, f: float) -> float:
        if self.subspace:
            return self._search_subspace(x, f)
        if self.alpha is None:
            return self._search_correction(x, f, self.local[0])
        correction = self._half
        self.local[0].additive(x, f, self.g, correction)
        x.axpy(self.alpha, correction)
        value = self.objective.value_gradient(x, self.g)
        if math.isfinite(value) and math.isfinite(self.g.norm()):
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
    (:meth:`ddml.decomposition.subdomains.Subdomains.colours`): all from the same point, on groups of ranks as in the
    additive method, which exchange nothing meanwhile, and followed by a strong-Wolfe search along the sum of the
    corrections that first tries 1. An iteration with C colours takes 1 + C (1 + k_s) evaluations on the critical path,
    extra ones of searches apart.
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
        if not (math.isfinite(value) and math.isfinite(self.g.norm())):
            self._half.copy(x)
            start_g.copy(self.g)
            value = f
        start_g.destroy()
        return value


class DenseMSPQN(MSPQN):
    """:class:`MSPQN` with other defaults: overlapping windows of two layers, whose dense self-scaled matrices are kept.

    The matrices of L layers of n / L parameters take about 4 / L of the memory of that of
    :class:`solvers.quasi_newton.self_scaled.SSBroyden`. Windows, kept matrices and the numbers of local steps are our
    choices. As an iteration takes many evaluations, points move often.
    """

    options: ClassVar[Sequence[Option]] = with_defaults(
        MSPQN.options, decomposition="windows", local_solver="ssbroyden", local_memory="keep", local_steps=20,
        balance_steps=True,
    )  # fmt: skip
    moves_points = 1
