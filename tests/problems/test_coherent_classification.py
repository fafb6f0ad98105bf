"""Coherent nets on the ranks: where they begin, what is frozen, how well they do, and the coarse net eliminated."""

from typing import Any

import numpy as np
import pytest
import torch
from coherent_cases import CASES, CLASSES, COUNT, coherent, images, in_tiles
from mpi4py import MPI
from one_rank import on_one_rank
from torch import Tensor

from ddml.errors import InputError
from ddml.losses.branched import BranchedLoss
from ddml.losses.restricted import RestrictedLoss
from ddml.networks.coherent import Coherent
from ddml.objectives.branched import BranchedObjective, branched_layout
from ddml.objectives.composed import sampled
from ddml.objectives.eliminated import EliminatedObjective
from ddml.problems.classification import ClassificationLoss, TestSet
from ddml.problems.coherent import TiledTestSet, coherent_loss, prepared
from solvers import Minimisation, minimise

NAME = "2x2, dense"


def made(comm: MPI.Comm, name: str = NAME, module: Coherent | None = None) -> BranchedLoss:
    module = coherent(**CASES[name]) if module is None else module
    samples = images(CASES[name]["shape"])
    asked: list[int] = []

    def tile(number: int) -> Any:
        asked.append(number)
        return in_tiles(module, samples).tiles[number]

    loss = coherent_loss(module, CLASSES, samples.targets, tile, comm)
    assert sorted(asked) == sorted(loss.samples.tiles)
    assert comm.size == 1 or comm.size > 4 or len(asked) < 4
    return loss


def test_it_begins_where_it_is_told_and_what_is_frozen_stays() -> None:
    module = coherent(**CASES[NAME])
    theta = torch.arange(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    for frozen, names in ((("local",), ("coarse",)), (("coarse",), ("nets",)), ((), ("nets", "coarse"))):
        assert prepared(module, theta, frozen) is module
        assert torch.equal(torch.cat([p.reshape(-1) for p in module.parameters()]), theta)
        assert {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == set(names)
    for arguments, words in (
        ((theta[1:],), "the coherent net has 815 parameters, and there are 814 to begin with"),
        ((None, ("global",)), "one of local, coarse can be frozen, got global"),
        ((None, ("local", "coarse")), "one of local, coarse can be frozen, got local, coarse"),
        ((None, "nets"), "can be frozen"),
    ):
        with pytest.raises(InputError, match=words):
            prepared(module, *arguments)


@pytest.mark.ranks
def test_frozen_networks_stay_and_the_coarse_net_learns_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    module = prepared(coherent(**CASES[NAME]), None, ("local",))
    before = [p.clone() for p in module.nets.parameters()]
    loss = made(comm, module=module)
    found = minimise(loss, "lbfgs", comm, iterations=10)
    loss.assign(found.theta)
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert all(torch.equal(p, q) for p, q in zip(module.nets.parameters(), before, strict=True))


@pytest.mark.ranks
@pytest.mark.parametrize("frozen", [(), ("local",), ("coarse",)])
def test_what_the_networks_hold_fixed_themselves_is_no_part_of_it(frozen: tuple[str, ...], comm: MPI.Comm) -> None:
    module = coherent(**CASES[NAME])
    still = [module.nets[0][0], module.nets[2][-1], *([] if "local" in frozen else [module.coarse[1]])]
    for layer in still:
        layer.requires_grad_(False)
    module = Coherent(list(module.nets), module.coarse, module.tiles, module.link)
    fixed = {id(p) for layer in still for p in layer.parameters()}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    size = sum(p.numel() for p in module.parameters() if id(p) not in fixed)
    with pytest.raises(InputError, match=f"has {size} parameters, and there are 815"):
        prepared(module, torch.zeros(815), frozen)
    theta = torch.cat([p.detach().reshape(-1) for p in module.parameters() if id(p) not in fixed])
    for name in ("coarse", "local"):  # what was frozen before goes on
        prepared(module, None, (name,))
    prepared(module, theta, frozen)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    loss = made(comm, module=module)
    found = minimise(loss, "lbfgs", comm, iterations=5)
    loss.assign(found.theta)
    assert found.losses[-1] < found.losses[0]
    for name, p in module.named_parameters():
        part = "local" if name.startswith("nets.") else "coarse"
        assert torch.equal(p, before[name]) == (id(p) in fixed or part in frozen), name


@pytest.mark.ranks
def test_refusals_are_those_of_all_ranks(comm: MPI.Comm) -> None:
    module, samples = coherent(**CASES[NAME]), images(CASES[NAME]["shape"])

    def short(number: int) -> Any:
        count = COUNT - 1 if number == 3 else COUNT  # on one rank only
        return in_tiles(module, samples).tiles[number].part(0, count)

    with pytest.raises(InputError, match="tile 3 has 12 samples"):
        coherent_loss(module, CLASSES, samples.targets, short, comm)
    with pytest.raises(InputError, match="gives 3 numbers for a sample, and there are 5 classes"):
        coherent_loss(module, 5, samples.targets, short, comm)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [NAME, "1x3, linear", "volume, padded"])
def test_accuracy_is_that_of_the_whole_module_on_any_number_of_ranks(name: str, comm: MPI.Comm) -> None:
    loss = made(comm, name)
    objective = BranchedObjective(loss, branched_layout(loss, comm), blocks=3)
    other = images(CASES[name]["shape"], 29)
    module = coherent(**CASES[name])
    test = TiledTestSet(objective, in_tiles(module, other, list(loss.samples.tiles)))
    whole = ClassificationLoss(module, other, CLASSES)
    expected = TestSet(whole, other, MPI.COMM_SELF)(loss.initial())
    found = test(loss.initial())
    assert found["accuracy"] == expected["accuracy"]
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)
    assert test.logits.shape == (len(module.nets), 29, CLASSES)
    broken = loss.initial()
    broken[-1] = float("nan")
    assert test(broken)["accuracy"] == 0
    assert objective.work.total == 0


