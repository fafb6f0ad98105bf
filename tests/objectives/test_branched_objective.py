"""Networks dealt over the ranks: the numbers of one rank, and how much the ranks tell each other."""

from typing import Any

import numpy as np
import pytest
import torch
from coherent_cases import CASES, coherent, images, in_tiles, losses
from mpi4py import MPI
from objective_cases import points, put, serial
from one_rank import on_one_rank

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.branched import BranchedLoss
from ddml.losses.recorded import cuda_graph
from ddml.objectives.branched import BranchedObjective, branched_layout, tiles_of_ranks
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.restricted import restricted
from ddml.problems.classification import cross_entropy
from solvers import minimise

cases = pytest.mark.parametrize("name", CASES)


def mine(name: str, comm: MPI.Comm, count: int = 13, dtype: torch.dtype = torch.float64) -> BranchedLoss:
    """With the tiles of this rank only."""
    module = coherent(**CASES[name]).to(dtype)
    samples = images(CASES[name]["shape"], count)
    samples = type(samples)(samples.inputs.to(dtype), samples.targets)
    empty = BranchedLoss(module, cross_entropy, in_tiles(module, samples, []))
    return empty.on(in_tiles(module, samples, tiles_of_ranks(empty, comm.size)[comm.rank]))


def objective(name: str, comm: MPI.Comm, blocks: int = 4, **given: Any) -> BranchedObjective:
    loss = mine(name, comm, **given)
    return BranchedObjective(loss, branched_layout(loss, comm), blocks=blocks)


@cases
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.ranks
def test_on_any_number_of_ranks_it_is_the_loss_of_the_module(name: str, blocks: int, comm: MPI.Comm) -> None:
    whole, _ = losses(name)
    made = objective(name, comm, blocks)
    alone = objective(name, MPI.COMM_SELF, blocks)
    for theta in points(whole, 2):
        value, gradient = serial(whole, theta)
        x, y = put(made.layout, theta), put(alone.layout, theta)
        g, h = x.duplicate(), y.duplicate()
        found = made.value_gradient(x, g)
        assert found == pytest.approx(value, rel=1e-12)
        assert made.value(x) == pytest.approx(value, rel=1e-12)
        full = made.layout.gather(g).numpy().copy()
        assert np.abs(full - gradient).max() <= 1e-12 * np.abs(gradient).max()
        assert (found, full.tolist()) == (alone.value_gradient(y, h), h.array_r.tolist())  # to the last bit
        short, compact = made.value_compact(x)
        assert short == found
        compact.load(g)
        assert (made.layout.gather(g).numpy() == full).all()
        for vec in (x, y, g, h):
            vec.destroy()


class Counted(MPI.Intracomm):
    """Counts the calls that every rank must make."""

    NAMES = (
        *("Allgatherv", "Bcast", "Reduce_scatter", "Allreduce", "Alltoallv"),
        *("allgather", "allreduce", "bcast", "Barrier"),
    )
    calls: dict[str, int]
    sent = 0


def _counting(name: str) -> Any:
    def call(self: Counted, *arguments: Any, **named: Any) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.sent += arguments[0][0].size if name == "Allgatherv" else 0
        return getattr(MPI.Intracomm, name)(self, *arguments, **named)

    return call


for _name in Counted.NAMES:
    setattr(Counted, _name, _counting(_name))


