"""Solvers by name: loaded when they are asked for, and what they say of themselves."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from petsc4py import PETSc

import solvers
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from solvers import PETSC_TYPES, SOLVERS, Solver, configure, solver_class

ROOT = Path(__file__).parents[2]

STARTS = {
    "import solvers": ("torch", "petsc4py", "mpi4py", "solvers.base"),
    "from solvers import SOLVERS, configure; list(SOLVERS); 'tr' in SOLVERS": (
        *("solvers.quasi_newton", "solvers.trust_region", "solvers.gauss_newton", "solvers.schwarz"),
    ),
    "from solvers.schwarz import schwarz": ("solvers.quasi_newton", "solvers.trust_region", "solvers.gauss_newton"),
    "from solvers import LBFGS": ("solvers.trust_region", "solvers.gauss_newton", "solvers.schwarz"),
    "from solvers import TrustRegion": ("solvers.quasi_newton", "solvers.gauss_newton", "solvers.schwarz"),
    "from solvers import GaussNewton": ("solvers.quasi_newton", "solvers.trust_region", "solvers.schwarz"),
}


# each code in a process of its own, which begins where nothing is loaded; torch, which takes a second, once for all
EACH = """
import os, sys
codes = sys.argv[1:]
for number, code in enumerate(codes):
    if number == 1:
        import torch
        assert not [name for name in sys.modules if name.partition(".")[0] in ("ddml", "solvers", "petsc4py")]
    pid = os.fork()
    if not pid:
        exec(code)
        print(*sys.modules, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, code
"""


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="starts processes of its own")
def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    run = subprocess.run([sys.executable, "-c", EACH, *STARTS], cwd=ROOT, capture_output=True, text=True, check=True)
    for code, line in zip(STARTS, run.stdout.splitlines(), strict=True):
        loaded = line.split()
        assert "solvers" in loaded
        assert not [name for name in loaded if any(f"{name}.".startswith(f"{absent}.") for absent in STARTS[code])], (
            code
        )


def test_public_names_are_what_they_say() -> None:
    assert set(solvers.__all__) <= set(dir(solvers))
    for name in solvers.__all__:
        found = getattr(solvers, name)
        if isinstance(found, type):
            assert found.__name__ == name
    assert {kind.__name__ for kind in SOLVERS.values()} <= set(solvers.__all__)
    assert dict(SOLVERS).keys() == set(SOLVERS) and len(SOLVERS) == len(list(SOLVERS))
    with pytest.raises(AttributeError, match="'solvers' has no attribute 'SGD'"):
        solvers.SGD  # noqa: B018
    with pytest.raises(KeyError):
        SOLVERS["sgd"]


@pytest.mark.parametrize("name", [*SOLVERS, *PETSC_TYPES])
def test_classes_say_what_they_are(name: str) -> None:
    kind = solver_class(name)
    by_parameters = ("aspqn", "mspqn", "mspqn_dense", "apts_weights", "napts", "asadagrad")
    of = {**dict.fromkeys(by_parameters, "parameters"), "apts_data": "samples"}
    assert kind.subdomains_of == of.get(name, "")
    depth, samples = ("rmtr", "mgopt", "cascade", "mladagrad"), ("mlvr", "ssn", "svrg", "sarah")
    assert kind.levels_of == {**dict.fromkeys(depth, "depth"), **dict.fromkeys(samples, "samples")}.get(name, "")
    judges = ("tr", "astrom", "apts_weights", "apts_data", "napts", "rmtr", "mgopt", "cascade")
    assert kind.judges_batches == (name in judges)
    moves = {"ssbroyden": 250, "ssbfgs": 250, "gauss_newton": 5, "mspqn_dense": 1}
    assert kind.moves_points == moves.get(name, 0)
    assert kind.measures_error == (10 if name in ("ssbroyden", "ssbfgs") else 1)
    assert (kind is Solver) == (name in PETSC_TYPES)


@pytest.mark.parametrize("name", SOLVERS)
def test_petsc_finds_them_by_their_public_names(comm: MPI.Comm, prefix: str, name: str) -> None:
    by_name, by_type = PETSc.TAO().create(comm), PETSc.TAO().create(comm)
    configure(by_name, name)
    by_type.setOptionsPrefix(prefix)
    by_type.setType("python")
    by_type.setPythonType(f"solvers.{solver_class(name).__name__}")
    assert type(by_name.getPythonContext()) is type(by_type.getPythonContext()) is SOLVERS[name]
    by_name.destroy()
    by_type.destroy()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Mine:\n    pass\n", "must be a class that derives from solvers.base.Solver"),
        ("Mine = 3\n", "must be a class that derives from solvers.base.Solver"),
        ("from solvers import LBFGS\n\ndef Mine():\n    return LBFGS()\n", "must be a class that derives from"),
        ("Other = 3\n", "has no 'Mine'"),
    ],
)
def test_what_is_no_solver_is_refused(tmp_path: Path, comm: MPI.Comm, text: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    tao = PETSc.TAO().create(comm)
    for refused in (lambda name: solver_class(name), lambda name: configure(tao, name)):
        with pytest.raises(InputError, match=words) as error:
            refused(f"{tmp_path / 'mine.py'}:Mine")
        assert "\n" not in str(error.value)
    tao.destroy()
    with pytest.raises(InputError, match="unknown solver 'sgd'; there are ssbroyden, "):
        solver_class("sgd")


# what -subdomains alone means, whatever the solver's own default is
WINDOWS = ("apts_weights", "napts", "mspqn_dense")


@pytest.mark.parametrize("name", [*WINDOWS, "aspqn", "lbfgs"])
def test_a_number_of_subdomains_alone_means_layers(least_squares: Any, prefix: str, name: str) -> None:
    loss, database, kind = least_squares([3, 2, 4, 1, 2]), PETSc.Options(), solver_class(name)
    default = kind.decompose(loss, prefix)
    assert default.ranges == (Subdomains.windows(loss, 2) if name in WINDOWS else Subdomains.by_layers(loss, 5)).ranges
    database.setValue(f"{prefix}subdomains", 4)
    assert kind.decompose(loss, prefix).ranges == Subdomains.by_layers(loss, 4).ranges
    database.setValue(f"{prefix}overlap", 1)
    assert kind.decompose(loss, prefix).ranges == Subdomains.by_layers(loss, 4, 1).ranges
    database.delValue(f"{prefix}overlap")
    database.setValue(f"{prefix}decomposition", "tensors")
    assert kind.decompose(loss, prefix).ranges == Subdomains.by_tensors(loss, 4, 0, None).ranges
    database.setValue(f"{prefix}decomposition", "windows")
    with pytest.raises(InputError, match=f"-{prefix}subdomains does not go with -{prefix}decomposition windows"):
        kind.decompose(loss, prefix)


def test_the_samples_of_apts_are_no_subdomains_of_parameters(least_squares: Any, prefix: str) -> None:
    loss = least_squares([3, 2, 4])
    PETSc.Options().setValue(f"{prefix}subdomains", 2)
    assert solver_class("apts_data").decompose(loss, prefix).ranges == Subdomains.by_layers(loss, 1).ranges
