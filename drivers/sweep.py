"""Runs of a sweep, one a line of a file: python drivers/sweep.py options.txt [-table NAME].

A line has what drivers/job.sbatch takes: pinn (the default), classify, logistic or kernel, and options, with blanks
between them; empty lines and those that begin with # are no runs. Every line is checked as its driver would, up to the
first evaluation. With -table, what the run files NAME_1.h5, NAME_2.h5, ... hold is printed instead, one row a line.
"""

from __future__ import annotations

from common.program import ASKED, run_program  # first: it initialises PETSc

import argparse
import gc
import io
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from mpi4py import MPI
from petsc4py import PETSc

import classify
import kernel
import logistic
import pinn
from common.arguments import Parser
from ddml.errors import InputError
from ddml.origins import origins
from ddml.runs.opened import open_run

MAINS = {"pinn": pinn.main, "classify": classify.main, "logistic": logistic.main, "kernel": kernel.main}
COLUMNS = ("iteration", "loss", "error", "accuracy", "work", "time")
SCRIPTS = ("output", "restart", "overwrite", "interrupted_code")  # what drivers/job.sbatch gives or works out


def lines(path: str) -> list[list[str]]:
    """The words of each run.

    Raises
    ------
    InputError
        A file that cannot be read, or has no run.
    """
    try:
        # in bytes, which have the blanks and the ends of lines that a shell knows
        words = [[word.decode() for word in line.split()] for line in Path(path).read_bytes().split(b"\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    runs = [line for line in words if line and not line[0].startswith("#")]
    if not runs:
        raise InputError(f"{path} has no line with options of a run")
    return runs


def check(words: Sequence[str], comm: MPI.Comm) -> None:
    """Do what a driver does with these words up to the first evaluation.

    Raises
    ------
    InputError
        What it refuses; options that are not for lines of a sweep.
    """
    name, options = (words[0], words[1:]) if words[0] in MAINS else ("pinn", words)
    for word in options:
        if word.lstrip("-") in SCRIPTS and word.startswith("-"):
            raise InputError(f"option {word} is not for a line of a sweep: its run file is JOBNAME_TASK.h5")
        if word in ASKED:
            raise InputError(f"option {word} is not for a line of a sweep: it trains nothing")
    database, before, arguments = PETSc.Options(), PETSc.Options().getAll(), sys.argv
    sys.argv = [name, *options, "-check"]
    try:
        origins(sys.argv[1:], {})  # what it refuses, PETSc gives up on
        database.insertString(" ".join(sys.argv[1:]))
        with redirect_stdout(io.StringIO()):
            MAINS[name](comm)
    finally:
        for key in database.getAll().keys() - before.keys():
            database.delValue(key)
        sys.argv = arguments
        gc.collect()


def table(runs: Sequence[Sequence[str]], name: str) -> str:
    """What the run files of a sweep hold, a row each, and a line for each that cannot be read."""
    found, wrong = [], list[str]()
    for number, words in enumerate(runs, 1):
        path = Path(f"{name}_{number}.h5")
        history = None
        if path.exists():
            try:
                history = open_run(path).history
            except InputError as error:
                wrong.append(f"run {number}: {error}")
        values = [history.last(column) if history is not None else math.nan for column in COLUMNS]
        found.append([str(number), *("" if math.isnan(v) else f"{v:.6g}" for v in values), " ".join(words)])
    rows = [["run", *COLUMNS, "options"], *found]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    aligned = ["  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join([*aligned, *wrong])


def main(comm: MPI.Comm) -> int:
    """Do what the command line says; the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("-h", "-help", "--help", action="help", help="explain the options")
    parser.add_argument("file", metavar="options.txt")
    parser.add_argument("-table", metavar="NAME", help="print what has come out of the runs of that name")
    arguments = parser.parse_args()
    if comm.size > 1:
        raise InputError("sweep.py runs on one rank")
    runs = lines(arguments.file)
    if arguments.table is not None:
        print(table(runs, arguments.table))
        return 0
    for number, words in enumerate(runs, 1):
        try:
            check(words, comm)
        except InputError as error:
            raise InputError(f"run {number} of {arguments.file}: {error}") from error
    print(f"{len(runs)} runs, no option that is refused")
    return 0


if __name__ == "__main__":
    run_program(main)
