"""Physics-informed networks on levels of depth: what pinn.py prints, counts, restarts and refuses."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from calling import call, refusal
from launch import assert_same, content
from mpi4py import MPI
from test_ranks import first

DEEP = ("-problem", "klein_gordon", "-network", "residual", "-width", 5, "-depth", 4, "-points", 40,
        "-test_points", 5, "-error_points", 9, "-summation_blocks", 4, "-progress", "none")  # fmt: skip

CASES = {
    "cascade": "-solver cascade -cascade_work 1.2,1.2 -resample never",
    "cascade, moving points": "-solver cascade -cascade_work 1 -resample residual -resample_interval 2",
    "cascade by SSBroyden, moving points": "-solver cascade -smoother ssbroyden -cascade_work 1.5 -resample sobol "
    "-resample_interval 3",
    "cascade by L-BFGS": "-solver cascade -smoother lbfgs -cascade_work 1.5",
    "cascade, layers inserted": "-solver cascade -cascade_work 1.2,1.2 -prolongation insert -coarse_start drawn "
    "-resample sobol -resample_interval 2",
    "cascade by SSBroyden, layers inserted": "-solver cascade -smoother ssbroyden -cascade_work 1.5 "
    "-prolongation insert",
    "cascade by MSPQN": "-solver cascade -smoother mspqn -smooth_local_steps 2 -coarse_local_steps 2 -cascade_work 5",
    "rmtr, moving points": "-solver rmtr -cascade_work 0.7 -coarse_steps 2 -resample residual -resample_interval 3",
    "rmtr by SSBroyden": "-solver rmtr -smoother ssbroyden -cascade_work 1 -coarse_steps 2",
    "rmtr by APTS": "-solver rmtr -levels 2 -smoother apts_weights -smooth_norm 2 -coarse_solver tr -coarse_norm 2 "
    "-cascade_work 1 -coarse_steps 2",
    "mgopt, moving points": "-solver mgopt -cascade_work 0.7 -coarse_steps 2 -resample sobol -resample_interval 2",
    "mgopt by ASPQN": "-solver mgopt -levels 2 -smoother aspqn -smooth_local_steps 2 -coarse_solver lbfgs "
    "-cascade_work 1 -coarse_steps 2 -resample residual -resample_interval 3",
    "mgopt by MSPQN": "-solver mgopt -levels 2 -smoother mspqn -smooth_local_steps 2 -coarse_local_steps 2 "
    "-cascade false -coarse_steps 2",
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
    """From within the cascade, and behind it."""
    whole, parts, options = shared_tmp / "whole.h5", shared_tmp / "parts.h5", CASES[case].split()
    train(whole, 1, 9, *options)
    for ranks, iterations in ((1, 3), (max(1, comm.size - 1), 6), (comm.size, 9)):
        train(parts, ranks, iterations, *options)
    assert_same(whole, parts, errors=1e-13)  # which are summed by ranks
    history = content(whole).history
    assert list(history["iteration"]) == list(range(10))
    assert np.isfinite(history["loss"]).all() and np.ptp(history["loss"]) > 1e-3
    comm.barrier()


def test_the_header_shows_the_levels_and_work_is_in_units_of_the_finest(
    comm: MPI.Comm, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_tmp / "run.h5"
    train(path, comm.size, 4, "-solver", "cascade", "-smoother", "gradient", "-cascade_work", 1e3)  # fmt: skip
    out = comm.bcast(capfd.readouterr().out)
    shares = [float(share) for share in re.findall(r"a gradient costs (.*)", out)]
    lines = re.findall(r"level (\d): (\d) layers?, (\d+) parameters, 40 samples, a gradient costs", out)
    sizes = [3 * 5 + depth * (5 * 6 + 1) + 6 for depth in (4, 2, 1)]
    assert lines == [(str(2 - k), str(4 >> k), str(size)) for k, size in enumerate(sizes)]
    assert shares[0] == 1 and 0.4 < shares[1] < 0.6 and 0.2 < shares[2] < 0.4
    work = content(path).history["work"]
    # the finest loss and gradient, then coarse ones: where the cascade begins, and for each trial
    spent = np.diff(work) / shares[2]
    assert work[0] == 1 and np.allclose(spent, spent.round(), rtol=3e-3) and 0.99 < spent.min() < 1.01
    comm.barrier()


def test_inserted_layers_change_no_loss(comm: MPI.Comm, shared_tmp: Path) -> None:
    """Where the cascade goes on to the next level the loss does not rise; it does with copies, here."""
    rises = []
    for prolongation in ("insert", "copy"):
        path = shared_tmp / f"{prolongation}.h5"
        train(path, comm.size, 100, "-solver", "cascade", "-smoother", "ssbroyden", "-cascade_work", 40,
              "-coarse_start", "drawn", "-prolongation", prolongation)  # fmt: skip
        losses = content(path).history["loss"]
        rises.append(max(after / before for before, after in itertools.pairwise(losses)))
        comm.barrier()
    assert rises[0] <= 1 < 2 < rises[1]


REFUSED = {
    "a plain network": ("-solver rmtr -network mlp", "plain MLP has no depth hierarchy"),
    "a plain network, cascade": ("-solver cascade -network mlp", "plain MLP has no depth hierarchy"),
    "more levels than the depth allows": ("-solver mgopt -levels 4", "depth of 1 is not divisible by 2"),
    "a refinement that does not divide": ("-solver cascade -refinement 3", "depth of 4 is not divisible by 3"),
    "no levels": ("-solver rmtr -levels 0", "levels must be 1 or more"),
    "work that is none": ("-solver cascade -cascade_work 1,-2", "cascade_work must be numbers"),
    "an unknown prolongation": ("-solver cascade -prolongation linear", "prolongation"),
    "an unknown smoother": ("-solver rmtr -smoother sgd", "sgd"),
    "the modular norm": ("-solver rmtr -norm modular -model first", "no modular norm"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_levels_is_refused_in_one_line(case: str, comm: MPI.Comm, shared_tmp: Path) -> None:
    options, said = REFUSED[case]
    assert said in refusal("pinn", *DEEP, *options.split(), "-output", shared_tmp / "run.h5")
    assert not list(shared_tmp.iterdir())


@pytest.mark.ranks
def test_other_levels_do_not_go_on_from_a_run_file(comm: MPI.Comm, shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    train(path, comm.size, 3, "-solver", "cascade", "-cascade_work", 1)
    before = path.read_bytes()
    for options, said in (
        ("-levels 2", "the same -levels and -refinement go on from it"),
        ("-refinement 4", "the same -levels and -refinement go on from it"),
        ("-smoother lbfgs", "option -smoother changes only where another -solver begins"),
        ("-prolongation insert", "option -prolongation changes only where another -solver begins"),
    ):
        assert said in refusal("pinn", "-restart", path, *options.split(), "-max_it", 5)
    comm.barrier()
    assert path.read_bytes() == before
    comm.barrier()
