"""What a monitor of :func:`solvers.fit_kernel` is shown, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from test_kernel_fit import Y, dense, made

from solvers import fit_kernel


@pytest.mark.ranks
@pytest.mark.parametrize("given", [{}, {"together": False}, {"preconditioner": "none"}, {"dtype": "float32"}])
def test_a_monitor_sees_the_iterates_whose_residuals_are_reported(comm: MPI.Comm, given: dict[str, Any]) -> None:
    settings = {key: value for key, value in given.items() if key == "dtype"}
    options = {key: value for key, value in given.items() if key != "dtype"}
    seen: list[list[np.ndarray]] = [[], []]
    for iterates, on in zip(seen, (comm, MPI.COMM_SELF), strict=True):
        operator = made(on, **settings)
        found = fit_kernel(operator, Y, monitor=iterates.append, **options)
    assert [alpha.tobytes() for alpha in seen[0]] == [alpha.tobytes() for alpha in seen[1]]
    assert len(seen[0]) == len(found.history)
    assert not seen[0][0].any()
    assert seen[0][-1] == pytest.approx(found.coefficients, rel=1e-14)
    A, order = dense(operator), operator.layout.domain.order
    norms = np.linalg.norm(Y, axis=0)
    left = np.array([np.linalg.norm((Y[order] - A @ alpha[order]) / norms, axis=0) for alpha in seen[0]])
    if options.get("together", True):
        assert np.linalg.norm(left, axis=1) == pytest.approx(np.sqrt(10) * found.history, rel=1e-3, abs=1e-5)
    else:
        assert (np.diff((left < 0.5).sum(axis=1)) >= 0).all()  # one column after another
    without = fit_kernel(operator, Y, **options)
    assert without.coefficients.tobytes() == found.coefficients.tobytes()
