"""What preconditioners of kernel machines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

from petsc4py import PETSc

from ddml.errors import InputError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.kernel_machines.system import Operations
from ddml.options import Option, read


class KernelPreconditioner(ABC):
    """Python context of a PC for K + mu I, which it builds once for an operator and options."""

    options: ClassVar[Sequence[Option]] = ()

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.operator: KernelOperator | None = None
        self.columns = 1  # of the vectors that it is built for
        self.built: SimpleNamespace | None = None  # the settings that it was built with

    @property
    def symmetric(self) -> bool:
        """Whether it is symmetric positive definite, as conjugate gradients need it."""
        return True

    def setFromOptions(self, pc: PETSc.PC) -> None:
        """Read the options under the prefix of the KSP. Collective."""
        self.settings = read(self.options, pc.getOptionsPrefix())

    def setUp(self, pc: PETSc.PC) -> None:
        """Build it, unless it is one for this operator and these options already. Collective.

        Raises
        ------
        InputError
            If the matrix is no :class:`KernelOperator`; what :meth:`build` raises.
        """
        mat = pc.getOperators()[1]
        operator = mat.getPythonContext() if mat.getType() == "python" else None
        if not isinstance(operator, KernelOperator):
            raise InputError(f"{type(self).__name__} preconditions systems of kernel machines only")
        if operator is not self.operator or self.settings != self.built:
            self.columns = mat.getSize()[0] // operator.layout.size
            self.build(operator)
            self.operator, self.built = operator, self.settings

    @abstractmethod
    def build(self, operator: KernelOperator) -> None:
        """Build it. Collective."""

    @abstractmethod
    def solve(self, rows: Array) -> Array:
        """This rank's rows of M^-1 X, of those of X (n, k). Collective."""

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write M^-1 x to y. Collective."""
        assert self.operator is not None
        with y as array:
            array[:] = self.solve(self.operator.layout.matrix(x)).ravel()


class ChargedPreconditioner(KernelPreconditioner):
    """A preconditioner that says what it takes, so that runs can count it."""

    @abstractmethod
    def set_up_operations(self) -> Operations:
        """What building it has taken."""

    @abstractmethod
    def operations(self, columns: int) -> Operations:
        """What an application to so many columns takes."""

    @abstractmethod
    def received(self, columns: int) -> float:
        """Numbers that subdomains are sent in an application, if each is on a process of its own."""


def check_limit(needed: float, limit: float, what: str, advice: str) -> None:
    """See that what a rank is to keep fits what the kernel's memory limit leaves.

    Raises
    ------
    InputError
        If it does not, in words.
    """
    if needed > limit:
        raise InputError(
            f"{what} take {needed:.3g} bytes on a rank, but the kernel's memory limit leaves {limit:.3g}: {advice}, or "
            "more memory"
        )
