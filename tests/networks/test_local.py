"""Networks of tiles: narrower ones of the same kind, each with its seed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ddml.decomposition.tiles import Tiles
from ddml.errors import InputError
from ddml.losses.costs import multiplications
from ddml.networks.classifiers import OPTIONS, build_classifier
from ddml.networks.local import build_local, local_seeds, local_width

FACE, SOLID = (1, 96, 84), (1, 32, 32, 32)


def settings(network: str, **given: Any) -> SimpleNamespace:
    values = {o.name: o.default for o in OPTIONS} | {"seed": 0, "dtype": "float32", "network": network}
    return SimpleNamespace(**values | given)


def local(network: str, tiles: Tiles, classes: int = 38, width: int | None = None, **given: Any) -> list[nn.Module]:
    made = build_local(settings(network, **given), tiles.shapes, classes, tiles.narrowing, width)
    return [module for module, _ in made]


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Parameters of the smallest, the largest and all networks, multiplications of the largest and of all, by hand.
# A tile's vgg of width 4 on 32 x 29 pixels, say: 40 + 296 + 1168 of convolutions, (4 * 3 * 16 + 1) * 32 and 33 * 38.
@pytest.mark.parametrize(
    ("network", "shape", "parts", "overlap", "classes", "counted"),
    [
        ("vgg", FACE, 1, 0, 38, (1_011_366, 1_011_366, 1_011_366, 20_728_576, 20_728_576)),
        ("vgg", FACE, 2, 0, 38, (69_862, 69_862, 279_448, 1_342_592, 5_370_368)),
        ("vgg", FACE, 2, 8, 38, (94_438, 94_438, 377_752, 1_870_592, 7_482_368)),
        ("vgg", FACE, 4, 0, 38, (5_862, 5_862, 93_792, 91_552, 1_464_832)),
        ("vgg", FACE, 4, 4, 38, (7_398, 8_934, 130_656, 169_792, 2_369_152)),
        ("vgg", FACE, 4, 8, 38, (8_934, 13_030, 173_664, 272_096, 3_486_976)),
        ("resnet", FACE, 4, 8, 38, (15_038, 19_134, 271_328, 571_616, 7_302_400)),
        ("vgg", (1, 192, 168), 4, 8, 38, (24_294, 31_462, 444_000, 688_832, 9_611_776)),
        ("vgg", (1, 192, 168), 4, 16, 38, (31_462, 48_870, 634_464, 1_101_376, 14_129_152)),
        ("vgg", SOLID, (4, 4, 2), 2, 10, (2_358, 3_638, 93_888, 243_520, 6_392_896)),
        ("vgg", (3, 32, 32), 2, 4, 10, (14_938, 14_938, 4 * 14_938, 325_632, 4 * 325_632)),
    ],
)
def test_the_width_rule_gives_what_is_counted_by_hand(
    network: str, shape: tuple[int, ...], parts: Any, overlap: int, classes: int, counted: tuple[int, ...]
) -> None:
    tiles = Tiles(shape, parts, overlap)
    networks = local(network, tiles, classes)
    sizes = [size(module) for module in networks]
    products = [multiplications(m, torch.zeros(1, *s)) for m, s in zip(networks, tiles.shapes, strict=True)]
    assert (min(sizes), max(sizes), sum(sizes), max(products), sum(products)) == counted


def test_widths_are_rounded_and_at_least_one() -> None:
    assert [local_width(16, p) for p in (1, 2, 3, 4, 5, 6, 16, 32, 33, 99)] == [16, 8, 5, 4, 3, 3, 1, 1, 1, 1]
    assert [local_width(6, p) for p in (1, 2, 4, 8)] == [6, 3, 2, 1]  # the larger of two nearest
    tiles = Tiles(FACE, (2, 4))
    assert size(local("vgg", tiles)[0]) == size(local("vgg", tiles, width=4)[0]) < size(local("vgg", tiles, width=5)[0])
    with pytest.raises(InputError, match="a width of 1 or more, got 0"):
        local("vgg", tiles, width=0)


@pytest.mark.parametrize("network", ["cnn", "vgg", "resnet"])
@pytest.mark.parametrize("shape", [(2, 20, 17), (1, 16, 17, 18)])
def test_one_tile_without_overlap_has_the_global_network_to_the_bit(network: str, shape: tuple[int, ...]) -> None:
    tiles = Tiles(shape, 1)
    undivided, words = build_classifier(settings(network, seed=5), shape, 4)
    ((module, local_words),) = build_local(settings(network, seed=5), tiles.shapes, 4, tiles.narrowing)
    x = torch.rand(3, *shape)
    assert torch.equal(module(tiles.cut(x, 0)), undivided(x))
    assert local_words.startswith(words.split("-")[0])


def test_every_tile_has_its_own_seed() -> None:
    seeds = local_seeds(7, 16)
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert seeds == local_seeds(7, 16)
    assert local_seeds(7, 4) == seeds[:4]
    assert not set(local_seeds(8, 16)) & set(seeds)
    first, again = local("vgg", Tiles(FACE, 4)), local("vgg", Tiles(FACE, 4))
    x = torch.rand(2, 1, 24, 21)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0](x), first[1](x))


USER = """
from torch import nn
def net(shape, classes, width=8):
    layers = nn.Conv2d(shape[0], width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    return nn.Sequential(*layers)
def asked(shape, classes, width): return net(shape, classes, width)
def ignoring(shape, classes, width=8): return net(shape, classes)
def without(shape, classes): return net(shape, classes)
def wordy(shape, classes, width="wide"): return net(shape, classes)
def picky(shape, classes, width=8):
    assert shape[1] > 5, "five rows are not enough"
    return net(shape, classes, width)
"""


def test_a_users_network_is_narrowed_by_its_width(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    tiles = Tiles((1, 12, 12), 4, 1)

    def expected(width: int) -> int:
        return 10 * width + 3 * (width + 1)

    assert {size(m) for m in local(f"{file}:net", tiles, 3)} == {expected(2)}
    assert {size(m) for m in local(f"{file}:net", tiles, 3, width=5)} == {expected(5)}
    made = build_local(settings(f"{file}:asked", width=12), tiles.shapes, 3, tiles.narrowing)
    assert {size(m) for m, _ in made} == {expected(3)}
    assert {words.rpartition(", ")[2] for _, words in made} == {"width 3"}
    for name, match in (
        (
            "ignoring",
            "ignores its width: on a tile of shape .1, 4, 4. it has 107 parameters with a width of 8 and of 2",
        ),
        ("without", "has no width that local networks could have less of: cnn, vgg, resnet, or"),
        ("asked", "has no width of 1 or more by default: give option -width"),
        ("wordy", "has no width of 1 or more by default"),
        ("picky", "no local network for tile 0 of shape .1, 4, 4.: .* five rows are not enough"),
    ):
        with pytest.raises(InputError, match=match):
            local(f"{file}:{name}", tiles, 3)


def test_networks_that_do_not_fit_their_tiles_are_refused() -> None:
    for network, tiles, match in (
        ("vgg", Tiles((1, 28, 28), 4), "tile 0 of shape .1, 7, 7.: network 'vgg' of 3 stages is too deep .* -depth 1"),
        ("resnet", Tiles((1, 8, 8, 8), (4, 4, 2)), "tile 0 of shape .1, 4, 2, 2.: .* too deep"),
        ("cnn", Tiles((1, 34, 31), 2), "tile 0 of shape .1, 17, 15.: network 'cnn' of 2 stages needs at least 16 x 16"),
        ("mlp", Tiles((1, 28, 28), 2), "network 'mlp' has no width"),
        ("residual", Tiles((1, 28, 28), 2), "network 'residual' has no width"),
        ("euler_cnn", Tiles((1, 28, 28), 2), "network 'euler_cnn' has no width"),
    ):
        with pytest.raises(InputError, match=match):
            local(network, tiles)
