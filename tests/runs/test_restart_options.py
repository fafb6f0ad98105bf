"""A restart goes on with the options of its run file; what stands beside it is noted, or refused before any change."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.runs import run_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "drivers"))
import classify
import pinn

EQUATION = (
    "-problem klein_gordon -network residual -width 6 -depth 2 -points 60 -error_points 16 -test_points 20 "
    "-summation_blocks 4 -progress lines"
)
DIGITS = "-data digits -samples 90 -widths 6,5 -batch_size 30 -batch_overlap 0.1 -summation_blocks 4"
PROGRAMS = {"pinn": pinn, "classify": classify}
Drive = Callable[..., SimpleNamespace]

# (driver, options), chosen for what has to come from the file: prefixes, flags, PETSc's own, samples that move
RUNS = {
    "moving points": ("pinn", f"{EQUATION} -solver ssbroyden -resample_interval 2 -seed 4 -matrix_form factored"),
    "the solver by default": ("pinn", f"{EQUATION} -tao_ls_gtol 0.7"),
    "local solvers": ("pinn", f"{EQUATION} -solver aspqn -local_steps 3 -coarse_step -sub_memory 2 -coarse_memory 1"),
    "Gauss-Newton": ("pinn", f"{EQUATION} -solver gauss_newton -form primal -preconditioner schwarz -gn_ksp_rtol 0.01"),
    "batches": ("classify", f"{DIGITS} -solver tr -norm kfac -delta0 0.03 -batch_growth 1.5"),
    "K-FAC and SR1": ("classify", f"{DIGITS} -solver tr -norm kfac -model sr1 -delta0 0.03"),
    "batches and subdomains": ("classify", f"{DIGITS} -solver napts -overlap_pairs -seed 3 -dtype float64"),
}


@pytest.fixture
def drive(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Drive]:
    """Call a driver in this process with the given options only; its exit code and what rank 0 printed."""
    database, before = PETSc.Options(), PETSc.Options().getAll()

    def clear() -> None:
        for key in database.getAll().keys() - before.keys():
            database.delValue(key)

    def run(driver: str, *options: object) -> SimpleNamespace:
        clear()
        database.insertString(" ".join(map(str, options)))
        monkeypatch.setattr(sys, "argv", [driver])
        capfd.readouterr()
        code = PROGRAMS[driver].main(comm)
        return SimpleNamespace(code=code, out=comm.bcast(capfd.readouterr().out))

    yield run
    clear()


def content(path: Path) -> dict[str, bytes]:
    """Parameters and history, times apart, to the last bit."""
    with h5py.File(path, "r") as file:
        values = {name: column[()].tobytes() for name, column in file["history"].items() if name != "time"}
        return values | {"theta": file["parameters/theta"][()].tobytes()}


def attributes(path: Path) -> dict[str, str]:
    with h5py.File(path, "r") as file:
        return {name: str(value) for name, value in file.attrs.items()}


def notes(result: SimpleNamespace) -> list[str]:
    return [line.removeprefix("note: ") for line in result.out.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("name", RUNS)
def test_the_run_file_alone_goes_on_to_the_last_bit_on_any_number_of_ranks(
    name: str, drive: Drive, shared_tmp: Path
) -> None:
    driver, options = RUNS[name]
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    drive(driver, options, "-max_it 7 -output", whole)
    drive(driver, options, "-max_it 3 -output", parts)
    result = drive(driver, "-restart", parts, "-max_it 7")
    assert notes(result) == ["-max_it 7 in the place of 3"]
    assert content(parts) == content(whole)
    then, now = attributes(whole), attributes(parts)
    assert {key for key in then | now if then.get(key) != now.get(key)} <= {"option output", "option restart"}


@pytest.mark.parametrize("name", ["moving points", "batches"])
def test_it_stops_where_the_run_would_have(name: str, drive: Drive, shared_tmp: Path) -> None:
    driver, options = RUNS[name]
    path = shared_tmp / "run.h5"
    drive(driver, options, "-max_it 3 -output", path)
    before = content(path)
    result = drive(driver, "-restart", path)
    assert "stopped: max_it is reached. 3 iterations" in result.out
    assert not notes(result)
    assert content(path) == before


def test_it_writes_the_file_that_it_reads_or_another(drive: Drive, comm: MPI.Comm, shared_tmp: Path) -> None:
    first, second, third = (shared_tmp / f"{name}.h5" for name in ("first", "second", "third"))
    drive("pinn", EQUATION, "-solver lbfgs -max_it 2 -output", first)
    if comm.rank == 0:
        shutil.move(first, second)  # not written where it was made
    comm.barrier()
    drive("pinn", "-restart", second, "-max_it 3")
    assert not first.exists()
    before = second.read_bytes()
    drive("pinn", "-restart", second, "-max_it 5 -output", third)
    assert second.read_bytes() == before
    comm.barrier()
    drive("pinn", "-restart", second, "-max_it 5")
    assert content(second) == content(third)
    with pytest.raises(InputError, match=r"first\.h5 exists|third\.h5 exists"):
        drive("pinn", "-restart", second, "-max_it 6 -output", third)


# (the run, what stands beside -restart, what the one line says)
REFUSED = {
    "problem": ("moving points", "-problem burgers", "-problem cannot change: .* -problem klein_gordon, not burgers"),
    "network": ("moving points", "-network mlp", "-network cannot change: .* -network residual, not mlp"),
    "width": ("moving points", "-width 9", "-width cannot change: .* -width 6, not 9"),
    "depth": ("moving points", "-depth 3", "-depth cannot change"),
    "precision": ("moving points", "-dtype float32", "-dtype cannot change: .* -dtype float64, not float32"),
    "seed": ("moving points", "-seed 5", "-seed cannot change: .* -seed 4, not 5"),
    "points": ("moving points", "-points 90", "-points changes only where another -solver begins.* -points 60, not 90"),
    "moving of points": ("moving points", "-resample never", "-resample changes only where"),
    "a typing error": ("moving points", "-max_iterations 9", "unknown option -max_iterations"),
    "another solver's option": ("moving points", "-local_steps 9", "unknown option -local_steps"),
    "a value out of range": ("moving points", "-max_it -1", "-max_it must be 0 or more"),
    "data": ("batches", "-data other.h5", "-data cannot change: .* -data digits, not other.h5"),
    "samples": ("batches", "-samples 60", "-samples cannot change: .* -samples 90, not 60"),
    "scaling": ("batches", "-scaling unit", "-scaling cannot change: .* -scaling standard, not unit"),
    "widths": ("batches", "-widths 6,6", "-widths cannot change"),
    "batches": ("batches", "-batch_size 45", "-batch_size changes only where"),
    "norm": ("batches", "-norm 2", "-norm changes only where"),
    "model": ("batches", "-model sr1", "-model changes only where"),
    "driver": ("batches", "pinn", "was written for driver 'classify', not 'pinn'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_change_is_refused_on_all_ranks_before_any_change(
    name: str, drive: Drive, module_tmp: Path
) -> None:
    run, beside, message = REFUSED[name]
    driver, options = RUNS[run]
    path = module_tmp / f"{driver}.h5"
    if not path.exists():  # since the first case
        drive(driver, options, "-max_it 2 -output", path)
    before = path.read_bytes()
    words = ("pinn",) if beside == "pinn" else (driver, beside)
    with pytest.raises(InputError, match=message) as error:
        drive(words[0], "-restart", path, *words[1:])
    assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == before
    assert not path.with_suffix(".h5.new").exists()


def test_what_changes_is_noted(drive: Drive, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    drive("pinn", EQUATION, "-solver lbfgs -max_it 2 -output", path)
    result = drive(
        "pinn",
        "-restart",
        path,
        "-max_it 4 -memory 5 -tao_fmin 1e-7 -test_points 0 -width 6 -resample auto -solver auto",
    )
    assert sorted(notes(result)) == [
        "-max_it 4 in the place of 2", "-memory 5 in the place of 3", "-tao_fmin 1e-7 in the place of the default",
        "-test_points 0 in the place of 20",
    ]  # fmt: skip
    now = attributes(path)
    assert (now["option memory"], now["option tao_fmin"], now["option solver"]) == ("5", "1e-7", "lbfgs")
    assert not notes(drive("pinn", "-restart", path, "-max_it 4 -memory 5"))


@pytest.mark.parametrize("beside", ["-solver lbfgs", "-tao_type lmvm", "-solver lmvm"])
def test_another_solver_begins_afresh_with_options_of_its_own(beside: str, drive: Drive, shared_tmp: Path) -> None:
    driver, options = RUNS["moving points"]
    path, solver = shared_tmp / "run.h5", beside.split()[1]
    drive(driver, options, "-max_it 4 -output", path)
    with h5py.File(path, "r") as file:
        losses = file["history/loss"][()]
    result = drive(driver, "-restart", path, "-max_it 8 -points 70", beside)
    assert {
        f"-solver {solver} in the place of ssbroyden",
        "without -matrix_form factored, options of ssbroyden",
        "-points 70 in the place of 60",
        "the solver begins afresh from the parameters of the file: it has no state of its own there",
    } <= set(notes(result))
    assert "70 points (residual at 70), the interior ones new every 2 iterations" in result.out
    with h5py.File(path, "r") as file:
        assert file["history/iteration"][()].tolist() == list(range(9))
        np.testing.assert_array_equal(file["history/loss"][:5], losses)
        assert np.all(np.diff(file["history/work"]) > 0)
    again = drive(driver, "-restart", path, "-max_it 9")  # with the solver that the file has now
    assert f"solver {solver} on" in again.out
    assert "9 iterations" in again.out


def test_batches_of_another_size_begin_anew_with_another_solver(drive: Drive, shared_tmp: Path) -> None:
    driver, options = RUNS["batches"]
    path = shared_tmp / "run.h5"
    drive(driver, options, "-max_it 3 -output", path)
    with pytest.raises(InputError, match="-batch_growth is for solvers with a trust region"):
        drive(driver, "-restart", path, "-solver lbfgs -batch_size 45 -max_it 5")
    result = drive(driver, "-restart", path, "-solver lbfgs -batch_size 45 -batch_growth 1 -max_it 5")
    assert "2 batches an epoch of 45" in result.out
    assert "5 iterations" in result.out
    again = drive(driver, "-restart", path, "-solver ssbroyden -batch_size 0 -max_it 7")
    assert "all in each evaluation" in again.out
    assert "7 iterations" in again.out


HEAT = """
import torch
from ddml.problems import PDE


