r"""Coefficients of kernel machines: :math:`(K + \mu I) \alpha = Y` by PETSc's KSP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError, NonFiniteError
from ddml.kernel_machines.cuts import Array
from ddml.kernel_machines.operator import KernelOperator
from ddml.options import preset, understood

from .nystrom_pc import KernelNystromPC
from .preconditioner import KernelPreconditioner
from .schwarz_pc import KernelSchwarzPC

PRECONDITIONERS = {"schwarz": KernelSchwarzPC, "nystrom": KernelNystromPC}
# our choices: solves for the residual that is left, at most, and iterations of each whose norms are kept
REFINEMENTS, REMEMBERED = 5, 100_000
SYMMETRIC_ONLY = ("cg", "pipecg", "groppcg", "pipecr", "fcg", "cr", "minres", "symmlq", "stcg", "gltr", "nash")


@dataclass(frozen=True)
class KernelFit:
    """The coefficients of a kernel machine, and how they were found.

    Attributes
    ----------
    coefficients : ndarray
        alpha (n, k), by sample, on every rank.
    iterations : int
        Of KSP, over all solves.
    history : ndarray
        Norms of the residuals that KSP knew before the first and after each iteration, relative to those of Y, one
        solve behind the other.
    residuals : ndarray
        (k,), the true ones of alpha in float64, of each column relative to that of Y.
    remainder : ndarray
        This rank's rows of Y - A alpha (n, k).
    converged : bool
        Whether the norm of the true residual of all columns, or of each where they were solved for apart, is within
        the tolerance.
    """

    coefficients: Array
    iterations: int
    history: Array
    residuals: Array
    remainder: Array
    converged: bool


def fit_kernel(
    operator: KernelOperator,
    Y: Any,
    preconditioner: str | KernelPreconditioner = "schwarz",
    prefix: str = "",
    together: bool = True,
    start: Array | None = None,
    monitor: Callable[[Array], object] | None = None,
    **options: Any,
) -> KernelFit:
    """Solve (K + mu I) alpha = Y, by conjugate gradients and the two-level Schwarz preconditioner by default.

    The same bits on any number of ranks. The columns of Y are solved for as if of norm 1. What the Krylov method
    believes is not enough in float32: the true residual is computed in float64, and what is left of it is solved for
    again until it is within the tolerance. Collective.

    Parameters
    ----------
    operator
        K + mu I.
    Y
        (n, k) or (n,), finite, the same on all ranks.
    preconditioner
        ``schwarz``, ``nystrom``, ``none``, or an object; one that was used before for the same operator is not built
        again.
    prefix
        Of PETSc's options, and those of the preconditioner.
    together
        Whether all columns are one vector of one Krylov method, so that a product serves all, or are solved one
        after another.
    start
        First guess (n, k) of alpha; zero by default.
    monitor
        Called before the first and after each iteration of each solve, with alpha (n, k) as it is there, by sample, on
        every rank. Making that is collective and takes no product.
    **options
        Options under the prefix where they are not given on the command line, as in ``coarse_rank=200,
        ksp_rtol=1e-8``; ``ksp_rtol`` is 1e-6 by default.

    Raises
    ------
    InputError
        On all ranks: Y or ``start`` of another shape or not finite; options that there are not, or that do not go
        together; what the preconditioner cannot be built for.
    NonFiniteError
        If a residual is not finite.
    """
    n = operator.layout.size
    targets = columns_of("Y", Y, n)
    alpha = np.zeros_like(targets) if start is None else columns_of("start", start, n).copy()
    if alpha.shape != targets.shape:
        raise InputError(f"start must be {targets.shape} as Y, got {alpha.shape}")
    norms = np.linalg.norm(targets, axis=0)
    scales = np.where(norms > 0, norms, 1.0)
    rows, columns = operator.layout.rows, targets.shape[1]
    mine, found = targets[rows] / scales, alpha[rows] / scales
    left, history, iterations = np.empty_like(mine), [np.empty(0)], 0
    groups = [slice(0, columns)] if together else [slice(j, j + 1) for j in range(columns)]

    def by_sample(rows: Array) -> Array:
        return np.asarray(operator.layout.everywhere(rows)[operator.layout.places] * scales)

    def look(ksp: PETSc.KSP, *_: Any) -> None:
        assert monitor is not None
        now = found.copy()
        now[:, group] += operator.layout.matrix(ksp.buildSolution())
        monitor(by_sample(now))

    with krylov(operator, columns if together else 1, preconditioner, prefix, options) as ksp:
        with understood():
            ksp.setUp()
        if monitor is not None:
            ksp.setMonitor(look)
        rtol, converged = ksp.getTolerances()[0], True
        for group in groups:
            left[:, group], count, seen = _solved(ksp, operator, mine[:, group], found[:, group], rtol)
            converged &= norm(operator, left[:, group]) <= rtol * norm(operator, mine[:, group])
            iterations, history = iterations + count, history + seen
    residuals = np.sqrt(np.diagonal(operator.layout.inner(left, left)))
    return KernelFit(by_sample(found), iterations, np.concatenate(history), residuals, left * scales, converged)


def preconditioner_named(name: str | KernelPreconditioner) -> KernelPreconditioner | None:
    """The preconditioner of that name, or the object; nothing for ``none``.

    Raises
    ------
    InputError
        If there is no such preconditioner.
    """
    if isinstance(name, KernelPreconditioner):
        return name
    if name == "none":
        return None
    if name not in PRECONDITIONERS:
        raise InputError(f"unknown preconditioner '{name}'; there are {', '.join(PRECONDITIONERS)}, none")
    return PRECONDITIONERS[name]()


def columns_of(name: str, values: Any, n: int) -> Array:
    """Values (n, k) or (n,) as a matrix (n, k).

    Raises
    ------
    InputError
        If they have another shape or are not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or len(found) != n or not found.shape[1]:
        raise InputError(f"{name} must have a row for each of {n} samples, and columns; got {np.shape(values)}")
    if not np.isfinite(found).all():
        raise InputError(f"{name} has values that are not finite")
    return found


