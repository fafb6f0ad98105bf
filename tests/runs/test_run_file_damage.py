"""Full disks, kills and damaged bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc
from run_files import SIZE, assert_values, comm, refused, save, small, vector

from ddml.errors import RunFileError
from ddml.runs import sealed
from ddml.runs.lock import locked
from ddml.runs.run_file import check_writable, inspect, read


@pytest.mark.parametrize("victim", ["first", "last"])
def test_a_full_disk_on_one_rank_leaves_the_old_file(shared_tmp: Path, victim: str) -> None:
    """A limit on the size of files stands for the full disk: writes behind it fail."""
    path = shared_tmp / "run.h5"
    small(path, 1.0)
    before = path.read_bytes()
    comm.barrier()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    theta = vector(np.full(SIZE, 2.0))
    try:
        if comm.rank == (0 if victim == "first" else comm.size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(RunFileError, match=r"cannot write .*File too large.*unchanged"):
            save(path, theta, {"m": theta})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]
    comm.barrier()
    save(path, theta, {"m": theta})
    assert path.read_bytes() != before
    theta.destroy()


def test_what_an_earlier_kill_left_is_no_obstacle(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    if comm.rank == 0:
        (shared_tmp / "run.h5.01234567.new").write_bytes(b"left" * 100_000)
    comm.barrier()
    check_writable(str(path), comm)
    with locked(str(path), comm):
        small(path, 3.0)
    comm.barrier()
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]
    theta = vector(np.zeros(SIZE))
    read(str(path), theta)[0]["m"].destroy()
    assert_values(theta, np.full(SIZE, 3.0))
    theta.destroy()


def test_a_working_folder_that_has_gone_is_one_line(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if comm.rank == 0:
        (shared_tmp / "gone").mkdir()
    comm.barrier()
    monkeypatch.chdir(shared_tmp / "gone")
    comm.barrier()
    if comm.rank == 0:
        (shared_tmp / "gone").rmdir()
    comm.barrier()
    with pytest.raises(RunFileError, match=r"cannot write run\.h5: No such file or directory"):
        small(Path("run.h5"))


def test_who_may_read_a_file_stays_as_it_is(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    small(path, 1.0)
    if comm.rank == 0:
        path.chmod(0o600)
    comm.barrier()
    small(path, 2.0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_symbolic_link_stays_one(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    if comm.rank == 0:
        path.symlink_to(shared_tmp / "elsewhere.h5")
    comm.barrier()
    small(path)
    assert path.is_symlink()
    assert sorted(os.listdir(shared_tmp)) == ["elsewhere.h5", "run.h5"]


def put(path: Path, content: bytes) -> None:
    """Rank 0 writes the file."""
    comm.barrier()
    if comm.rank == 0:
        path.write_bytes(content)
    comm.barrier()


def test_every_kind_of_damage_is_refused(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    small(path)
    good = path.read_bytes()
    for length in (1, 100, 511, 512, 513, 2048, len(good) // 2, len(good) - 8, len(good) - 1):
        put(path, good[:length])
        refused(path, "is damaged|is not a run file")
    put(path, good + b"\0")
    refused(path, "is damaged")
    for position in np.random.default_rng(0).integers(0, len(good), 40):
        bad = bytearray(good)
        bad[position] ^= 1 << int(position) % 8
        put(path, bytes(bad))
        refused(path, "is damaged|is not a run file|is an HDF5 file but not")
    start = len(good) // 2 // 512 * 512
    put(path, good[:start] + bytes(512) + good[start + 512 :])
    refused(path, "do not match their checksum")
    put(path, good)
    assert inspect(str(path), comm).size == SIZE


def test_checksum_does_not_depend_on_the_pieces_and_finds_what_a_plain_sum_misses() -> None:
    data = np.random.default_rng(0).integers(0, 256, 200_003, dtype=np.uint8)
    whole = sealed.checksum(data, 512)
    for cut in (8, 65_536, 65_544, 199_992):
        assert (sealed.checksum(data[:cut], 512) + sealed.checksum(data[cut:], 512 + cut)) % 2**64 == whole
    ones = np.ones(4096).view(np.uint8)
    zeroed, swapped = ones.copy(), np.repeat([1.0, 2.0], 2048).view(np.uint8)
    zeroed[4096:8192] = 0
    assert sealed.checksum(zeroed, 0) != sealed.checksum(ones, 0)
    assert sealed.checksum(swapped, 0) != sealed.checksum(np.roll(swapped, 16_384), 0)


# for each version that it is told, a process that writes the next ones until it is killed; torch is loaded once
CHILD = """
import os, sys
import h5py, numpy as np, torch
path = sys.argv[1]
for line in sys.stdin:
    version, pid = int(line), os.fork()
    if not pid:
        break
    os.waitpid(pid, 0)
    print("ended", flush=True)
else:
    sys.exit()
print(os.getpid(), flush=True)
from petsc4py import PETSc
from ddml.runs.run_file import write
from ddml.runs.history import History
theta, m = (PETSc.Vec().createSeq(20000) for _ in range(2))
while True:
    version += 1
    theta.set(version)
    m.set(-version)
    history = History.from_columns({"loss": np.full(version % 50, float(version))})
    write(path, theta, parameters=(), state={"m": m, "version": version}, history=history, attributes={"v": version})
    print(version, flush=True)
"""


@contextmanager
def writers(path: Path) -> Iterator[Callable[[int], tuple[int, Iterator[str]]]]:
    """What starts a writer behind a version and gives its process id, and the lines that it prints."""
    alone = {name: text for name, text in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, env=alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin and parent.stdout

        def start(version: int) -> tuple[int, Iterator[str]]:
            print(version, file=parent.stdin, flush=True)
            return int(parent.stdout.readline()), iter(parent.stdout.readline, "ended\n")

        yield start


def killed(writer: tuple[int, Iterator[str]], pause: float) -> int:
    """Kill a writer `pause` seconds after its first file; its last finished version."""
    pid, versions = writer
    first = next(versions)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    return int([first, *versions][-1])


def test_a_kill_at_any_moment_leaves_a_whole_file(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    error = ""
    if comm.rank == 0:
        try:
            theta, version = PETSc.Vec().createSeq(20_000), 0
            with writers(path) as start:
                for pause in np.random.default_rng().uniform(0, 0.05, 8):
                    done = killed(start(version), pause)
                    state, history = read(str(path), theta)
                    version = state["version"]
                    assert version in (done, done + 1)
                    np.testing.assert_array_equal(theta.getArray(), float(version))
                    np.testing.assert_array_equal(state["m"].getArray(), -float(version))
                    np.testing.assert_array_equal(history["loss"], np.full(version % 50, float(version)))
                    assert inspect(str(path), MPI.COMM_SELF).attributes["v"] == version
                    state["m"].destroy()
            theta.destroy()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    assert comm.bcast(error) == ""


def test_what_another_run_writes_meanwhile_is_read_whole_or_refused(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    theta = PETSc.Vec().createSeq(20000)
    with writers(path) as start:
        pid, lines = start(0)
        assert next(lines)
        end, versions = time.monotonic() + 1.5, set()
        while time.monotonic() < end:
            try:
                state, _ = read(str(path), theta)
            except RunFileError as error:
                assert "another run writes it" in str(error) or "damaged" in str(error)
                continue
            assert np.all(theta.array_r == state["version"])
            assert np.all(state["m"].array_r == -state["version"])
            versions.add(state["version"])
            state["m"].destroy()
        os.kill(pid, signal.SIGKILL)
        assert list(lines)
    theta.destroy()
    assert len(versions) > 2
