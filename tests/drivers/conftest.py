"""What the tests of the drivers share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import call
from launch import SMALL
from mpi4py import MPI


@pytest.fixture(scope="session")
def good() -> Iterator[Path]:
    """The run file of a few iterations of pinn.py, made in this process."""
    comm = MPI.COMM_WORLD
    folder = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    path = Path(comm.bcast(folder.name if folder else None)) / "run.h5"
    assert call("pinn", "-solver", "lbfgs", *SMALL, "-max_it", 5, "-output", path, "-progress", "none") == 0
    comm.barrier()
    yield path
    comm.barrier()
    if folder:
        folder.cleanup()
