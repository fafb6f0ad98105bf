"""What pip installs: its version, what it needs, its files and commands; containers as text."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from distutils.core import run_setup
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

import ddml
from ddml.version import refuse_old

ROOT = Path(__file__).parents[1]
COMMANDS = ("ddml-pinn", "ddml-classify", "ddml-logistic", "ddml-kernel", "ddml-plot", "ddml-predict", "ddml-export")
MPIEXEC = ("mpiexec", "--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else []))
CONTAINERS = sorted((ROOT / "containers").iterdir())


@pytest.fixture(scope="module")
def setup() -> Iterator[SimpleNamespace]:
    """The arguments of setup.py, as setuptools has them."""
    before = Path.cwd()
    os.chdir(ROOT)
    dist = run_setup("setup.py", stop_after="init")
    os.chdir(before)
    yield SimpleNamespace(version=dist.get_version(), needs=dist.install_requires, extras=dist.extras_require,
                          commands=dist.entry_points["console_scripts"])  # fmt: skip


def names(requirements: list[str]) -> set[str]:
    return {re.split("[<>=]", requirement)[0] for requirement in requirements}


def test_the_version_is_the_same_everywhere(setup: SimpleNamespace) -> None:
    assert setup.version == ddml.__version__
    assert f"\nversion: {ddml.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {ddml.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    docs, navigation = ROOT / "docs", (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(docs).as_posix() for page in docs.rglob("*.md")]
    assert [page for page in pages if f"- {page}\n" not in navigation] == []


def test_least_versions_are_not_above_those_that_are_tested(setup: SimpleNamespace) -> None:
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "versions.txt").read_text(), re.MULTILINE))
    page = (ROOT / "docs/installing.md").read_text()
    for requirement in setup.needs:
        name, least = requirement.split(">=")
        assert [*map(int, least.split("."))] <= [*map(int, pins[name].split("."))], requirement
        assert f"| {name} | {least} |" in page, "docs/installing.md says why"
    assert {"numpy", "scipy", "torch", "h5py", "mpi4py", "petsc4py"} == names(setup.needs)


def test_every_package_that_the_code_may_import_is_needed_or_an_extra(setup: SimpleNamespace) -> None:
    ours = {"ddml", "solvers", "common", *sys.stdlib_module_names, *(p.stem for p in (ROOT / "drivers").glob("*.py"))}
    found: set[str] = set()
    for package in ("ddml", "solvers", "drivers/common"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module or "")
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "extra":
                    found |= {a.value for a in node.args[1:] if isinstance(a, ast.Constant)}
    missing = {{"PIL": "Pillow"}.get(top, top) for top in (name.partition(".")[0] for name in found)} - ours
    assert {"torch", "tensorboard", "onnxscript", "xarray", "Pillow"} <= missing, "what the code imports"
    assert missing <= names(setup.needs) | {n for extra in setup.extras.values() for n in names(extra)}


def test_each_command_is_the_program_of_that_name(setup: SimpleNamespace) -> None:
    assert tuple(entry.partition(" = ")[0] for entry in setup.commands) == COMMANDS
    source = (ROOT / "drivers/commands.py").read_text()
    defined = re.findall(r'^(\w+) = partial\(start, "(\w+)"\)', source, re.MULTILINE)
    assert setup.commands == [f"ddml-{name} = ddml_drivers.commands:{name}" for name, _ in defined]
    for name, program in defined:
        assert name == program
        assert "def main(comm: MPI.Comm) -> int:" in (ROOT / f"drivers/{program}.py").read_text()


@pytest.mark.parametrize("recipe", CONTAINERS, ids=lambda p: p.name)
def test_containers_name_what_there_is(recipe: Path) -> None:
    text = recipe.read_text()
    assert "make env" in text
    assert "debian:12" in text
    for path in re.findall(r"\b(?:containers|drivers|docs|ddml)/[\w./]+", text):
        if not path.startswith("ddml/.venv"):  # which make env will have made
            assert (ROOT / path).exists(), path
    assert set(re.findall(r"ddml-\w+", text)) <= set(COMMANDS)
    assert len(CONTAINERS) == 2


def test_debian_has_the_packages_of_containers() -> None:
    found = [re.findall(r"apt-get install -y --no-install-recommends (.+?) *\\?\n", p.read_text()) for p in CONTAINERS]
    assert [len(lines) for lines in found] == [1, 1]
    wanted = sorted({package for (line,) in found for package in line.split()})
    assert "python3-venv" in wanted
    if shutil.which("apt-cache") is None or not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("no lists of Debian's packages here")
    shown = subprocess.run(["apt-cache", "show", *wanted], capture_output=True, text=True, check=False)
    assert sorted(set(re.findall("^Package: (.+)$", shown.stdout, re.MULTILINE))) == wanted, shown.stderr


@pytest.mark.parametrize(
    ("version", "old"),
    [("3.26.1", False), ("3.26.0", False), ("3.27.0.dev0", False), ("4.0", False),
     ("3.25.6", True), ("3.18.5", True), ("3.9.1", True), ("2.99", True)],
)  # fmt: skip
def test_an_old_petsc4py_is_refused_by_its_version(version: str, old: bool, setup: SimpleNamespace) -> None:
    with pytest.raises(ImportError, match=f"petsc4py {version} is too old: ddml needs 3.26") if old else nullcontext():
        refuse_old(version)
    assert "petsc4py>=3.26" in setup.needs


# What follows builds and installs: make test-long and .ci/run -------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The wheel that is made of the source distribution, in an environment beside the packages of this one."""
    folder = tmp_path_factory.mktemp("package")

    def python(*words: object, where: Path = ROOT) -> None:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    pip = ("-m", "pip", "--disable-pip-version-check")
    python("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder)
    (sdist,) = folder.glob("*.tar.gz")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    python("-m", "venv", "--without-pip", folder / "venv")
    python(*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", wheel)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib"))  # what .pth files there name is not added
    empty = folder / "empty"
    empty.mkdir()
    return SimpleNamespace(sdist=sdist, wheel=wheel, bin=folder / "venv/bin", site=site, empty=empty)


