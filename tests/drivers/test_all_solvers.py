"""Every solver of the table, ours and PETSc's, on digits and on an equation: it runs, or refuses in one line."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from launch import ROOT
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError
from solvers import PETSC_TYPES, SOLVERS

sys.path.insert(0, str(ROOT / "drivers"))
import classify
import pinn

DIGITS = "-data digits -samples 60 -widths 6,5 -progress none"
EQUATION = "-problem klein_gordon -width 6 -depth 2 -points 60 -error_points 16 -test_points 0 -progress none"
DRIVERS = {"digits": (classify.main, DIGITS), "klein_gordon": (pinn.main, EQUATION)}
TYPES = [f"-solver {name}" for name in (*SOLVERS, *PETSC_TYPES)] + [f"-tao_type {name}" for name in PETSC_TYPES]
REFUSED = {
    ("digits", "gauss_newton"): "sums of squares",
    **{("klein_gordon", name): "no modular norm" for name in ("tr", "apts_weights", "apts_data", "napts")},
}


@pytest.fixture
def drive(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], int]]:
    """Call a driver in this process with some options; its exit code."""
    database, before = PETSc.Options(), PETSc.Options().getAll()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(name: str, options: str) -> int:
        main, common = DRIVERS[name]
        words = f"{common} {options}".split()  # names and values
        for key, value in zip(words[::2], words[1::2], strict=True):
            database.setValue(key, value)
        monkeypatch.setattr(sys, "argv", [name])
        return main(comm)

    yield run
    for key in database.getAll().keys() - before.keys():
        database.delValue(key)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("options", TYPES)
@pytest.mark.parametrize("name", DRIVERS)
def test_it_runs(
    drive: Callable[[str, str], int], capfd: pytest.CaptureFixture[str], comm: MPI.Comm, shared_tmp: Path,
    name: str, options: str,
) -> None:  # fmt: skip
    solver, path = options.split()[1], shared_tmp / "run.h5"
    if solver in ("tr", "apts_weights", "apts_data", "napts") and name == "klein_gordon":
        assert drive(name, f"{options} -norm 2 -max_it 3") == 0
        PETSc.Options().delValue("norm")
        capfd.readouterr()
    if (name, solver) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, solver]):
            drive(name, f"{options} -max_it 3")
        return
    assert drive(name, f"{options} -max_it 3 -output {path}") == 0
    if comm.rank == 0:
        assert f"solver {solver} on" in capfd.readouterr().out
        with h5py.File(path, "r") as file:
            assert file.attrs["solver"] == solver
            assert np.isfinite(file["history/loss"][()]).all() and file["history/iteration"][()].max() <= 3
    comm.barrier()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-solver bqnkls", "'bqnkls'"),
        ("-tao_type bqnkls", "-tao_type must be one of"),
        ("-tao_type python", "by -solver"),
        ("-solver lmvm -tao_type cg", "ask for two solvers"),
        ("-tao_max_it 7 -max_it 40", "-tao_max_it is -max_it"),
    ],
)
@pytest.mark.parametrize("name", DRIVERS)
def test_it_is_refused(drive: Callable[[str, str], int], name: str, options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drive(name, options)


@pytest.mark.parametrize("options", ["-solver aspqn -local_solver tr", "-solver mspqn -local_solver tr",
                                     "-solver aspqn -local_solver ssbroyden -coarse_step true",
                                     "-solver napts -local_solver lbfgs"])  # fmt: skip
@pytest.mark.parametrize("name", DRIVERS)
def test_local_solvers_have_their_own_defaults(drive: Callable[[str, str], int], name: str, options: str) -> None:
    if name == "klein_gordon":  # which has no modular norm
        options += {"tr": " -sub_norm 2", "lbfgs": " -norm 2"}.get(options.split()[3], "")
    assert drive(name, f"{options} -max_it 2") == 0


@pytest.mark.parametrize("solver", ["apts_weights", "napts", "mspqn_dense", "aspqn"])
def test_one_layer_is_the_undivided_method(
    drive: Callable[[str, str], int], capfd: pytest.CaptureFixture[str], comm: MPI.Comm, tmp_path: Path, solver: str
) -> None:
    network = tmp_path / "network.py"
    network.write_text(
        "from torch import nn\n\ndef one(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
    )
    assert drive("digits", f"-network {network}:one -solver {solver} -max_it 3") == 0
    if comm.rank == 0:
        assert "note: there is one subdomain" in capfd.readouterr().out


@pytest.mark.parametrize("solver", ["apts_weights", "napts", "mspqn_dense"])
def test_a_number_of_subdomains_alone_is_of_layers(
    drive: Callable[[str, str], int], capfd: pytest.CaptureFixture[str], comm: MPI.Comm, solver: str
) -> None:
    assert drive("digits", f"-solver {solver} -subdomains 3 -max_it 1") == 0
    alone = capfd.readouterr().out
    assert drive("digits", f"-solver {solver} -decomposition layers -subdomains 3 -max_it 1") == 0
    if comm.rank == 0:
        pattern = re.compile("^.*subdomain.*$", re.MULTILINE)
        assert pattern.findall(alone) == pattern.findall(capfd.readouterr().out) != []


@pytest.mark.parametrize("solver", ["aspqn", "lbfgs", "ssbroyden", "lmvm", "bntr"])
@pytest.mark.parametrize("name", DRIVERS)
def test_no_iterations(
    drive: Callable[[str, str], int], capfd: pytest.CaptureFixture[str], comm: MPI.Comm, shared_tmp: Path,
    name: str, solver: str,
) -> None:  # fmt: skip
    """The initial parameters are evaluated and written; a restart with nothing to do leaves the file alone."""
    path = shared_tmp / "run.h5"
    assert drive(name, f"-solver {solver} -max_it 0 -output {path}") == 0
    if comm.rank == 0:
        assert "max_it is reached" in capfd.readouterr().out
        with h5py.File(path, "r") as file:
            assert file["history/iteration"][()].tolist() == [0] and np.isfinite(file["history/loss"][()]).all()
    comm.barrier()
    PETSc.Options().delValue("output")
    assert drive(name, f"-restart {path} -solver {solver} -max_it 2") == 0
    assert drive(name, f"-restart {path} -solver {solver} -max_it 0") == 0
    before = path.read_bytes()
    comm.barrier()
    for other, limit in (("ssbfgs", 2), ("cg", 1)):
        assert drive(name, f"-restart {path} -solver {other} -max_it {limit}") == 0
        assert path.read_bytes() == before
        comm.barrier()
    if comm.rank == 0:
        with h5py.File(path, "r") as file:
            assert file["history/iteration"][()].max() <= 2
    comm.barrier()
