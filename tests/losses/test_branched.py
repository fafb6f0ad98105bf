"""Losses of networks side by side: the whole, behind kept outputs, and what they are charged."""

from itertools import combinations
from typing import Any

import pytest
import torch
from coherent_cases import CASES, CLASSES, COUNT, coherent, images, in_tiles, local, losses
from loss_cases import close, gradient_of, point, product_of
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.data.tiled import TiledSamples
from ddml.decomposition.subdomains import Subdomains
from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError
from ddml.losses.branched import BranchedLoss, RestrictedBranchedLoss
from ddml.losses.outputs import Outputs
from ddml.losses.residual import restricted_loss
from ddml.losses.work import ACTIVATION, CRITERION, KEPT
from ddml.networks.coherent import Coherent
from ddml.problems.classification import cross_entropy

cases = pytest.mark.parametrize("name", CASES)


def chosen_layers(loss: BranchedLoss) -> list[list[int]]:
    """Blocks, pairs of them, single layers, and everything."""
    blocks = [list(block) for block in loss.blocks]
    pairs = [a + b for a, b in combinations(blocks, 2)][:3]
    return [*blocks, *pairs, *([n] for n in range(0, len(loss.layers), 3)), list(range(len(loss.layers)))]


def logits(loss: BranchedLoss, theta: Tensor) -> Outputs:
    found = torch.stack([loss.outputs_of(i, theta) for i in range(len(loss.nets))])
    return Outputs(found, loss.samples.numbers)


@cases
def test_it_is_the_loss_of_the_whole_module(name: str) -> None:
    whole, tiled = losses(name)
    assert [p.name for p in tiled.parameters] == [p.name for p in whole.parameters]
    assert torch.equal(tiled.initial(), whole.initial())
    for seed in range(2):
        theta = point(whole, seed)
        value, gradient = gradient_of(whole, theta)
        found, own = gradient_of(tiled, theta)
        assert found == pytest.approx(value, rel=1e-12)
        assert tiled.value(theta) == pytest.approx(value, rel=1e-12)
        assert close(own, gradient)
        direction = point(whole, seed + 5)
        assert close(product_of(tiled, theta, direction), product_of(whole, theta, direction), 1e-10)
        parts = [gradient_of(tiled.part(a, b), theta) for a, b in ((0, 4), (4, 4), (4, COUNT))]
        assert sum(v for v, _ in parts) == pytest.approx(value, rel=1e-12)
        assert close(sum(g for _, g in parts), gradient)
        rows = torch.tensor([5, 0, 9, 2])
        expected, by = gradient_of(whole.sampled(rows), theta)
        batch = tiled.sampled(rows)
        assert batch.samples.numbers.tolist() == rows.tolist()
        assert gradient_of(batch, theta)[0] == pytest.approx(expected, rel=1e-12)
        assert close(gradient_of(batch, theta)[1], by)


@cases
@pytest.mark.parametrize("known", [False, True])
def test_behind_kept_outputs_nothing_changes(name: str, known: bool) -> None:
    whole, tiled = losses(name)
    theta = point(whole)
    for layers in chosen_layers(tiled):
        ranges = Subdomains.of_layers(tiled, [layers]).ranges[0]
        restricted = restricted_loss(tiled, ranges)
        assert isinstance(restricted, RestrictedBranchedLoss)
        restricted.freeze(theta, logits(tiled, theta) if known else None)
        moved = restricted.initial() + 0.1 * torch.sin(torch.arange(restricted.size, dtype=torch.float64))
        full = theta.clone()
        restricted.insert(moved, full)
        value, gradient = gradient_of(whole, full)
        for loss in (restricted, restricted.part(0, COUNT)):
            found, own = gradient_of(loss, moved)
            assert found == pytest.approx(value, rel=1e-12)
            assert loss.value(moved) == pytest.approx(value, rel=1e-12)
            assert close(own, restricted.take(gradient))
        halves = [gradient_of(restricted.part(a, b), moved) for a, b in ((0, 7), (7, COUNT))]
        assert close(halves[0][1] + halves[1][1], restricted.take(gradient))
        rows = torch.tensor([11, 3, 4])
        assert close(
            gradient_of(restricted.sampled(rows), moved)[1],
            restricted.take(gradient_of(whole.sampled(rows), full)[1]),
        )