def run(installed: SimpleNamespace, *words: object, ranks: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """A command of the wheel in the empty folder, on so many ranks; 0 is without mpiexec."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PYTHON"))}
    variables |= {"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1", **more}
    command = [*(MPIEXEC if ranks else ()), *(("-n", str(ranks)) if ranks else ())]
    return subprocess.run(
        [*command, str(installed.bin / str(words[0])), *map(str, words[1:])], cwd=installed.empty, env=variables,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_the_source_distribution_is_a_checkout(installed: SimpleNamespace) -> None:
    with tarfile.open(installed.sdist) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    outside = {".ci/run", ".dockerignore", ".gitignore"}
    assert set(tracked) - found <= outside
    assert {"LICENSE", "ddml/kernels/vectors.h", "environment.sh", "versions.txt"} <= found
    assert not any(name.endswith((".so", ".pyc")) for name in found)


@pytest.mark.long
def test_the_wheel_holds_what_is_imported_and_no_more(installed: SimpleNamespace) -> None:
    found = set(ZipFile(installed.wheel).namelist())
    assert {name.partition("/")[0] for name in found} == {
        "ddml", "solvers", "ddml_drivers", f"ddml-{ddml.__version__}.dist-info",
    }  # fmt: skip
    for package in ("ddml", "solvers"):
        assert {str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py")} <= found
    assert {"ddml/data/digits.npz", "ddml_drivers/pinn.py", "ddml_drivers/common/program.py"} <= found
    assert {f"ddml/kernels/_{k}{sysconfig.get_config_var('EXT_SUFFIX')}" for k in ("portable", "sums")} <= found
    assert not any("bench" in name or name.endswith((".c", ".h")) for name in found)
    assert any(name.endswith("LICENSE") for name in found)


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_in_an_empty_folder(command: str, installed: SimpleNamespace) -> None:
    done = run(installed, command, "-help")
    assert (done.returncode, done.stderr) == (0, "")
    assert command in done.stdout
    assert not list(installed.empty.iterdir())


@pytest.mark.long
def test_commands_refuse_as_the_programs_do(installed: SimpleNamespace) -> None:
    done = run(installed, "ddml-pinn", "-widht", 9, ranks=2)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: unknown option -widht; -help lists them"
    ]
    done = run(installed, "ddml-plot", "nothing.h5")
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (1, 1, "error: "), done.stderr
    assert not list(installed.empty.iterdir())


@pytest.mark.long
def test_what_ends_one_rank_ends_all(installed: SimpleNamespace, tmp_path: Path) -> None:
    """An import that fails on one rank, while the others wait in the first collective call."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n"
        "    sys.modules['ddml.runs.advice'] = None\n"
    )
    done = run(installed, "ddml-pinn", "-max_it", 1, ranks=2, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "ddml.runs.advice" in done.stderr


@pytest.mark.long
def test_a_run_of_the_wheel_goes_on_and_is_read(installed: SimpleNamespace, tmp_path: Path) -> None:
    """Also where other packages of these names come first."""
    for name in ("ddml", "solvers", "common", "pinn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('foreign')\n")
    small = ("-points", 200, "-solver", "lbfgs", "-progress", "none", "-output", "run.h5")
    foreign = {"PYTHONPATH": str(tmp_path)}
    for words, ranks in (
        (("ddml-pinn", *small, "-max_it", 2), 2),
        (("ddml-pinn", "-restart", "run.h5", "-max_it", 4), 1),
        (("ddml-predict", "run.h5", "-grid", 5, "-o", "out.csv"), 0),
        (("ddml-export", "run.h5", "-o", "net.pt"), 0),
    ):
        done = run(installed, *words, ranks=ranks, **foreign)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
    assert {p.name for p in installed.empty.iterdir()} == {"run.h5", "out.csv", "net.pt"}
