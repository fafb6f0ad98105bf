"""Jobs of drivers/job.sbatch on the private cluster of :mod:`cluster`, and waiting for what becomes of them."""

from __future__ import annotations

import shlex
from pathlib import Path

from cluster import Cluster, wait_for
from launch import HERE, LONG, ROOT, warm

ITERATIONS = 100
PACED = (
    *("-problem", f"{HERE / 'paced_problems.py'}:Paced", "-solver", "lbfgs", "-points", 200, "-test_points", 50),
    *("-error_points", 100, "-summation_blocks", 4, "-max_it", ITERATIONS, "-progress", "none"),
)  # fmt: skip
FIRST = ("--nodelist=n1", "--nodes=1")  # node n2 is for those who preempt and kill


def workplace(folder: Path, fresh: bool = LONG) -> Path:
    """Make a folder with the checkout's programs, where runs are slow.

    ``fresh`` as in :func:`launch.start`: otherwise what stands there for the interpreter has its imports done.
    """
    folder.mkdir()
    (folder / "drivers").symlink_to(ROOT / "drivers")
    if fresh:
        (folder / ".venv").symlink_to(ROOT / ".venv")
    else:
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m mpi4py" ] || exit 9\nshift 2\nexec {shlex.join(warm())} "$@"\n')
        python.chmod(0o755)
    (folder / "slow").touch()
    return folder


class Job:
    """A job, or a task of an array.

    Parameters
    ----------
    cluster, folder
        Where it runs.
    name
        Of the job, as Slurm knows it.
    number
        Its id, as in 7 or 7_2.
    """

    def __init__(self, cluster: Cluster, folder: Path, name: str, number: str) -> None:
        self.cluster, self.folder, self.name, self.number = cluster, folder, name, number

    @classmethod
    def submit(cls, cluster: Cluster, folder: Path, sbatch: tuple[object, ...], words: tuple[object, ...]) -> Job:
        """Hand it in, with options of sbatch and words for the script; it is named after its folder."""
        name = folder.name
        options = ("--parsable", "--job-name", name, "--output=%x.log", *sbatch)
        number = cluster.call("sbatch", *options, "drivers/job.sbatch", *words, folder=folder).strip()
        return cls(cluster, folder, name, number)

    def task(self, index: int) -> Job:
        """A task of this array."""
        return Job(self.cluster, self.folder, self.name, f"{self.number}_{index}")

    @property
    def file(self) -> Path:
        """Its run file."""
        _, under, task = self.number.partition("_")
        return self.folder / f"{self.name}{under}{task}.h5"

    @property
    def log(self) -> str:
        """What it has printed."""
        path = self.folder / f"{self.name}.log"
        return path.read_text() if path.exists() else ""

    def __getitem__(self, key: str) -> str:
        """What ``scontrol show job`` says, as in JobState."""
        job, under, task = self.number.partition("_")
        same = {"ArrayJobId": job, "ArrayTaskId": task} if under else {"JobId": job}
        found = [each for each in self.cluster.jobs() if same.items() <= each.items()]
        return found[0][key] if found else ""  # a task that has not begun is not listed on its own

    def update(self, **fields: object) -> None:
        """Change it."""
        self.cluster.call("scontrol", "update", f"JobId={self.number}", *(f"{k}={v}" for k, v in fields.items()))

    def signal(self, name: str) -> None:
        """Send its run a signal."""
        self.cluster.call("scancel", f"--signal={name}", self.number)

    def wait_until_going(self, restarts: int = 0) -> None:
        """Wait until some iterations of its start with that number are done."""
        task = self.number.partition("_")[2]
        wait_for(f"iterations of {self.name}", (self.folder / f"going{task}.{restarts}").exists)

    def wait_until_requeued(self, restarts: int = 1) -> None:
        """Wait until it stands in the queue again, for that time."""
        wait_for(
            f"{self.name} in the queue",
            lambda: (self["JobState"], self["Restarts"]) == ("PENDING", str(restarts)) or self._failed(),
        )

    def _failed(self) -> bool:
        assert self["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self.log
        return False

    def go_on(self) -> None:
        """Start now, not two minutes after it was put into the queue."""
        self.update(StartTime="now")

    def finish(self) -> None:
        """Let it run to its end without delay."""
        (self.folder / "slow").unlink()
        if self["JobState"] == "PENDING":
            self.go_on()
        assert self.wait_for_end() == ("COMPLETED", "0:0"), self.log

    def wait_for_end(self) -> tuple[str, str]:
        """Wait for the end of it; state and exit code."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(f"the end of {self.name}", lambda: self["JobState"] in ends)
        return self["JobState"], self["ExitCode"]
