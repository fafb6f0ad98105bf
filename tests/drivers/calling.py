"""Call drivers in this process, on all of its ranks, with PETSc's options and sys.argv as a command line sets them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch import ROOT
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError

sys.path.insert(0, str(ROOT / "drivers"))
import classify
import logistic
import pinn
import plot

MAIN = {"pinn": pinn.main, "classify": classify.main, "logistic": logistic.main, "plot": plot.main}


@contextmanager
def command_line(name: str, words: list[str]) -> Iterator[None]:
    """Options and arguments within this block."""
    database, before, arguments = PETSc.Options(), PETSc.Options().getAll(), sys.argv
    sys.argv = [name, *words]
    if name != "plot":  # whose options are no options of PETSc
        database.insertString(" ".join(words))
    try:
        yield
    finally:
        for key in database.getAll().keys() - before.keys():
            database.delValue(key)
        sys.argv = arguments


def call(name: str, *options: object, comm: MPI.Comm = MPI.COMM_WORLD) -> int:
    """The exit code of a driver. Collective."""
    with command_line(name, [str(option) for option in options]):
        return MAIN[name](comm)


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
    """Everything in a folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
