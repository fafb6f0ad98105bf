"""Errors of local solves, which only one group of ranks sees, are everybody's."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import classifier
from mpi4py import MPI
from petsc4py import PETSc

from ddml.decomposition.subdomains import Subdomains
from ddml.errors import CollectiveError, InputError, NonFiniteError
from ddml.layout import ParameterLayout
from ddml.objectives.objective import Objective
from ddml.parallel import Interrupted, agreed, cause
from solvers.schwarz.schwarz import Schwarz

Train = Callable[..., SimpleNamespace]
FAULTY = Path(__file__).resolve().parents[1] / "drivers" / "faulty_solvers.py"
TEXT = "a local solver has had enough"
SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("aspqn", {"local_steps": 3}),
    ("mspqn", {"local_steps": 3}),
    ("mspqn", {"local_steps": 3, "side_by_side": 0}),
    ("apts_weights", {"decomposition": "layers"}),
    ("apts_data", {"subdomains": 3}),
    ("napts", {"decomposition": "layers"}),
]


@pytest.mark.parametrize("kind", ["input", "arithmetic", "memory"])
@pytest.mark.parametrize("fault", [0, 1, 4])
@pytest.mark.parametrize(("solver", "settings"), SOLVERS)
def test_errors_of_one_group_are_raised_by_all(
    train: Train, comm: MPI.Comm, solver: str, settings: dict[str, Any], fault: int, kind: str
) -> None:
    inside = {"local_solver": f"{FAULTY}:Faulty", "sub_fault": fault, "sub_kind": kind}
    with pytest.raises((InputError, PETSc.Error)) as error:
        train(classifier(), solver, 6, **settings, **inside)
    found: BaseException | None = error.value
    while isinstance(found, PETSc.Error):
        found = found.__cause__ or found.__context__
    assert type(found) is (CollectiveError if kind == "input" else RuntimeError)
    assert comm.allgather(str(found)) == [str(found)] * comm.size
    assert TEXT in str(found)


def test_a_constructor_that_raises_on_one_rank(train: Train, comm: MPI.Comm) -> None:
    with pytest.raises((InputError, PETSc.Error)) as error:
        train(classifier(), "aspqn", 2, local_solver=f"{FAULTY}:CannotBeMade")
    found = cause(error.value, InputError)
    assert found is not None and TEXT in str(found) and "CannotBeMade" in str(found)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (InputError, CollectiveError),
        (NonFiniteError, NonFiniteError),
        (Interrupted, Interrupted),
        (ZeroDivisionError, RuntimeError),
    ],
)
def test_what_becomes_of_exceptions(comm: MPI.Comm, raised: type[Exception], seen: type[Exception]) -> None:
    with pytest.raises(seen, match=str(comm.size - 1)), agreed(comm):
        if comm.rank == comm.size - 1:
            raise raised(f"of rank {comm.rank}")
    with agreed(comm):
        pass


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_the_matrices_of_a_node_are_added_up(
    sum_over_rows: Any, comm: MPI.Comm, prefix: str, parallel: bool, together: bool
) -> None:
    """Two subdomains whose matrices each take 0.7 of the memory; nothing of it is taken."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = int(np.sqrt(2 * 0.7 * memory / 8))

    def rows(theta: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table * theta[0] ** 2

    loss = sum_over_rows(rows, np.ones(4), [size, size], np.zeros(2 * size))
    objective = Objective(loss, ParameterLayout(loss.parameters, comm))
    both = Subdomains.by_layers(loss, 2)
    one, other = both.subset([0]), both.subset([1])
    made = [Schwarz(objective, one, parallel, prefix, [1], "ssbroyden")]
    with pytest.raises(CollectiveError, match=r"1\.4 times the memory of a node"):
        if together:
            Schwarz(objective, both, parallel, prefix, [1, 1], "ssbroyden")
        else:
            Schwarz(objective, other, parallel, prefix, [1], "ssbroyden", beside=made)
    made[0].destroy()


@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_steps_that_are_not_finite_count_as_none(train: Train, comm: MPI.Comm, solver: str) -> None:
    """A local solver that ends at points that are no numbers, in one subdomain."""
    seen: list[tuple[dict[int, float], float]] = []

    def watch(context: Any, iteration: int) -> None:
        if iteration:
            seen.append((dict(context.local.decreases), context.local.promise))

    settings = {"local_solver": f"{FAULTY}:EndsNowhere", "decomposition": "layers"}
    if solver == "apts_data":
        settings = {"local_solver": f"{FAULTY}:EndsNowhere", "subdomains": 3}
    run = train(classifier(), solver, 3, watch=watch, **settings)
    assert np.isfinite(run.losses).all() and np.isfinite(run.theta).all()
    for decreases, promise in seen:
        assert 0.0 in decreases.values() and max(decreases.values()) > 0 and promise > 0
