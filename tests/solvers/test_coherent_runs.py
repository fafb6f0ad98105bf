"""Whole runs on networks dealt over the ranks, with batches: through a restart, and on any number of ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from coherent_cases import CASES, coherent, images, in_tiles
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor
from whole_runs import Training, assert_goes_on

from ddml.losses.branched import BranchedLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.objectives.branched import BranchedObjective, branched_layout, tiles_of_ranks
from ddml.objectives.eliminated import EliminatedObjective
from ddml.problems.classification import cross_entropy
from ddml.sampling.batches import OPTIONS, Batches
from solvers import minimise

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lbfgs": ("lbfgs", {}),
    "tr": ("tr", {}),
    "apts_weights": ("apts_weights", {"local_steps": 2}),
    "coarse phase": ("apts_weights", {"local_steps": 2, "coarse_phase": True}),
    "napts": ("napts", {"local_steps": 2}),
    "aspqn": ("aspqn", {"local_steps": 2}),
    "eliminated": ("tr", {}),
}


def solved(loss: RestrictedLoss) -> tuple[Tensor, float]:
    found = minimise(loss, "lbfgs", MPI.COMM_SELF, iterations=10, blocks=1)
    return found.theta, found.work


def batches(comm: MPI.Comm, eliminated: bool) -> Batches:
    module, samples = coherent(**CASES["2x2, dense"]), images(CASES["2x2, dense"]["shape"], 40)
    empty = BranchedLoss(module, cross_entropy, in_tiles(module, samples, []))
    loss = empty.on(in_tiles(module, samples, tiles_of_ranks(empty, comm.size)[comm.rank]))
    layout = branched_layout(loss, comm)
    objective = (
        EliminatedObjective(solved, loss, layout, blocks=3) if eliminated else BranchedObjective(loss, layout, blocks=3)
    )
    values = {o.name: o.default for o in OPTIONS} | {"batch_size": 20, "batch_steps": 3}
    return Batches(objective, SimpleNamespace(**values), 5)


@pytest.mark.ranks
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly(
    name: str, comm: MPI.Comm, prefix: str, shared_tmp: Path
) -> None:
    solver, settings = RUNS[name]
    for key, value in settings.items():
        PETSc.Options().setValue(prefix + key, value)

    def trained(comm: MPI.Comm, **limits: Any) -> Training:
        return Training(batches(comm, name == "eliminated"), prefix, solver, **limits)

    assert_goes_on(trained, comm, str(shared_tmp / "run.h5"), 5, [4])  # in the middle of a batch
