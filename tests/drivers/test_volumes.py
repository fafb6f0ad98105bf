"""classify.py with networks of images and volumes: the same numbers on any number of ranks, restarted, opened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call
from launch import content
from mpi4py import MPI
from one_rank import on_one_rank
from own_data import USER

import ddml

NETWORKS = {
    "vgg": ("-network", "vgg", "-width", 2, "-depth", 2),
    "resnet": ("-network", "resnet", "-width", 2, "-depth", 2),
    "cnn": ("-network", "cnn", "-width", 2, "-depth", 1),
}


@pytest.fixture(scope="module")
def user(module_tmp: Path) -> Path:
    """A user's Python file."""
    if MPI.COMM_WORLD.rank == 0:
        (module_tmp / "mine.py").write_text(USER)
    MPI.COMM_WORLD.barrier()
    return module_tmp / "mine.py"


def train(path: Path, comm: MPI.Comm, iterations: int, *options: object) -> None:
    """Run so many iterations, or to so many from a run file that is there. Collective on ``comm``."""
    where = comm.bcast("-restart" if path.exists() else "-output")
    assert call("classify", where, path, *options, "-max_it", iterations, "-progress", "none", comm=comm) == 0


@pytest.mark.ranks
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("data", ["solids", "digits"])
def test_runs_have_the_same_bits_on_any_number_of_ranks_and_through_a_restart(
    network: str, data: str, user: Path, shared_tmp: Path, comm: MPI.Comm
) -> None:
    where = ("-data", f"{user}:solids" if data == "solids" else data)
    options = (*where, *NETWORKS[network], "-samples", 60, "-summation_blocks", 4)
    alone, together = shared_tmp / "alone.h5", shared_tmp / "together.h5"
    on_one_rank(lambda one: train(alone, one, 4, *options))
    train(together, comm, 2, *options)
    train(together, comm, 4, *where)
    one, other = content(alone), content(together)
    assert len(one.history["loss"]) == 5
    assert one.history["loss"].tobytes() == other.history["loss"].tobytes()
    assert one.theta.tobytes() == other.theta.tobytes()
    assert one.history["loss"][-1] < one.history["loss"][0]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_of_volumes_learns_and_comes_out_of_its_run_file(
    network: str, user: Path, shared_tmp: Path, comm: MPI.Comm
) -> None:
    path = shared_tmp / "run.h5"
    options = ("-data", f"{user}:solids", *NETWORKS[network], "-summation_blocks", 4, "-error_interval", 1)
    train(path, comm, 20, *options)
    run = content(path)
    assert run.history["accuracy"][-1] > 0.8
    if comm.rank:
        return
    classifier = ddml.open_run(path).network()
    assert (classifier.shape, classifier.classes) == ((1, 7, 8, 9), ("D", "H", "W"))
    bright = np.zeros((3, 1, 7, 8, 9), dtype="float32")
    bright[0, 0, :4], bright[1, 0, :, :4], bright[2, 0, :, :, :4] = 1, 1, 1
    assert classifier.probabilities(torch.as_tensor(bright)).argmax(dim=1).tolist() == [0, 1, 2]
