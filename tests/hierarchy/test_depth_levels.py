"""Depth hierarchies: what levels cost, batches that they follow, networks of users, and what is refused."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from depth_cases import (
    applied,
    classification,
    dense,
    made,
    objective_of,
    pinn,
    prolongation,
    put,
    random,
    written_out,
)
from mpi4py import MPI
from torch import Tensor, nn

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.hierarchy.depth import depth_hierarchy
from ddml.losses.loss import Loss
from ddml.losses.work import ACTIVATION, CRITERION
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.composed import shifted
from ddml.objectives.restricted import restricted
from ddml.problems import Burgers, PDELoss
from ddml.problems.classification import ClassificationLoss
from ddml.problems.pde import collocation
from ddml.sampling import batches


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels_prints_itself(comm: MPI.Comm, levels: int) -> None:
    hierarchy = made("dense", comm, levels, depth=16)
    words = ["16 blocks", "8 blocks", "4 blocks", "2 blocks", "1 block"][:levels]
    assert [level.words for level in hierarchy.levels][::-1] == words
    lines = repr(hierarchy).splitlines()
    assert lines[0] == f"{levels} levels"
    assert lines[1] == f"  level {levels - 1}: 16 blocks, 533 parameters, 30 samples, a gradient costs 1"
    if levels == 5:
        assert re.fullmatch(r"  level 0: 1 block, 83 parameters, 30 samples, a gradient costs 0\.\d+", lines[-1])
    hierarchy.destroy()


def test_work_is_in_units_of_the_finest_level(comm: MPI.Comm) -> None:
    """Shares are counted multiply-adds of a gradient: of 6-5-...-5-3, an activation and the criterion as charged."""
    hierarchy = made("dense", comm, 3)
    finest = hierarchy.levels[-1].objective
    finest.compute(1e5, 1e4, 1e3)
    unit = finest.work.total

    def charged(blocks: int) -> tuple[float, float]:
        """Of a loss, and of a loss and gradient."""
        products = 7 * 5 + blocks * 6 * 5 + 6 * 3
        besides = ACTIVATION * (5 + blocks * 5 + 3) + CRITERION * 3
        return products + besides, 3 * products - 7 * 5 + 2 * besides

    whole = charged(12)[1]
    for level, blocks in zip(hierarchy.levels, (3, 6, 12), strict=True):
        objective, (forward, gradient) = level.objective, charged(blocks)
        assert level.share == pytest.approx(gradient / whole, rel=1e-14)
        x, g = objective.layout.vector(), objective.layout.vector()
        for evaluate, cost in (
            (lambda: objective.value_gradient(x, g), gradient / whole),  # noqa: B023
            (lambda: objective.value(x), forward / whole),  # noqa: B023
            (lambda: objective.compute(1e5, 1e4, 1e3), unit),  # noqa: B023
        ):
            objective.work.reset()
            evaluate()
            assert objective.work.total == pytest.approx(cost, rel=1e-13)
    assert len({id(level.objective.work) for level in hierarchy.levels}) == 3
    hierarchy.destroy()


def test_coarse_levels_follow_the_batches(comm: MPI.Comm) -> None:
    loss = dense()
    objective = objective_of(loss, comm, 3)
    values = {o.name: o.default for o in batches.OPTIONS} | {"batch_size": 10, "batch_overlap": 0.2, "batch_steps": 1}
    moving = batches.Batches(objective, SimpleNamespace(**values), seed=2)
    hierarchy = depth_hierarchy(objective, 3)
    theta = [random(level.objective.loss.size, 8) for level in hierarchy.levels]
    seen = []
    for _ in range(4):
        hierarchy.follow()
        rows = torch.as_tensor(moving.rows)
        seen.append(moving.rows.tolist())
        for number, level in enumerate(hierarchy.levels):
            coarse = level.objective
            assert coarse.loss.count == len(rows)
            assert coarse.fraction == pytest.approx(level.share * len(rows) / 30, rel=1e-14)
            network = written_out(torch.tensor(theta[number]), coarse.loss, 2.0 ** (-(2 - number) / 2), 3 * 2**number)
            assert torch.equal(coarse.loss.inputs, loss.inputs[rows])
            assert coarse.value(put(coarse, theta[number])) == pytest.approx(float(network), rel=1e-12)
            if len(seen) > 1:
                assert np.array_equal(coarse.replacement.overlap, objective.replacement.overlap)
        versions = [level.objective.version for level in hierarchy.levels]
        hierarchy.follow()
        assert [level.objective.version for level in hierarchy.levels] == versions
        moving.move(torch.empty(0))
    assert len({tuple(rows) for rows in seen}) == 4
    hierarchy.destroy()


def test_coarse_levels_follow_moving_points(comm: MPI.Comm) -> None:
    objective = objective_of(pinn(), comm)
    hierarchy = depth_hierarchy(objective, 2)
    values = {o.name: o.default for o in collocation.OPTIONS} | {"resample": "sobol", "resample_interval": 1}
    moving = collocation.MovingPoints(objective, SimpleNamespace(**values), seed=2)
    coarse = hierarchy.levels[0].objective
    theta = torch.tensor(0.3 * random(coarse.loss.size, 8))
    before = coarse.value(put(coarse, theta))
    moving.move(torch.empty(0))
    hierarchy.follow()
    alone = pinn(6).with_points(moving.points)
    assert coarse.value(put(coarse, theta)) == pytest.approx(alone.value(theta), rel=1e-12)
    assert abs(alone.value(theta) - before) > 1e-6 * before
    assert coarse.fraction == hierarchy.levels[0].share
    hierarchy.destroy()


class Own(nn.Module):
    """A user's network with blocks y + h relu(g W y), which says how coarser ones are made."""

    def __init__(self, blocks: int = 4, gain: float = 1.0, first: int = 0, width: int = 5) -> None:
        super().__init__()
        self.blocks, self.gain = blocks, gain
        self.start = nn.Linear(6, width)
        for i in range(first, first + blocks):
            self.add_module(f"block{i}", nn.Sequential(nn.Linear(width, width), nn.ReLU()))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        for name, block in self.named_children():
            if name.startswith("block"):
                y = y + block(self.gain * y) / self.blocks
        return self.head(y)

    def coarsened(self, factor: int) -> Any:
        return Own(self.blocks // factor, self.gain / math.sqrt(factor)).double()


class Fails(Own):
    def coarsened(self, factor: int) -> Any:
        raise OSError("no memory")


class NoModule(Own):
    def coarsened(self, factor: int) -> Any:
        return 3


class Wider(Own):
    def coarsened(self, factor: int) -> Any:
        return Own(self.blocks // factor, 1.0, width=6).double()


class Deeper(Own):
    def coarsened(self, factor: int) -> Any:
        return Own(self.blocks).double()


class Elsewhere(Own):
    def coarsened(self, factor: int) -> Any:
        return Own(self.blocks // factor, first=7).double()


class BadScales(Own):
    def coarsened(self, factor: int) -> Any:
        return Own(self.blocks // factor).double()

    def sources(self, factor: int) -> Any:
        return {"head.weight": ("head.weight", 0.0)}


class NoSources(BadScales):
    def sources(self, factor: int) -> Any:
        return {"head.weight": 1}


def test_a_users_network_has_levels_too(comm: MPI.Comm) -> None:
    loss = classification(Own(), (6,))
    state = torch.random.get_rng_state()
    hierarchy = depth_hierarchy(objective_of(loss, comm), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [level.words for level in hierarchy.levels] == ["1 block", "2 blocks", "4 blocks"]
    for number, transfer in enumerate(hierarchy.transfers):
        coarse, fine = (hierarchy.levels[k].objective for k in (number, number + 1))
        matrix = prolongation(fine.loss, coarse.loss, 2)
        s = random(coarse.loss.size, 1)
        assert applied(transfer.prolong, coarse, fine, s) == pytest.approx(matrix @ s, rel=1e-14)
    hierarchy.destroy()


def test_frozen_layers_are_on_no_level(comm: MPI.Comm) -> None:
    loss = dense()
    for parameter in (*loss.module.open.parameters(), *loss.module.block5.parameters()):
        parameter.requires_grad_(False)
    loss = ClassificationLoss(loss.module, loss.samples, 3)
    hierarchy = depth_hierarchy(objective_of(loss, comm), 2)
    coarse = hierarchy.levels[0].objective
    names = [p.name for p in coarse.loss.parameters]
    assert not any(n.startswith("open") for n in names) and "block2.layer.weight" in names
    matrix = prolongation(loss, coarse.loss, 2)
    s, g = random(coarse.loss.size, 1), random(loss.size, 2)
    transfer = hierarchy.transfers[0]
    assert applied(transfer.prolong, coarse, hierarchy.levels[1].objective, s) == pytest.approx(matrix @ s, rel=1e-14)
    mean = applied(transfer.project, hierarchy.levels[1].objective, coarse, g)
    assert mean == pytest.approx(np.linalg.pinv(matrix) @ g, rel=1e-12, abs=1e-12)
    network, again = coarse.loss.module, loss.module
    assert torch.equal(network.open.layer.weight, again.open.layer.weight)
    hierarchy.destroy()


def test_large_networks_may_have_dropped_their_parameters(comm: MPI.Comm) -> None:
    loss = dense()
    loss.drop_initial()
    hierarchy = depth_hierarchy(objective_of(loss, comm), 2)
    coarse = hierarchy.levels[0].objective
    theta = random(coarse.loss.size, 3)
    expected = written_out(torch.tensor(theta), coarse.loss, 0.5**0.5, 6)
    assert coarse.value(put(coarse, theta)) == pytest.approx(float(expected), rel=1e-12)
    hierarchy.destroy()


def plain() -> Loss:
    return classification(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (6,))


def plain_pinn() -> Loss:
    return PDELoss(Burgers(), TanhNetwork(2, 5, 4, 1).double(), 20)


WRONG: dict[str, tuple[Callable[[], Loss], int, int, str]] = {
    "no level": (dense, 0, 2, "1 level or more, got 0"),
    "no refinement": (dense, 2, 1, "factor of 2 or more, got 1"),
    "levels that do not divide": (dense, 4, 2, r"depth of 3 is not divisible by 2 \(4 levels\)"),
    "a factor that does not divide": (dense, 2, 5, "depth of 12 is not divisible by 5"),
    "one level more than blocks allow": (lambda: dense(4), 4, 2, r"depth of 1 is not divisible by 2 \(4 levels\)"),
    "a plain MLP": (plain, 2, 2, "a plain MLP has no depth hierarchy.*-network euler"),
    "a plain PINN": (plain_pinn, 2, 2, "a plain MLP has no depth hierarchy.*-network residual"),
    "layers that do not divide": (lambda: pinn(3), 2, 2, "depth of 3 is not divisible by 2"),
    "a user's that fails": (lambda: classification(Fails(), (6,)), 2, 2, r"coarsened\(2\) raised OSError: no memory"),
    "a user's that gives no module": (lambda: classification(NoModule(), (6,)), 2, 2, "must give a torch module.*int"),
    "a user's of other shapes": (lambda: classification(Wider(), (6,)), 2, 2, r"which is of shape \(6, 6\) there"),
    "a user's of too many blocks": (lambda: classification(Deeper(), (6,)), 2, 2, "block2.0.weight.*has no copies"),
    "a user's of other names": (lambda: classification(Elsewhere(), (6,)), 2, 2, "block0.0.weight.*not trained"),
    "a user's of scale 0": (lambda: classification(BadScales(), (6,)), 2, 2, "must have one scale, not 0"),
    "a user's of no sources": (lambda: classification(NoSources(), (6,)), 2, 2, r"sources\(2\) raised TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_has_no_levels_is_refused_in_words(comm: MPI.Comm, what: str) -> None:
    loss, levels, factor, words = WRONG[what]
    with pytest.raises(InputError, match=words):
        depth_hierarchy(objective_of(loss(), comm), levels, factor)


def test_other_objectives_are_refused(comm: MPI.Comm, sum_over_rows: Any) -> None:
    objective = objective_of(dense(), comm)
    zero = objective.layout.vector()
    with pytest.raises(InputError, match="not one with linear terms"):
        depth_hierarchy(shifted(objective, zero, zero), 2)
    decomposition = Decomposition(Subdomains.by_layers(objective.loss, 1), objective.layout, False)
    parts = restricted(objective, decomposition)
    with pytest.raises(InputError, match="not a RestrictedObjective"):
        depth_hierarchy(parts[0], 2)
    for part in parts.values():
        part.destroy()
    decomposition.destroy()
    table = sum_over_rows(lambda theta, rows: rows @ theta, torch.ones(3, 2), [2], torch.zeros(2))
    with pytest.raises(InputError, match="loss without a network"):
        depth_hierarchy(objective_of(table, comm), 2)
    with pytest.raises(InputError, match="takes no samples of a PDELoss"):
        objective.loss.on_samples_of(pinn())
    with pytest.raises(InputError, match="points of a loss of the same problem"):
        pinn().on_samples_of(pinn())
    with pytest.raises(InputError, match="is of no torch module"):
        table.of_module(nn.Linear(2, 2))
    zero.destroy()


def test_losses_of_another_module_keep_samples_and_weights() -> None:
    part = dense().part(3, 12)
    other = classification(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (6,))
    found, expected = part.of_module(other.module), other.part(3, 12)
    theta = torch.tensor(random(other.size, 1))
    assert (found.count, found.weight) == (9, 1 / 30)
    assert found.value(theta) == expected.value(theta)
    assert found.costs == expected.costs
    assert part.value(part.initial()) == dense().part(3, 12).value(part.initial())  # which is as before

    whole = pinn()
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    moved, alone = whole.of_module(network), PDELoss(Burgers(), network, 37)
    theta = torch.tensor(random(alone.size, 2))
    gradients = [torch.zeros(alone.size, dtype=torch.float64) for _ in range(2)]
    values = [one.value_gradient(theta, g) for one, g in zip((moved, alone), gradients, strict=True)]
    assert values[0] == pytest.approx(values[1], rel=1e-14)
    assert torch.allclose(*gradients, rtol=1e-13)
    assert moved.programs == alone.programs == {}
    assert moved.in_torch == alone.in_torch
    before = whole.initial()
    assert whole.value(before) == pytest.approx(pinn().value(before), rel=1e-15)
