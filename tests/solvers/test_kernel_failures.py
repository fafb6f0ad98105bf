"""Kernels that fail on one rank alone."""

import itertools

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout
from ddml.kernel_machines.functions import users
from solvers import fit_kernel

X = np.random.default_rng(0).standard_normal((260, 3))


@pytest.mark.ranks
def test_a_kernel_that_fails_on_one_rank_at_any_time_is_refused_on_all(comm: MPI.Comm, prefix: str) -> None:
    layout, calls = SampleLayout(SampleDomain.by_tree(X, 2), comm), 0

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == last and comm.rank == comm.size - 1:
            raise ValueError("out of luck")
        return torch.exp(-torch.cdist(x, y))

    for last in itertools.count(1):
        calls = 0
        try:
            operator = KernelOperator(users(function, "mine.py:k"), X, 0.3, layout, keep=last % 2 == 0)
            fit_kernel(operator, X[:, :1], prefix=prefix, coarse_rank=20, ksp_max_it=1)
        except InputError as error:
            assert "kernel 'mine.py:k' raised ValueError: out of luck" in str(error)
        else:
            assert comm.bcast(calls, comm.size - 1) < last
            break
    assert last > 8