@pytest.mark.ranks
def test_an_evaluation_takes_one_gather_and_one_number_over_the_ranks(comm: MPI.Comm) -> None:
    made = objective("2x2, dense", comm)
    x = put(made.layout, points(losses("2x2, dense")[0], 1)[0])
    g = x.duplicate()
    counted = Counted(comm)
    counted.calls = {}
    made.comm = made.layout.comm = made.parts.comm = counted  # PETSc takes none but its own
    for evaluate in (lambda: made.value_gradient(x, g), lambda: made.value(x)):
        counted.calls.clear()
        evaluate()
        assert counted.calls == {"Allgatherv": 1, "Bcast": 1}
    counted.calls.clear()
    made.outputs_at(x)
    assert counted.calls == {"allreduce": 1}
    x.destroy()
    g.destroy()


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "told"), [("2x2, dense", 4), ("a frozen net", 3), ("frozen nets", 0)])
def test_outputs_of_frozen_networks_are_told_once_over_the_ranks(name: str, told: int, comm: MPI.Comm) -> None:
    counted = Counted(comm)
    counted.calls = {}
    made = objective(name, comm)
    x = put(made.layout, points(losses(name)[0], 1)[0])
    g = x.duplicate()
    first = made.value_gradient(x, g)
    made.comm = counted
    counted.sent = 0
    assert made.value_gradient(x, g) == first
    coarse = made.loss.coarse.place.stop - made.loss.coarse.place.start
    assert comm.allreduce(counted.sent) == comm.size + coarse + told * 13 * 3  # a number of each rank's own
    x.destroy()
    g.destroy()


@pytest.mark.ranks
def test_single_precision_has_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    found = minimise(mine("2x2, dense", comm, dtype=torch.float32), "tr", comm, iterations=5)
    alone, double = (
        on_one_rank(lambda one, d=dtype: minimise(mine("2x2, dense", one, dtype=d), "tr", one, iterations=5))
        for dtype in (torch.float32, torch.float64)
    )
    assert found.losses.tolist() == alone.losses.tolist()
    assert torch.equal(found.theta, alone.theta)
    assert found.losses.tolist() == pytest.approx(double.losses.tolist(), rel=1e-4)


@pytest.mark.ranks
def test_no_rank_has_the_tiles_of_another(comm: MPI.Comm) -> None:
    loss = mine("2x2, dense", comm)
    held = comm.allgather(sorted(loss.samples.tiles))
    assert sorted({i for tiles in held for i in tiles}) == [0, 1, 2, 3]
    if comm.size <= 4:
        assert sum(map(len, held)) == 4
    made = BranchedObjective(loss, branched_layout(loss, comm))
    assert sorted(i for nets in comm.allgather(made.mine) for i in nets) == [0, 1, 2, 3]


@pytest.mark.ranks
def test_samples_are_replaced_and_terms_added_over_the_ranks(comm: MPI.Comm) -> None:
    whole, _ = losses("1x3, linear")
    made = objective("1x3, linear", comm)
    theta, other = points(whole, 2)
    rows = torch.tensor([8, 1, 12, 4, 2])
    x, y = put(made.layout, theta), put(made.layout, other)
    g = x.duplicate()
    small = sampled(made, rows)
    assert isinstance(small, BranchedObjective)
    assert small.value_gradient(x, g) == pytest.approx(serial(whole.sampled(rows), theta)[0], rel=1e-12)
    tilted = shifted(made, y, y)
    expected = serial(whole, theta)[0] + float(other @ (theta - other))
    assert tilted.value_gradient(x, g) == pytest.approx(expected, rel=1e-12)
    expected_g = serial(whole, theta)[1] + other
    assert np.abs(made.layout.gather(g).numpy() - expected_g).max() < 1e-12
    before = made.outputs_at(x)
    made.replace(made.loss.sampled(rows), fraction=5 / 13)
    after = made.outputs_at(x)
    assert torch.allclose(after.logits, before.logits[:, rows], rtol=1e-12, atol=1e-12)
    assert made.value(x) == pytest.approx(serial(whole.sampled(rows), theta)[0], rel=1e-12)
    assert tilted.value(x) == pytest.approx(made.value(x) + float(other @ (theta - other)), rel=1e-12)
    for vec in (x, y, g):
        vec.destroy()


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["2x2, dense", "2x2, linear, logits", "a frozen net", "one tile"])
def test_local_objectives_are_restrictions_over_the_ranks(name: str, comm: MPI.Comm) -> None:
    whole, _ = losses(name)
    made = objective(name, comm)
    theta = points(whole, 1)[0]
    x = put(made.layout, theta)
    outputs = made.outputs_at(x)
    decomposition = Decomposition(Subdomains.by_blocks(made.loss), made.layout, True)
    _, gradient = serial(whole, theta)
    work = made.work.total
    for s, local in restricted(made, decomposition).items():
        local.freeze(torch.tensor(theta), outputs=outputs)
        ranges = decomposition.subdomains.ranges[s]
        z = put(local.layout, np.concatenate([theta[r] for r in ranges]))
        g = z.duplicate()
        assert local.value_gradient(z, g) == pytest.approx(serial(whole, theta)[0], rel=1e-12)
        expected = np.concatenate([gradient[r] for r in ranges])
        assert np.abs(local.layout.gather(g).numpy() - expected).max() <= 1e-12 * np.abs(gradient).max()
        z.destroy()
        g.destroy()
        local.destroy()
    assert made.work.total == work
    decomposition.destroy()
    x.destroy()


