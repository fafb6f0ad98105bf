"""Whatever is wrong with the input: one line that names it on all ranks, exit code 1, and no file is touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from calling import check_refusal, check_refusal_of_a_start
from launch import HERE, SMALL, launch, started
from mpi4py import MPI

PROBLEMS = HERE / "bad_problems.py"
GAUSS_NEWTON = "-solver gauss_newton -form primal"

# what is wrong: (the options, a text that the error line must contain)
OPTIONS = {
    "unknown option": ("-widht 8", "-widht"),
    "unknown option of a local solver": ("-sub_memmory 8", "-sub_memmory"),
    "option without its dash": ("-seed 1 width 8", "'width'"),
    "unknown solver": ("-solver sgd", "'sgd'"),
    "unknown local solver": ("-sub_tao_type sgd", "sgd"),
    "unknown problem": ("-problem navier", "'navier'"),
    "unknown network": ("-network transformer", "'transformer'"),
    "text for an integer": ("-width wide", "-width"),
    "no file": ("-output", "option -output has no value"),
    "more points than memory": ("-points 99999999999", "the memory is too small"),
    "zero points": ("-points 0", "-points"),
    "too large seed": ("-seed 99999999999999999999", "-seed"),
    "negative overlap": ("-overlap -1", "-overlap"),
    "more subdomains than layers": ("-subdomains 9", "9"),
    "a window of more layers than there are": ("-decomposition windows -window 9", "window"),
    "windows and their number": ("-decomposition windows -subdomains 2", "-window"),
    "no such local solver": ("-local_solver sgd", "'sgd'"),
    "memory of a solver of PETSc": ("-local_memory keep -sub_tao_type lmvm", "lmvm"),
    "max_time is no number": ("-max_time nan", "-max_time"),
    "unknown way to move points": ("-resample often", "-resample"),
    "no iterations between points": ("-resample_interval 0", "-resample_interval"),
    "no such device": ("-device cuda:99", "-device"),
    "checkpoint_interval is no interval": ("-checkpoint_interval soon", "-checkpoint_interval"),
    "additive_step is no number": ("-additive_step often", "-additive_step"),
    "negative memory": ("-memory -1", "-memory"),
    "unknown preconditioner": (f"{GAUSS_NEWTON} -preconditioner amg", "'amg'"),
    "PETSc's preconditioner that needs a matrix": (f"{GAUSS_NEWTON} -gn_pc_type lu", "-gn_ options"),
    "preconditioner of no module": (f"{GAUSS_NEWTON} -gn_pc_type python -gn_pc_python_type solvers.Foo", "solvers.Foo"),
    "window of too many layers": (f"{GAUSS_NEWTON} -preconditioner schwarz -gn_window 9", "a window must hold"),
    "option of another preconditioner": (f"{GAUSS_NEWTON} -gn_sweep additive", "-gn_sweep"),
    "text for one of PETSc's numbers": ("-tao_fmin small", "-tao_fmin"),
}

USER_PROBLEMS = {
    "user file is missing": ("nothing.py:Right", "nothing.py"),
    "user file does not import": ("{folder}/broken.py:Right", "SyntaxError"),
    "user file lacks the class": (f"{PROBLEMS}:Wrong", "'Wrong'"),
    "class is no PDE": (f"{PROBLEMS}:NotAProblem", "NotAProblem"),
    "class cannot be made": (f"{PROBLEMS}:BadConstructor", "no such table"),
    "residual of wrong shape": (f"{PROBLEMS}:WrongShape", "residual"),
    "unknown derivative": (f"{PROBLEMS}:UnknownDerivative", "u.yy"),
    "residual raises": (f"{PROBLEMS}:Raises", "viscosity"),
    "residual is not a number": (f"{PROBLEMS}:NotANumber", "nan"),
    "domain without intervals": (f"{PROBLEMS}:NoInterval", "NoInterval"),
    "no terms": (f"{PROBLEMS}:NoTerms", "no terms"),
}


def damage(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["parameters"] = [1.0, 2.0]


# what is wrong: (done to a good run file, further options, a text that the error line must contain)
FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "restart file is missing": (Path.unlink, "-restart {run}", "run.h5"),
    "restart file is truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), "-restart {run}", "damaged"),
    "restart file is damaged": (damage, "-restart {run}", "damaged"),
    "restart file is foreign": (foreign, "-restart {run}", "not a run file"),
    "restart with another network": (Path.exists, "-restart {run} -width 9", "-width cannot change"),
    "restart with another problem": (Path.exists, "-restart {run} -problem allen_cahn", "allen_cahn"),
    "restart into another file": (Path.exists, "-restart {run} -output {folder}/broken.py", "broken.py exists"),
    "output exists": (Path.exists, "-output {run}", "-overwrite"),
    "folder of output is missing": (Path.exists, "-output {folder}/nowhere/run.h5", "nowhere"),
    "folder of output is a file": (Path.exists, "-output {run}/run.h5", "run.h5"),
}


# what is wrong: (done to a good run file, options, a text that the error line must contain)
KEEP = "-output {run} -overwrite "
TRIES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    **{name: (Path.exists, KEEP + options, text) for name, (options, text) in OPTIONS.items()},
    **{name: (Path.exists, f"{KEEP}-problem {problem}", text) for name, (problem, text) in USER_PROBLEMS.items()},
    **FILES,
}


def prepared(folder: Path, good: Path, prepare: Callable[[Path], object], options: str) -> list[str]:
    """The command line, for a folder with a good run file to which something was done."""
    run = folder / "run.h5"
    if MPI.COMM_WORLD.rank == 0:
        shutil.copy(good, run)
        (folder / "broken.py").write_text("class Right(:\n")
        prepare(run)
    MPI.COMM_WORLD.barrier()
    return [*SMALL, "-solver", "aspqn", "-max_it", "5", *options.format(run=run, folder=folder).split()]


@pytest.mark.parametrize("name", TRIES)
def test_bad_input_is_named_in_one_line_on_all_ranks(
    name: str, good: Path, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    *what, expected = TRIES[name]
    check_refusal("pinn", prepared(shared_tmp, good, *what), expected, shared_tmp, capfd)


@started
@pytest.mark.parametrize("name", ["unknown option of a local solver", "residual raises", "restart file is damaged"])
def test_a_driver_that_refuses_prints_one_line_and_ends_with_1(name: str, good: Path, tmp_path: Path) -> None:
    *what, expected = TRIES[name]
    check_refusal_of_a_start("pinn", prepared(tmp_path, good, *what), expected, tmp_path)


@started
def test_help_lists_the_options() -> None:
    result = launch(2, "-help")
    assert result.rc == 0, result.err
    options = """problem solver width depth network points seed dtype subdomains overlap local_steps max_it max_work
                 max_time target_error checkpoint_interval output restart"""
    for option in options.split():
        assert f"  -{option} " in result.out
