r"""The matrix :math:`K + \mu I` of a kernel and samples, its rows over ranks, kept or computed as it is applied."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.parallel import agreed

from .cuts import Array, Numbers, Values
from .domain import table
from .functions import Kernel, check_symmetry, squared_norms
from .halves import WIDTH, Entries, Half, Piece, Places
from .layout import SampleLayout
from .picked import Wanted, picked

TEMPORARIES = 4  # arrays of a block's size that computing it takes, itself among them (at most, of our kernels)
# our choices: points that are predicted together; columns that a symmetric product has at once, and more than which
# blocks that are not kept are computed all for, not half: sums of half of them would take more memory than blocks
AT_ONCE, TOGETHER = 512, 32
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class KernelOperator:
    r"""The symmetric matrix :math:`A = K + \mu I`, for any number of columns in one product.

    Each rank has the rows of vectors for its samples, and all samples. It has half of its rows of K, whose blocks serve
    as columns, too (:class:`Half`): it keeps them where they fit into the memory limit, or else computes them in every
    product. Blocks are the same in both cases and on any number of ranks, and so are the bits of products (of at most
    32 columns; where nothing is kept, more are multiplied with whole rows). Collective on the layout's communicator.

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
        Bytes for K on each rank, those of a block included; where it is not kept, for what preconditions it.
    dtype
        ``float64`` or ``float32``: what K is computed and kept in. Products are float64 numbers; with float32 they have
        seven digits, and :meth:`residual` computes K again in float64.
    keep
        Whether K may be kept where it fits.

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
        Whether all ranks keep their blocks of K.
    half : Half
        Which blocks of K this rank has.
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
        keep: bool = True,
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
            moved = found[layout.domain.order]
            np.subtract(moved, self.mean, out=moved)
            # numbers that all samples share add nothing to distances of samples: a tenth of those of images of MNIST
            shared = (moved == moved[:1]).all(axis=0) & kernel.translates
            moved[:, shared] = 0.0
            self.samples = torch.as_tensor(moved)
            check_symmetry(kernel, self.samples)
            self.block = self._block()
            inputs = torch.as_tensor(moved[:, ~shared]) if shared.any() and not shared.all() else self.samples
        self._inputs = inputs.to(DTYPES[dtype])
        self._exact = self._inputs if dtype == "float64" else self.samples
        self._norms = {"float64": squared_norms(self.samples), dtype: squared_norms(self._inputs)}
        self.half = Half(layout, self.block)
        needed = self.half.entries * self._inputs.itemsize + (TEMPORARIES - 1) * 8 * layout.size * self.block
        self.keeps = keep and bool(layout.comm.allreduce(needed <= memory, MPI.LAND))
        self._kept: dict[int, list[torch.Tensor]] | None = None

    def __repr__(self) -> str:
        where = "kept" if self.keeps else f"computed in each product by blocks of {self.block}"
        return (
            f"K + {self.shift:g} I of {self.layout.size} samples, kernel {self.kernel}: {where}, {self.dtype}, within "
            f"{self.memory:.3g} bytes a rank"
        )

    @property
    def kept(self) -> dict[int, list[torch.Tensor]] | None:
        """This rank's blocks of K, by unit, if all ranks keep theirs: computed when first asked for. Collective.

        Raises
        ------
        InputError
            On all ranks, if the kernel gives anything that it must not.
        """
        if self.keeps and self._kept is None:
            with agreed(self.layout.comm):
                self._kept = {
                    unit: [self._entries(self._inputs, piece.rows, piece.columns) for piece in self.half.pieces(unit)]
                    for unit in self.layout.units
                }
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

    def _block(self) -> int:
        """Samples in a block: as many as the largest unit has, or as the memory holds in float64."""
        row = TEMPORARIES * 8 * self.layout.size
        if self.memory < row:
            raise InputError(
                f"a memory limit of {self.memory:g} bytes is below one block of the kernel: a row of "
                f"{self.layout.size} samples and what computing it takes are {row}"
            )
        return min(int(self.memory // row), int(np.diff(self.layout.edges).max()))

    @property
    def spare(self) -> float:
        """Bytes of the limit that a preconditioner may take on each rank: no limit where K itself fits and is kept."""
        row = TEMPORARIES * 8 * min(WIDTH, self.layout.size)
        return math.inf if self.keeps else max(self.memory - self.block * row, 0.0)

    def blocks(self) -> list[slice]:
        """This rank's blocks: places among its rows."""
        pieces = map(self.layout.piece, self.layout.units)
        return [slice(a, min(a + self.block, p.stop)) for p in pieces for a in range(p.start, p.stop, self.block)]

    def _entries(self, inputs: torch.Tensor, rows: Places, columns: Places) -> torch.Tensor:
        """Entries of K, by place, in the precision of the samples."""
        norms = self._norms[str(inputs.dtype).removeprefix("torch.")]
        return self.kernel(inputs[rows], inputs[columns], (norms[rows], norms[columns]))

    def columns(
        self,
        points: torch.Tensor,
        changed: Callable[[Values], Values] = lambda rows: rows,
        dtype: str = "float64",
        computed: str = "float64",
    ) -> Values:
        """This rank's rows of k(x_i, p_j), (n, m), of points (m, d) as ``samples`` are. Collective.

        Parameters
        ----------
        points
            p.
        changed
            From the rows of a unit to what is to stand there.
        dtype
            What that is rounded to.
        computed
            What the values of k are computed in.
        """
        begin, precision = self.layout.begin, DTYPES[computed]
        found, given = np.empty((self.layout.end - begin, len(points)), dtype), points.to(precision)
        known, of_points = self._norms.get(computed), squared_norms(given)
        with agreed(self.layout.comm):
            for piece in map(self.layout.piece, self.layout.units):
                places = slice(begin + piece.start, begin + piece.stop)
                mine = self.samples[places].to(precision)
                norms = squared_norms(mine) if known is None else known[places]
                found[piece] = changed(self.kernel(mine, given, (norms, of_points)).numpy())
        return found

    def picks(self, dtype: str) -> bool:
        """Whether entries in that precision are picked out of what ranks keep of K, and not computed."""
        return self.keeps and np.dtype(dtype).itemsize <= np.dtype(self.dtype).itemsize

    def submatrices(self, dtype: str) -> list[Values]:
        """K (n_i, n_i) of this rank's subdomains, in their order, or what must have its lower triangle. Collective.

        Raises
        ------
        InputError
            See :attr:`kept`.
        """
        layout, places = self.layout, [self.layout.places[wide] for wide in self.layout.domain.sets]
        if self.picks(dtype):
            assert self.kept is not None
            return picked(self.half, self.kept, list(map(Wanted, layout.owners, places)), dtype)
        with agreed(layout.comm):
            return [self.kernel.lower(self.samples[places[i]].to(DTYPES[dtype])).numpy() for i in layout.mine]

    def multiply(self, V: Array) -> Array:
        """This rank's rows of A V, of those of V (n, k). Collective."""
        return self._multiply(V, self._inputs)

    def residual(self, Y: Array, V: Array) -> Array:
        """This rank's rows of Y - A V (n, k), in float64 whatever K is kept in. Collective."""
        return Y - self._multiply(V, self._exact)

    def _multiply(self, V: Array, inputs: torch.Tensor) -> Array:
        self.products += V.shape[1]
        whole = self.layout.everywhere(V.astype(inputs.numpy().dtype))
        product, entries = self.shift * V, self._source(inputs)
        begun = self.half.seconds
        if V.shape[1] <= TOGETHER or (self.keeps and inputs is self._inputs):
            for group in np.array_split(np.arange(V.shape[1]), -(-V.shape[1] // TOGETHER)):
                product[:, group] += self.half.product(entries, np.ascontiguousarray(whole[:, group]))
            self.seconds.append((self.half.seconds - begun) / V.shape[1])
            return product
        begin, size = self.layout.begin, self.layout.size
        with agreed(self.layout.comm):
            clock = time.perf_counter()
            for block, a in itertools.product(self.blocks(), range(0, size, WIDTH)):
                rows, columns = slice(begin + block.start, begin + block.stop), slice(a, min(a + WIDTH, size))
                product[block] += self._entries(inputs, rows, columns).numpy() @ whole[columns]
            self.seconds.append((time.perf_counter() - clock) / V.shape[1])
        return product

    def _source(self, inputs: torch.Tensor) -> Entries:
        """Where products find entries of K in the precision of inputs: among those kept, or computed now."""
        kept = self.kept if inputs is self._inputs else None

        def entries(piece: Piece, rows: Places, columns: Places) -> torch.Tensor:
            if kept is None:
                return self._entries(inputs, rows, columns)
            block = kept[piece.unit][piece.number]
            block = block if rows is piece.rows else block[rows - piece.rows.start]
            return block if columns is piece.columns else block[:, columns - piece.columns.start]

        return entries

    def multiply_columns(self, places: Numbers, V: Array) -> Array:
        """This rank's rows of A's columns at some places times V (m, k), which is the same on all ranks. Collective."""
        whole = np.zeros((self.layout.size, V.shape[1]), self.dtype)
        whole[places] = V
        product = self.half.product(self._source(self._inputs), whole, np.sort(places))
        inside = (places >= self.layout.begin) & (places < self.layout.end)
        product[places[inside] - self.layout.begin] += self.shift * V[inside]
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
