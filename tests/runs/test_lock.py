"""One program at a time on a run file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from ddml.errors import RunFileError
from ddml.runs.lock import locked

# without MPI, which would leave helpers of its own behind
CHILD = """
import fcntl, os, sys, time
held = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(held, fcntl.LOCK_EX)
os.write(held, b"process 7 on another node")
print("held", flush=True)
time.sleep(100)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another program that holds the lock."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, f"{path}.lock"], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize("links", [False, True])
def test_a_second_one_is_refused_on_all_ranks(links: bool, comm: MPI.Comm, shared_tmp: Path) -> None:
    path = other = shared_tmp / "run.h5"
    if links:
        other = shared_tmp / "link.h5"
        if comm.rank == 0:
            other.symlink_to(path)
    with locked(str(path), comm) as notes:
        assert not notes
        comm.barrier()
        with (
            pytest.raises(RunFileError, match=rf"{other.name} is in use by process \d+ on ") as caught,
            locked(str(other), comm),
        ):
            raise AssertionError
        assert comm.allgather(str(caught.value)) == [str(caught.value)] * comm.size
        with locked(str(shared_tmp / "another.h5"), comm), locked(None, comm):
            pass
    comm.barrier()
    assert sorted(os.listdir(shared_tmp)) == ["link.h5"] * links
    comm.barrier()
    with locked(str(other), comm):
        pass


def test_an_error_inside_ends_it(comm: MPI.Comm, shared_tmp: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(str(shared_tmp / "run.h5"), comm):
            raise ZeroDivisionError
    comm.barrier()
    assert os.listdir(shared_tmp) == []


def test_a_dead_one_is_no_obstacle_and_its_rest_is_removed(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    child = holder(path) if comm.rank == 0 else None
    comm.barrier()
    with pytest.raises(RunFileError, match="is in use by process 7 on another node: wait"), locked(str(path), comm):
        raise AssertionError
    if child is not None:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert path.with_name("run.h5.lock").exists()
        path.with_name("run.h5.0123abcd.new").write_bytes(b"half")
        path.with_name("another.h5.0123abcd.new").write_bytes(b"half")
    with locked(str(path), comm):
        comm.barrier()
        assert sorted(os.listdir(shared_tmp)) == ["another.h5.0123abcd.new", "run.h5.lock"]
        comm.barrier()


def test_a_lock_that_somebody_removed_or_wrote_into_is_no_obstacle(comm: MPI.Comm, shared_tmp: Path) -> None:
    name = shared_tmp / "run.h5.lock"
    if comm.rank == 0:
        name.write_text("process 1 on a node that has gone, and more text than ours" * 10)
    with locked(str(shared_tmp / "run.h5"), comm):
        if comm.rank == 0:
            assert name.read_text().startswith(f"process {os.getpid()} on ")
            assert "gone" not in name.read_text()
            name.unlink()
    comm.barrier()
    assert os.listdir(shared_tmp) == []


@pytest.mark.parametrize("place", ["missing/run.h5", "file/run.h5"])
def test_where_there_is_no_folder_nothing_is_made(place: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    """Whoever writes there will say so."""
    if comm.rank == 0:
        (shared_tmp / "file").write_text("in the way")
    comm.barrier()
    with locked(str(shared_tmp / place), comm) as notes:
        assert not notes
    assert os.listdir(shared_tmp) == ["file"]


def test_a_folder_in_the_place_of_the_lock_is_named(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.rank == 0:
        (shared_tmp / "run.h5.lock").mkdir()
    comm.barrier()
    with pytest.raises(RunFileError, match=r"cannot write .*: Is a dir"), locked(str(shared_tmp / "run.h5"), comm):
        raise AssertionError