def test_a_restricted_loss_is_restricted_again() -> None:
    whole, tiled = losses("2x2, dense")
    theta = point(whole)
    for block in tiled.blocks:
        outer = restricted_loss(tiled, Subdomains.of_layers(tiled, [block]).ranges[0])
        outer.freeze(theta, logits(tiled, theta))
        for n in range(len(outer.layers)):
            inner = restricted_loss(outer, Subdomains.of_layers(outer, [[n]]).ranges[0])
            inner.freeze(outer.initial())
            moved = inner.initial() * 1.3
            full, middle = theta.clone(), outer.initial().clone()
            outer.insert(inner.insert(moved, middle), full)
            value, gradient = gradient_of(whole, full)
            found, own = gradient_of(inner, moved)
            assert found == pytest.approx(value, rel=1e-12)
            assert close(own, inner.take(outer.take(gradient)))


@pytest.mark.parametrize("name", ["2x2, dense", "1x3, linear", "volume, padded", "residual"])
def test_no_network_reads_another_tile(name: str) -> None:
    """Behind kept outputs the tiles of the others are NaN, or not there."""
    whole, tiled = losses(name)
    theta = point(whole)
    _, gradient = gradient_of(whole, theta)
    samples = in_tiles(coherent(**CASES[name]), images(CASES[name]["shape"]))
    for net in range(len(tiled.nets)):
        factors = {i: 1.0 if i == net else float("nan") for i in samples.tiles}
        poisoned = {i: TensorSamples(s.inputs * factors[i], s.targets) for i, s in samples.tiles.items()}
        for tiles in (poisoned, {net: samples.tiles[net]}):
            loss = tiled.on(TiledSamples(tiles, samples.targets))
            restricted = restricted_loss(loss, Subdomains.by_blocks(loss).ranges[net])
            restricted.freeze(theta, logits(tiled, theta))
            assert close(gradient_of(restricted, restricted.initial())[1], restricted.take(gradient))
    loss = tiled.on(TiledSamples({}, samples.targets))
    head = restricted_loss(loss, Subdomains.by_blocks(loss).ranges[-1])
    head.freeze(theta, logits(tiled, theta))
    assert close(gradient_of(head, head.initial())[1], head.take(gradient))


def test_layers_and_blocks_are_those_of_the_networks() -> None:
    _, tiled = losses("2x2, dense")
    names = [[tiled.parameters[k].name for k in layer] for layer in tiled.layers]
    assert names[:3] == [[f"nets.0.{i}.{kind}" for kind in ("weight", "bias")] for i in (0, 3, 5)]
    assert names[-1] == ["coarse.3.weight", "coarse.3.bias"]
    assert tiled.blocks == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11), (12, 13))
    _, frozen = losses("a frozen net")
    assert frozen.blocks == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10))
    _, only = losses("frozen nets")
    assert only.blocks == ((0, 1),)
    assert Subdomains.by_blocks(only).ranges == ((slice(0, only.size),),)
    assert tiled.behind(frozenset([4])) == {4, 5, 12, 13}
    assert tiled.behind(frozenset([1, 8])) == {1, 2, 8, 12, 13}
    assert tiled.behind(frozenset([13])) == {13}


def counted(side: int) -> dict[str, float]:
    """A sample's multiply-adds in a network of a tile, and behind, by hand: 4 -> 3 twice, and 6 -> 5 -> 3."""
    net, first, second = side * 3 + 3, 6 * 5 + 5, 5 * 3 + 3
    return {"net": net, "first": first, "second": second, "points": 3 * ACTIVATION}


def test_branches_are_charged_not_chains() -> None:
    tiles = Tiles((1, 2, 4), (1, 2))
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double() for _ in range(2)]
    module = Coherent(nets, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), tiles)
    samples = images((1, 2, 4))
    charges = BranchedLoss(module, cross_entropy, in_tiles(module, samples)).charges
    c, e = counted(4), 3 * CRITERION
    net, points = c["net"], c["points"]
    behind, points_behind = c["first"] + c["second"], (5 + 3) * ACTIVATION
    forward = 2 * (net + points) + behind + points_behind + e
    adjoint = 2 * points + behind + points_behind + e  # of no network's inputs
    whole = forward + adjoint + 2 * net + behind
    assert charges.operations == pytest.approx(whole)
    assert charges.evaluation(gradient=False) == pytest.approx(forward / whole)
    # a local net: itself, and its half of the columns of the first layer behind
    sliver = c["first"] / 2 + c["second"]
    own = KEPT * 5 + net + points + sliver + points_behind + e + points + sliver + points_behind + e + net
    assert charges.restricted(frozenset([0])) == pytest.approx(own / whole)
    assert charges.restricted(frozenset([1])) == pytest.approx(own / whole)
    # the coarse net: from all kept outputs
    coarse = KEPT * 6 + behind + points_behind + e + c["second"] + points_behind + e + behind
    assert charges.restricted(frozenset([2, 3])) == pytest.approx(coarse / whole)
    # the critical path: one of the networks and the coarse net
    longest = net + points + behind + points_behind + e
    assert charges.critical(gradient=False) == pytest.approx(longest / whole)
    longest += points + behind + points_behind + e + net + behind
    assert charges.critical() == pytest.approx(longest / whole)