def norm(operator: KernelOperator, rows: Array) -> float:
    """The norm of a matrix (n, k), of which each rank has its rows. Collective.

    Raises
    ------
    NonFiniteError
        If it is not finite.
    """
    found = math.sqrt(np.trace(operator.layout.inner(rows, rows)))
    if not math.isfinite(found):
        raise NonFiniteError(f"a residual of the kernel machine is {found}")
    return found


def _solved(
    ksp: PETSc.KSP, operator: KernelOperator, Y: Array, alpha: Array, rtol: float
) -> tuple[Array, int, list[Array]]:
    """The rows of the residual, the number of iterations, and the norms that KSP saw in each solve.

    What is found is added to alpha.
    """
    history: list[Array] = []
    iterations = 0
    left = operator.residual(Y, alpha) if operator.layout.comm.allreduce(bool(alpha.any()), MPI.LOR) else Y
    whole, size = norm(operator, Y), norm(operator, left)
    x, y = ksp.getOperators()[0].createVecs()
    try:
        while size > rtol * whole and len(history) <= REFINEMENTS:
            with x as array:
                array[:] = left.ravel()
            ksp.setTolerances(rtol=rtol * whole / size)
            with understood():
                ksp.solve(x, y)
            alpha += operator.layout.matrix(y)
            iterations += ksp.getIterationNumber()
            history.append(ksp.getConvergenceHistory() / whole)
            left = operator.residual(Y, alpha)
            before, size = size, norm(operator, left)
            if size > before / 2 or ksp.getConvergedReason() < 0:
                break  # no digit is gained any more, or there are no iterations left
    finally:
        for vec in (x, y):
            vec.destroy()
    return left, iterations, history


@contextmanager
def krylov(
    operator: KernelOperator, columns: int, name: str | KernelPreconditioner, prefix: str, options: dict[str, Any]
) -> Iterator[PETSc.KSP]:
    """PETSc's solver of the columns' system, with its preconditioner, not set up; destroyed at the end. Collective.

    Errors as of :func:`fit_kernel`.
    """
    context = preconditioner_named(name)
    matrix = operator.matrix(columns)
    ksp = PETSc.KSP().create(operator.layout.comm)
    try:
        ksp.setOptionsPrefix(prefix)
        ksp.setOperators(matrix)
        ksp.setType("cg")
        ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        pc = ksp.getPC()
        pc.setType("none" if context is None else "python")
        if context is not None:
            pc.setPythonContext(context)
        with preset(**{prefix + key: value for key, value in ({"ksp_rtol": 1e-6} | options).items()}), understood():
            ksp.setFromOptions()
            database = PETSc.Options()
            unknown = [key for key in options if not database.used(prefix + key)]
        if unknown:
            raise InputError(f"there is no option {', '.join(unknown)} of this preconditioner, or of PETSc's KSP")
        if context is not None and not context.symmetric and ksp.getType() in SYMMETRIC_ONLY:
            raise InputError(f"-{prefix}ksp_type {ksp.getType()} needs a symmetric preconditioner: use gmres or fgmres")
        ksp.setConvergenceHistory(min(ksp.getTolerances()[3], REMEMBERED) + 1, reset=True)
        yield ksp
    finally:
        ksp.destroy()
        matrix.destroy()
