"""Local networks: those of tiles of images, of the global network's kind and narrower."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from ddml import plugins
from ddml.errors import InputError
from ddml.options import NEVER, Option

from .classifiers import KNOWN, build_classifier, sizes_taken
from .families import FAMILIES

OPTIONS = (
    Option("local_width", None, "The -width of the networks of tiles (default: that of the undivided one over the "
           "most tiles along H or W).", kind=int, minimum=1, changes=NEVER),
)  # fmt: skip


def local_width(width: int, narrowing: int) -> int:
    """The width nearest to that of the global network over ``narrowing``, at least 1 (our choice)."""
    return max((2 * width + narrowing) // (2 * narrowing), 1)


def local_seeds(seed: int, count: int) -> list[int]:
    """Seeds of local networks: the first has the global one, the others what is drawn from it (our choice)."""
    return [seed, *(int(drawn) for drawn in np.random.SeedSequence(seed).generate_state(count - 1))]


def build_local(
    settings: Any, shapes: Sequence[tuple[int, ...]], classes: int, narrowing: int, width: int | None = None
) -> list[tuple[nn.Module, str]]:
    """A network for each tile, each with its own seed, and its description.

    One tile that is the whole image, with a narrowing of 1, has the global network.

    Parameters
    ----------
    settings
        Of the global network, as for :func:`ddml.networks.classifiers.build_classifier`.
    shapes
        Of the tiles of a sample.
    classes
        How many there are: the global ones.
    narrowing
        How many times narrower local networks are than the global one, see
        :attr:`ddml.decomposition.tiles.Tiles.narrowing`.
    width
        That of the local networks, in its place.

    Raises
    ------
    InputError
        A network of no width, one that ignores it, or one that does not fit a tile; a width below 1. See
        :func:`ddml.networks.classifiers.build_classifier`.
    """
    globally, width = _global_width(settings, shapes[0]), width_of(settings, shapes[0], narrowing, width)

    def built(shape: tuple[int, ...], width: int, seed: int) -> tuple[nn.Module, str]:
        changed = SimpleNamespace(**vars(settings) | {"width": width, "seed": seed})
        return build_classifier(changed, shape, classes)

    made = []
    for tile, (shape, seed) in enumerate(zip(shapes, local_seeds(settings.seed, len(shapes)), strict=True)):
        try:
            made.append(built(shape, width, seed))
        except InputError as error:
            raise InputError(f"no local network for tile {tile} of shape {shape}: {error}") from error
    if settings.network not in KNOWN and width != globally:
        narrow, wide = (_size(built(shapes[0], w, settings.seed)[0]) for w in (width, globally))
        if narrow == wide:
            raise InputError(
                f"network '{settings.network}' ignores its width: on a tile of shape {shapes[0]} it has {wide} "
                f"parameters with a width of {globally} and of {width}"
            )
    return made


def width_of(settings: Any, shape: tuple[int, ...], narrowing: int, width: int | None = None) -> int:
    """The width that :func:`build_local` gives local networks, the first of which is for a tile of that shape.

    Raises
    ------
    InputError
        A network of no width; a width below 1.
    """
    width = local_width(_global_width(settings, shape), narrowing) if width is None else width
    if width < 1:
        raise InputError(f"local networks need a width of 1 or more, got {width}")
    return width


def _global_width(settings: Any, shape: tuple[int, ...]) -> int:
    """The width given, or that by default.

    Raises
    ------
    InputError
        If the network has none.
    """
    chosen = plugins.load(settings.network, KNOWN, "network")
    if settings.network in FAMILIES:
        return FAMILIES[settings.network].sizes(shape, settings.width, None)[0]
    taken = {} if settings.network in KNOWN else sizes_taken(settings.network, chosen)
    if "width" not in taken:
        raise InputError(
            f"network '{settings.network}' has no width that local networks could have less of: "
            f"{', '.join(FAMILIES)}, or path/to/file.py:Name with an argument width"
        )
    found = taken["width"] if settings.width is None else settings.width
    if not isinstance(found, int) or found < 1:
        raise InputError(f"network '{settings.network}' has no width of 1 or more by default: give option -width")
    return found


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
