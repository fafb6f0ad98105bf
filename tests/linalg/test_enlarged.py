"""Matrices over the ranks that become blocks of larger ones, against dense numpy."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.linalg.factored import FactoredMatrix
from ddml.linalg.symmetric import SymmetricMatrix


@pytest.mark.ranks
@pytest.mark.parametrize("kind", [SymmetricMatrix, FactoredMatrix])
@pytest.mark.parametrize(("n", "m"), [(4, 3), (17, 16), (60, 7), (101, 101)])
def test_a_larger_matrix_has_the_smaller_one_at_its_places(comm: MPI.Comm, kind: type[Any], n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    places, block = np.sort(rng.choice(n, m, replace=False)), rng.standard_normal((m, m))
    if kind is SymmetricMatrix:
        block += block.T
    expected = np.eye(n)
    expected[np.ix_(places, places)] = block
    small, large = kind(comm, m, max(comm.size, 3)), kind(comm, n, max(comm.size, 4))
    stored = block[np.tril_indices(m)] if kind is SymmetricMatrix else block.ravel()
    small.values[:] = stored[small.place(small.rows.start) : small.place(small.rows.stop)]
    saved = small.save()
    made = large.enlarged(saved, places)
    large.load(made)
    for vec in (saved, made):
        vec.destroy()
    g = np.cos(np.arange(n))
    product = comm.allreduce(large.multiply(g).sum(axis=0))
    whole = expected if kind is SymmetricMatrix else expected.T @ expected
    assert product == pytest.approx(whole @ g, rel=1e-12, abs=1e-12)
