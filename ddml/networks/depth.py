"""Networks of other depths: how a coarser one is made, and what is a copy of what in it.

A module has a depth hierarchy if it has a method ``coarsened(factor)``, which gives a module of its kind with that many
times fewer blocks, each of as many times the step. Every trained parameter of the one is a multiple of a parameter of
the other. By default that is so by names, and in coordinates in which all columns of the prolongation have norm 1:
``block<i>.<rest>`` is 1 / sqrt(factor) times the coarse ``block<i // factor>.<rest>``, and everything else is the
parameter of the same name. So a block has to compute with gain * parameter, and the gain of a coarse block is
1 / sqrt(factor) times that of a fine one: then both have the same weights in effect. A module in which it is otherwise
says so in a method ``sources(factor)``.

A coarser module may take the samples in a coarser form, images of fewer pixels, say: its method ``coarse_inputs(x)``
makes it of the inputs (B, ...) of the finest module, once for all evaluations on these samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddml.errors import InputError

BLOCK = re.compile(r"block(\d+)\.")


class Source(NamedTuple):
    """What a parameter is a copy of: ``scale`` times that of this ``name`` in a coarser network.

    Where it is of another shape, ``entries``, of its own shape, are the numbers (int64) of the coarse entries that its
    entries are copies of, each as often.
    """

    name: str
    scale: float
    entries: Tensor | None = None


def check_blocks(blocks: int, factor: int) -> None:
    """Raise an InputError if a network of so many blocks has no coarser one by that factor."""
    if factor < 2:
        raise InputError(f"a network gets coarser by a factor of 2 or more, got {factor}")
    if blocks % factor:
        raise InputError(f"there is no coarser network: a depth of {blocks} is not divisible by {factor}")


def coarsened(module: nn.Module | None, factor: int) -> nn.Module:
    """A network of that many times fewer blocks.

    Raises
    ------
    InputError
        If the module has none, or fails to make it.
    """
    make = getattr(module, "coarsened", None)
    if make is None:
        kind = "loss without a network" if module is None else type(module).__name__
        raise InputError(
            f"a plain MLP has no depth hierarchy, nor has any {kind} without residual blocks of a step: -network euler "
            "or euler_cnn to classify, residual for a PDE, or a module with a method coarsened(factor)"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            made = make(factor)
    except InputError:
        raise
    except Exception as error:  # of a user's module
        raise InputError(f"the network's coarsened({factor}) raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"the network's coarsened({factor}) must give a torch module, it gave {type(made).__name__}")
    return made


def sources(module: nn.Module, factor: int, names: Iterable[str]) -> dict[str, Source]:
    """What the parameters of these names are copies of in the network that is coarser by a factor.

    Raises
    ------
    InputError
        If a user's module fails to say so.
    """
    own = getattr(module, "sources", None)
    try:
        said = {} if own is None else {name: Source(*source) for name, source in own(factor).items()}
    except Exception as error:  # of a user's module
        raise InputError(f"the network's sources({factor}) raised {type(error).__name__}: {error}") from error
    return {name: said[name] if name in said else by_block(name, factor) for name in names}


def insertions(module: nn.Module, factor: int) -> dict[str, str | None]:
    """What each parameter is equal to in a network of fewer layers whose function it keeps; None for zeros.

    Raises
    ------
    InputError
        If no layer of the module can be without an effect.
    """
    own = getattr(module, "insertions", None)
    if own is None:
        raise InputError(
            f"no layers can be inserted into a {type(module).__name__} that change nothing: -prolongation copy, or "
            "a module with a method insertions(factor)"
        )
    try:
        return dict(own(factor))
    except Exception as error:  # of a user's module
        raise InputError(f"the network's insertions({factor}) raised {type(error).__name__}: {error}") from error


def by_block(name: str, factor: int) -> Source:
    """What the parameter of a block, or of what stands before or behind them, is a copy of."""
    found = BLOCK.match(name)
    if found is None:
        return Source(name, 1.0)
    return Source(f"block{int(found[1]) // factor}.{name[found.end() :]}", 1 / math.sqrt(factor))


@torch.no_grad()
def average(fine: nn.Module, coarse: nn.Module, factor: int) -> None:
    """Write the projection of a network to one that is coarser by a factor: the means over copies, each unscaled.

    What is trained in one of the copies is trained. Parameters whose memory has been freed leave zeros.
    """
    named = dict(fine.named_parameters())
    copies: dict[str, list[tuple[nn.Parameter, Source]]] = {}
    for name, source in sources(fine, factor, named).items():
        copies.setdefault(source.name, []).append((named[name], source))
    for name, parameter in coarse.named_parameters():
        parameter.zero_()
        parameter.requires_grad_(any(p.requires_grad for p, _ in copies[name]))
        for copy, (_, scale, entries) in copies[name]:
            values: Tensor = copy
            if entries is not None and copy.shape == entries.shape:
                order = entries.flatten().argsort(stable=True).to(copy.device)
                values = copy.flatten()[order].view(*parameter.shape, -1).mean(dim=-1)
            if values.shape == parameter.shape:
                parameter.add_(values.to(parameter) / (scale * len(copies[name])))
