"""Quick starts of drivers: ranks forked from one interpreter whose imports are done, see :mod:`forked`.

MPI forbids to fork a process that has initialised it, so the interpreter imports mpi4py and petsc4py without that, and
torch, ddml and solvers, which takes as long as a short run.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # -I leaves it out
import forked  # noqa: E402


def become(request: dict[str, object]) -> None:
    """Be the rank, to the end of this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    sys.argv = list(request["arguments"])  # type: ignore[call-overload]
    program = Path(sys.argv[0]).resolve()
    sys.path.insert(0, str(program.parent))
    MPI.Init()
    if program.parent.name != "drivers":  # which initialise PETSc themselves
        petsc4py.init()
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    PETSc._finalize()
    MPI.Finalize()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        import importlib
        import pkgutil
        import runpy

        import answers
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import mpi4py
        import petsc4py.lib
        import torch._dynamo  # noqa: F401  # which optimizers and exports load late

        mpi4py.rc.initialize = False
        PETSc = petsc4py.lib.ImportPETSc()  # and does not initialise it
        from mpi4py import MPI

        sys.path[:2] = [str(ROOT)]  # in the place of the folders of tests
        import ddml.hdf5

        for package in map(importlib.import_module, ("ddml", "solvers")):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                if not module.name.startswith("ddml.kernels."):  # libraries, which are no modules of Python
                    importlib.import_module(module.name)
        assert not MPI.Is_initialized()
        answering = answers.command()
        ddml.hdf5.command = lambda: answering  # this process's, not each child's own
        forked.serve(sys.argv[2], become)
    else:
        sys.exit(forked.ask(sys.argv[1], sys.argv[2:]))
