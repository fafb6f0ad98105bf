"""Problems in users' units by default options, advice on runs that stall, and none on those that went well."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from calling import call
from launch import assert_same
from mpi4py import MPI

HERE = Path(__file__).parent
SCALED = HERE / "scaled_problems.py"
USERS = HERE.parent / "problems" / "user_problems.py"
GOOD = {
    "Rod": (f"{SCALED}:Rod", 60, 1e-3),
    "RodOfTerms": (f"{SCALED}:RodOfTerms", 150, 1e-3),
    "People": (f"{SCALED}:People", 60, 1e-5),
    "Wave": (f"{SCALED}:Wave", 120, 1e-3),
    "Bar": (f"{SCALED}:Bar", 60, 1e-4),
    "Said": (f"{SCALED}:Said", 60, 1e-4),
    "Measured": (f"{SCALED}:Measured", 100, 1e-3),
    "OnlyMeasured": (f"{SCALED}:OnlyMeasured", 100, None),
    "Decay": (f"{USERS}:Decay -width 8 -depth 2", 60, 1e-3),
    "HardPeriodic": (f"{USERS}:HardPeriodic -width 10 -depth 2", 200, 1e-2),
}
STALLED = {
    "flat": (f"{HERE / 'stalling_problems.py'}:Contradiction", "-solver lbfgs -max_it 80"),
    "loss on other points": (f"{HERE / 'stalling_problems.py'}:Overfitted", "-points 5 -resample never -max_it 300"),
    "floor of rounding": (f"{HERE / 'stalling_problems.py'}:Cancels", "-dtype float32 -max_it 100"),
    "steps refused": (f"{HERE / 'stalling_problems.py'}:Contradiction", "-max_it 400"),
}


def words(problem: str, *more: object) -> list[str]:
    return ["-problem", *f"{problem} -points 400".split(), "-progress", "none", *map(str, more)]


@pytest.mark.parametrize("name", GOOD)
def test_problems_in_users_units_converge_and_get_no_advice(
    name: str, comm: MPI.Comm, capfd: pytest.CaptureFixture[str]
) -> None:
    problem, iterations, error = GOOD[name]
    assert call("pinn", *words(problem, "-max_it", iterations)) == 0
    text = capfd.readouterr().out
    if comm.rank == 0:
        assert "did not converge" not in text
        found = re.search(r"relative error (\S+),", text)
        assert (float(found[1]) < error) if found and error else error is None
        assert ("on other points" in text) == (name != "OnlyMeasured")


@pytest.mark.parametrize(("name", "seed"), [("Lorenz", 0), pytest.param("EarlyFirst", 1, marks=pytest.mark.long)])
def test_a_long_time_interval(name: str, seed: int, comm: MPI.Comm, capfd: pytest.CaptureFixture[str]) -> None:
    """By default options, the first seed; others take the wrong branch unless early times weigh more."""
    options = ("-seed", seed, "-max_it", 1200, "-target_error", 1e-2, "-progress", "none")
    assert call("pinn", "-problem", f"{SCALED}:{name}", *options) == 0
    assert comm.rank > 0 or "stopped: target_error is reached" in capfd.readouterr().out


@pytest.mark.parametrize("name", STALLED)
def test_a_run_that_stalls_says_what_it_saw(name: str, comm: MPI.Comm, capfd: pytest.CaptureFixture[str]) -> None:
    problem, options = STALLED[name]
    assert call("pinn", "-problem", problem, "-points", 200, "-progress", "none", *options.split()) == 0
    assert comm.rank > 0 or f"(docs/convergence.md, '{name}')" in capfd.readouterr().out


def test_the_header_says_ranges_sizes_and_what_is_out_of_scale(
    comm: MPI.Comm, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("pinn", *words(f"{SCALED}:Unmatched", "-max_it", 1)) == 0
    text = capfd.readouterr().out
    if comm.rank == 0:
        assert "coordinates t from 0 to 3600 (as -1 to 1), x from 0 to 0.1 (as -1 to 1)\n" in text
        assert re.search(r"at the start: residual \S+ \(u\.t \S+, u\.xx \S+, rest \S+\)\n", text)
        assert "note: in term residual, u.xx is" in text


def test_a_restart_takes_the_scales_from_the_run_file(comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    options = words(f"{SCALED}:RodOfTerms", "-resample_interval", 4)
    assert call("pinn", *options, "-max_it", 12, "-output", whole) == 0
    assert call("pinn", *options, "-max_it", 6, "-output", parts) == 0
    assert call("pinn", "-restart", parts, "-trust", "-max_it", 12) == 0
    if comm.rank == 0:
        assert_same(whole, parts)
        with h5py.File(parts, "r") as file:
            assert '"fields":{"u":1000.0}' in file.attrs["option scales"]
    comm.barrier()


def test_run_files_without_scales_go_on_without(comm: MPI.Comm, shared_tmp: Path) -> None:
    """As those that an older ddml has written."""
    old = shared_tmp / "old.h5"
    options = words(f"{SCALED}:Rod", "-solver", "lbfgs", "-output", old)
    assert call("pinn", *options, "-scales", "none", "-max_it", 3) == 0
    with_scales = shared_tmp / "new.h5"
    assert call("pinn", "-restart", old, "-trust", "-output", with_scales, "-max_it", 5) == 0
    if comm.rank == 0:
        with h5py.File(with_scales, "r") as file:
            assert file.attrs["option scales"] == "none"
            assert np.all(np.diff(file["history/loss"][()]) <= 0)
    comm.barrier()
