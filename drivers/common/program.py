"""What every driver does first and last: PETSc's options, one thread a rank, exit codes, errors on all ranks."""

from __future__ import annotations

import gc
import os
import sys
import time
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
from ddml.parallel import ranks_that_meet

if not PETSc.Options().hasName("options_left"):  # drivers refuse unknown options themselves
    PETSc.Options().setValue("options_left", False)


def run_program(main: Callable[[MPI.Comm], int]) -> None:
    """Run a driver and end the process with its exit code.

    An InputError is printed once; exit code 1. It should be the same on every rank: where others do not have it within
    some seconds, it ends the whole job. So does any other exception, whatever the other ranks are doing.
    """
    world = MPI.COMM_WORLD
    try:
        code = main(world)
    except InputError as error:
        together = ranks_that_meet(world)
        if world.rank == together[0]:
            print("error:", *str(error).splitlines(), file=sys.stderr, flush=True)
        if len(together) < world.size:
            time.sleep(0.0 if world.rank == together[0] else 1.0)  # who prints comes first
            world.Abort(1)
        code = 1
    except SystemExit as end:  # of argparse after its help
        code = int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)
        raise
    sys.stdout.flush()
    gc.collect()  # on all ranks: PETSc waits for ever at the end if what it is to destroy differs
    if code:
        # mpi4py answers a SystemExit with MPI_Abort, whose pages of text would hide the one line above
        PETSc._finalize()
        if not MPI.Is_finalized():
            MPI.Finalize()
        os._exit(code)
