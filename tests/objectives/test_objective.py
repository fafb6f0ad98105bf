"""Objectives on all ranks against the loss on one process."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from objective_cases import LOSSES, blocks, burgers, close, layouts, losses, points, put, serial
from one_rank import on_one_rank

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.objective import Hessian, Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import restricted
from ddml.parallel import Interrupted, StopRequest
from ddml.vectors import owned


@losses
@blocks
def test_values_and_derivatives_are_those_of_the_serial_loss(comm: MPI.Comm, name: str, blocks: int) -> None:
    loss = LOSSES[name]()
    theta, v = points(loss, 2)
    value, gradient = serial(loss, theta)
    product = torch.zeros(loss.size, dtype=torch.float64)
    loss.hessian_product(torch.tensor(theta), torch.tensor(v), product)
    for layout in layouts(loss, comm):
        objective = Objective(loss, layout, blocks=blocks)
        x, d, g = put(layout, theta), put(layout, v), layout.vector()
        assert objective.value(x) == pytest.approx(value, rel=1e-12)
        assert objective.value_gradient(x, g) == pytest.approx(value, rel=1e-12)
        assert close(layout, g, gradient)
        g.set(7.0)
        objective.value_gradient(x, g)
        assert close(layout, g, gradient)
        objective.hessian_product(x, d, g)
        assert close(layout, g, product.numpy(), 1e-11)
        mat = Hessian(objective).matrix()
        mat.getPythonContext().point = x
        mat.mult(d, g)
        assert close(layout, g, product.numpy(), 1e-11)
        objective.initial(x)
        assert np.array_equal(layout.gather(x).numpy(), loss.initial().numpy())
        for thing in (x, d, g, mat):
            thing.destroy()


@pytest.mark.ranks
@pytest.mark.parametrize("blocks", [3, 40])
@losses
def test_blocks_make_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm, name: str, blocks: int) -> None:
    loss = LOSSES[name]()
    alone = Objective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF), blocks=blocks)
    for theta in points(loss, 3):
        x, g = put(alone.layout, theta), alone.layout.vector()
        value = alone.value_gradient(x, g)
        for layout in layouts(loss, comm):
            together = Objective(loss, layout, blocks=blocks)
            y, h = put(layout, theta), layout.vector()
            assert together.value_gradient(y, h) == value
            assert together.value(y) == alone.value(x)
            begin, end = h.getOwnershipRange()
            assert h.array_r.tobytes() == g.array_r[begin:end].tobytes()


def test_torch_and_petsc_share_the_memory_of_the_owned_range(comm: MPI.Comm) -> None:
    loss = burgers()
    for layout in layouts(loss, comm):
        x = put(layout, points(loss, 1)[0])
        begin, end = x.getOwnershipRange()
        seen = owned(x)
        assert seen.dtype == torch.float64
        assert len(seen) == end - begin
        if end > begin:
            assert seen.data_ptr() == x.array_r.ctypes.data
            x.setValue(begin, 42.0)
            x.assemble()
            assert seen[0] == 42.0
        else:
            x.assemble()
        alone = ParameterLayout(loss.parameters, MPI.COMM_SELF)
        y = put(alone, points(loss, 1)[0])
        assert alone.gather(y).data_ptr() == y.array_r.ctypes.data
        assert Objective(loss, alone).parameters(y).data_ptr() == y.array_r.ctypes.data


@pytest.mark.parametrize("ranges", [lambda n, p: [0] * p, lambda n, p: [1] + [n] * p, lambda n, p: [0] * p + [n - 1]])
def test_boundaries_that_do_not_fit_are_refused(comm: MPI.Comm, ranges: Any) -> None:
    loss = burgers()
    with pytest.raises(InputError, match="boundaries"):
        ParameterLayout(loss.parameters, comm, ranges(loss.size, comm.size))


# Sums of squares ----------------------------------------------------------------------------------------------------


@cache
def residuals_and_jacobian() -> tuple[np.ndarray, np.ndarray]:
    """Of Burgers' equation, by torch on one rank. Collective, at the first call."""

    def found(_: MPI.Comm) -> tuple[np.ndarray, np.ndarray]:
        loss = burgers(37, 5)
        at = torch.tensor(points(loss, 2)[0])
        J = torch.autograd.functional.jacobian(lambda p: torch.cat(list(loss.residuals(p))), at)
        return loss.residual(at).numpy(), J.numpy()

    return on_one_rank(found)


@blocks
def test_residuals_and_jacobian_products(comm: MPI.Comm, blocks: int) -> None:
    loss = burgers(37, 5)
    theta, v = points(loss, 2)
    layout = ParameterLayout(loss.parameters, comm)
    objective = ResidualObjective(loss, layout, blocks=blocks)
    x, d, g, back = put(layout, theta), put(layout, v), layout.vector(), layout.vector()
    r, Jd, w = (objective.residual_vector() for _ in range(3))
    assert r.getSize() == loss.residual_count() == 37
    expected, J = residuals_and_jacobian()
    mine = slice(*r.getOwnershipRange())
    objective.residual(x, r)
    assert r.array_r == pytest.approx(expected[mine], rel=1e-12, abs=1e-14)
    assert r.dot(r) == pytest.approx(objective.value(x), rel=1e-12)
    objective.jacobian_product(x, d, Jd)
    assert np.allclose(Jd.array_r, (J @ v)[mine], rtol=1e-11, atol=1e-12 * np.abs(J @ v).max())
    weights = np.random.default_rng(5).standard_normal(37)
    w.setArray(weights[mine])
    objective.jacobian_transpose_product(x, w, back)
    assert close(layout, back, J.T @ weights)
    assert Jd.dot(w) == pytest.approx(d.dot(back), rel=1e-11)
    objective.jacobian_transpose_product(x, r, back)
    objective.value_gradient(x, g)
    g.axpy(-2.0, back)
    assert g.norm() <= 1e-11 * back.norm()


