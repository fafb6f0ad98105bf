"""Every solver on digits and on a part of MNIST: the same run on any number of ranks, and through a restart."""

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn
from whole_runs import Training, assert_goes_on, make_batches

from ddml.data import files
from ddml.data.sample_sets import TensorSamples
from ddml.networks.euler import euler
from ddml.problems.classification import ClassificationLoss
from solvers import SOLVERS

OFFICIAL = Path(os.environ.get("DDML_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mnist"
LOCAL = {"local_steps": 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SOLVERS if name != "gauss_newton"},  # which is for sums of squares
    "aspqn": ("aspqn", LOCAL),
    "mspqn": ("mspqn", LOCAL),
    "mspqn_dense": ("mspqn_dense", LOCAL),
    "mspqn_dense in colours": ("mspqn_dense", {**LOCAL, "side_by_side": 0}),
    "tr, K-FAC norm, L-BFGS": ("tr", {"norm": "kfac", "model": "lbfgs", "memory": 1, "overlap_pairs": True}),
    "tr, K-FAC norm, Gauss-Newton": ("tr", {"norm": "kfac", "model": "gauss_newton", "curvature_fraction": 0.2}),
    "tr, 2-norm, L-SR1": ("tr", {"model": "sr1", "overlap_pairs": True}),
    "tr, 2-norm, Hessian": ("tr", {"model": "hessian", "tr_ksp_max_it": 5}),
    "apts_weights, random groups": ("apts_weights", {"decomposition": "random", "subdomains": 4}),
    "apts_weights, K-FAC norm, L-BFGS": ("apts_weights", {"norm": "kfac", "model": "lbfgs", "memory": 1}),
    "apts_data, 2-norm, L-SR1": ("apts_data", {"model": "sr1", "subdomains": 3}),
    "napts, 2-norm": ("napts", {"norm": "2"}),
}


def digits(count: int) -> TensorSamples:
    found = files.digits()
    return TensorSamples(torch.as_tensor(found.inputs[:count] / 16.0), torch.as_tensor(found.labels[:count]))


def mnist(count: int) -> TensorSamples:
    """The first images, of a quarter of the pixels: dense matrices of their networks are small."""
    if not OFFICIAL.is_dir():
        pytest.skip("the official files are not at hand")
    images, labels = (
        np.frombuffer(gzip.decompress((OFFICIAL / f"train-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    pixels = images[16:].reshape(-1, 28, 28)[:count, ::2, ::2] / 255.0
    return TensorSamples(torch.as_tensor(pixels[:, None]), torch.as_tensor(labels[8 : 8 + count].astype(np.int64)))


def made(comm: MPI.Comm, source: Any, solver: str) -> Any:
    samples = source(240)
    torch.manual_seed(0)
    inputs = samples.inputs[0].numel()
    network: nn.Module = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 10)
    )
    if SOLVERS[solver].levels_of == "depth":
        network = euler(tuple(samples.inputs.shape[1:]), 10, blocks=4, width=6, horizon=1.0)
    loss = ClassificationLoss(network.double(), samples, 10)
    return make_batches(loss, comm, blocks=3, batch_size=60, batch_overlap=0.1, batch_steps=4, batch_growth=1.5)


@pytest.mark.ranks
@pytest.mark.parametrize("source", [digits, pytest.param(mnist, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SETTINGS)
def test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly(
    name: str, source: Any, comm: MPI.Comm, prefix: str, shared_tmp: Path
) -> None:
    solver, settings = SETTINGS[name]
    for key, value in settings.items():
        PETSc.Options().setValue(prefix + key, value)

    def trained(comm: MPI.Comm, max_it: int, **limits: Any) -> Training:
        run = Training(made(comm, source, solver), prefix, solver, max_it=max_it, **limits)
        losses = run.run.history["loss"]
        assert np.isfinite(losses).all()
        assert losses[4] < losses[0]  # of the same batch
        return run

    assert_goes_on(trained, comm, str(shared_tmp / "run.h5"), 9, [5])  # in the middle of a batch