class Heat(PDE):
    domain = {"t": (0, 1), "x": (0, 1)}
    width, depth = 5, 2

    def lift(self, t, x):
        return torch.sin(torch.pi * x)

    def factor(self, t, x):
        return t * x * (1 - x)

    def residual(self, u, t, x):
        return u.t - 0.1 * u.xx


class Cold(Heat):
    pass
"""


def test_a_users_class_may_move_and_no_other_takes_its_place(drive: Drive, comm: MPI.Comm, shared_tmp: Path) -> None:
    old, new, path = shared_tmp / "heat.py", shared_tmp / "moved" / "heat.py", shared_tmp / "run.h5"
    if comm.rank == 0:
        old.write_text(HEAT)
    comm.barrier()
    drive("pinn", f"-problem {old}:Heat -points 50 -error_points 16 -max_it 2 -output", path)
    assert attributes(path)["option width"] == "5"
    before = path.read_bytes()
    comm.barrier()
    if comm.rank == 0:
        new.parent.mkdir()
        shutil.move(old, new)
    comm.barrier()
    with pytest.raises(InputError, match=r"no file .*heat\.py' here: give the new path as -problem path/to/heat"):
        drive("pinn", "-restart", path, "-max_it 4")
    with pytest.raises(InputError, match="-problem cannot change"):
        drive("pinn", "-restart", path, f"-max_it 4 -problem {new}:Cold")
    assert path.read_bytes() == before
    comm.barrier()
    result = drive("pinn", "-restart", path, f"-max_it 4 -problem {new}:Heat")
    assert f"-problem {new}:Heat in the place of {old}:Heat" in notes(result)
    assert "the solver begins afresh" not in result.out
    with pytest.raises(InputError, match=r"names a program.*heat\.py:Heat': give it anew with -problem, or -trust"):
        drive("pinn", "-restart", path)
    assert "4 iterations" in drive("pinn", "-restart", path, "-trust").out


def test_a_file_of_an_older_ddml_goes_on(drive: Drive, comm: MPI.Comm, shared_tmp: Path) -> None:
    """Older files leave open what the problem chooses, and may have options that are gone."""
    driver, options = RUNS["moving points"]
    path, state = shared_tmp / "run.h5", shared_tmp / "whole.h5"
    drive(driver, options.replace("-summation_blocks 4", ""), "-max_it 5 -output", state)
    drive(driver, options.replace("-summation_blocks 4", ""), "-max_it 2 -output", path)
    assert attributes(path)["option summation_blocks"] == "None"
    assert int(attributes(path)["summation_blocks"]) > 0
    result = drive(driver, "-restart", path, "-max_it 5")
    assert content(path) == content(state)
    assert "sums in fixed order" in result.out
    if comm.rank == 0:
        rewrite(path, {"option width": "None", "option sweep_twice": "3", "option target_accuracy": "1.01"})
    comm.barrier()
    result = drive(driver, "-restart", path, "-max_it 6 -width 6")
    assert "-sweep_twice 3 of the run file is read by nothing here" in notes(result)
    assert "target_accuracy" not in result.out
    assert "6 iterations" in result.out
    if comm.rank == 0:
        rewrite(path, {"option width": "None"})
    comm.barrier()
    with pytest.raises(InputError, match="another network"):
        drive(driver, "-restart", path, "-max_it 7 -width 7")


def rewrite(path: Path, changes: dict[str, str]) -> None:
    """Write a run file again with other attributes, in this process alone."""
    own = {"format", "format_version", "ranks", "petsc_version", "numpy_version", "h5py_version", "hdf5_version",
           "python_version", "ddml_version"}  # fmt: skip
    header = run_file.inspect(str(path), MPI.COMM_SELF)
    theta = PETSc.Vec().createSeq(header.size)
    state, history = run_file.read(str(path), theta)
    kept = {name: value for name, value in header.attributes.items() if name not in own}
    run_file.write(
        str(path), theta, parameters=header.parameters, state=state, history=history, attributes=kept | changes
    )
