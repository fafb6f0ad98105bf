"""The start of a run: its options and where they come from, the lock on its file, and the signals that stop it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

import ddml.runs.restart
from ddml import options
from ddml.errors import InputError, StoppedError
from ddml.options import EACH_START, Option
from ddml.origins import COMMAND_LINE, Origins, origins, refuse_words
from ddml.parallel import Interrupted, StopRequest, agreed
from ddml.runs.lock import locked
from ddml.runs.restart import Restart
from solvers import PETSC_TYPES, solver_class
from . import signals

LARGEST_CODE = 254  # the one above it is the last exit code that there is
ELSEWHERE = "PETSc's options"  # of YAML, or set by who calls a driver


INTERRUPTED_CODE = Option(
    "interrupted_code", 0, "Exit code of a run that a signal has stopped; unless it is 0, one more where no iteration "
    "was gained since the start (see docs/cluster.md).", minimum=0, changes=EACH_START,
)  # fmt: skip


@dataclass
class Start:
    """What a run begins with, besides its settings.

    Attributes
    ----------
    restart : Restart
        What it takes over from its run file.
    stop : StopRequest
        Knows of signals, from here on.
    origins : Origins
        Of the options that are given.
    interrupted_code : int
        The value of :data:`INTERRUPTED_CODE`.
    notes : list of str
        What a user should know.
    """

    restart: Restart
    stop: StopRequest
    origins: Origins
    interrupted_code: int = 0
    notes: list[str] = field(default_factory=list)

    def interrupted(self, gained: bool) -> int:
        """The exit code of a run that a signal has stopped, which has gained iterations or none."""
        return self.interrupted_code + (self.interrupted_code > 0 and not gained)

    def unread(self) -> list[str]:
        """Notes on options that nothing has read and that nobody has given to this program in particular.

        Raises
        ------
        InputError
            On others that nothing has read.
        """
        around = self.origins.around()
        left = self.restart.unknown()
        wrong = [name for name in left if name not in around]
        if wrong:
            names = ", ".join("-" + name for name in wrong)
            raise InputError(f"unknown option{'s' * (len(wrong) > 1)} {names}; -help lists them")
        return [f"-{name} of {around[name]} is read by nothing here" for name in left]

    def elsewhere(self) -> list[str]:
        """Lines on options that do not stand on the command line, for the header."""
        by: dict[str, list[str]] = {}
        for name, (text, origin) in self.options().items():
            if name not in self.restart.options and origin not in (COMMAND_LINE, ELSEWHERE):
                by.setdefault(origin, []).append(f"-{name} {text or ''}".rstrip())
        return [f"options of {origin}: {' '.join(given)}" for origin, given in by.items()]

    def options(self) -> dict[str, tuple[str | None, str]]:
        """Value and origin of each option that is given and has been read, by name."""
        of, around = {**self.origins.of, **self.restart.origins}, self.origins.around()
        unread = {name for name in options.unused() if name in around}
        return {
            name: (text, of.get(name, ELSEWHERE))
            for name, text in sorted(PETSc.Options().getAll().items())
            if name not in unread
        }


@contextmanager
def started(
    comm: MPI.Comm,
    driver: str,
    table: Sequence[Option],
    limits: Sequence[Option],
    options_of: Callable[[str], Sequence[Option]] = lambda name: solver_class(name).options,
) -> Iterator[tuple[Any, Any, Start]]:
    """A driver's settings, the limits of its run and what else it begins with, for the block that runs. Collective.

    Options come from where PETSc looks for them, and behind ``-restart`` from the run file
    (:mod:`ddml.runs.restart`), where ``options_of`` says which are a solver's; torch's threads are set. Within the
    block signals ask the run to stop, and nobody else can begin with the same run file.

    Raises
    ------
    InputError
        Words that are neither options nor values of options, values out of range; what a restart refuses; a run file
        that is in use; a signal before the run. One about an option that does not stand on the command line says where
        it does.
    """
    found = Origins()
    with agreed(comm):
        if comm.rank == 0:  # as PETSc does
            found = origins(sys.argv[1:], os.environ)
            refuse_words(sys.argv[1:], os.environ)
    found = comm.bcast(found)
    stop, code = StopRequest(), 0
    with stop.listening(), _naming(found.of):
        try:
            stop.requested |= signals.came()
            files = options.read(limits)
            code = interrupted_code()
            stop.check(comm)
            with locked(files.output or files.restart, comm) as notes:
                restart = Restart()
                if files.restart is not None:
                    weak = {} if found.of.get("restart") in found.ambient else found.around()
                    restart = ddml.runs.restart.take_over(
                        files.restart, comm, driver, (*table, *limits), options_of, weak, files.trust
                    )
                settings = options.read(table)
                settings.solver = chosen_solver(settings.solver)
                torch.set_num_threads(settings.threads)
                yield settings, options.read(limits), Start(restart, stop, found, code, notes)
        except Interrupted:
            text = "a signal asked to stop before the run began; nothing was written"
            raise StoppedError(text, code + 1) from None  # 1 where that is no success either


def interrupted_code() -> int:
    """The value of :data:`INTERRUPTED_CODE`.

    Raises
    ------
    InputError
        If it, or the one above it, is no exit code.
    """
    code: int = options.read([INTERRUPTED_CODE]).interrupted_code
    if code > LARGEST_CODE:
        raise InputError(f"option -interrupted_code must be {LARGEST_CODE} or less, got {code}")
    return code


def chosen_solver(name: str) -> str:
    """The solver that ``-solver``, whose value or default this is, and PETSc's ``-tao_type`` ask for.

    Raises
    ------
    InputError
        If they contradict each other, or there is none of that type here; ``-tao_max_it``, ``-tao_python_type``.
    """
    database = PETSc.Options()
    if database.hasName("tao_max_it"):
        raise InputError("option -tao_max_it is -max_it here, which also counts the iterations before a restart")
    if database.hasName("tao_python_type"):
        raise InputError("option -tao_python_type is -solver path/to/file.py:Class here")
    if not database.hasName("tao_type"):
        return name
    kind = database.getString("tao_type")
    if kind not in PETSC_TYPES:
        raise InputError(f"option -tao_type must be one of {', '.join(PETSC_TYPES)}; got '{kind}'; others by -solver")
    if database.hasName("solver") and name != kind:
        raise InputError(f"options -solver {name} and -tao_type {kind} ask for two solvers: give one")
    return kind


@contextmanager
def _naming(of: Mapping[str, str]) -> Iterator[None]:
    """Make an InputError that names an option also say where that stands, if not on the command line."""
    try:
        yield
    except InputError as error:
        names = {
            name: of[name] for name in re.findall(r"-(\w+)", str(error)) if of.get(name, COMMAND_LINE) != COMMAND_LINE
        }
        if not names:
            raise
        where = ", ".join(f"-{name} stands in {origin}" for name, origin in names.items())
        raise type(error)(f"{error} ({where})") from error
