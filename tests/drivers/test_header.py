"""What a driver says it is about to run."""

from pathlib import Path

import pytest
from calling import call
from launch import SMALL
from mpi4py import MPI
from test_all_solvers import drive

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


LOCAL = "in PETSc's secant matrices of local solvers ({}) by ranks"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("digits", "-solver lmvm", "in PETSc's secant matrices by ranks"),
        ("digits", "-solver cg", None),
        ("digits", "-solver aspqn", None),
        ("digits", "-solver aspqn -local_solver cg", None),
        ("digits", "-solver aspqn -local_solver lmvm", LOCAL.format("lmvm")),
        ("klein_gordon", "-solver mspqn -sub_tao_type bntr", LOCAL.format("bntr")),
        ("klein_gordon", "-solver mspqn -side_by_side 0 -local_solver lmvm", LOCAL.format("lmvm")),
        ("digits", "-solver mspqn -coarse_step true -coarse_tao_type bqnls", LOCAL.format("bqnls")),
        (
            "digits",
            "-solver aspqn -local_solver blmvm -coarse_step true -coarse_tao_type bqnls",
            LOCAL.format("blmvm, bqnls"),
        ),
        ("digits", "-solver apts_weights -local_solver blmvm", LOCAL.format("blmvm")),
        ("digits", "-solver apts_data -sub_tao_type bncg", LOCAL.format("bncg")),
        ("digits", "-solver napts -local_solver bqnktr", LOCAL.format("bqnktr")),
        ("digits", "-solver napts", None),
        ("digits", "-solver aspqn -decomposition windows -local_solver mspqn -sub_sub_tao_type lmvm",
         LOCAL.format("lmvm")),
        ("digits", "-solver aspqn -local_solver lmvm -local_steps 0", None),
        ("digits", "-solver lmvm -summation_blocks 0", None),
    ],
)  # fmt: skip
def test_the_header_says_which_solvers_sum_by_ranks(
    capfd: pytest.CaptureFixture[str],
    comm: MPI.Comm,
    name: str,
    options: str,
    expected: str | None,
) -> None:
    """Also those inside others."""
    assert drive(name, f"{options} -max_it 1") == 0
    if comm.rank == 0:
        line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("solver "))
        assert line.count("secant matrices") == (expected is not None)
        assert expected is None or line.partition(", in")[1:] == (", in", expected.removeprefix("in"))
