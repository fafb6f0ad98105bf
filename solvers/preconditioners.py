"""Preconditioners of Gauss-Newton systems, for PETSc's KSP: ``-gn_pc_type python -gn_pc_python_type solvers.<name>``.

They are built from the matrix's :class:`NormalEquations`, are symmetric positive definite, and can be
kept while the point and the damping move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc
from scipy import linalg, sparse

from ddml.decomposition import Decomposition, Subdomains, length
from ddml.errors import InputError
from ddml.jacobian import Linearisation
from ddml.loss import Loss
from ddml.objective import Objective
from ddml.options import Option, read, with_defaults
from ddml.parallel import redistributed
from ddml.residual import ResidualObjective

from .spqn import DECOMPOSITION, subdomains

Array = NDArray[np.float64]


class NormalEquations:
    """Python context of the matrix J^T J + lambda I (n, n) of a residual objective; PETSc calls what is collective."""

    def __init__(self, objective: ResidualObjective) -> None:
        self.objective = objective
        self.damping = 0.0
        self.moves = 0  # number of points so far
        self._at: Linearisation | None = None

    def move(self, at: Linearisation | None) -> None:
        """Make it the matrix at another point, or at none for now."""
        self._at = at
        self.moves += at is not None

    @property
    def at(self) -> Linearisation:
        """The linearisation at the point."""
        assert self._at is not None
        return self._at

    def matrix(self) -> PETSc.Mat:
        """The matrix; the caller destroys it."""
        local, n = int(self.objective.layout.counts[self.objective.comm.rank]), self.objective.size
        mat = PETSc.Mat().createPython(((local, n), (local, n)), self, comm=self.objective.comm)
        mat.setOption(PETSc.Mat.Option.SPD, True)
        mat.setUp()
        return mat

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        self.at.transpose_product(self.at.product(self.objective.layout.gather(x)), y)
        y.axpy(self.damping, x)

    def getDiagonal(self, mat: PETSc.Mat, diagonal: PETSc.Vec) -> None:
        """The diagonal, for PETSc's own preconditioners."""
        self.at.diagonal(diagonal)
        diagonal.shift(self.damping)


