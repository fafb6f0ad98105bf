"""drivers/job.sbatch and drivers/sweep.sbatch on a real Slurm, which these tests start and end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import CPUS, Cluster, given_up, wait_for
from launch import HERE, LONG, assert_same, content
from slurm_jobs import FIRST, ITERATIONS, PACED, Job, workplace

Scenario = Callable[[Cluster, Path], None]
SCENARIOS: dict[str, Scenario] = {}
_second_node, _all_in_service = threading.Lock(), threading.Lock()
WHOLE = "whole"
FRESH = ("sigterm_in_the_first_second",)  # where the start is what is tested


def scenario(function: Scenario) -> Scenario:
    """One of those that run side by side, each in a folder named after it."""
    SCENARIOS[function.__name__] = function
    return function


def check(job: Job) -> None:
    """Its run is that of the job that nobody disturbed, to the last bit."""
    assert_same(job.folder.parent / WHOLE / f"{WHOLE}.h5", job.file)


def undisturbed(cluster: Cluster, folder: Path) -> None:
    """What the others are compared to, on both nodes."""
    (folder / "slow").unlink()
    job = Job.submit(cluster, folder, ("--ntasks=2", "--nodes=2"), PACED)
    assert job.wait_for_end() == ("COMPLETED", "0:0"), job.log
    assert job["Restarts"] == "0"


@scenario
def three_time_limits_in_a_row(cluster: Cluster, folder: Path) -> None:
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), PACED)
    for number in range(3):
        job.wait_until_going(number)
        hours, minutes, _ = map(int, job["RunTime"].rpartition("-")[2].split(":"))
        job.update(TimeLimit=60 * hours + minutes + 1)
        job.wait_until_requeued(number + 1)
        job.update(TimeLimit=60)
        if number < 2:
            job.go_on()
    job.finish()
    check(job)
    assert job.log.count("stopped: a signal asked to stop") == 3  # the log is appended


@scenario
def a_time_limit_before_the_run_has_stopped(cluster: Cluster, folder: Path) -> None:
    """Nothing comes before the limit but a signal that means nothing; what the limit sends is enough."""
    job = Job.submit(cluster, folder, ("--ntasks=1", "--time=1", "--signal=CONT@1", *FIRST), PACED)
    job.wait_until_requeued()
    cluster.call("scancel", job.number)


@scenario
def a_limit_shorter_than_one_iteration(cluster: Cluster, folder: Path) -> None:
    (folder / "stuck").touch()
    job = Job.submit(cluster, folder, ("--ntasks=1", "--time=1", "--signal=TERM@20", *FIRST), PACED)
    job.wait_until_requeued()
    assert job.file.with_suffix(".h5.tries").exists()
    job.go_on()
    assert job.wait_for_end() == ("FAILED", "76:0"), job.log
    assert "no iteration was gained twice in a row" in job.log
    assert job["Restarts"] == "1"
    assert not job.file.with_suffix(".h5.tries").exists()


@scenario
def signals(cluster: Cluster, folder: Path) -> None:
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), PACED)
    for number, name in enumerate(("USR1", "TERM")):
        job.wait_until_going(number)
        job.signal(name)
        job.wait_until_requeued(number + 1)
        if not number:
            job.go_on()
    job.finish()
    check(job)


@scenario
def sigterm_in_the_first_second(cluster: Cluster, folder: Path) -> None:
    job = Job.submit(cluster, folder, ("--ntasks=2", *FIRST), PACED)
    # Slurm itself loses a signal to a step that it knows, but whose processes it has not started yet
    step = {"SLURM_JOB_ID": job.number, "SLURM_STEP_ID": 0}
    wait_for("ranks", lambda: all(cluster.processes(**step, SLURM_PROCID=rank) for rank in (0, 1)))
    job.signal("TERM")
    job.wait_until_requeued()
    assert not job.file.exists()
    job.go_on()
    job.wait_until_going(1)
    job.signal("USR1")  # an iteration has been gained between two interruptions
    job.wait_until_requeued(2)
    job.finish()
    check(job)


@scenario
def preemption(cluster: Cluster, folder: Path) -> None:
    with _second_node:
        job = Job.submit(cluster, folder, ("--ntasks=2", "--nodelist=n2"), PACED)
        job.wait_until_going()
        all_of_it = ("--nodelist=n2", "--nodes=1", f"--ntasks={CPUS}")
        cluster.call("sbatch", "--partition=high", *all_of_it, "--output=/dev/null", "--wrap=true")
        job.wait_until_requeued()
        job.finish()
    check(job)


BACK_ONCE_ASKED = """#!/bin/sh
PATH=${PATH#*:}
sbatch "$@"
code=$?
scontrol update NodeName=n1 State=RESUME 2>/dev/null
while [ "$(sinfo -h -n n1 -t drain,no_respond -o %n)" ]; do sleep 0.1; done
exit $code
"""  # a command sbatch whose first answer is older than that node's return to service


@scenario
def a_node_that_dies(cluster: Cluster, folder: Path) -> None:
    words = (*PACED, "-checkpoint_interval", 1)
    with _second_node, _all_in_service:
        cluster.call("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
        job = Job.submit(cluster, folder, ("--ntasks=2",), words)
        wish = ("--job-name=waiting", "--output=/dev/null", "--ntasks=1", *FIRST)
        said = cluster.call("bash", "drivers/submit.sh", *wish, "drivers/job.sbatch", *words, folder=folder)
        assert "it waits for n1" in said
        cluster.call("scancel", "--name", "waiting")
        wait_for("a start on n2", lambda: job["NodeList"] == "n2")
        (folder / "bin").mkdir()
        (folder / "bin" / "sbatch").write_text(BACK_ONCE_ASKED)
        (folder / "bin" / "sbatch").chmod(0o755)
        ours = ("env", f"PATH={folder}/bin:{cluster.environment['PATH']}", "bash", "drivers/submit.sh")
        assert "Submitted" in cluster.call(*ours, *wish, "--hold", "drivers/job.sbatch", *words, folder=folder)
        cluster.call("scancel", "--name", "waiting")
        job.wait_until_going()
        cluster.kill(SLURMD_NODENAME="n2")
        job.wait_until_requeued()
        reached = content(job.file).history["iteration"][-1]
        job.finish()
        assert job["NodeList"] == "n1"
        cluster.start_node("n2")
    assert 0 < reached < ITERATIONS
    check(job)
    assert "was written on" not in job.log  # the same number of ranks


@scenario
def other_ranks(cluster: Cluster, folder: Path) -> None:
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), PACED)
    job.wait_until_going()
    job.signal("USR1")
    job.wait_until_requeued()
    job.update(NumTasks=2, NumCPUs=2)
    job.finish()
    check(job)
    assert "was written on 1 rank" in job.log


@scenario
def an_array_of_four(cluster: Cluster, folder: Path) -> None:
    array = Job.submit(cluster, folder, ("--ntasks=1", "--array=1-4", *FIRST), PACED)
    tasks = [array.task(index) for index in range(1, 5)]
    for task in tasks[1:3]:
        task.wait_until_going()
        task.signal("TERM")
        task.wait_until_requeued()
    (folder / "slow").unlink()
    for task in tasks[1:3]:
        task.go_on()
    for task in tasks:
        assert task.wait_for_end() == ("COMPLETED", "0:0"), task.log
        check(task)
    assert [task["Restarts"] for task in tasks] == ["0", "1", "1", "0"]


@scenario
def two_jobs_on_one_file(cluster: Cluster, folder: Path) -> None:
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), PACED)
    job.wait_until_going()
    other = Job.submit(cluster, folder, ("--ntasks=1", "--output=other.log", *FIRST), PACED)
    assert other.wait_for_end() == ("FAILED", "1:0"), other.log
    assert f"{job.name}.h5 is in use by process" in (folder / "other.log").read_text()
    assert other["Restarts"] == "0"
    job.finish()
    check(job)


@scenario
def what_ends_for_good(cluster: Cluster, folder: Path) -> None:
    """A broken run, and one that is cancelled."""
    broken = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), (*PACED, "-widht", 9))
    assert broken.wait_for_end() == ("FAILED", "1:0"), broken.log
    assert "unknown option -widht" in broken.log
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), PACED)
    job.wait_until_going()
    cluster.call("scancel", job.number)
    assert job.wait_for_end()[0] == "CANCELLED", job.log
    wait_for("the end of the script", lambda: "Exited with exit code 75" in job.log and not _ending(cluster, job))
    assert (broken["Restarts"], job["Restarts"], job["JobState"]) == ("0", "0", "CANCELLED")
    assert job.file.exists()


def _ending(cluster: Cluster, job: Job) -> bool:
    return cluster.call("squeue", "-h", "-j", job.number, "-t", "all", "-o", "%t").split() == ["CG"]


@scenario
def another_driver_another_file(cluster: Cluster, folder: Path) -> None:
    words = ("classify", "-data", "digits", "-samples", 90, "-widths", "6,5", "-max_it", 2, "-output", "other.h5")
    job = Job.submit(cluster, folder, ("--ntasks=1", *FIRST), words)
    assert job.wait_for_end() == ("COMPLETED", "0:0"), job.log
    assert content(folder / "other.h5").attributes["driver"] == "classify"
    assert not job.file.exists()


@scenario
def a_sweep(cluster: Cluster, folder: Path) -> None:
    words = " ".join(map(str, PACED))
    (folder / "widths.txt").write_text(f"# two widths\n{words}\n\npinn {words} -width 6\n")
    options = ("--ntasks=1", "--output=%x.log", *FIRST)
    said = cluster.call("bash", "drivers/sweep.sbatch", "widths.txt", *options, folder=folder)
    number = re.findall(r"array (\d+) of 2 runs", said)[0]
    tasks = [Job(cluster, folder, "widths", f"{number}_{index}") for index in (1, 2)]
    tasks[0].wait_until_going()
    tasks[0].signal("USR1")
    tasks[0].wait_until_requeued()
    (folder / "slow").unlink()
    assert tasks[1].wait_for_end() == ("COMPLETED", "0:0"), tasks[1].log
    assert not (folder / "widths.table").exists()  # it waits for who has gone back into the queue
    tasks[0].go_on()
    table = folder / "widths.table"
    wait_for("the table", lambda: table.exists() and table.read_text().count("\n") == 3)
    _, first, second = table.read_text().splitlines()
    assert (first.split()[:2], second.split()[:2]) == (["1", str(ITERATIONS)], ["2", str(ITERATIONS)])
    assert second.endswith("-width 6")
    check(tasks[0])


@scenario
def what_is_refused_before_it_is_submitted(cluster: Cluster, folder: Path) -> None:
    (folder / "wrong.txt").write_text("-width 6\n-width 6 -widht 6\n")
    with pytest.raises(AssertionError, match=r"run 2 of wrong\.txt: unknown option -widht"):
        cluster.call("bash", "drivers/sweep.sbatch", "wrong.txt", *FIRST, folder=folder)
    with _all_in_service:
        away = ("sinfo", "-h", "-N", "-t", "down,drain,fail,maint,no_respond", "-o", "%N")
        wait_for("all nodes", lambda: not cluster.call(*away).strip())
        for wish in ("--ntasks=99", "--nodes=3", "--partition=none"):
            with pytest.raises(AssertionError, match=r"can never start here") as caught:
                cluster.call("bash", "drivers/submit.sh", wish, "--job-name=wrong", "drivers/job.sbatch", folder=folder)
            assert f"partition low*: 2 nodes of {CPUS} cores" in str(caught.value)
    assert "wrong" not in cluster.call("squeue", "-h", "-t", "all", "-o", "%j")
    assert {path.name for path in folder.iterdir()} == {"drivers", ".venv", "slow", "wrong.txt"}


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Cluster]]:
    """A cluster within a block, and the process that keeps it; skips the test where there can be none."""
    command = [sys.executable, str(HERE / "cluster.py"), str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    try:
        assert process.stdout
        line = process.stdout.readline().strip()
        if line != "ready":
            pytest.skip(line) if line else pytest.fail("the cluster does not start")
        yield process, Cluster(folder)
    finally:
        process.communicate()  # closes its input, which is what it waits for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as (_, found):
        yield found


@pytest.fixture(scope="module")
def going(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[None]]]:
    """All scenarios that were asked for, side by side, behind the run that they are compared to."""
    place, asked = tmp_path_factory.mktemp("jobs"), [item.name for item in request.session.items]
    undisturbed(cluster, workplace(place / WHOLE, fresh=True))

    def run(name: str) -> None:
        try:
            SCENARIOS[name](cluster, workplace(place / name, LONG or name in FRESH))
        except BaseException:
            cluster.call("scancel", "--name", name)  # it would take the others' time
            raise

    chosen = [name for name in SCENARIOS if any(f"[{name}]" in test for test in asked)]
    with ThreadPoolExecutor(len(chosen)) as pool:
        yield {name: pool.submit(run, name) for name in chosen}
        given_up.set()  # by Ctrl-C, or a test that failed


@pytest.mark.parametrize("name", SCENARIOS)
def test_jobs_keep_their_word(name: str, going: dict[str, Future[None]]) -> None:
    going[name].result()


@pytest.mark.parametrize("how", ["its input ends", "SIGTERM"])
def test_everything_that_was_started_is_ended(how: str, tmp_path: Path) -> None:
    """Its input ends however the tests end; a job is running then."""
    with running(tmp_path) as (process, cluster):
        words = ("--ntasks=1", "--output=/dev/null", "--wrap=touch here; exec sleep 1000")
        cluster.call("sbatch", *words, folder=tmp_path)
        wait_for("the job", (tmp_path / "here").exists)
        assert len(cluster.processes()) >= 5  # munged, slurmctld, two slurmd, the job
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
            process.wait()
    assert cluster.processes() == []