def test_what_is_kept_is_charged_once() -> None:
    _, tiled = losses("2x2, dense")
    theta = tiled.initial()
    restricted = restricted_loss(tiled, Subdomains.by_blocks(tiled).ranges[1])
    restricted.freeze(theta)
    computed = restricted.owed()
    assert restricted.owed() == 0
    restricted.freeze(theta, logits(tiled, theta))
    summed = restricted.owed()
    assert computed - summed == pytest.approx(tiled.charges.outputs([0, 2, 3]))
    assert 0 < summed < 0.2 * computed or summed < 0.1


def test_kept_outputs_are_found_by_the_numbers_of_samples() -> None:
    found = Outputs(torch.arange(5.0).view(1, 5, 1), torch.tensor([7, 3, 9, 1, 4]))
    assert found.of(torch.tensor([9, 9, 1])).flatten().tolist() == [2, 2, 3]  # type: ignore[union-attr]
    assert found.of(torch.tensor([7, 3, 9, 1, 4])) is found.logits
    assert found.of(torch.tensor([7, 2])) is None
    assert found.of(torch.tensor([11])) is None
    assert Outputs(torch.zeros(1, 0, 1), torch.zeros(0, dtype=torch.int64)).of(torch.tensor([0])) is None


def refusals() -> dict[str, tuple[Any, str]]:
    tiles = Tiles((1, 4, 4), 2)
    samples = images((1, 4, 4))

    def made(change: Any = None, net: nn.Module | None = None, coarse: nn.Module | None = None) -> Any:
        nets = [local(s).double() for s in tiles.shapes]
        if net is not None:
            nets[2] = net.double()
        module = Coherent(nets, (coarse or nn.Linear(4 * CLASSES, CLASSES)).double(), tiles)
        return lambda: BranchedLoss(module, cross_entropy, in_tiles(module, samples))

    flat = nn.Flatten()
    return {
        "fails": (made(net=nn.Linear(3, 3)), "the network of tile 2 fails on inputs"),
        "another number": (made(net=nn.Sequential(flat, nn.Linear(4, 5))), r"\[3, 5\] numbers for a sample"),
        "no vector": (made(net=nn.Linear(2, 3)), "the network of tile 2 must map"),
        "chance": (
            made(net=nn.Sequential(flat, nn.Linear(4, 3), nn.Dropout(0.5))), r"the network of tile 2 gives .*\(dropout",
        ),
        "batches": (made(net=nn.Sequential(flat, nn.BatchNorm1d(4), nn.Linear(4, 3))), "batch statistics"),
        "coarse": (made(coarse=nn.Linear(5, 3)), "the coarse net fails on inputs"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["fails", "another number", "no vector", "chance", "batches", "coarse"])
def test_networks_that_do_not_fit_are_refused(name: str) -> None:
    make, words = refusals()[name]
    with pytest.raises(InputError, match=words):
        make()


def test_tiles_that_are_missing_are_named() -> None:
    _, tiled = losses("2x2, dense")
    some = in_tiles(coherent(**CASES["2x2, dense"]), images((1, 7, 6)), [1, 3])
    loss = tiled.on(some)
    for call in (
        lambda: loss.value(loss.initial()),
        lambda: loss.outputs_of(0, loss.initial()),
        lambda: restricted_loss(loss, [slice(0, loss.size)]),
    ):
        with pytest.raises(InputError, match=r"samples of tiles \[1, 3\] only, and not of \[0"):
            call()
    with pytest.raises(InputError, match="tile 1 has 12 samples, where there are 13 targets"):
        TiledSamples({1: some.tiles[1].part(0, 12)}, some.targets)
    whole, _ = losses("2x2, dense")
    with pytest.raises(InputError, match="ClassificationLoss has no networks side by side"):
        Subdomains.by_blocks(whole)