class Preconditioner(ABC):
    """Python context of a PC. ``setUp`` builds it anew unless it has just been restored; :meth:`damp` moves lambda."""

    options: ClassVar[Sequence[Option]] = ()
    keeps: ClassVar[bool] = True  # whether it stays positive definite when the matrix moves on

    def __init__(self) -> None:
        self.settings = SimpleNamespace(**{o.name: o.default for o in self.options})
        self.prefix, self.restored, self.damping = "", False, 0.0
        self.built = 0  # for which of the matrix's points

    def setFromOptions(self, pc: PETSc.PC) -> None:
        """Read the options under the prefix of the KSP. Collective."""
        self.prefix = pc.getOptionsPrefix() or ""
        self.settings = read(self.options, self.prefix)

    def setUp(self, pc: PETSc.PC) -> None:
        """Build it for the matrix as it is. Collective."""
        system = self.system = self.equations(pc)
        self.objective = system.objective
        self.prepare()
        if not self.restored and self.built != system.moves:
            self.build(system.at)
            self.built = system.moves
        self.restored = False
        self.damp(system.damping)

    def equations(self, pc: PETSc.PC) -> NormalEquations:
        """What the matrix is made of.

        Raises
        ------
        InputError
            If it is none of ours.
        """
        mat = pc.getOperators()[1]
        context = mat.getPythonContext() if mat.getType() == "python" else None
        if not isinstance(context, NormalEquations):
            raise InputError(f"{type(self).__name__} preconditions Gauss-Newton systems only")
        return context

    def prepare(self) -> None:
        """Make what does not depend on the point. Collective."""
        return

    @abstractmethod
    def build(self, at: Linearisation) -> None:
        """Build it for J^T J at a point. Collective."""

    def damp(self, damping: float) -> None:
        """Make it one for J^T J + damping I. Collective."""
        self.damping = damping

    @abstractmethod
    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write M^-1 x to y. Collective."""

    def kind(self) -> str:
        """What a :meth:`state` is of: one of another kind cannot be restored."""
        return type(self).__name__

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on without :meth:`build`. Collective."""

    @abstractmethod
    def restore(self, objective: Objective, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`, of any number of ranks, before ``setUp``. Collective."""


class NystromPC(Preconditioner):
    r"""Randomised Nystrom preconditioner of rank l (Frangella, Tropp, Udell 2023, algorithms 2.1 and 5.3).

    With J^T J ~ U diag(m) U^T, m_1 >= ... >= m_l,

    .. math:: M^{-1} = I + U ((m_l + \lambda) (m + \lambda)^{-1} - I) U^T.

    The test matrix is Gaussian the first time, and U of the time before later on (our choice: a step
    of a subspace iteration that costs nothing).
    """

    options: ClassVar[Sequence[Option]] = (
        Option("rank", 300, "Rank l (at most n).", minimum=1),
        Option("rank_seed", 0, "Seed of the first test matrix.", minimum=0),
    )

    def __init__(self) -> None:
        super().__init__()
        self.basis: Array | None = None
        self.values = np.zeros(0)
        self.matrix: PETSc.Mat | None = None

    def kind(self) -> str:
        """See :meth:`Preconditioner.kind`."""
        return f"{super().kind()} of rank {self.settings.rank}"

    def build(self, at: Linearisation) -> None:
        """See :meth:`Preconditioner.build`; every rank does what is small for itself."""
        n = self.objective.size
        rank = min(self.settings.rank, n)
        test = self.basis
        if test is None or test.shape[1] != rank:
            test = np.random.default_rng(self.settings.rank_seed).standard_normal((n, rank))
            test = linalg.qr(test, mode="economic", check_finite=False)[0]
        product = everywhere(self.objective, at.gram_product(test))
        # a small shift, undone below, keeps the Cholesky factorisation positive definite
        shift = np.finfo(float).eps * np.sqrt(n) * linalg.norm(product, 2)
        factor = cholesky(test.T @ product, shift)
        half = linalg.solve_triangular(factor, (product + shift * test).T, lower=True, check_finite=False).T
        basis, singular, _ = linalg.svd(half, full_matrices=False, check_finite=False)
        self._take(basis, np.maximum(singular**2 - shift, 0.0))

    def _take(self, basis: Array, values: Array) -> None:
        # in one order: what a product rounds depends on it
        self.basis, self.values = np.ascontiguousarray(basis), values
        self._release()
        self.matrix = tall(self.objective, basis[owned(self.objective)])
        self.small = self.matrix.createVecRight()

    def _release(self) -> None:
        if self.matrix is not None:
            self.matrix.destroy()
            self.small.destroy()
            self.matrix = None

    def destroy(self, pc: PETSc.PC) -> None:
        """Destroy what was made. Collective."""
        self._release()

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """See :meth:`Preconditioner.apply`."""
        assert self.matrix is not None
        self.matrix.multTranspose(x, self.small)
        if self.small.getLocalSize():
            least = max(self.values[-1] + self.damping, np.finfo(float).tiny)
            self.small.array[:] *= least / (self.values + self.damping) - 1
        self.matrix.mult(self.small, y)
        y.axpy(1.0, x)

    def state(self) -> dict[str, Any]:
        """See :meth:`Preconditioner.state`."""
        return {"basis": self.basis, "values": self.values}

    def restore(self, objective: Objective, state: dict[str, Any]) -> None:
        """See :meth:`Preconditioner.restore`."""
        self.objective = objective  # type: ignore[assignment]
        self._take(np.asarray(state["basis"]), np.asarray(state["values"]))
        self.restored = True


class SchwarzPC(Preconditioner):
    r"""Overlapping Schwarz preconditioner on subdomains of layers, with a coarse space of neurons.

    With the blocks A_s = R_s (J^T J + \lambda I) R_s^T, factorised on their ranks, additive:
    M_1^{-1} = sum_s R_s^T A_s^{-1} R_s; multiplicative: one symmetric sweep over the subdomains. The
    coarse space Z has two vectors for each neuron, its weights as they are and its bias; it is balanced
    (Mandel 1993): with Q = Z (Z^T A Z)^{-1} Z^T

    .. math:: M^{-1} = Q + (I - Q A) M_1^{-1} (I - A Q).

    Blocks that are layers without overlap do not precondition: near-null directions of J^T J trade scale
    and rotation between neighbouring layers. One subdomain (-gn_decomposition layers -gn_subdomains 1
    -gn_coarse none) is a dense Cholesky factorisation. Factors are used until lambda has moved by more
    than a factor of 4 (our choice).
    """

    options: ClassVar[Sequence[Option]] = (
        *with_defaults(DECOMPOSITION, decomposition="windows"),
        Option("sweep", "additive", "Subdomains side by side, or one after another and back.",
               choices=("additive", "multiplicative")),
        Option("coarse", "neurons", "Coarse space.", choices=("neurons", "none")),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.subdomains: Subdomains | None = None
        self.decomposition: Decomposition | None = None
        self.blocks: dict[int, Array] = {}  # J^T J of the subdomains that this rank leads
        self.factors: dict[int, Array] = {}
        self.factored = False
        self.coarse: _Neurons | None = None
        self.written: list[PETSc.Vec] = []

    def setFromOptions(self, pc: PETSc.PC) -> None:
        """See :meth:`Preconditioner.setFromOptions`."""
        super().setFromOptions(pc)
        self.subdomains = subdomains(self.equations(pc).objective.loss, self.prefix, self.options)

    def kind(self) -> str:
        """See :meth:`Preconditioner.kind`."""
        ranges = () if self.subdomains is None else self.subdomains.ranges
        return f"{super().kind()} with coarse {self.settings.coarse} on {[length(r) for r in ranges]}"

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        """See :class:`Preconditioner`: local solves of another matrix may make a sweep diverge."""
        return bool(self.settings.sweep == "additive")

    def prepare(self) -> None:
        """See :meth:`Preconditioner.prepare`."""
        if self.decomposition is not None:
            return
        loss, layout = self.objective.loss, self.objective.layout
        chosen = self.subdomains or Subdomains.windows(loss, min(2, len(loss.layers)))
        self.decomposition = Decomposition(chosen, layout, parallel=True, gathered=True)
        self.local = [self.decomposition.vector(s) for s in range(len(self.decomposition.R))]
        self.rest, self.work = self.objective.layout.vector(), self.objective.layout.vector()

    def build(self, at: Linearisation) -> None:
        """See :meth:`Preconditioner.build`."""
        assert self.decomposition is not None
        self.blocks = at.gram_blocks(self.decomposition)
        if self.settings.coarse == "neurons":
            self.theta = at.theta.double().cpu().numpy()
            basis = neuron_basis(self.objective.loss, self.theta)
            self._coarsen(basis, at.gram_product(basis))
        self.factored = False

    def _coarsen(self, basis: sparse.csc_array, images: Array) -> None:
        if self.coarse is not None:
            self.coarse.destroy()
        self.coarse = _Neurons(self.objective, basis, images)

    def damp(self, damping: float) -> None:
        """See :meth:`Preconditioner.damp`."""
        slack = 4.0 if self.settings.sweep == "additive" else 1.0
        if self.factored and 1 / slack <= damping / self.damping <= slack:
            return
        self.damping, self.factored = damping, True
        self.factors = {s: cholesky(b, damping) for s, b in self.blocks.items()}
        if self.coarse is not None:
            self.coarse.damp(damping)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """See :meth:`Preconditioner.apply`."""
        one_level = self._additive if self.settings.sweep == "additive" else self._multiplicative
        if self.coarse is None:
            one_level(x, y)
            return
        self.coarse.project(x, self.rest)
        one_level(self.rest, y)
        self.coarse.correct(y)

    def _additive(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self.decomposition is not None
        y.set(0.0)
        for restriction, local in zip(self.decomposition.R, self.local, strict=True):
            restriction.mult(x, local)
        for s in self.factors:
            self._solve(s)
        for restriction, local in zip(self.decomposition.R, self.local, strict=True):
            restriction.multTransposeAdd(local, y, y)

    def _multiplicative(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self.decomposition is not None
        at, layout, ranges = self.system.at, self.objective.layout, self.decomposition.subdomains.ranges
        y.set(0.0)
        images = [torch.zeros_like(r) for r in at.residual]  # J y
        count = len(ranges)
        for s in (*range(count), *reversed(range(count - 1))):
            at.transpose_product(images, self.work, ranges[s])
            self.work.aypx(-1.0, x)
            self.work.axpy(-self.system.damping, y)
            self.decomposition.R[s].mult(self.work, self.local[s])
            if s in self.factors:
                self._solve(s)
            self.decomposition.R[s].multTranspose(self.local[s], self.work)
            y.axpy(1.0, self.work)
            for image, more in zip(images, at.product(layout.gather(self.work), ranges[s]), strict=True):
                image += more

    def _solve(self, s: int) -> None:
        local = self.local[s]
        local.array[:] = linalg.cho_solve((self.factors[s], True), local.array_r, check_finite=False)

    def state(self) -> dict[str, Any]:
        """See :meth:`Preconditioner.state`."""
        self._release()
        packed = [b[np.tril_indices(len(b))] for _, b in sorted(self.blocks.items())]
        self.written = [_vector(self.objective, np.concatenate([*packed, np.zeros(0)]))]
        if self.coarse is not None:
            self.written.append(_vector(self.objective, self.coarse.images.ravel()))
        return {
            "damping": self.damping,
            "vectors": self.written,
            "theta": None if self.coarse is None else self.theta,
        }

    def restore(self, objective: Objective, state: dict[str, Any]) -> None:
        """See :meth:`Preconditioner.restore`."""
        self.objective = objective  # type: ignore[assignment]
        self.prepare()
        assert self.decomposition is not None
        sizes = [length(r) * (length(r) + 1) // 2 for r in self.decomposition.subdomains.ranges]
        edges = [0, *np.cumsum(sizes)]
        led = [s for s, workers in enumerate(self.decomposition.workers) if workers[0] == objective.comm.rank]
        place = (edges[led[0]], edges[led[-1] + 1]) if led else (0, 0)
        packed = redistributed(objective.comm, state["vectors"][0], *place)
        self.blocks = {}
        for s in led:
            n = length(self.decomposition.subdomains.ranges[s])
            self.blocks[s] = np.zeros((n, n), order="F")
            self.blocks[s][np.tril_indices(n)] = packed[edges[s] - place[0] : edges[s + 1] - place[0]]
        if state["theta"] is not None:
            self.theta = np.asarray(state["theta"])
            basis, mine = neuron_basis(objective.loss, self.theta), owned(objective)
            columns = basis.shape[1]
            images = redistributed(objective.comm, state["vectors"][1], mine.start * columns, mine.stop * columns)
            self._coarsen(basis, images.reshape(-1, columns))
        for vec in state["vectors"]:
            vec.destroy()
        self.factored, self.restored = False, True
        self.damp(state["damping"])

    def _release(self) -> None:
        for vec in self.written:
            vec.destroy()
        self.written = []

    def destroy(self, pc: PETSc.PC) -> None:
        """Destroy what was made. Collective."""
        self._release()
        if self.coarse is not None:
            self.coarse.destroy()
        if self.decomposition is not None:
            for vec in (*self.local, self.rest, self.work):
                vec.destroy()
            self.decomposition.destroy()
            self.decomposition = None


class _Neurons:
    """The coarse space: Z (n, k) with orthonormal columns, J^T J Z, and what is made of them."""

    def __init__(self, objective: Objective, basis: sparse.csc_array, images: Array) -> None:
        self.images = images
        mine = basis.tocsr()[owned(objective)]
        self.Z, self.W = tall(objective, mine), tall(objective, images)  # W = J^T J Z
        self.gram = objective.comm.allreduce(mine.T @ images)  # Z^T J^T J Z
        self.small, self.more, self.spare = (self.Z.createVecRight() for _ in range(3))

    def damp(self, damping: float) -> None:
        """Add damping * I to J^T J."""
        self.damping = damping
        self.factor = cholesky(self.gram, damping)

    def _solve(self, vec: PETSc.Vec) -> None:
        if vec.getLocalSize():
            vec.array[:] = linalg.cho_solve((self.factor, True), vec.array_r, check_finite=False)

    def _images(self, vec: PETSc.Vec, small: PETSc.Vec) -> None:
        """Z^T A vec."""
        self.W.multTranspose(vec, small)
        self.Z.multTranspose(vec, self.spare)  # no multTransposeAdd: it rounds otherwise on several ranks
        small.axpy(self.damping, self.spare)

    def project(self, x: PETSc.Vec, rest: PETSc.Vec) -> None:
        """Write (I - A Q) x to ``rest``."""
        self.Z.multTranspose(x, self.small)
        self._solve(self.small)
        self.W.mult(self.small, rest)
        rest.aypx(-1.0, x)
        self.small.copy(self.more)
        self.more.scale(-self.damping)
        self.Z.multAdd(self.more, rest, rest)

    def correct(self, y: PETSc.Vec) -> None:
        """Make y the sum of (I - Q A) y and Q x with the x of the last projection."""
        self._images(y, self.more)
        self._solve(self.more)
        self.small.axpy(-1.0, self.more)
        self.Z.multAdd(self.small, y, y)

    def destroy(self) -> None:
        """Destroy the PETSc objects."""
        for thing in (self.Z, self.W, self.small, self.more, self.spare):
            thing.destroy()


def neuron_basis(loss: Loss, theta: Array) -> sparse.csc_array:
    """Z (n, k) with orthonormal columns: each neuron's weights as they are in theta (n,), and each other parameter.

    A neuron's weights are theta[i] of a tensor of two or more dimensions; where they are all zero, all alike.
    """
    labels, values, count = np.zeros(loss.size, dtype=np.int64), np.ones(loss.size), 0
    for p in loss.parameters:
        rows = p.shape[0] if len(p.shape) > 1 else p.size
        table = theta[p.range].reshape(rows, -1) if len(p.shape) > 1 else np.ones((rows, 1))
        table = np.where(np.any(table != 0, axis=1, keepdims=True), table, 1.0)
        values[p.range] = (table / linalg.norm(table, axis=1, keepdims=True)).ravel()
        labels[p.range] = count + np.repeat(np.arange(rows), table.shape[1])
        count += rows
    return sparse.csc_array((values, (np.arange(loss.size), labels)), shape=(loss.size, count))


def owned(objective: Objective) -> slice:
    """The parameters that this rank owns."""
    ranges, rank = objective.layout.ranges, objective.comm.rank
    return slice(ranges[rank], ranges[rank + 1])


def tall(objective: Objective, rows: Array | sparse.csr_array) -> PETSc.Mat:
    """A matrix (n, k) of which this rank has the rows of its parameters; its small vectors (k,) are on rank 0."""
    comm, columns = objective.comm, rows.shape[1]
    sizes = ((rows.shape[0], objective.size), (columns if comm.rank == 0 else 0, columns))
    if isinstance(rows, np.ndarray):
        mat = PETSc.Mat().createDense(sizes, array=np.asfortranarray(rows), comm=comm)
    else:
        csr = rows.indptr.astype(PETSc.IntType), rows.indices.astype(PETSc.IntType), rows.data
        mat = PETSc.Mat().createAIJ(sizes, csr=csr, comm=comm)
    mat.assemble()
    return mat


def everywhere(objective: Objective, rows: Array) -> Array:
    """A matrix (n, k) on every rank, of which each had the rows of its parameters. Collective."""
    layout, columns = objective.layout, rows.shape[1]
    whole = np.empty((layout.size, columns))
    counts, places = layout.counts * columns, np.array(layout.ranges[:-1]) * columns
    objective.comm.Allgatherv(np.ascontiguousarray(rows), [whole, counts, places, MPI.DOUBLE])
    return whole


def _vector(objective: Objective, values: Array) -> PETSc.Vec:
    return PETSc.Vec().createWithArray(values, (len(values), PETSc.DETERMINE), comm=objective.comm)


def cholesky(matrix: Array, damping: float) -> Array:
    """The lower Cholesky factor of matrix + damping * I, of which the lower triangle is given.

    Where rounding has left it indefinite, the damping is raised to some roundings of the largest diagonal entry.
    """
    shift = damping
    while True:
        try:
            moved = matrix.copy(order="F")
            moved[np.diag_indices(len(moved))] += shift
            return np.asarray(linalg.cholesky(moved, lower=True, overwrite_a=True, check_finite=False))
        except linalg.LinAlgError:
            if not np.isfinite(matrix).all():
                return np.full_like(matrix, np.nan)  # and what it solves is refused, on every rank
            shift = max(10 * shift, 10 * np.finfo(float).eps * float(np.abs(matrix.diagonal()).max()))
