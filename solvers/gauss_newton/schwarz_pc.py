"""Overlapping Schwarz preconditioners of Gauss-Newton systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from petsc4py import PETSc
from scipy import linalg, sparse

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.options import DECOMPOSITION, subdomains
from ddml.decomposition.subdomains import Subdomains, length
from ddml.linalg.small import cholesky
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.options import Option, with_defaults
from ddml.parallel import agreed, check_memory, redistributed
from solvers.owner import Owner

from .neurons import Neurons, neuron_basis
from .preconditioners import Array, Preconditioner, distributed, owned


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
        self.coarse: Neurons | None = None
        self.written = self.own(Owner())  # of the last state

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
        """See :meth:`Preconditioner.prepare`.

        Raises
        ------
        CollectiveError
            If the blocks of all subdomains of a node and their factors need more than its memory.
        """
        if self.decomposition is not None:
            return
        loss, layout = self.objective.loss, self.objective.layout
        chosen = self.subdomains or Subdomains.windows(loss, min(2, len(loss.layers)))
        self.decomposition = self.own(Decomposition(chosen, layout, parallel=True, gathered=True))
        led = [s for s, workers in enumerate(self.decomposition.workers) if workers[0] == layout.comm.rank]
        needed = sum(2 * 8 * length(chosen.ranges[s]) ** 2 for s in led)  # blocks and their factors
        what = f"what {len(chosen)} subdomains keep in dense matrices"
        check_memory(layout.comm, needed, what, "use more nodes, smaller subdomains, or -preconditioner nystrom")
        self.local = [self.own(self.decomposition.vector(s)) for s in range(len(self.decomposition.R))]
        self.rest, self.work = self.own(layout.vector()), self.own(layout.vector())

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
        self.coarse = Neurons(self.objective, basis, images)

    def damp(self, damping: float) -> None:
        """See :meth:`Preconditioner.damp`."""
        slack = 4.0 if self.settings.sweep == "additive" else 1.0
        if self.factored and 1 / slack <= damping / self.damping <= slack:
            return
        self.damping, self.factored = damping, True
        with agreed(self.objective.comm):
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
            step = layout.gather(self.work, device=at.device)
            for image, more in zip(images, at.product(step, ranges[s]), strict=True):
                image += more

    def _solve(self, s: int) -> None:
        local = self.local[s]
        local.array[:] = linalg.cho_solve((self.factors[s], True), local.array_r, check_finite=False)

    def state(self) -> dict[str, Any]:
        """See :meth:`Preconditioner.state`."""
        self.written.destroy()
        packed = [b[np.tril_indices(len(b))] for _, b in sorted(self.blocks.items())]
        numbers = [np.concatenate([*packed, np.zeros(0)])]
        if self.coarse is not None:
            numbers.append(self.coarse.images.ravel())
        return {
            "damping": self.damping,
            "vectors": [self.written.own(distributed(self.objective, values)) for values in numbers],
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
