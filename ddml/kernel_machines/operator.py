r"""The matrix :math:`K + \mu I` of a kernel and samples, its rows over ranks, kept or computed as it is applied."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.parallel import agreed

from .cuts import Array, Numbers
from .domain import table
from .functions import Kernel, check_symmetry
from .layout import SampleLayout

TEMPORARIES = 4  # arrays of a block's size that computing it takes, itself among them (at most, of our kernels)
AT_ONCE = 512  # points that are predicted together (our choice)
Values = NDArray[Any]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class KernelOperator:
    r"""The symmetric matrix :math:`A = K + \mu I`, for any number of columns in one product.

    Each rank has the rows of its samples, and all samples. It keeps its rows of K where they fit into the memory
    limit, or else computes them by blocks in every product. Blocks are the same in both cases and on any number of
    ranks, and so are the bits of products. Collective on the layout's communicator.

    Parameters
    ----------
    kernel
        k.
    samples
        (n, ...), finite, the same on all ranks.
    shift
        :math:`\mu`, 0 or more.
    layout
        Of the coefficients.
    memory
        Bytes for K on each rank, those of a block included.
    dtype
        ``float64`` or ``float32``: what K is computed and kept in. Products are float64 numbers; with float32 they have
        seven digits, and :meth:`residual` computes K again in float64.

    Raises
    ------
    InputError
        On all ranks: samples that do not fit the layout or are not finite, a negative shift, memory for less than a row
        of K, a kernel that is not symmetric or gives no finite numbers of the right shape.

    Attributes
    ----------
    samples : Tensor
        (n, d), in the layout's order, :meth:`prepared`.
    block : int
        Samples in a block, at most.
    keeps : bool
        Whether all ranks keep their rows of K.
    products : int
        Columns that A was multiplied with so far.
    seconds : list of float
        What this rank took for its rows of each product, a column, without waiting for others.
    """

    def __init__(
        self,
        kernel: Kernel,
        samples: Any,
        shift: float,
        layout: SampleLayout,
        memory: float = 2e9,
        dtype: str = "float64",
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"a kernel is computed in one of {', '.join(DTYPES)}; got '{dtype}'")
        if not 0 <= shift < math.inf:
            raise InputError(f"the regularisation lambda must be 0 or more, got {shift}")
        self.kernel, self.shift, self.layout, self.memory, self.dtype = kernel, shift, layout, memory, dtype
        self.products, self.seconds = 0, list[float]()
        with agreed(layout.comm):
            found = table(samples)
            if len(found) != layout.size:
                raise InputError(f"the layout has {layout.size} samples, got {len(found)}")
            self.mean = found.mean(axis=0) if kernel.translates else np.zeros(found.shape[1])
            self.samples = self.prepared(found[layout.domain.order])
            check_symmetry(kernel, self.samples)
            self.block = self._block()
        self._inputs = self.samples.to(DTYPES[dtype])
        needed = self.row_bytes * (layout.end - layout.begin) + (TEMPORARIES - 1) * 8 * layout.size * self.block
        self.keeps = bool(layout.comm.allreduce(needed <= memory, MPI.LAND))
        self._kept: list[Values] | None = None

    def __repr__(self) -> str:
        where = "kept" if self.keeps else f"computed in each product by blocks of {self.block}"
        return (
            f"K + {self.shift:g} I of {self.layout.size} samples, kernel {self.kernel}: {where}, {self.dtype}, within "
            f"{self.memory:.3g} bytes a rank"
        )

    @property
    def kept(self) -> list[Values] | None:
        """This rank's rows of K, block by block, if all ranks keep theirs: computed when first asked for. Collective.

        Raises
        ------
        InputError
            On all ranks, if the kernel gives anything that it must not.
        """
        if self.keeps and self._kept is None:
            with agreed(self.layout.comm):
                self._kept = [self._rows(piece, self._inputs) for piece in self.blocks()]
        return self._kept

    def prepared(self, samples: Any) -> torch.Tensor:
        """Other samples (m, ...) as the kernel is to get them: a table in float64, moved where that changes nothing.

        Raises
        ------
        InputError
            If they are not finite or of another shape.
        """
        found = table(samples)
        if found.shape[1] != len(self.mean):
            raise InputError(f"samples have {len(self.mean)} numbers here, got {found.shape[1]}")
        return torch.as_tensor(found - self.mean)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of K."""
        return self.layout.size * DTYPES[self.dtype].itemsize

    def _block(self) -> int:
        """Samples in a block: as many as the largest unit has, or as the memory holds in float64."""
        row = TEMPORARIES * 8 * self.layout.size
        if self.memory < row:
            raise InputError(
                f"a memory limit of {self.memory:g} bytes is below one block of the kernel: a row of "
                f"{self.layout.size} samples and what computing it takes are {row}"
            )
        return min(int(self.memory // row), int(np.diff(self.layout.edges).max()))

    def blocks(self) -> list[slice]:
        """This rank's blocks: places among its rows."""
        pieces = map(self.layout.piece, self.layout.units)
        return [slice(a, min(a + self.block, p.stop)) for p in pieces for a in range(p.start, p.stop, self.block)]

    def _rows(self, block: slice, inputs: torch.Tensor) -> Values:
        """The rows of K of a block, in the precision of the samples."""
        begin = self.layout.begin
        return self.kernel(inputs[begin + block.start : begin + block.stop], inputs).numpy()

    def columns(self, points: torch.Tensor) -> Array:
        """This rank's rows of k(x_i, p_j), (n, m), of points (m, d) as ``samples`` are. Collective."""
        begin = self.layout.begin
        pieces = map(self.layout.piece, self.layout.units)
        with agreed(self.layout.comm):
            parts = [self.kernel(self.samples[begin + p.start : begin + p.stop], points).numpy() for p in pieces]
        return np.concatenate([np.empty((0, len(points))), *parts])

    def multiply(self, V: Array) -> Array:
        """This rank's rows of A V, of those of V (n, k). Collective."""
        return self._multiply(V, self._inputs, self.kept)

    def residual(self, Y: Array, V: Array) -> Array:
        """This rank's rows of Y - A V (n, k), in float64 whatever K is kept in. Collective."""
        exact = self.dtype == "float64"
        return Y - self._multiply(V, self.samples, self.kept if exact else None)

    def _multiply(self, V: Array, inputs: torch.Tensor, kept: list[Values] | None) -> Array:
        self.products += V.shape[1]
        whole = self.layout.everywhere(V).astype(str(inputs.dtype).removeprefix("torch."))
        product = self.shift * V
        with agreed(self.layout.comm):
            begun = time.perf_counter()
            for number, block in enumerate(self.blocks()):
                product[block] += (self._rows(block, inputs) if kept is None else kept[number]) @ whole
            self.seconds.append((time.perf_counter() - begun) / V.shape[1])
        return product

    def multiply_columns(self, places: Numbers, V: Array) -> Array:
        """This rank's rows of A's columns at some places times V (m, k), which is the same on all ranks. Collective."""
        product = np.zeros((self.layout.end - self.layout.begin, V.shape[1]))
        if not len(places):
            return product
        some, given = self._inputs[places], V.astype(self.dtype)
        begin, kept = self.layout.begin, self.kept
        with agreed(self.layout.comm):
            for number, block in enumerate(self.blocks()):
                mine = self._inputs[begin + block.start : begin + block.stop]
                rows = self.kernel(mine, some).numpy() if kept is None else kept[number][:, places]
                product[block] = rows @ given
        inside = (places >= begin) & (places < self.layout.end)
        product[places[inside] - begin] += self.shift * V[inside]
        return product

    def predict(self, coefficients: Array, points: Any) -> Array:
        """The sums (m, k) of coefficients (n, k), by sample, times k(x_i, p_j) of points (m, ...), in float64.

        The same bits on any number of ranks. Collective.

        Raises
        ------
        InputError
            If there are no coefficients for each sample, or points are not finite or of another shape.
        """
        if np.shape(coefficients)[:1] != (self.layout.size,) or np.ndim(coefficients) != 2:
            raise InputError(
                f"{self.layout.size} samples need a row of coefficients each, got {np.shape(coefficients)}"
            )
        mine = coefficients[self.layout.rows]
        parts = self.prepared(points).split(AT_ONCE)
        return np.concatenate([self.layout.inner(self.columns(part), mine) for part in parts])

    def createVecs(self, mat: PETSc.Mat) -> tuple[PETSc.Vec, PETSc.Vec]:
        """What PETSc multiplies, and where it writes the product."""
        columns = mat.getSize()[0] // self.layout.size
        return self.layout.vector(columns), self.layout.vector(columns)

    def matrix(self, columns: int = 1) -> PETSc.Mat:
        """The matrix A, of vectors of some columns together; the caller destroys it. Collective."""
        local, n = (self.layout.end - self.layout.begin) * columns, self.layout.size * columns
        mat = PETSc.Mat().createPython(((local, n), (local, n)), self, comm=self.layout.comm)
        mat.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        mat.setOption(PETSc.Mat.Option.SPD, True)
        mat.setUp()
        return mat

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Multiply."""
        with y as array:
            array[:] = self.multiply(self.layout.matrix(x)).ravel()
