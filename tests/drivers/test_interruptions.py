"""Signals, other programs and full disks: a run ends in one line with its file whole, or goes on."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import call, refusal, tree
from launch import HERE, SMALL, assert_same, content, finish, start, started
from mpi4py import MPI

from ddml.runs.lock import locked

PROBLEMS = HERE / "hindering_problems.py"
RUN = ("-solver", "lbfgs", *SMALL, "-progress", "none", "-max_it", 60)


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """Signals that are not ignored, as they are behind nohup and in the background of a script."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(shared_tmp: Path, comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the problems hinder."""
    folder = shared_tmp / "runs"
    if comm.rank == 0:
        folder.mkdir()
    monkeypatch.setenv("HINDERED", str(folder))
    comm.barrier()
    yield folder
    comm.barrier()


@pytest.mark.parametrize("name", ["Interrupted", "HungUp"])
def test_a_signal_on_one_of_any_number_of_ranks_stops_a_run_that_can_go_on(
    name: str, comm: MPI.Comm, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before its first checkpoint."""
    path, whole = folder / "run.h5", folder / "whole.h5"
    problem = ("-problem", f"{PROBLEMS}:{name}")
    assert call("pinn", *problem, *RUN, "-checkpoint_interval", 0, "-output", path) == 0
    assert comm.rank > 0 or "stopped: a signal asked to stop." in capfd.readouterr().out
    stopped = int(content(path).history["iteration"][-1])
    assert 0 < stopped < 60
    assert call("pinn", "-problem", f"{PROBLEMS}:Hindering", *RUN, "-output", whole) == 0
    comm.barrier()
    assert call("pinn", "-restart", path, "-problem", f"{PROBLEMS}:{name}", "-max_it", stopped) == 0
    if comm.rank == 0:
        last = {column: values[: stopped + 1] for column, values in content(whole).history.items()}
        assert list(content(path).history["loss"]) == list(last["loss"])
    comm.barrier()
    assert sorted(os.listdir(folder)) == ["run.h5", "whole.h5"]


@pytest.mark.parametrize("name", ["InterruptedInItsConstructor", "InterruptedAtOnce"])
def test_before_the_run_there_is_nothing_to_write(
    name: str, good: Path, comm: MPI.Comm, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run.h5"
    if comm.rank == 0:
        shutil.copy(good, path)
    comm.barrier()
    before = tree(folder)
    words = ("-problem", f"{PROBLEMS}:{name}", *RUN, "-output", path, "-overwrite")
    assert refusal("pinn", *words) == "a signal asked to stop before the run began; nothing was written"
    assert tree(folder) == before
    assert "Traceback" not in "".join(capfd.readouterr())


def test_handlers_of_signals_are_there_while_a_run_is(good: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    refusal("pinn", "-restart", good, "-width", 9)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


OBSTACLES = {"SmallFiles": "File too large", "SmallFilesOfRank0": "File too large", "FolderGone": "No such file",
             "FileInItsPlace": "Not a directory"}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_checkpoint_that_fails_is_one_line_and_the_old_file_is_whole(
    name: str, comm: MPI.Comm, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run.h5"
    words = ("-problem", f"{PROBLEMS}:{name}", *RUN, "-checkpoint_interval", 1, "-output", path)
    line = refusal("pinn", *words)
    assert line.startswith(f"cannot write {path}: {OBSTACLES[name]}")
    assert "the file that was there is unchanged" in line
    where = path if path.exists() else folder.with_name("elsewhere") / "run.h5"
    iterations = content(where).history["iteration"]
    assert 0 < iterations[-1] < 59
    left = os.listdir(where.parent)
    assert "run.h5" in left
    assert not [other for other in left if other.endswith(".new")]
    out = "".join(capfd.readouterr())
    assert "Traceback" not in out
    assert comm.rank > 0 or f"stopped: the run file cannot be written. {int(iterations[-1]) + 1} iterations" in out


@pytest.fixture(scope="module")
def whole(module_tmp: Path) -> Path:
    """The run file of 80 iterations that nothing hinders."""
    path = module_tmp / "whole.h5"
    assert call("pinn", "-problem", f"{PROBLEMS}:Hindering", *RUN, "-max_it", 80, "-output", path) == 0
    return path


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_run_goes_on_to_a_checkpoint_that_can_be_written(
    name: str, comm: MPI.Comm, folder: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run.h5"
    words = ("-problem", f"{PROBLEMS}:{name}", *RUN, "-keep_going", "-checkpoint_interval", 2, "-max_it", 80)
    assert call("pinn", *words, "-output", path) == 0
    notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith(f"note: cannot write {path}")]
    assert comm.rank > 0 or 2 < len(notes) < 40
    comm.barrier()
    assert_same(path, whole)
    assert os.listdir(folder) == ["run.h5"]


def test_where_the_last_one_fails_too_the_summary_is_there_and_the_line(
    comm: MPI.Comm, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("-problem", f"{PROBLEMS}:SmallFilesForEver", *RUN, "-keep_going", "-checkpoint_interval", 2)
    assert "cannot write" in refusal("pinn", *words, "-output", folder / "run.h5")
    out = capfd.readouterr().out
    assert comm.rank > 0 or ("stopped: max_it is reached. 60 iterations" in out and "; run file" not in out)
    assert 0 < content(folder / "run.h5").history["iteration"][-1] < 60


DRIVERS = {
    "pinn": (*RUN, "-problem", "klein_gordon"),
    "classify": ("-data", "digits", "-samples", 90, "-widths", "6,5", "-progress", "none"),
    "logistic": ("-data", "digits", "-classes", "4,9", "-progress", "none"),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", ["-output", "-restart"])
def test_two_starts_on_one_file_exclude_each_other(
    driver: str, how: str, good: Path, comm: MPI.Comm, folder: Path
) -> None:
    path = folder / "run.h5"
    if comm.rank == 0:
        shutil.copy(good, path)
    comm.barrier()
    before = path.read_bytes()
    with locked(str(path), comm):
        line = refusal(driver, *DRIVERS[driver], how, path, *(["-overwrite"] if how == "-output" else []))
    assert line.startswith(f"{path} is in use by process ")
    assert path.read_bytes() == before
    comm.barrier()
    assert os.listdir(folder) == ["run.h5"]


@started
def test_ctrl_c_before_the_first_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    words = ("-solver", "lbfgs", *SMALL, "-max_it", 10**6, "-max_time", 100, "-checkpoint_interval", 0)
    process = start(0, *words, "-output", path, fresh=True)
    assert process.stdout and any(line.startswith("     2 ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.rc, result.err) == (0, "")
    assert "stopped: a signal asked to stop" in result.out
    assert content(path).history["iteration"][-1] >= 2
    assert os.listdir(tmp_path) == ["run.h5"]


@started
def test_a_reader_who_leaves_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    words = ("-solver", "lbfgs", *SMALL, "-max_it", 30, "-progress", "lines", "-output", path)
    process = start(0, *words)
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr and process.stderr.read() == ""
    process.stderr.close()
    assert content(path).history["iteration"][-1] == 30


@started
def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    words = ("-problem", f"{PROBLEMS}:SleepsInItsConstructor", *RUN, "-output", tmp_path / "run.h5")
    process = start(0, *words)
    assert process.stdout and process.stdout.readline() == "asleep\n"
    before = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    result = finish(process)
    assert time.monotonic() - before < 20
    assert result.rc == -signal.SIGINT
    assert "Traceback" not in result.out + result.err
    assert not (tmp_path / "run.h5").exists()


@started
def test_while_modules_are_imported_it_is_one_line() -> None:
    process = start(0, *RUN, fresh=True)
    maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 20
    while "libpetsc" not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.01)  # torch comes behind it, and takes a second
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.rc, result.err) == (130, "error: interrupted before anything was begun\n")


@started
def test_ranks_end_together_where_one_cannot_write(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    words = ("-problem", f"{PROBLEMS}:FolderGone", *RUN, "-checkpoint_interval", 1, "-output", folder / "run.h5")
    result = finish(start(2, *words, HINDERED=str(folder)), 60)
    assert result.rc == 1
    assert result.err.count("error:") == 1
    assert "Traceback" not in result.err
    assert os.listdir(tmp_path / "elsewhere")[0].startswith("run.h5")