def test_work_is_the_same_on_all_ranks_and_critical_work_that_of_the_longest_way(comm: MPI.Comm) -> None:
    made = objective("2x2, dense", comm)
    x = made.layout.vector()
    made.initial(x)
    g = x.duplicate()
    made.value_gradient(x, g)
    charges = made.loss.charges
    assert made.work.total == pytest.approx(1)
    assert made.work.critical == pytest.approx(charges.critical())
    assert made.work.critical < 1
    made.value(x)
    assert made.work.total == pytest.approx(1 + charges.evaluation(gradient=False))
    spent = made.work.total
    made.outputs_at(x)  # known
    assert made.work.total == spent
    made.outputs_at(x, frozenset([4]))
    assert made.work.total - spent == pytest.approx(charges.outputs([1]))
    spent, critical = made.work.total, made.work.critical
    made.outputs_at(x, frozenset(range(12)))
    assert made.work.total - spent == pytest.approx(charges.outputs())
    assert made.work.critical - critical == pytest.approx(max(charges.outputs([i]) for i in range(4)))
    x.destroy()
    g.destroy()


def test_what_does_not_fit_is_refused_on_all_ranks(comm: MPI.Comm) -> None:
    loss = mine("2x2, dense", comm)
    if comm.size > 1:
        last = ParameterLayout(loss.parameters, comm, [0] * comm.size + [loss.size])
        with pytest.raises(InputError, match="branched_layout"):
            BranchedObjective(loss, last)
    lacking = loss.on(in_tiles(coherent(**CASES["2x2, dense"]), images((1, 7, 6)), [0]))
    with pytest.raises(InputError, match=r"samples of tiles \[0\] only"):
        BranchedObjective(lacking, branched_layout(loss, comm))
    with pytest.raises(InputError, match="cannot be recorded"):
        BranchedObjective(loss, branched_layout(loss, comm), record=cuda_graph)


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["lbfgs", "tr", "gradient", "lmvm"])
def test_solvers_have_the_same_trajectory_on_any_number_of_ranks(solver: str, comm: MPI.Comm) -> None:
    found = minimise(mine("2x2, dense", comm), solver, comm, iterations=6)
    alone = on_one_rank(lambda one: minimise(mine("2x2, dense", one), solver, one, iterations=6))
    tolerance = 1e-9 if solver == "lmvm" else 0.0
    assert found.losses.tolist() == pytest.approx(alone.losses.tolist(), rel=tolerance, abs=0.0)
    assert torch.allclose(found.theta, alone.theta, rtol=tolerance, atol=tolerance)
    assert (found.work, found.critical) == (alone.work, alone.critical)
    whole = minimise(losses("2x2, dense")[0], solver, comm, iterations=6)
    assert found.losses.tolist() == pytest.approx(whole.losses.tolist(), rel=1e-6)
    assert found.losses[-1] < found.losses[0]
