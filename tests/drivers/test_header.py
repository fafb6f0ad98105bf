"""What a driver says it is about to run."""

from pathlib import Path

import pytest
from calling import call
from launch import SMALL
from mpi4py import MPI

PROBLEMS = Path(__file__).with_name("mixed_problems.py")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("burgers", "residuals compiled\n"),
        (
            f"{PROBLEMS}:Mixed",
            "residuals compiled: start; in torch: layered (values read by numpy), left (a change in place), "
            "ends (periodic pairs)\n",
        ),
        (
            f"{PROBLEMS}:Dispersion",
            "derivatives u.xxx beyond the kernels' order 2: all in torch, about 20 times slower\n"
            "residuals in torch (derivatives beyond order 2)\n",
        ),
        (f"{PROBLEMS.with_name('faulty_problems.py')}:BecomesNotANumber", "residuals in torch (compiled = False)\n"),
    ],
)
def test_the_header_says_which_residuals_are_compiled(
    problem: str, expected: str, comm: MPI.Comm, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("pinn", "-problem", problem, *SMALL, "-max_it", 1) == 0
    assert comm.rank > 0 or expected in capfd.readouterr().out
