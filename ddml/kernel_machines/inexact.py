r"""Systems :math:`(K_\theta + \mu I) \alpha = Y` of features that move, solved no better than their use demands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ddml.errors import InputError

from .cuts import Array
from .gradients import SmoothKernel
from .layout import SampleLayout
from .operator import KernelOperator

# our choices: the tolerance at first, at last; the part of the outer progress that an error may be, and by what the
# tolerance falls from one value to the next at most
FIRST, LEAST, SHARE, FALL = 1e-2, 1e-8, 0.1, 3.0
# growth of iterations a digit at which a preconditioner is built anew (the issue's), and iterations that say so (ours)
GROWTH, FEW = 1.5, 4
FAILED, ROUNDING = 10.0, 1e-9  # a residual of so many tolerances, above rounding, is no solution (our choices)


class Solved(Protocol):
    """What a solve gives, such as ``solvers.kernel_machines.fit.KernelFit``."""

    @property
    def coefficients(self) -> Array:
        """Alpha (n, k), by sample, on every rank."""

    @property
    def remainder(self) -> Array:
        """This rank's rows of Y - A alpha."""

    @property
    def residuals(self) -> Array:
        """(k,), their norms over those of Y."""

    @property
    def iterations(self) -> int:
        """Of the Krylov method."""

    @property
    def history(self) -> Array:
        """Norms of the residuals, relative to those of Y."""


Solve = Callable[[KernelOperator, Array, "Array | None", float, "KernelOperator | None"], Solved]
"""From A, Y (n, k) by sample, a first guess, a relative tolerance, and the operator that the preconditioner is to be
built of before (None: the one that is there is kept): ``solvers.kernel_machines.inner.InnerSolver``."""


