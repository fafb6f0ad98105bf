"""What all solvers share."""

from typing import Any

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.networks.tanh import TanhNetwork
from ddml.parallel import Interrupted, StopRequest, cause
from ddml.problems import Burgers, PDELoss
from solvers import Minimisation

DENSE = {"decomposition": "windows", "local_solver": "ssbroyden", "local_memory": "keep", "local_steps": 2}


@pytest.mark.parametrize(
    ("solver", "settings", "whole"),
    [
        ("ssbroyden", {}, True),
        ("gauss_newton", {}, True),
        ("mspqn", DENSE, True),
        ("mspqn", {"local_steps": 2}, False),
        ("lbfgs", {}, False),
        ("tr", {"norm": "2"}, False),
        ("astrom", {}, False),
        ("newton", {}, False),
        ("apts_weights", {"norm": "2"}, True),
        ("apts_data", {"norm": "2"}, True),
        ("napts", {"norm": "2"}, True),
    ],
)
def test_a_request_to_stop_waits_where_an_iteration_changes_what_is_kept(
    comm: MPI.Comm, prefix: str, solver: str, settings: dict[str, Any], whole: bool
) -> None:
    network = TanhNetwork(2, 5, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss, stop = PDELoss(Burgers(), network, 30), StopRequest()
    for name, value in settings.items():
        PETSc.Options().setValue(prefix + name, value)
    made, done = Minimisation(loss, solver, comm, prefix, blocks=0, stop=stop), list[int]()
    objective, tao = made.objective, made.tao
    tao.setMaximumIterations(3)

    def monitor(tao: PETSc.TAO) -> None:
        done.append(tao.getIterationNumber())
        stop.requested = True  # while the next iteration runs
        assert objective.stop is stop

    tao.setMonitor(monitor)
    if whole:
        tao.solve()
        assert done == [0, 1, 2, 3]
    else:
        with pytest.raises(PETSc.Error) as error:
            tao.solve()
        assert cause(error.value, Interrupted) is not None
        assert done == [0]
    made.destroy()
