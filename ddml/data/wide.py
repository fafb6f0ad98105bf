"""A generated set of the shape of Gisette: few samples, many features of which few say anything."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from scipy import sparse

from ddml.parallel import agreed

from .data_set import shared_arrays
from .rows import SparseRows

SAMPLES, TESTS = 6000, 1000
INFORMATIVE, MIXED, NOISE = 100, 2400, 2500
_QUANTILE = 0.8416212335729143  # behind which a fifth of the normal distribution lies
_ROWS = 500  # that are made in one go


def generate(seed: int, comm: MPI.Comm, samples: int = SAMPLES, tests: int = TESTS) -> list[SparseRows]:
    """Training and test samples with labels -1 and +1, the same on any number of ranks; ours. Collective on ``comm``.

    5,000 features: 100 normal ones u, of which y = sign(a.u + e) is made with e of a tenth of the deviation of a.u;
    2,400 mixtures of those 100 with as much noise as signal, and 2,500 of noise alone, in an order by chance. Each has
    deviation 1, and what is stored is (t - 0.84) / 2 clipped to [0, 1], so that a fifth of the entries is not 0. After
    Gisette (Guyon 2003: 6,000 x 5,000, pixels of digits 4 and 9 and features without meaning), with constants that are
    our choice. One rank of each node makes them, into memory that the node shares.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    made: list[tuple[sparse.csr_array, NDArray[np.float64]]] = []
    with agreed(comm):
        if node.rank == 0:
            made = [_part(seed, 0, samples), _part(seed, 1, tests)]
    tables = []
    for number, what in enumerate(("generated wide set", "generated wide test set")):
        x, y = made[number] if made else (None, np.empty(0))
        arrays = {} if x is None else {"data": x.data, "indices": x.indices, "indptr": x.indptr, "labels": y}
        shapes = node.bcast({name: (array.shape, array.dtype) for name, array in arrays.items()})
        shared, windows = shared_arrays(shapes, node)
        for name, array in arrays.items():
            shared[name][:] = array
        for window in windows:
            window.Fence()
        tables.append(SparseRows(**shared, features=INFORMATIVE + MIXED + NOISE, origin=what, windows=windows))
    node.Free()
    return tables


def _part(seed: int, number: int, count: int) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    rng = np.random.default_rng([seed, 0])
    direction = rng.standard_normal(INFORMATIVE)
    direction /= np.linalg.norm(direction)
    mixing = rng.standard_normal((INFORMATIVE, MIXED)) / np.sqrt(2 * INFORMATIVE)
    order = rng.permutation(INFORMATIVE + MIXED + NOISE)
    blocks, labels = [], []
    for begin in range(0, count, _ROWS):
        rng = np.random.default_rng([seed, 1 + number, begin])
        rows = min(_ROWS, count - begin)
        u = rng.standard_normal((rows, INFORMATIVE))
        mixed = u @ mixing + rng.standard_normal((rows, MIXED)) / np.sqrt(2)
        t = np.hstack([u, mixed, rng.standard_normal((rows, NOISE))])[:, order]
        blocks.append(sparse.csr_array(np.clip((t - _QUANTILE) / 2, 0.0, 1.0)))
        labels.append(np.where(u @ direction + 0.1 * rng.standard_normal(rows) > 0, 1.0, -1.0))
    return sparse.vstack(blocks, format="csr"), np.concatenate(labels)
