"""Call drivers in this process, on all of its ranks, with PETSc's options and sys.argv as a command line sets them."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launch import ROOT, launch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError

sys.path.insert(0, str(ROOT / "drivers"))
import classify
import export
import kernel
import logistic
import pinn
import plot
import predict
import sweep

MAIN = {"pinn": pinn.main, "classify": classify.main, "logistic": logistic.main, "kernel": kernel.main}
# without options of PETSc
OF_RUN_FILES = {"plot": plot.main, "predict": predict.main, "export": export.main, "sweep": sweep.main}


@contextmanager
def command_line(name: str, words: list[str]) -> Iterator[None]:
    """Options and arguments within this block, and what limits it changes."""
    database, before, arguments = PETSc.Options(), PETSc.Options().getAll(), sys.argv
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sys.argv = [name, *words]
    if name not in OF_RUN_FILES:
        database.insertString(" ".join(words))
    try:
        yield
    finally:
        for key in database.getAll().keys() - before.keys():
            database.delValue(key)
        sys.argv = arguments
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # which a hindering problem has changed


def call(name: str, *options: object, comm: MPI.Comm = MPI.COMM_WORLD) -> int:
    """The exit code of a driver. Collective."""
    with command_line(name, [str(option) for option in options]):
        return (MAIN | OF_RUN_FILES)[name](comm)


def refusal(name: str, *options: object, comm: MPI.Comm = MPI.COMM_WORLD) -> str:
    """The one line with which a driver refuses its input, the same on all ranks. Collective."""
    line = None
    try:
        call(name, *options, comm=comm)
    except InputError as error:
        line = " ".join(str(error).splitlines())
    lines = comm.allgather(line)
    assert line is not None and lines == [line] * comm.size, lines
    return line


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but what Python compiles of it."""
    found = (p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts)
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


def check_refusal(name: str, words: list[str], expected: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A driver names what is wrong in one line on all ranks, and touches no file of a folder. Collective."""
    before = tree(folder)
    MPI.COMM_WORLD.barrier()
    assert expected in refusal(name, *words)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert tree(folder) == before
    MPI.COMM_WORLD.barrier()


def check_refusal_of_a_start(name: str, words: list[str], expected: str, folder: Path) -> None:
    """The same of two ranks that are started: one line altogether, exit code 1."""
    before = tree(folder)
    result = launch(2, *words, driver=f"{name}.py")
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert result.rc == 1, result.out + result.err
    assert len(errors) == 1, result.err
    assert expected in errors[0]
    assert "Traceback" not in result.err + result.out
    assert tree(folder) == before
