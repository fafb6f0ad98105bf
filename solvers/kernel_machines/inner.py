"""Inner solves of deep kernels: a preconditioner that is kept while the features move."""

from __future__ import annotations

from typing import Any

from petsc4py import PETSc

from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator

from .fit import KernelFit, fit_kernel, preconditioner_named
from .preconditioner import KernelPreconditioner


class KeptPC(KernelPreconditioner):
    """A preconditioner that is built when it is told to, of an operator that it is told, and serves others meanwhile.

    Parameters
    ----------
    inner
        What is built.

    Attributes
    ----------
    source : KernelOperator or None
        What the next :meth:`setUp` builds it of.
    """

    def __init__(self, inner: KernelPreconditioner) -> None:
        super().__init__()
        self.inner = inner
        self.source: KernelOperator | None = None

    @property
    def symmetric(self) -> bool:
        """See :attr:`KernelPreconditioner.symmetric`."""
        return self.inner.symmetric

    def setFromOptions(self, pc: PETSc.PC) -> None:
        """See :meth:`KernelPreconditioner.setFromOptions`."""
        self.inner.setFromOptions(pc)

    def setUp(self, pc: PETSc.PC) -> None:
        """Build it where it has a source, which is forgotten. Collective."""
        self.operator = pc.getOperators()[1].getPythonContext()
        if self.source is not None:
            self.build(self.source)
            self.source = None

    def build(self, operator: KernelOperator) -> None:
        """See :meth:`KernelPreconditioner.build`."""
        self.inner.build(operator)

    def solve(self, rows: Array) -> Array:
        """See :meth:`KernelPreconditioner.solve`."""
        return self.inner.solve(rows)


class InnerSolver:
    """Solves what :class:`ddml.kernel_machines.inexact.InexactSystem` asks for, by :func:`.fit_kernel`.

    Parameters
    ----------
    preconditioner
        ``schwarz``, ``nystrom``, ``none`` or an object.
    prefix
        Of PETSc's options, and those of the preconditioner, without ``ksp_rtol``: the tolerance is asked for.
    **options
        Options under the prefix where they are not given on the command line.

    Raises
    ------
    InputError
        If there is no such preconditioner.
    """

    def __init__(
        self, preconditioner: str | KernelPreconditioner = "schwarz", prefix: str = "", **options: Any
    ) -> None:
        inner = preconditioner_named(preconditioner)
        self.kept = None if inner is None else KeptPC(inner)
        self.prefix, self.options = prefix, options

    def __call__(
        self, operator: KernelOperator, Y: Array, start: Array | None, rtol: float, source: KernelOperator | None
    ) -> KernelFit:
        """See :data:`ddml.kernel_machines.inexact.Solve`. Collective."""
        options = self.options | {"ksp_rtol": rtol}
        if self.kept is None:
            return fit_kernel(operator, Y, "none", self.prefix, start=start, **options)
        self.kept.source = source
        found = fit_kernel(operator, Y, self.kept, self.prefix, start=start, **options)
        self.kept.operator = None  # whose K takes memory
        return found
