"""The commands and the code of the README and of docs/, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launch import LONG, ROOT, warm

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.S)]
SHELL = "".join(body for kind, body in BLOCKS if kind == "sh").replace("\\\n", " ")
COMMANDS = [re.split(r"(?<=\S) +# ", line)[0].strip() for line in SHELL.splitlines()]
PROGRAMS = [body for kind, body in BLOCKS if kind == "python" and not re.search(r"^class ", body, flags=re.M)]
RUN_BY_CI = ("make demo", "make test")
STARTED = [command for command in dict.fromkeys(COMMANDS) if command.startswith(("mpiexec", ".venv"))]
PYTHON = re.compile(r"\.venv/bin/python( -m mpi4py)?(?= )")


def form(command: str) -> tuple[str | None, str]:
    """With or without mpiexec, and the driver."""
    found = re.search(r"(mpiexec)?.* drivers/(\w+)\.py", command)
    assert found, command
    return found[1], found[2]


# the first command of each form is started as it stands, the others in interpreters whose imports are done
AS_IT_STANDS = STARTED if LONG else list({form(command): command for command in reversed(STARTED)}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it: the checkout's programs, and the code blocks in files."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("drivers", ".venv"):
        (path / name).symlink_to(ROOT / name)
    for kind, body in BLOCKS:
        found = re.search(r"^class (\w+)", body, flags=re.M)
        if kind == "python" and found:
            (path / f"{found.group(1).lower()}.py").write_text(body)
    return path


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    return clean | {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                    "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
                    "OMPI_MCA_hwloc_base_binding_policy": "none"}  # fmt: skip


def test_every_command_is_known() -> None:
    known = (*RUN_BY_CI, "sbatch", "mpiexec", ".venv/bin/python")
    assert COMMANDS
    assert all(command.startswith(known) for command in COMMANDS), COMMANDS
    ci = (ROOT / ".ci/run").read_text()
    assert all(command in ci for command in RUN_BY_CI)


def test_drivers_are_started_as_the_pages_say() -> None:
    launchers = {driver: {form(c)[0] for c in AS_IT_STANDS if form(c)[1] == driver} for _, driver in map(form, STARTED)}
    assert all(launchers[driver] == {"mpiexec", None} for driver in ("pinn", "classify", "logistic"))


@pytest.mark.parametrize("command", STARTED)
def test_command_runs(command: str, folder: Path) -> None:
    line = command if command in AS_IT_STANDS else PYTHON.sub(shlex.join(warm()), command)
    done = subprocess.run(
        shlex.split(line), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stderr.lower()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_program_runs(number: int, ranks: int, folder: Path) -> None:
    """Behind the commands, whose run files they may read; the same output on any number of ranks."""
    if ranks > 1 and "import h5py" in PROGRAMS[number]:
        pytest.skip("reads a file on its own")
    file = folder / f"program{number}.py"
    file.write_text(PROGRAMS[number])
    # to a file each: mpiexec prints what comes from ranks into each other's lines; the first program as it stands
    python = ".venv/bin/python -m mpi4py" if LONG or (ranks == 1 and number == 0) else shlex.join(warm())
    command = f"{python} {file.name} > {file.name}.${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}"
    done = subprocess.run(
        ["mpiexec", "-n", str(ranks), "sh", "-c", command], cwd=folder, env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [Path(f"{file}.{rank}").read_text() for rank in range(ranks)]
    assert printed[0] and printed == printed[:1] * ranks


def test_batch_script_starts_and_goes_on(folder: Path) -> None:
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    check = '[ "$1 $3 $4 $5" = "env .venv/bin/python -m mpi4py" ] || exit 9; held=$2'
    start = ".venv/bin/python -m mpi4py" if LONG else shlex.join(warm())
    srun.write_text(f'#!/bin/sh\n{check}\nshift 5\nexec mpiexec -n 2 env "$held" {start} "$@"\n')
    srun.chmod(0o755)
    variables = environment() | {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_JOB_NAME": "batch"}
    for iterations in ("1", "2"):
        command = ["bash", "drivers/job.sbatch", "-problem", "heat.py:Heat", "-max_it", iterations]
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{iterations} iterations" in done.stdout
