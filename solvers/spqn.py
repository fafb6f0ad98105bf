"""Schwarz-preconditioned quasi-Newton methods."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from petsc4py import PETSc

from ddml.decomposition import Subdomains
from ddml.errors import InputError
from ddml.loss import Loss
from ddml.options import Option, number_or_word, read

from .quasi_newton import LBFGS
from .schwarz import Schwarz

DECOMPOSITION = (
    Option("subdomains", None, "Number of subdomains (default: one a layer).", kind=int, minimum=1),
    Option("decomposition", "layers", "Subdomains are groups of layers, of parameter tensors, of tensors at random, or "
           "all windows of neighbouring layers.", choices=("layers", "tensors", "random", "windows")),
    Option("window", 2, "Layers in each window.", minimum=1),
    Option("overlap", 0, "Layers (or tensors) that neighbouring subdomains share on each side.", minimum=0),
    Option("balance", "layers", "Groups of equally many layers, or of equal cost of a local gradient.",
           choices=("layers", "cost")),
    Option("decomposition_seed", 0, "Seed of random subdomains."),
)  # fmt: skip


def subdomains(loss: Loss, prefix: str = "") -> Subdomains:
    """The subdomains that the options under a prefix ask for.

    Raises
    ------
    InputError
        More subdomains than layers or tensors, a window of more layers than there are, options that do not go together.
    """
    chosen = read(DECOMPOSITION, prefix)
    if chosen.decomposition == "windows":
        for name in ("subdomains", "overlap", "balance"):
            if getattr(chosen, name) != next(o.default for o in DECOMPOSITION if o.name == name):
                raise InputError(f"option -{prefix}{name} does not go with -{prefix}decomposition windows: use -window")
        return Subdomains.windows(loss, chosen.window)
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
        Option("coarse_step", False, "Minimise over the first layer of each subdomain before the local solves."),
        Option("coarse_steps", 10, "Iterations of the coarse solver (our choice).", minimum=1),
    )

    def setUp(self, tao: PETSc.TAO) -> None:
        """Build the decomposition and the local solvers. Collective."""
        super().setUp(tao)
        self.local: Schwarz | None = None
        self.coarse: Schwarz | None = None
        loss, steps = self.objective.loss, self.settings.local_steps
        chosen = subdomains(loss, self.prefix)
        if steps > 0:
            self.local = Schwarz(self.objective, chosen, self.parallel, f"{self.prefix}sub_", steps)
            self._half = tao.getSolution().duplicate()
        if self.settings.coarse_step:
            first = {min(loss.layer_numbers(core)) for core in chosen.cores}
            coarse = Subdomains.of_layers(loss, [sorted(first)])
            self.coarse = Schwarz(self.objective, coarse, False, f"{self.prefix}coarse_", self.settings.coarse_steps)

    def destroy(self, tao: PETSc.TAO) -> None:
        """Destroy what :meth:`setUp` made."""
        super().destroy(tao)
        for schwarz in (getattr(self, "local", None), getattr(self, "coarse", None)):
            if schwarz is not None:
                schwarz.destroy()
        if hasattr(self, "_half"):
            self._half.destroy()

    def view(self, tao: PETSc.TAO, viewer: PETSc.Viewer) -> None:
        """See :meth:`ddml.solvers.base.Solver.view`."""
        super().view(tao, viewer)
        if getattr(self, "local", None) is not None:
            for line in repr(self.local.decomposition.subdomains).splitlines():  # type: ignore[union-attr]
                viewer.printfASCII(f"    {line}\n")

    def precondition(self, x: PETSc.Vec) -> float:
        """See :meth:`LBFGS.precondition`."""
        if self.iteration == 0:
            return self.f
        f = self.f
        if self.coarse is not None:
            self.coarse.multiplicative(x, f, self.g)
            f = self.objective.value_gradient(x, self.g)
        if self.local is not None:
            f = self._correct(x, f, self.local)
        return f

    @abstractmethod
    def _correct(self, x: PETSc.Vec, f: float, local: Schwarz) -> float:
        """Improve x and ``self.g`` by local solves; the loss there."""


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
    """

    parallel = True
    options: ClassVar[Sequence[Option]] = (
        *_SPQN.options,
        Option("additive_step", "search", "alpha: a strong-Wolfe search, or a number."),
    )

    def _correct(self, x: PETSc.Vec, f: float, local: Schwarz) -> float:
        correction = self._half
        local.additive(x, f, self.g, correction)
        if self.alpha is None:
            if not self.g.dot(correction) < 0:
                return f
            return self.search(x, f, self.g, correction).value
        x.axpy(self.alpha, correction)
        value = self.objective.value_gradient(x, self.g)
        if math.isfinite(value):
            return value
        x.axpy(-self.alpha, correction)
        return self.objective.value_gradient(x, self.g)

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the options. Collective."""
        super().setFromOptions(tao)
        self.alpha = number_or_word(self.prefix, "additive_step", self.settings.additive_step, "search")


class MSPQN(_SPQN):
    r"""Multiplicatively Schwarz-preconditioned quasi-Newton method (Kopanicakova et al. 2024).

    As :class:`ASPQN`, but each subdomain starts from what the ones before it reached, and
    theta_{k+1/2} is what the last one left: alpha = 1, since every local solve was searched.
    All ranks work on one subdomain at a time. An iteration takes 2 + S k_s evaluations.
    """

    parallel = False

    def _correct(self, x: PETSc.Vec, f: float, local: Schwarz) -> float:
        x.copy(self._half)
        start_g = self.g.copy()
        local.multiplicative(x, f, self.g)
        value = self.objective.value_gradient(x, self.g)
        if not math.isfinite(value):
            self._half.copy(x)
            start_g.copy(self.g)
            value = f
        start_g.destroy()
        return value