def exact(loss: RestrictedLoss) -> tuple[Tensor, float]:
    found = minimise(loss, "lbfgs", MPI.COMM_SELF, iterations=60, blocks=1)
    return found.theta, found.work


@pytest.mark.ranks
def test_the_eliminated_coarse_net_gives_the_gradient_of_the_least_loss_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    loss = made(comm, "2x2, linear, logits")

    def damped(coarse: RestrictedLoss) -> tuple[Tensor, float]:
        found = minimise(coarse, "lbfgs", MPI.COMM_SELF, iterations=400, blocks=1, tolerance=1e-10)
        return found.theta, found.work

    objective = EliminatedObjective(damped, loss, branched_layout(loss, comm), blocks=2)
    x, step = objective.layout.vector(), objective.layout.vector()
    objective.initial(x)
    start, g = x.copy(), x.duplicate()
    value = objective.value_gradient(x, g)
    place = loss.coarse.place
    moved, by = objective.layout.gather(x).clone(), objective.layout.gather(g).clone()
    assert torch.equal(moved[: place.start], loss.initial()[: place.start])
    assert not torch.equal(moved[place], loss.initial()[place])
    assert not by[place].any()
    plain = BranchedObjective(loss, branched_layout(loss, comm), blocks=2)
    assert plain.value_gradient(x, start) == pytest.approx(value, rel=1e-12)
    assert torch.allclose(plain.layout.gather(start)[: place.start], by[: place.start], rtol=1e-10, atol=1e-12)
    assert objective.work.total > 1
    step.array[:] = np.sin(np.arange(*step.getOwnershipRange()))
    slope = float(step.dot(g))
    around = []
    for h in (1e-4, -1e-4):
        start.waxpy(h, step, x)
        around.append(objective.value(start))
    if value > 1e-3:  # else the samples are told apart, and the least loss is 0
        assert (around[0] - around[1]) / 2e-4 == pytest.approx(slope, rel=2e-2, abs=1e-4)
    for vec in (x, step, start, g):
        vec.destroy()


@pytest.mark.ranks
def test_a_trust_region_on_the_networks_has_the_same_bits_on_any_number_of_ranks(comm: MPI.Comm) -> None:
    def run(comm: MPI.Comm) -> tuple[list[float], Tensor, float]:
        loss = made(comm)
        objective = EliminatedObjective(exact, loss, branched_layout(loss, comm), blocks=2)
        solving = Minimisation(objective, "tr", comm)
        seen: list[float] = []
        solving.tao.setMonitor(lambda tao: seen.append(tao.getSolutionStatus()[1]))
        solving.tao.setMaximumIterations(5)
        solving.tao.solve()
        theta = solving.layout.gather(solving.x).clone()
        assert loss.value(theta) == pytest.approx(seen[-1], rel=1e-12) if comm.size == 1 else True
        work = objective.work.total
        solving.destroy()
        return seen, theta, work

    seen, theta, work = run(comm)
    alone = on_one_rank(run)
    assert seen == alone[0]
    assert torch.equal(theta, alone[1])
    assert work == pytest.approx(alone[2], rel=1e-12)
    assert seen == sorted(seen, reverse=True)
    plain = minimise(made(comm), "tr", comm, iterations=5)
    assert seen[-1] < plain.losses[-1]


def test_a_frozen_part_cannot_be_eliminated(comm: MPI.Comm) -> None:
    for frozen in ("local", "coarse"):
        loss = made(comm, module=prepared(coherent(**CASES[NAME]), None, (frozen,)))
        with pytest.raises(InputError, match="one is frozen"):
            EliminatedObjective(exact, loss, branched_layout(loss, comm))


@pytest.mark.ranks
def test_an_eliminated_objective_stays_one_on_other_samples_over_the_ranks(comm: MPI.Comm) -> None:
    loss = made(comm)
    objective = EliminatedObjective(exact, loss, branched_layout(loss, comm), blocks=2)
    part = sampled(objective, [1, 5, 2, 8])
    assert isinstance(part, EliminatedObjective)
    x = objective.layout.vector()
    objective.initial(x)
    before = BranchedObjective(part.loss, objective.layout, blocks=2).value(x)
    assert part.value(x) < before
    x.destroy()
