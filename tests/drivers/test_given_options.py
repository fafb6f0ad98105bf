"""Options that do not stand on the command line, PETSc's own ones, and foreign packages."""

import shutil
from pathlib import Path

import h5py
import pytest
from calling import call, refusal
from launch import ROOT, SMALL, launch, started
from mpi4py import MPI
from petsc4py import PETSc

RUN = ("-solver", "lbfgs", *SMALL, "-progress", "none", "-max_it", 3)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Options that are there when a driver is called, as PETSC_OPTIONS gives them."""
    monkeypatch.setenv("PETSC_OPTIONS", request.param)
    for key in (words := request.param.split())[::2]:
        PETSC.setValue(key, words[words.index(key) + 1])
    request.addfinalizer(lambda: [PETSC.delValue(key) for key in words[::2]])
    return str(request.param)


PETSC = PETSc.Options()


def options(path: Path) -> dict[str, str]:
    with h5py.File(path, "r") as file:
        return {name: str(value) for name, value in file.attrs.items()}


@pytest.mark.parametrize("around", ["-memory 3 -snes_max_it 7"], indirect=True)
def test_ours_are_in_force_and_foreign_ones_noted(
    around: str, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    assert call("pinn", *RUN, "-seed", 4, "-view", "-output", path) == 0
    out = capfd.readouterr().out
    if comm.rank == 0:
        assert "\noptions of PETSC_OPTIONS: -memory 3\n" in out
        assert "\nnote: -snes_max_it of PETSC_OPTIONS is read by nothing here\n" in out
        assert "\n  -memory 3 (PETSC_OPTIONS)\n" in out
        assert "\n  -seed 4 (the command line)\n" in out
        found = options(path)
        assert (found["option memory"], found["origin memory"]) == ("3", "PETSC_OPTIONS")
        assert (found["option seed"], found["origin seed"]) == ("4", "the command line")
        assert "option snes_max_it" not in found
    comm.barrier()


@pytest.mark.parametrize("around", ["-width 9 -max_it 50 -memory 7 -snes_max_it 7"], indirect=True)
def test_a_restart_goes_on_with_the_options_of_its_file(
    around: str, good: Path, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the command line's, whatever the environment says by now."""
    path = shared_tmp / "run.h5"
    if comm.rank == 0:
        shutil.copy(good, path)
    comm.barrier()
    with h5py.File(path, "r") as file:
        before = dict(file.attrs)
    comm.barrier()
    assert call("pinn", "-restart", path, "-max_it", 6) == 0
    out = capfd.readouterr().out
    assert comm.rank > 0 or "note: -width 9 of PETSC_OPTIONS gives way to the run file" in out
    assert comm.rank > 0 or "note: -memory 7 of PETSC_OPTIONS gives way to the run file" in out
    comm.barrier()
    after = options(path)
    assert after["option width"] == before["option width"] == "8"
    assert after["option max_it"] == "6"
    assert "option snes_max_it" not in after


@pytest.mark.parametrize(
    ("around", "expected"),
    [
        ("-seed wide", "option -seed must be an integer, got 'wide' (-seed stands in PETSC_OPTIONS)"),
        ("-tao_max_it 7", "-tao_max_it stands in PETSC_OPTIONS"),
        ("-tao_type lmvm", "ask for two solvers: give one (-tao_type stands in PETSC_OPTIONS)"),
        ("-sub_tao_type sgd", "-sub_tao_type stands in PETSC_OPTIONS"),
    ],
    indirect=["around"],
)
def test_what_is_wrong_with_one_is_said_with_its_place(around: str, expected: str, good: Path) -> None:
    assert expected in refusal("pinn", *RUN, "-solver", "aspqn", "-output", good, "-overwrite")


@pytest.mark.parametrize("driver", ["pinn", "classify"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-tao_max_it 7 -max_it 40", "-tao_max_it is -max_it here"),
        ("-tao_python_type solvers.ASPQN", "-tao_python_type is -solver"),
        ("-tao_type python", "-tao_type must be one of"),
        ("-solver lbfgs -tao_max_funcs 5", "-tao_max_funcs is for PETSc's own solvers: LBFGS"),
        ("-solver lbfgs -tao_trust0 5", "-tao_trust0 is for PETSc's own solvers: LBFGS"),
        ("-solver lbfgs -tao_fd_gradient", "-tao_fd_gradient is for PETSc's own solvers: LBFGS"),
        ("-solver aspqn -sub_tao_max_funcs 5", "-sub_tao_max_funcs is for PETSc's own solvers: LBFGS"),
        ("-solver lbfgs -tao_type lmvm", "ask for two solvers"),
        ("-solver lmvm -tao_wrong 5", "unknown option -tao_wrong"),
    ],
)
def test_options_of_petsc_that_cannot_be_followed_are_refused_on_all_ranks(
    driver: str, words: str, expected: str
) -> None:
    of_driver = SMALL if driver == "pinn" else ("-data", "digits", "-samples", "90", "-widths", "6,5")
    assert expected in refusal(driver, *of_driver, *words.split())


