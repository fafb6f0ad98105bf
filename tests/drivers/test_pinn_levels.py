"""Physics-informed networks on levels of depth: what pinn.py prints, counts, restarts and refuses."""

import re
from pathlib import Path

import numpy as np
import pytest
from calling import call, refusal
from launch import assert_same, content
from mpi4py import MPI
from test_ranks import first

DEEP = ("-problem", "klein_gordon", "-network", "residual", "-width", 5, "-depth", 4, "-points", 40,
        "-test_points", 20, "-error_points", 50, "-summation_blocks", 4, "-progress", "none")  # fmt: skip

# settings, and iterations after which a run is on a coarse level, where it has one
CASES = {
    "cascade": "-solver cascade -cascade_work 1.2,1.2 -resample never",
    "cascade, moving points": "-solver cascade -cascade_work 1 -resample residual -resample_interval 2",
    "cascade by SSBroyden, moving points": "-solver cascade -smoother ssbroyden -cascade_work 1.5 -resample sobol "
    "-resample_interval 3",
    "cascade by L-BFGS": "-solver cascade -smoother lbfgs -cascade_work 1.5",
    "cascade by MSPQN": "-solver cascade -smoother mspqn -smooth_local_steps 3 -coarse_local_steps 3 -cascade_work 5",
    "rmtr, moving points": "-solver rmtr -cascade_work 0.7 -coarse_steps 3 -resample residual -resample_interval 3",
    "rmtr by SSBroyden": "-solver rmtr -smoother ssbroyden -cascade_work 1 -coarse_steps 3",
    "rmtr by APTS": "-solver rmtr -levels 2 -smoother apts_weights -smooth_norm 2 -coarse_solver tr -coarse_norm 2 "
    "-cascade_work 1 -coarse_steps 3",
    "mgopt, moving points": "-solver mgopt -cascade_work 0.7 -coarse_steps 3 -resample sobol -resample_interval 2",
    "mgopt by ASPQN": "-solver mgopt -levels 2 -smoother aspqn -smooth_local_steps 3 -coarse_solver lbfgs "
    "-cascade_work 1 -coarse_steps 3 -resample residual -resample_interval 3",
    "mgopt by MSPQN": "-solver mgopt -levels 2 -smoother mspqn -smooth_local_steps 3 -coarse_local_steps 3 "
    "-cascade false -coarse_steps 3",
    "mladagrad, moving points": "-solver mladagrad -resample residual -resample_interval 3",
}


def train(path: Path, ranks: int, iterations: int, *options: object) -> None:
    """Run to so many iterations on the first ranks, from the run file if it is there."""
    where = ("-restart", path) if path.exists() else (*DEEP, *options, "-output", path)
    MPI.COMM_WORLD.barrier()
    with first(ranks) as comm:
        if comm is not None:
            assert call("pinn", *where, "-max_it", iterations, comm=comm) == 0


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_runs_go_on_to_the_last_bit_on_any_number_of_ranks(case: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    """From within the cascade, and after it; all ranks' run is that of one rank."""
    whole, parts, options = shared_tmp / "whole.h5", shared_tmp / "parts.h5", CASES[case].split()
    train(whole, comm.size, 12, *options)
    for ranks, iterations in ((1, 3), (max(1, comm.size - 1), 5), (comm.size, 9), (1, 12)):
        train(parts, ranks, iterations)if parts.exists() else train(parts, ranks, iterations, *options)
    assert_same(whole, parts, errors=1e-13)  # which are summed by ranks
    history = content(whole).history
    assert list(history["iteration"]) == list(range(13))
    assert np.isfinite(history["loss"]).all() and np.ptp(history["loss"]) > 1e-3
    comm.barrier()
