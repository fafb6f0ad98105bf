"""What the two-level preconditioner keeps: precision, memory, and pivots that a model of cost chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from ddml.data.files import digits
from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance, named
from ddml.kernel_machines.costs import Task, coarse_rank, memory
from ddml.kernel_machines.pivots import Pivots
from solvers import KernelSchwarzPC, fit_kernel
from solvers.kernel_machines.local import LocalSolves

X = digits().inputs[:600].reshape(600, -1) / 16.0
Y = np.eye(10)[digits().labels[:600]] - 0.1


def made(comm: MPI.Comm, shift: float = 0.1, count: int = 8, **settings: Any) -> KernelOperator:
    layout = SampleLayout(SampleDomain.by_tree(X, count, 0.1), comm)
    return KernelOperator(named("rbf", 0.5 * median_distance(X)), X, shift, layout, **settings)


@pytest.mark.ranks
@pytest.mark.parametrize("schwarz", ["symmetric", "plain"])
@pytest.mark.parametrize("shift", [1.0, 0.1, 1e-2, 1e-3])
def test_factors_in_float32_cost_no_iterations_and_no_digits(comm: MPI.Comm, shift: float, schwarz: str) -> None:
    operator, found = made(comm, shift), []
    for factors in ("float32", "float64"):
        found.append(fit_kernel(operator, Y, factors=factors, schwarz=schwarz, ksp_rtol=1e-11))
    assert found[0].converged
    assert found[0].iterations <= 1.1 * found[1].iterations + 1
    scale = np.linalg.norm(found[1].coefficients)
    assert np.linalg.norm(found[0].coefficients - found[1].coefficients) < 1e-9 * scale / min(shift, 0.1)


@pytest.mark.ranks
def test_float32_is_chosen_where_lambda_is_large_enough(comm: MPI.Comm) -> None:
    for shift, coarse, expected in (
        (0.1, "woodbury", "float32"),
        (0.1, "restricted", "float64"),
        (1e-3, "woodbury", "float32"),
        (1e-5, "woodbury", "float64"),
        (0.1, "balanced", "float64"),
        (0.1, "none", "float64"),
    ):
        context = KernelSchwarzPC()
        kind = {"schwarz": coarse, "ksp_type": "gmres"} if coarse == "restricted" else {"coarse": coarse}
        fit_kernel(made(comm, shift), Y, context, ksp_max_it=2, **kind)
        assert {str(factor.dtype) for factor in context.local.factors} <= {expected}
    with pytest.raises(InputError, match="factors must be one of float32, float64; got 'float16'"):
        fit_kernel(made(comm), Y, factors="float16")
    with pytest.raises(InputError, match="use a larger lambda, or -factors float64"):
        twins = np.concatenate([X[:300], X[:300]])
        layout = SampleLayout(SampleDomain.by_tree(twins, 4, 0.1), comm)
        fit_kernel(KernelOperator(named("laplace", 2.0), twins, 1e-9, layout), Y, factors="float32")


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_images_are_what_they_say(comm: MPI.Comm, dtype: str) -> None:
    operator = made(comm)
    F = Pivots.chosen(operator, 150).mine(dtype)
    local = LocalSolves(operator, F, "unity", [0.0] * 8, dtype)
    for transposed in (False, True):
        parts = local.forward(F.astype(float), transposed)
        for image, part in zip(local.images(F, transposed), parts, strict=True):
            assert image.dtype == dtype
            assert np.abs(image - part).max() < (1e-12 if dtype == "float64" else 1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("limit", [2e6, 4e6])
def test_factors_keep_to_the_limit_where_the_kernel_is_not_kept(comm: MPI.Comm, limit: float) -> None:
    operator = made(comm, memory=limit / comm.size, dtype="float64", count=16)
    if operator.kept is not None:
        operator = made(comm, memory=limit / comm.size / 4, count=16)
    assert operator.kept is None
    context = KernelSchwarzPC()
    try:
        found = fit_kernel(operator, Y, context, ksp_max_it=3)
    except InputError as refusal:
        assert "use more subdomains, ranks or memory" in str(refusal)
        return
    held = sum(factor.nbytes for factor in context.local.factors) + sum(image.nbytes for image in context.images)
    assert held <= operator.spare < operator.memory
    assert found.iterations <= 3
    with pytest.raises(InputError, match=r"factors of 16 subdomains and 599 pivots take .* use a lower -coarse_rank"):
        fit_kernel(operator, Y, coarse_rank=599)


@pytest.mark.ranks
def test_what_is_held_is_what_the_model_says(comm: MPI.Comm) -> None:
    operator, context = made(comm, count=16), KernelSchwarzPC()
    fit_kernel(operator, Y, context, coarse_rank=100, ksp_max_it=1)
    sizes = [len(wide) for wide in operator.layout.domain.sets]
    held = sum(factor.nbytes for factor in context.local.factors) + sum(image.nbytes for image in context.images)
    needed = memory(Task(600, 64, 10, 0.1, comm.size), sizes, 100)
    assert max(comm.allgather(held)) <= 1.1 * needed
    assert sum(comm.allgather(held)) > 0.1 * needed


@pytest.mark.ranks
@pytest.mark.parametrize("columns", [1, 10])
def test_pivots_are_as_many_as_the_model_says(comm: MPI.Comm, columns: int) -> None:
    operator, context = made(comm), KernelSchwarzPC()
    fit_kernel(operator, Y[:, :columns], context)
    sizes = [len(wide) for wide in operator.layout.domain.sets]
    assert context.rank == coarse_rank(Task(600, 64, columns, 0.1), sizes)
    alone = KernelSchwarzPC()
    fit_kernel(made(MPI.COMM_SELF), Y[:, :columns], alone)
    assert context.rank == alone.rank
