"""Runs that have come to their end: what was measured last, machines that are done, points that PETSc reports twice."""

from pathlib import Path

import numpy as np
import pytest
from calling import call
from launch import assert_same, content
from mpi4py import MPI
from test_ranks import needs_three, train

from ddml.runs.opened import open_run

QUIET = ("-progress", "none")
SMALL = ("-problem", "burgers", "-width", 4, "-depth", 2, "-points", 50, "-test_points", 20, *QUIET)


@pytest.mark.ranks
def test_what_was_measured_at_the_end_is_in_the_file_and_no_restart_takes_it(comm: MPI.Comm, shared_tmp: Path) -> None:
    whole, parts = shared_tmp / "whole.h5", shared_tmp / "parts.h5"
    assert call("pinn", *SMALL, "-error_interval", 4, "-max_it", 11, "-output", whole) == 0
    assert call("pinn", *SMALL, "-error_interval", 4, "-max_it", 6, "-output", parts) == 0
    before = open_run(parts).history["error"]
    assert list(np.isfinite(before)) == [i in (0, 4, 6) for i in range(7)]
    assert np.isnan(content(parts).history["error"][6])
    comm.barrier()
    assert call("pinn", "-restart", parts, "-max_it", 11) == 0
    assert_same(whole, parts)
    history = open_run(parts).history
    assert list(np.flatnonzero(np.isfinite(history["error"]))) == [0, 4, 8, 11]
    assert np.isfinite(history["test_loss"][-1])
    comm.barrier()
    assert call("pinn", "-restart", parts, "-max_it", 12) == 0
    assert "measured error" not in content(parts).attributes  # it is in the history
    comm.barrier()


@pytest.mark.ranks
def test_a_trial_that_petsc_reports_and_refuses_has_no_row(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    words = ("-problem", "allen_cahn", "-points", 101, "-test_points", 0, "-error_points", 100, "-width", 8, *QUIET)
    assert call("pinn", *words, "-depth", 4, "-solver", "ntr", "-max_it", 3, "-output", path) == 0
    assert list(content(path).history["iteration"]) == [0, 1, 2, 3]
    comm.barrier()
    assert call("pinn", "-restart", path, "-max_it", 4) == 0
    assert list(open_run(path).history["iteration"]) == [0, 1, 2, 3, 4]
    comm.barrier()


@pytest.mark.ranks
@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_a_machine_that_is_done_has_nothing_to_do(loss: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    path, words = shared_tmp / "run.h5", ("-data", "digits", "-samples", 120, "-loss", loss, *QUIET)
    assert call("kernel", *words, "-lambda", 0.1, "-max_it", 100, "-output", path) == 0
    before = content(path)
    comm.barrier()
    assert call("kernel", "-restart", path, "-max_it", 200, *QUIET) == 0
    after = content(path)
    assert np.array_equal(before.theta, after.theta) and np.array_equal(before.history["loss"], after.history["loss"])
    comm.barrier()
    assert call("kernel", "-restart", path, "-rtol", 1e-9, *QUIET) == 0
    assert len(content(path).history["loss"]) > len(before.history["loss"])
    comm.barrier()


@pytest.mark.ranks
@needs_three
def test_few_samples_are_cut_alike_on_any_number_of_ranks(comm: MPI.Comm, shared_tmp: Path) -> None:
    files = [shared_tmp / f"{ranks}.h5" for ranks in (1, 2, 3)]
    for ranks, path in enumerate(files, 1):
        train("kernel", path, ranks, 3, "-data", "digits", "-samples", 100)
    for path in files[1:]:
        assert_same(files[0], path)
    comm.barrier()
