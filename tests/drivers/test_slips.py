"""Problem files with slips: each ends accurate, with a note, or refused in one line; none in silence."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import slips
from calling import call
from mpi4py import MPI

from ddml.errors import InputError

COUNT, OFTEN = 200, 40  # files in all, and those of make test
ITERATIONS, ERROR = 80, 1e-2  # what is accurate
OUT_OF_SCALE = 400  # iterations of problems that are

CASES = [
    pytest.param(kind, text, allowed, id=f"{number} {kind}: {name}", marks=[pytest.mark.long] * (number >= OFTEN))
    for number, (kind, name, text, allowed) in enumerate(slips.files(COUNT))
]


def outcome(file: Path, iterations: int = ITERATIONS) -> tuple[str, str]:
    """What comes of a problem file, and the words."""
    printed = io.StringIO()
    options = ("-max_it", iterations, "-points", 200, "-progress", "none")
    try:
        with contextlib.redirect_stdout(printed):
            call("pinn", "-problem", f"{file}:Problem", *options, comm=MPI.COMM_SELF)
    except InputError as error:
        return slips.REFUSED if len(str(error).splitlines()) == 1 else "refused in several lines", str(error)
    text = printed.getvalue()
    if re.search("^(note: |it did not converge)", text, re.MULTILINE):
        return slips.NOTED, text
    error = re.search(r"relative error (\S+),", text)
    return slips.ACCURATE if error and float(error[1]) < ERROR else "silent", text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("kind", "text", "allowed"), CASES)
def test_a_slip_in_a_problem_is_not_passed_over(kind: str, text: str, allowed: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "problem.py"
    file.write_text(text)
    found, words = outcome(file, OUT_OF_SCALE if kind == "scales" else ITERATIONS)
    assert found in allowed, f"{found}\n{words}\n{text}"


def test_the_files_are_the_same_each_time_and_of_all_kinds() -> None:
    assert list(slips.files(9)) == list(slips.files(9))
    assert list(slips.files(9, seed=1)) != list(slips.files(9))
    often = {kind for kind, *_ in slips.files(OFTEN)}
    assert often == {kind for kind, *_ in slips.SLIPS}
