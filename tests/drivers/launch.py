"""Start drivers as a user does, with mpiexec, and look at what they leave."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import h5py
import numpy as np
import pytest
from forked import surroundings
from mpi4py import MPI

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LONG = bool(os.environ.get("DDML_LONG"))
# what starts drivers does so from one rank
started = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="starts drivers")
SMALL = ("-network", "residual", "-width", "8", "-depth", "2", "-points", "200", "-test_points", "50",
         "-error_points", "100", "-summation_blocks", "4")  # fmt: skip
_one_at_a_time = threading.Lock()


def warm() -> list[str]:
    """What stands for ``python -m mpi4py`` in a command and has its imports done: see :mod:`warm`."""
    with _one_at_a_time:  # jobs are handed in by several threads
        return [sys.executable, "-I", "-S", str(HERE / "warm.py"), _address()]


@cache
def _address() -> str:
    return forked.started(str(HERE / "warm.py"), "serve")


def start(
    ranks: int,
    *options: object,
    driver: str = "pinn.py",
    fresh: bool = LONG,
    folder: Path = ROOT,
    **variables: str,
) -> subprocess.Popen[str]:
    """A driver in a session of its own.

    ``ranks`` 0 is one rank without mpiexec, ``fresh`` an interpreter of its own for each rank, as users have them,
    instead of the one of :func:`warm`; where the start is what is tested, it must be. What is done is the same:
    ``make test-long`` starts all afresh. ``folder`` is where it runs; ``variables`` come on top of those of the
    environment.
    """
    command = ["mpiexec", "--oversubscribe", "-n", str(ranks)] if ranks else []
    command += ["--allow-run-as-root"] if ranks and os.getuid() == 0 else []
    command += [sys.executable, "-m", "mpi4py"] if fresh else warm()
    command += [str(ROOT / "drivers" / driver), *map(str, options)]
    return subprocess.Popen(
        command, env=surroundings() | variables, cwd=folder, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 200.0) -> SimpleNamespace:
    """Exit code ``rc``, ``out`` and ``err`` of a driver; one that takes longer is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return SimpleNamespace(rc=process.returncode, out=out, err=err)


def launch(ranks: int, *options: object, timeout: float = 200.0, **settings: Any) -> SimpleNamespace:
    """Start, with the keywords of :func:`start`, and finish."""
    return finish(start(ranks, *options, **settings), timeout)


def processes(session: int) -> dict[int, int]:
    """Rank by process id of everything that runs in a session, -1 for what is no rank of a driver."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                variables = (folder / "environ").read_bytes().split(b"\0")
                ranks = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
                found[int(folder.name)] = ranks[0] if ranks else -1
    return found


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to mpiexec and all ranks; mpiexec gives each rank a process group, but all are in its session."""
    while alive := processes(process.pid):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()


def content(path: Path) -> SimpleNamespace:
    """Parameters ``theta``, ``history`` by column and ``attributes`` of a run file."""
    with h5py.File(path, "r") as file:
        history = {name: column[()] for name, column in file["history"].items()}
        return SimpleNamespace(theta=file["parameters/theta"][()], history=history, attributes=dict(file.attrs))


def assert_same(a: Path, b: Path, tolerance: float = 0.0, errors: float = 0.0) -> None:
    """Two run files have the same parameters and histories, times apart; to the last bit unless told otherwise."""
    first, second = content(a), content(b)
    assert first.history.keys() == second.history.keys() >= {"iteration", "loss", "work", "error", "time"}
    for name in first.history.keys() - {"time"}:
        rtol = max(tolerance, errors if name.startswith(("error", "test")) else 0.0)
        np.testing.assert_allclose(second.history[name], first.history[name], rtol=rtol, atol=0, err_msg=name)
    np.testing.assert_allclose(second.theta, first.theta, rtol=tolerance, atol=tolerance)
