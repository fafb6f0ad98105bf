"""Evaluations are charged as documented."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from objective_cases import LOSSES, burgers, close, losses, points, put, serial

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.layout import ParameterLayout
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import restricted
from ddml.problems.pde.charges import AUTOGRAD


@losses
def test_evaluations_of_the_whole_are_charged_as_documented(comm: MPI.Comm, name: str) -> None:
    loss = LOSSES[name]()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    x, y = put(layout, points(loss, 1)[0]), layout.vector()
    calls = [
        (lambda: objective.value(x), loss.charges.evaluation(gradient=False), "losses"),
        (lambda: objective.value_gradient(x, y), 1.0, "gradients"),
        (lambda: objective.hessian_product(x, x, y), loss.charges.hessian(), "products"),
    ]
    for call, units, kind in calls:
        before = objective.work.state()
        call()
        after = objective.work.state()
        assert after["total"] - before["total"] == pytest.approx(units, rel=1e-14)
        assert after["critical"] == after["total"]
        more = {k: after[k] - before[k] for k in ("losses", "gradients", "products")}
        assert more == {"losses": 0, "gradients": 0, "products": 0, kind: 1}
    copy = Objective(loss, layout).work
    copy.restore(objective.work.state())
    assert copy == objective.work
    copy.reset()
    assert copy == Objective(loss, layout).work


def test_jacobian_products_are_charged_as_documented(comm: MPI.Comm) -> None:
    loss = burgers()
    layout = ParameterLayout(loss.parameters, comm)
    objective = ResidualObjective(loss, layout)
    x, y, r = put(layout, points(loss, 1)[0]), layout.vector(), objective.residual_vector()
    totals = []
    for call in (
        lambda: objective.residual(x, r),
        lambda: objective.jacobian_product(x, x, r),
        lambda: objective.jacobian_transpose_product(x, r, y),
    ):
        call()
        totals.append(objective.work.total)
    forward, adjoint, weights, _ = loss.charges.passes()
    whole, residual = forward + adjoint + weights, AUTOGRAD / len(loss.indices)
    # the kernels go forward once for the residual and again for its derivative; a tangent is as much as a point
    expected = [forward / whole, (4 * forward + residual) / whole, (whole + forward + residual) / whole]
    assert np.diff([0.0, *totals]) == pytest.approx(expected, rel=1e-13)


@losses
@pytest.mark.parametrize("parallel", [True, False])
def test_restricted_evaluations_are_charged_by_what_is_left(comm: MPI.Comm, name: str, parallel: bool) -> None:
    loss = LOSSES[name]()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    theta = points(loss, 1)[0]
    value, gradient = serial(loss, theta)
    decomposition = Decomposition(Subdomains.by_layers(loss, 2), layout, parallel)
    for s, part in restricted(objective, decomposition).items():
        layers = sorted(loss.layer_numbers(part.loss.ranges))
        first = layers[0] if loss.keeps(layers[0]) else 0
        part.freeze(torch.tensor(theta))
        assert part.work.total == pytest.approx(loss.charges.prefix(first), abs=1e-15)
        part.work.reset()
        x, g = part.layout.vector(), part.layout.vector()
        mine = np.concatenate([theta[r] for r in decomposition.subdomains.ranges[s]])
        x.setArray(mine[slice(*x.getOwnershipRange())])
        assert part.value(x) == pytest.approx(value, rel=1e-12)
        assert part.work.total == pytest.approx(loss.charges.evaluation(first, gradient=False), rel=1e-13)
        part.work.reset()
        assert part.value_gradient(x, g) == pytest.approx(value, rel=1e-12)
        assert part.work.total == pytest.approx(loss.charges.evaluation(first, frozenset(layers)), rel=1e-13)
        chosen = np.concatenate([gradient[r] for r in decomposition.subdomains.ranges[s]])
        assert close(part.layout, g, chosen)
        part.work.reset()
        part.know(x, 12.5, x)
        assert part.value_gradient(x, g) == 12.5
        assert np.array_equal(g.array_r, x.array_r)
        assert part.work.gradients == 0
        part.hessian_product(x, g, g.duplicate())
        behind = frozenset(range(first, len(loss.layers)))  # torch differentiates by all of them
        assert part.work.total == pytest.approx(loss.charges.hessian(first, behind), rel=1e-13)
    assert objective.work.total == 0
    decomposition.destroy()


def test_samples_charge_their_fraction_and_shifts_nothing(comm: MPI.Comm) -> None:
    loss = burgers()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    x, g = put(layout, points(loss, 1)[0]), layout.vector()
    shifted(sampled(objective, range(10)), x, x).value_gradient(x, g)
    assert objective.work.total == pytest.approx(10 / 37, rel=1e-13)
    assert objective.work.gradients == 1