class InexactSystem:
    r"""The matrix at the present features, and solutions of systems with it.

    The tolerance begins at ``rtol``. Errors of reduced functionals are of second order: at a relative residual tau they
    are about :math:`\tau^2` times their scale. So after each value tau is lowered to what keeps that below a tenth of
    the difference to the best value before, by a factor of 3 at most. Solutions begin at the last ones. The
    preconditioner is built anew when iterations a digit have grown by a half. Collective.

    Parameters
    ----------
    kernel
        Of features.
    shift
        :math:`\mu > 0`.
    layout
        Of the samples.
    solve
        Solves.
    memory
        For K, see :class:`KernelOperator`.
    rtol
        The first tolerance.
    least
        The last one; as large as ``rtol``: it does not change.

    Raises
    ------
    InputError
        A mu that is not above 0; tolerances that are not.

    Attributes
    ----------
    rtol : float
        The tolerance now.
    products : int
        Columns that matrices were multiplied with.
    builds : int
        Preconditioners so far.
    """

    def __init__(
        self,
        kernel: SmoothKernel,
        shift: float,
        layout: SampleLayout,
        solve: Solve,
        memory: float = 2e9,
        rtol: float = FIRST,
        least: float = LEAST,
    ) -> None:
        if not 0 < shift < math.inf:
            raise InputError(f"a deep kernel needs a regularisation lambda above 0, got {shift}")
        if not 0 < least <= rtol < 1:
            raise InputError(
                f"tolerances of inner solves must be above 0, the last at most the first; got {least}, {rtol}"
            )
        self.kernel, self.shift, self.layout, self.memory, self.least = kernel, shift, layout, memory, least
        self._solve, self.rtol, self.best = solve, rtol, math.inf
        self._before = self.builds = 0
        self._operator: KernelOperator | None = None
        self._known: dict[str, tuple[Array, Array]] = {}
        self._source: Array | None = None  # features that the preconditioner was built of
        self._due, self._fresh = True, 0.0  # whether it is to be built; iterations a digit when it was
        self._lost = False  # whether it has to be built of those again

    @property
    def operator(self) -> KernelOperator:
        """The matrix at the present features."""
        assert self._operator is not None
        return self._operator

    @property
    def products(self) -> int:
        """See the class."""
        return self._before + (0 if self._operator is None else self._operator.products)

    def move(self, features: Array) -> None:
        """Go to features (n, q), by sample."""
        self._before = self.products
        self._operator = None  # whose memory may be needed
        self._features = features
        self._operator = KernelOperator(self.kernel, features, self.shift, self.layout, self.memory)

    def solve(self, name: str, Y: Array) -> tuple[Array, Array]:
        """Alpha (n, k) by sample, and this rank's rows of Y - A alpha; the last one of that name is the first guess.

        Raises
        ------
        InputError
            If the residual cannot be made small.
        """
        start = self._known[name][0] if name in self._known else None
        built = self._due
        found = self._judged(Y, start, built)
        if self._bad(found) and not built:
            found = self._judged(Y, found.coefficients, True)
        if self._bad(found):
            raise InputError(
                f"the inner system is solved to {_size(found):.1e} only, instead of {self.rtol:.1e}: use a larger "
                "lambda, or more iterations (ksp_max_it)"
            )
        self._known[name] = found.coefficients, found.remainder
        return self._known[name]

    def known(self, name: str) -> Array:
        """The last solution (n, k) of that name, by sample."""
        return self._known[name][0]

    def _bad(self, found: Solved) -> bool:
        return not _size(found) <= max(FAILED * self.rtol, ROUNDING)

    def _judged(self, Y: Array, start: Array | None, build: bool) -> Solved:
        """A solve, which says whether the preconditioner is to be built before the next one."""
        source = self.operator if build else None
        if self._lost and not build:  # with the same memory, which options may depend on: for once there are two
            source = KernelOperator(self.kernel, self._source, self.shift, self.layout, self.memory)
        self._lost = False
        found = self._solve(self.operator, Y, start, self.rtol, source)
        digits = math.log10(found.history[0] / _size(found)) if len(found.history) and _size(found) else 0.0
        rate = found.iterations / digits if digits > 0 else 0.0
        if build:
            self._source, self._fresh, self._due = self._features, rate, False
            self.builds += 1
        elif found.iterations >= FEW:
            self._due = self._due or rate > GROWTH * self._fresh
        return found

    def progressed(self, value: float, scale: float) -> None:
        """Note a value whose error is the scale times the square of the tolerance."""
        if math.isfinite(self.best) and scale > 0:
            wanted = math.sqrt(SHARE * abs(self.best - value) / scale)
            self.rtol = max(min(self.rtol, max(wanted, self.rtol / FALL)), self.least)
        self.best = min(self.best, value)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs: arrays by sample, numbers. Collective."""
        layout = self.layout
        known = {
            name: [alpha, layout.everywhere(rows)[layout.places]] for name, (alpha, rows) in sorted(self._known.items())
        }
        numbers = {"rtol": self.rtol, "best": self.best, "fresh": self._fresh, "due": self._due}
        return {"known": known, "source": self._source, "products": self.products, "builds": self.builds, **numbers}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, with a preconditioner as it was then. Collective.

        Raises
        ------
        InputError
            If it is of other samples.
        """
        n = self.layout.size
        arrays = [array for pair in state["known"].values() for array in pair]
        arrays += [state["source"]] if state["source"] is not None else []
        if any(np.ndim(array) != 2 or len(array) != n for array in arrays):
            raise InputError(f"the state of the deep kernel is not one of {n} samples")
        self._known = {name: (alpha, rows[self.layout.rows]) for name, (alpha, rows) in state["known"].items()}
        self.rtol, self.best, self._fresh, self._due = (state[key] for key in ("rtol", "best", "fresh", "due"))
        self._before, self.builds, self._source = state["products"], state["builds"], state["source"]
        self._operator, self._lost = None, self._source is not None


def _size(found: Solved) -> float:
    """The norm of the residual of all columns, each relative to that of Y."""
    return float(np.sqrt(np.mean(np.square(found.residuals))))
