"""The words that drivers/job.sbatch and drivers/sweep.sbatch pass on; ``srun`` and ``sbatch`` only write them down.

On a real Slurm: test_slurm.py.
"""

import os
import subprocess
from pathlib import Path

import pytest
from calling import refusal
from launch import ROOT

WRITES = '#!/bin/sh\nprintf "%s\\n" "$@" >>"$WORDS"\necho end >>"$WORDS"\n'
PROGRAMS = {"srun": WRITES, "sbatch": f"{WRITES}echo 7\n", "squeue": '#!/bin/sh\necho "$NAME"\n', "sinfo": WRITES}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the drivers, an interpreter that does nothing, and Slurm's programs in ``bin``."""
    place = tmp_path / "a plàce"
    for folder, programs in (("bin", PROGRAMS), (".venv/bin", {"python": "#!/bin/sh\n"})):
        (place / folder).mkdir(parents=True)
        for name, text in programs.items():
            (place / folder / name).write_text(text)
            (place / folder / name).chmod(0o755)
    (place / "drivers").symlink_to(ROOT / "drivers")
    return place


def written(checkout: Path, *command: object, **variables: str) -> list[list[str]]:
    """The words of each program of Slurm that a script has called."""
    words = checkout / "words"
    words.unlink(missing_ok=True)
    settings = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "WORDS": str(words), **variables}
    mine = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", *map(str, command)], cwd=checkout, env=mine | settings, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = words.read_bytes().decode().split("end\n")[:-1]
    return [call.split("\n")[:-1] for call in calls]


def driver(checkout: Path, *words: object, **variables: str) -> list[str]:
    """What the driver of a job is given."""
    (call,) = written(checkout, "drivers/job.sbatch", *words, **variables)
    place = next(number for number, word in enumerate(call) if word.startswith("drivers/"))
    assert call[-2:] == ["-interrupted_code", "75"]
    return call[place:-2]


def test_run_files_may_have_any_name(checkout: Path) -> None:
    start = ["drivers/pinn.py", "-output"]
    assert driver(checkout, SLURM_JOB_NAME="héat 2") == [*start, "héat 2.h5"]
    assert driver(checkout, SLURM_JOB_NAME="a", SLURM_ARRAY_TASK_ID="3") == [*start, "a_3.h5"]
    for option in ("-output", "--output"):
        assert driver(checkout, option, "a b ü.h5", "-width", 6) == [*start, "a b ü.h5", "-width", "6"]
    begin = driver(checkout, "--restart", "of others.h5", "-output", "a.h5")
    assert begin == ["drivers/pinn.py", "-restart", "of others.h5", "-output", "a.h5"]
    (checkout / "a b.h5").touch()
    assert driver(checkout, "-output", "a b.h5") == ["drivers/pinn.py", "-restart", "a b.h5"]
    assert driver(checkout, "classify", "-output", "a b.h5", "-restart", "c.h5")[1:] == ["-restart", "a b.h5"]


@pytest.mark.parametrize("lines", ["{}\n{}\n", "# two\r\n{}\r\n\r\n  # more\r\n{}\r\n", "\f\n\t{}\n\v{}"])
def test_a_task_has_the_words_of_its_line(checkout: Path, lines: str) -> None:
    (checkout / "a file.txt").write_bytes(lines.format("-width 6", "classify\t-data  *").encode())
    first, second = (
        driver(checkout, "@a file.txt", "-max_it", 5, SLURM_JOB_NAME="a", SLURM_ARRAY_TASK_ID=task) for task in "12"
    )
    assert first == ["drivers/pinn.py", "-output", "a_1.h5", "-width", "6", "-max_it", "5"]
    assert second == ["drivers/classify.py", "-output", "a_2.h5", "-data", "*", "-max_it", "5"]


def test_a_blank_of_another_kind_is_none_for_who_checks_the_lines_either(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("-width\N{NO-BREAK SPACE}6\n")
    assert "run 1 of" in refusal("sweep", tmp_path / "lines.txt")


@pytest.mark.parametrize(
    ("file", "name"),
    [("widths.txt", "widths"), ("../widths", "widths"), ("my run.d/my wìdths", "my wìdths"), ("a.b/c.d.txt", "c.d")],
)
def test_a_sweep_has_the_name_of_its_file(checkout: Path, file: str, name: str) -> None:
    path = checkout / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("-width 6\n\n-width 8")
    tried, array, table = written(checkout, "drivers/sweep.sbatch", file, "--ntasks=4", NAME=name)
    job = [f"--job-name={name}", "--array=1-2", "--ntasks=4", "drivers/job.sbatch", f"@{file}"]
    assert tried[1:] == array[:] == ["--parsable", *job]
    assert table[:3] == ["--ntasks=4", f"--job-name={name}.table", "--dependency=afterany:7"]
    assert table[-1] == f".venv/bin/python -m mpi4py drivers/sweep.py '{file}' -table '{name}'"
