"""What every driver does first and last: PETSc's options, one thread a rank, exit codes, errors on all ranks."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ASKED = {"-help", "--help", "-h"}
HELP = bool(ASKED & set(sys.argv))  # our own texts; PETSc's -help prints every option of every object
INTERRUPTED = 130  # the exit code of what SIGINT ends, in every shell


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line that SIGINT has ended the program, where nobody handles it: while modules are imported, say."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("error: interrupted before anything was begun", file=sys.stderr, flush=True)
    if "mpi4py.MPI" not in sys.modules or sys.modules["mpi4py.MPI"].COMM_WORLD.size == 1:
        os._exit(INTERRUPTED)  # mpi4py would answer with pages of text of MPI_Abort


sys.excepthook = _interrupted
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a rank is a core
# what stands beside this folder is ours, whatever else on PYTHONPATH has the same name
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddml  # noqa: F401
import solvers  # noqa: F401

del sys.path[0]  # in a wheel all of site-packages, which comes behind Python's own

from mpi4py import MPI
import petsc4py

from ddml.errors import InputError, printable
from ddml.origins import GPU_AWARE_MPI, origins
from ddml.version import refuse_old


def _start_petsc() -> bool:
    """Initialise PETSc, unless it is too old or its options cannot be read: it would answer with pages of text.

    True if somebody has said whether MPI reads from GPUs.
    """
    text, known = "", False
    if MPI.COMM_WORLD.rank == 0:
        try:
            refuse_old(petsc4py.__version__)
            known = not origins(sys.argv[1:], os.environ).of.keys().isdisjoint(GPU_AWARE_MPI)
        except (ImportError, InputError) as error:
            text = str(error)
    text, known = MPI.COMM_WORLD.bcast((text, known))
    if text:
        if MPI.COMM_WORLD.rank == 0:
            print("error:", printable(text), file=sys.stderr, flush=True)
        MPI.Finalize()
        os._exit(1)
    # by itself PETSc ends the process when the first vector is on a card and MPI does not read from there
    program, *arguments = (a for a in sys.argv if a not in ASKED)
    petsc4py.init([program, *([] if known else [f"-{GPU_AWARE_MPI[0]}", "0"]), *arguments])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it: a reader of the output who leaves ends no run
    return known


_known = _start_petsc()

from petsc4py import PETSc

from ddml.parallel import ranks_that_meet

if not (_known or PETSc.Sys.hasExternalPackage("cuda")):
    PETSc.Options().delValue(GPU_AWARE_MPI[0])  # says nothing there
if not PETSc.Options().hasName("options_left"):  # drivers refuse unknown options themselves
    PETSc.Options().setValue("options_left", False)


def run_program(main: Callable[[MPI.Comm], int]) -> None:
    """Run a driver and end the process with its exit code.

    An InputError is printed once; the exit code is its own. It should be the same on every rank: where others do not
    have it within some seconds, it ends the whole job. So does any other exception, whatever the other ranks are doing.
    """
    world = MPI.COMM_WORLD
    gc.freeze()  # what is imported stays, and to look through it takes 0.06 s each time
    try:
        code = main(world)
    except InputError as error:
        together = ranks_that_meet(world)
        if world.rank == together[0]:
            print("error:", *printable(error).splitlines(), file=sys.stderr, flush=True)
        if len(together) < world.size:
            time.sleep(0.0 if world.rank == together[0] else 1.0)  # who prints comes first
            world.Abort(1)
        code = error.exit_code
    except SystemExit as end:  # of argparse after its help
        code = int(bool(end.code))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        if world.size > 1:
            world.Abort(INTERRUPTED)
        _leave(INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)
        raise
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or there is no space for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    gc.collect()  # on all ranks: PETSc waits for ever at the end if what it is to destroy differs
    if code:
        _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process: mpi4py answers a SystemExit with MPI_Abort, whose pages of text would hide what was said."""
    PETSc._finalize()
    if not MPI.Is_finalized():
        MPI.Finalize()
    os._exit(code)