def test_the_limit_of_petsc_is_refused_beside_a_restart_on_all_ranks(good: Path) -> None:
    before = good.read_bytes()
    assert "-tao_max_it is -max_it here" in refusal("pinn", "-restart", good, "-tao_max_it", 7)
    assert good.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "solver", "expected"),
    [
        ("-tao_type lmvm", "lmvm", "max_it is reached"),
        ("-tao_type lmvm -solver lmvm", "lmvm", "max_it is reached"),
        ("-solver lmvm -tao_max_funcs 3", "lmvm", "the limit of evaluations is reached"),
        ("-solver lbfgs -tao_gatol 1e9", "lbfgs", "the gradient is below tao_gatol"),
        ("-solver lmvm -tao_grtol 1e9", "lmvm", "the gradient is below tao_grtol"),
        ("-solver ssbroyden -tao_gttol 0.999", "ssbroyden", "the gradient is below tao_gttol"),
        ("-solver lbfgs -tao_steptol 1e9", "lbfgs", "the step is below tao_steptol"),
        ("-solver lbfgs -tao_fmin 1e9", "lbfgs", "the loss is below tao_fmin"),
        (
            "-solver lbfgs -tao_view -tao_converged_reason -tao_monitor -tao_monitor_cancel",
            "lbfgs",
            "max_it is reached",
        ),
        ("-prefix_push sub_ -memory 3 -prefix_pop -solver aspqn", "aspqn", "max_it is reached"),
        ("-options_left -solver lbfgs", "lbfgs", "max_it is reached"),
    ],
)
def test_options_of_petsc_are_followed_and_the_file_says_what_ran(
    words: str, solver: str, expected: str, comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    assert call("pinn", *SMALL, "-max_it", 20, "-progress", "none", *words.split(), "-output", path) == 0
    out = capfd.readouterr().out
    if comm.rank == 0:
        assert f"\nsolver {solver} on " in out
        assert f"stopped: {expected}" in out
        assert options(path)["solver"] == solver
    comm.barrier()


@started
def test_files_of_other_programs_and_foreign_packages_are_no_obstacle(tmp_path: Path) -> None:
    """A folder as people have them: options of another program, and files named like modules."""
    (tmp_path / ".petscrc").write_text("# of another program\n-snes_monitor\n-seed 7\n-max_it 2\n")
    (tmp_path / "torch.py").write_text("import torch\nfrom ddml.problems import Burgers\nfrom material import k\n")
    (tmp_path / "material.py").write_text("import random\nk = random.SECOND\n")
    (tmp_path / "random.py").write_text("SECOND = 7\n")
    for name in ("solvers", "common", "benches", "ddml"):
        (tmp_path / "foreign" / name).mkdir(parents=True)
        (tmp_path / "foreign" / name / "__init__.py").write_text("raise RuntimeError('foreign')\n")
    words = ("-problem", "torch.py:Burgers", "-solver", "lbfgs", *SMALL, "-max_it", 3, "-output", "run.h5")
    result = launch(2, *words, folder=tmp_path, fresh=True, PYTHONPATH=f"{tmp_path / 'foreign'}:{ROOT}")
    assert result.rc == 0, result.out + result.err
    assert result.err == ""
    assert "note: -snes_monitor of .petscrc is read by nothing here\n" in result.out
    assert "options of .petscrc: -seed 7\n" in result.out
    assert "stopped: max_it is reached. 3 iterations" in result.out
    found = options(tmp_path / "run.h5")
    assert (found["option seed"], found["origin seed"]) == ("7", ".petscrc")
    assert (found["option max_it"], found["origin max_it"]) == ("3", "the command line")


@started
def test_a_file_that_petsc_cannot_read_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / ".petscrc").write_text("-seed 7\nhello world\n")
    result = launch(2, *RUN, "-output", "run.h5", folder=tmp_path)
    assert result.rc == 1
    errors = [line for line in result.err.splitlines() if "error" in line.lower()]
    assert errors == [errors[0]]
    assert errors[0].startswith("error: .petscrc, line 2: 'hello world'")
    assert not (tmp_path / "run.h5").exists()


def test_a_file_of_options_is_named_in_the_header_and_where_it_is_wrong(
    comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "options.txt"
    words = ("-solver", "lbfgs", *SMALL, "-progress", "none", "-options_file", path)
    for text in ("-seed 4\n-max_it 2\n", "-seed 4\n-widht 9\n"):
        comm.barrier()
        if comm.rank == 0:
            path.write_text(text)
        comm.barrier()
        if "widht" in text:
            assert f"unknown option -widht; -help lists them (-widht stands in {path})" in refusal("pinn", *words)
        else:
            assert call("pinn", *words) == 0
            assert comm.rank > 0 or f"\noptions of {path}: -max_it 2 -seed 4\n" in capfd.readouterr().out
