"""What all solvers share."""

from typing import Any

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.residual import ResidualObjective
from ddml.parallel import Interrupted, StopRequest, cause
from ddml.problems import Burgers, PDELoss
from solvers import configure

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
    layout = ParameterLayout(loss.parameters, comm)
    objective = ResidualObjective(loss, layout, stop)
    for name, value in settings.items():
        PETSc.Options().setValue(prefix + name, value)
    x, tao, done = layout.vector(), PETSc.TAO().create(comm), []
    objective.initial(x)
    tao.setOptionsPrefix(prefix)
    configure(tao, solver)
    objective.attach(tao)
    tao.setSolution(x)
    tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
    tao.setMaximumIterations(3)
    tao.setFromOptions()
    tao.setUp()

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
    tao.destroy()
