"""What people report of other programs: the problem works, or is refused in one line on all ranks."""

from __future__ import annotations

import re

import pytest
from calling import call, refusal
from launch import ROOT
from mpi4py import MPI

FILE = ROOT / "tests/drivers/field_problems.py"


@pytest.mark.parametrize(
    ("name", "iterations", "bound"),
    [
        ("ShiftsItsCoordinate", 60, 1e-3),
        ("ScaledInput", 60, 1e-3),
        ("MaskedExact", 60, 1e-3),
        ("TenDimensions", 100, 1e-2),
        ("Complex", 60, 1e-2),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_slip_with_a_meaning_is_solved(
    comm: MPI.Comm, name: str, iterations: int, bound: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("pinn", "-problem", f"{FILE}:{name}", "-max_it", iterations, "-points", 300, "-progress", "none") == 0
    text = comm.bcast(capsys.readouterr().out)
    error = re.search(r"relative error (\S+),", text)
    assert error is not None, text
    assert float(error[1]) < bound
    notes = {"MaskedExact": ["note: exact is not finite at 0.5 of the points: the error is that over the others"]}
    assert [line for line in text.splitlines() if line.startswith("note")] == notes.get(name, [])
    assert ("in torch (complex numbers)" in text) == (name == "Complex")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FaceOutside", "term wall: the face x = 2 is outside the domain, where x is in [0, 1]"),
        ("WeightNegative", "term residual: the weight must be a finite number above 0; got -1.0"),
        ("ExactTurned", "ExactTurned.exact must give one array (5000,) of real numbers for each of ('a', 'b')"),
    ],
)
def test_a_slip_without_is_refused(name: str, expected: str) -> None:
    assert expected in refusal("pinn", "-problem", f"{FILE}:{name}")
