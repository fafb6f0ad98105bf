"""Every solver of the table, ours and PETSc's, on digits and on an equation: it runs, or refuses in one line."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from calling import call
from mpi4py import MPI

from ddml.errors import InputError
from solvers import PETSC_TYPES, SOLVERS

DIGITS = "-data digits -samples 60 -widths 6,5 -progress none"
EQUATION = "-problem klein_gordon -width 6 -depth 2 -points 60 -error_points 16 -test_points 0 -progress none"
DEEP = {"digits": "-network euler -blocks 4 -width 5", "klein_gordon": "-network residual -depth 4"}
DRIVERS = {"digits": ("classify", DIGITS), "klein_gordon": ("pinn", EQUATION)}
TYPES = [f"-solver {name}" for name in (*SOLVERS, *PETSC_TYPES)] + [f"-tao_type {name}" for name in PETSC_TYPES]
REFUSED = {
    ("digits", "gauss_newton"): "sums of squares",
    **{("klein_gordon", name): "no modular norm" for name in ("tr", "apts_weights", "apts_data", "napts")},
}


def drive(name: str, options: str) -> int:
    """The exit code of a driver with some options, in this process."""
    driver, common = DRIVERS[name]
    return call(driver, *f"{common} {options}".split())


@pytest.mark.parametrize("options", TYPES)
@pytest.mark.parametrize("name", DRIVERS)
def test_it_runs(
    capfd: pytest.CaptureFixture[str], comm: MPI.Comm, shared_tmp: Path,
    name: str, options: str,
) -> None:  # fmt: skip
    solver, path = options.split()[1], shared_tmp / "run.h5"
    if solver in ("tr", "apts_weights", "apts_data", "napts") and name == "klein_gordon":
        assert drive(name, f"{options} -norm 2 -max_it 2") == 0
        capfd.readouterr()
    if solver in SOLVERS and SOLVERS[solver].levels_of == "depth":
        with pytest.raises(InputError, match="a plain MLP has no depth hierarchy"):
            drive(name, f"{options} -max_it 3")
        options += f" {DEEP[name]}"
    if (name, solver) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, solver]):
            drive(name, f"{options} -max_it 3")
        return
    assert drive(name, f"{options} -max_it 2 -output {path}") == 0
    if comm.rank == 0:
        assert f"solver {solver} on" in capfd.readouterr().out
        with h5py.File(path, "r") as file:
            assert file.attrs["solver"] == solver
            assert np.isfinite(file["history/loss"][()]).all() and file["history/iteration"][()].max() <= 2
    comm.barrier()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-solver bqnkls", "'bqnkls'"),
        ("-tao_type bqnkls", "-tao_type must be one of"),
        ("-solver ntl", "'ntl'"),
        ("-solver mspqn -sub_tao_type ntl", "-sub_tao_type must be one of .* got 'ntl'"),
        ("-tao_type python", "by -solver"),
        ("-solver lmvm -tao_type cg", "ask for two solvers"),
        ("-tao_max_it 7 -max_it 40", "-tao_max_it is -max_it"),
        ("-solver mspqn -sub_tao_type bqnkls", "-sub_tao_type must be one of .* got 'bqnkls'"),
        ("-solver aspqn -sub_tao_type tron", "-sub_tao_type must be one of .* got 'tron'"),
        ("-solver aspqn -coarse_step true -coarse_tao_type bqnkls", "-coarse_tao_type must be one of"),
        ("-solver apts_data -norm 2 -sub_tao_type bqnkls", "-sub_tao_type must be one of"),
        ("-solver aspqn -local_solver mspqn -sub_sub_tao_type bqnkls", "-sub_sub_tao_type must be one of"),
    ],
)
@pytest.mark.parametrize("name", DRIVERS)
def test_it_is_refused(name: str, options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drive(name, options)


@pytest.mark.parametrize("options", ["-solver aspqn -local_solver tr", "-solver mspqn -local_solver tr",
                                     "-solver aspqn -local_solver ssbroyden -coarse_step true",
                                     "-solver napts -local_solver lbfgs"])  # fmt: skip
@pytest.mark.parametrize("name", DRIVERS)
def test_local_solvers_have_their_own_defaults(name: str, options: str) -> None:
    if name == "klein_gordon":  # which has no modular norm
        options += {"tr": " -sub_norm 2", "lbfgs": " -norm 2"}.get(options.split()[3], "")
    assert drive(name, f"{options} -max_it 1") == 0


@pytest.mark.parametrize("solver", ["apts_weights", "napts", "mspqn_dense", "aspqn"])
def test_one_layer_is_the_undivided_method(
    capfd: pytest.CaptureFixture[str], comm: MPI.Comm, tmp_path: Path, solver: str
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
    capfd: pytest.CaptureFixture[str], comm: MPI.Comm, solver: str
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
    capfd: pytest.CaptureFixture[str], comm: MPI.Comm, shared_tmp: Path,
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
    assert drive(name, f"-restart {path} -solver {solver} -max_it 1") == 0
    assert drive(name, f"-restart {path} -solver {solver} -max_it 0") == 0
    before = path.read_bytes()
    comm.barrier()
    for other, limit in (("ssbfgs", 1), ("cg", 0)):
        assert drive(name, f"-restart {path} -solver {other} -max_it {limit}") == 0
        assert path.read_bytes() == before
        comm.barrier()
    if comm.rank == 0:
        with h5py.File(path, "r") as file:
            assert file["history/iteration"][()].max() <= 1
    comm.barrier()