# Composed -----------------------------------------------------------------------------------------------------------


@losses
@blocks
@pytest.mark.parametrize("rows", [[0], [28, 3, 3, 11], range(0, 29, 2)])
def test_a_sampled_objective_is_that_of_the_chosen_samples(
    comm: MPI.Comm, name: str, blocks: int, rows: list[int]
) -> None:
    loss = LOSSES[name]()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    chosen = sampled(objective, list(rows))
    theta = points(loss, 1)[0]
    x, g = put(layout, theta), layout.vector()
    terms = [serial(loss.part(r, r + 1), theta) for r in rows]
    value = sum(v for v, _ in terms) * loss.count / len(rows)
    gradient = sum(g for _, g in terms) * loss.count / len(rows)
    assert chosen.value_gradient(x, g) == pytest.approx(value, rel=1e-12)
    assert close(layout, g, gradient, 1e-11)
    assert objective.work.total == pytest.approx(len(rows) / loss.count, rel=1e-13)
    assert sampled(chosen, [0]).fraction == pytest.approx(1 / loss.count, rel=1e-13)


@pytest.mark.parametrize("rows", [[], [-1], [37], [0, 1000]])
def test_samples_that_do_not_exist_are_refused(comm: MPI.Comm, rows: list[int]) -> None:
    loss = burgers()
    with pytest.raises(InputError, match="0 to 36"):
        sampled(Objective(loss, ParameterLayout(loss.parameters, comm)), rows)


@losses
@pytest.mark.parametrize("blocks", [0, 5])
def test_a_shifted_objective_shifts_value_and_gradient(comm: MPI.Comm, name: str, blocks: int) -> None:
    loss = LOSSES[name]()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    start, there, slope, direction = points(loss, 4)
    x0, dg, x, g = put(layout, start), put(layout, slope), put(layout, there), layout.vector()
    tilted = shifted(objective, dg, x0)
    for at in (start, there):
        value, gradient = serial(loss, at)
        x.setArray(at[slice(*x.getOwnershipRange())])
        expected = value + slope @ (at - start)
        assert tilted.value(x) == pytest.approx(expected, rel=1e-12)
        assert tilted.value_gradient(x, g) == pytest.approx(expected, rel=1e-12)
        assert close(layout, g, gradient + slope)
    h, ends = 1e-5, []
    for sign in (1, -1):
        moved = put(layout, there + sign * h * direction)
        ends.append(tilted.value(moved))
    d = put(layout, direction)
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(g.dot(d), rel=1e-6)
    product, plain = layout.vector(), layout.vector()
    tilted.hessian_product(x, d, product)
    objective.hessian_product(x, d, plain)
    assert np.array_equal(product.array_r, plain.array_r)
    assert tilted.work is objective.work


def test_a_shift_by_the_gap_makes_the_gradient_consistent(comm: MPI.Comm) -> None:
    loss = burgers()
    layout = ParameterLayout(loss.parameters, comm)
    whole = Objective(loss, layout)
    part = sampled(whole, range(0, 37, 3))
    x = put(layout, points(loss, 1)[0])
    g, dg, h = layout.vector(), layout.vector(), layout.vector()
    whole.value_gradient(x, g)
    part.value_gradient(x, dg)
    dg.aypx(-1.0, g)
    shifted(part, dg, x).value_gradient(x, h)
    h.axpy(-1.0, g)
    assert h.norm() <= 1e-14 * g.norm()


# Trouble ------------------------------------------------------------------------------------------------------------


@blocks
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 11])
def test_what_is_not_finite_anywhere_is_seen_everywhere(
    comm: MPI.Comm, sum_over_rows: Any, blocks: int, bad: float, row: int
) -> None:
    table = np.ones((12, 1))
    table[row] = bad
    loss = sum_over_rows(lambda theta, rows: rows[:, 0] * (theta @ theta), table, [3, 4], np.ones(7))
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    x, g = put(layout, np.ones(7)), layout.vector()
    for value in (objective.value(x), objective.value_gradient(x, g)):
        assert math.isnan(value) if math.isnan(bad) else value == math.inf
    assert not np.isfinite(layout.gather(g).numpy()).any()


@blocks
@pytest.mark.parametrize("who", [0, -1])
def test_a_signal_on_one_rank_interrupts_all(comm: MPI.Comm, blocks: int, who: int) -> None:
    loss, stop = burgers(), StopRequest()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, stop, blocks)
    x, g = put(layout, points(loss, 1)[0]), layout.vector()
    before = objective.value_gradient(x, g)
    stop.requested = comm.rank == who % comm.size
    for evaluate in (lambda: objective.value(x), lambda: objective.value_gradient(x, g), lambda: stop.check(comm)):
        with pytest.raises(Interrupted):
            evaluate()
    stop.requested = False
    assert objective.value_gradient(x, g) == before


def test_a_restricted_objective_begins_where_it_is_frozen(comm: MPI.Comm) -> None:
    loss = burgers()
    objective = Objective(loss, ParameterLayout(loss.parameters, comm))
    decomposition = Decomposition(Subdomains.by_layers(loss, 2), objective.layout, parallel=True)
    theta = points(loss, 1)[0]
    for s, part in restricted(objective, decomposition).items():
        part.freeze(torch.tensor(theta))
        x = part.layout.vector()
        part.initial(x)
        mine = np.concatenate([theta[r] for r in decomposition.subdomains.ranges[s]])
        assert np.array_equal(x.array_r, mine[slice(*x.getOwnershipRange())])
    decomposition.destroy()
