"""``environment.sh`` beside a Python that has petsc4py already: what it brings stays, what does not fit is refused.

The given interpreters are virtual environments whose packages are links to those of this one, but for what a test
says: another numpy, a serial h5py, an old petsc4py."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))
OTHER_NUMPY = "2.3.5"


def interpreter(folder: Path, without: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A virtual environment in ``folder`` with links to all packages of this one but those of the names
    ``without`` and this project: its interpreter and where its packages lie."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(folder, "lib", PACKAGES.parent.name, "site-packages")
    for package in PACKAGES.iterdir():
        if not package.name.lower().startswith((*without, "ddml", "__pycache__", "pip")):
            (packages / package.name).symlink_to(package)
    return folder / "bin" / "python", packages


def module(packages: Path, name: str, text: str) -> None:
    """A package ``name`` of one file."""
    (packages / name).mkdir()
    (packages / name / "__init__.py").write_text(text)


def printed(python: Path, *arguments: str) -> list[str]:
    """The lines that an interpreter prints."""
    return subprocess.run([python, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def set_up(tree: Path, python: Path, **settings: str) -> subprocess.CompletedProcess:
    """Call ``environment.sh`` in a copy of the sources, outside MPI."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PYTHONPATH"))}
    environment = mine | {"PYTHON": str(python), "DDML_CACHE": str(tree / "cache")} | settings
    return subprocess.run([tree / "environment.sh"], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def tree(tmp_path):
    """A copy of what the set-up reads, without an environment, under a name with a blank and a letter of its own."""
    tree = tmp_path / "a träe"
    for name in ("ddml", "solvers", "drivers"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / "docs").mkdir()
    for name in ("environment.sh", "versions.txt", "setup.py", "README.md", "docs/requirements.txt"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def refusal(tree: Path, python: Path, **settings: str) -> str:
    """The one line that ends the set-up, before anything was made."""
    made = set_up(tree, python, **settings)
    assert made.returncode == 1
    assert not (tree / ".venv").exists() and not (tree / "cache").exists()
    (line,) = made.stderr.splitlines()
    assert line.startswith("environment: error: ")
    return line


@pytest.mark.long
def test_what_the_interpreter_brings_stays(tree, tmp_path):
    python, packages = interpreter(tmp_path / "given", without=("numpy",))
    pip = ["-m", "pip", "-q", "-q", "--disable-pip-version-check"]
    printed(Path(sys.executable), *pip, "install", "--no-deps", "--target", str(packages), f"numpy=={OTHER_NUMPY}")
    made = set_up(tree, python)
    assert made.returncode == 0, made.stderr
    assert f"numpy=={OTHER_NUMPY}" in made.stderr
    program = (
        "import numpy, h5py, mpi4py, petsc4py, torch; print(numpy.__version__, h5py.get_config().mpi);"
        "print(*(m.__file__ for m in (numpy, h5py, mpi4py, petsc4py)), sep='\\n')"
    )
    new = tree / ".venv" / "bin" / "python"
    first, *places = printed(new, "-c", program)
    assert first == f"{OTHER_NUMPY} True"
    assert all(Path(place).is_relative_to(packages) for place in places)
    later = [new, *pip[:2], "install", "--dry-run", f"numpy!={OTHER_NUMPY}"]
    refused = subprocess.run(later, capture_output=True, text=True)
    assert refused.returncode and "conflicting" in refused.stderr  # of every later install, too
    assert set_up(tree, python).stderr == ""  # and it is made once


def test_an_old_petsc4py_is_refused_with_its_version(tree, tmp_path):
    python, packages = interpreter(tmp_path / "given", without=("petsc",))
    module(packages, "petsc4py", "__version__ = '3.18.5'")
    assert "petsc4py 3.18.5" in refusal(tree, python)


def test_a_petsc4py_that_does_not_load_is_refused(tree, tmp_path):
    python, packages = interpreter(tmp_path / "given", without=("petsc",))
    module(packages, "petsc4py", f"__version__ = '{version('petsc4py')}'")
    assert "does not load" in refusal(tree, python)


def test_a_petsc_of_complex_numbers_is_refused(tree, tmp_path):
    python, packages = interpreter(tmp_path / "given", without=("petsc",))
    module(packages, "petsc4py", f"__version__ = '{version('petsc4py')}'")
    (packages / "petsc4py" / "PETSc.py").write_text("from numpy import complex128 as ScalarType")
    assert "computes in complex128" in refusal(tree, python)


SERIAL = "from types import SimpleNamespace\n__version__ = '3.11.0'\nget_config = lambda: SimpleNamespace(mpi=False)"


def test_a_serial_h5py_before_ours_is_refused(tree, tmp_path):
    python, _ = interpreter(tmp_path / "given", without=("h5py",))
    module(tmp_path, "h5py", SERIAL)
    assert "serial h5py (3.11.0), from" in refusal(tree, python, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("serial", [True, False])
def test_without_a_parallel_hdf5_h5py_is_refused(tree, tmp_path, serial):
    python, packages = interpreter(tmp_path / "given", without=("h5py", "petsc"))
    if serial:
        module(packages, "h5py", SERIAL)
    config = {"PETSC_DIR": str(tmp_path), "PETSC_ARCH": ""}
    module(packages, "petsc4py", f"__version__ = '{version('petsc4py')}'\nget_config = lambda: {config}")
    (packages / "petsc4py" / "PETSc.py").write_text("from numpy import float64 as ScalarType")
    (tmp_path / "bin").mkdir()  # neither mpicc nor h5pcc
    for name in ("bash", "cat", "cut", "dirname", "env", "grep", "sed", "sha256sum", "uname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    words = "a serial h5py (3.11.0)" if serial else "no h5py"
    assert f"has {words}, ddml is tested with one built with MPI" in refusal(tree, python, PATH=str(tmp_path / "bin"))


def test_cuda_is_asked_of_what_has_it(tree, tmp_path):
    assert "has no CUDA" in refusal(tree, interpreter(tmp_path / "given")[0], DDML_CUDA="1")
    bare = interpreter(tmp_path / "bare", without=("petsc",))[0]
    assert "CUDA_HOME" in refusal(tree, bare, DDML_CUDA="1", CUDA_HOME=str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to("/bin/true")
    wrong = {"DDML_CUDA": "1", "CUDA_HOME": str(tmp_path), "DDML_CUDA_ARCH": "hopper"}
    assert "DDML_CUDA_ARCH" in refusal(tree, bare, **wrong)


@pytest.mark.skipif("DDML_LONG" not in os.environ, reason="builds h5py")
def test_a_serial_h5py_is_built_anew(tree, tmp_path):
    python, packages = interpreter(tmp_path / "given", without=("h5py",))
    module(packages, "h5py", SERIAL)
    made = set_up(tree, python)
    assert made.returncode == 0, made.stderr
    assert "building h5py against" in made.stderr
    new = tree / ".venv" / "bin" / "python"
    program = "import h5py; print(h5py.get_config().mpi, h5py.__version__)"
    assert printed(new, "-c", program) == [f"True {version('h5py')}"]
