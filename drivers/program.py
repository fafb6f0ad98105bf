"""What every driver does first and last: PETSc's options, one thread a rank, exit codes, errors on all ranks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a rank is a core
import petsc4py

_ASKED = {"-help", "--help", "-h"}
HELP = bool(_ASKED & set(sys.argv))  # our own texts; PETSc's -help prints every option of every object
petsc4py.init([a for a in sys.argv if a not in _ASKED])

from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import InputError

if not PETSc.Options().hasName("options_left"):  # drivers refuse unknown options themselves
    PETSc.Options().setValue("options_left", False)


def run_program(main: Callable[[MPI.Comm], int]) -> None:
    """Run a driver and end the process with its exit code.

    An InputError, which is the same on every rank, is printed once; exit code 1. Any other
    exception ends the whole job, whatever the other ranks are doing.
    """
    world = MPI.COMM_WORLD
    try:
        code = main(world)
    except InputError as error:
        if world.rank == 0:
            print("error:", *str(error).splitlines(), file=sys.stderr, flush=True)
        code = 1
    except SystemExit as end:  # of argparse after its help
        code = int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)
        raise
    sys.stdout.flush()
    if code:
        # mpi4py answers a SystemExit with MPI_Abort, whose pages of text would hide the one line above
        PETSc._finalize()
        if not MPI.Is_finalized():
            MPI.Finalize()
        os._exit(code)
