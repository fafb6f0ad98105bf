"""Faulty problems are refused with what is wrong, before anything is evaluated."""

from __future__ import annotations

import bad_problems
import pytest
import torch
from mpi4py import MPI

from ddml.errors import InputError
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PDELoss
from ddml.problems.pde.accuracy import SolutionError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NoTensor", "shape"),
        ("Nowhere", "low < high"),
        ("LongName", "one letter"),
        ("NoDomain", "domain must map"),
        ("Unbounded", "finite"),
        ("NoInterval", "low, high"),
        ("Empty", "neither residual"),
        ("FaceElsewhere", "no coordinate 'y'"),
        ("TooFewData", "one number a point"),
        ("WrongLift", "lift must give tensors"),
        ("WrongExact", "exact"),
        ("BadCoefficient", "must be a number"),
    ],
)
def test_faulty_problem_is_refused(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        loss = PDELoss(getattr(bad_problems, name)(), TanhNetwork(2, 4, 2, 1), 20, torch.float64)
        SolutionError(loss, MPI.COMM_SELF, 50)
