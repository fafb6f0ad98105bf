"""Tanh networks: a plain multilayer perceptron and the residual network of the SPQN paper."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddml.errors import InputError

from .depth import Source, average, check_blocks


@dataclass(frozen=True)
class Stage:
    """One affine map and what follows it: ``y = h + tanh(10 a (W h + b))`` in its fullest form.

    ``weight`` (outputs, inputs), ``bias`` (outputs,) and ``slope`` (scalar a, or None for
    ``tanh(W h + b)``) are parameter names of the network; without ``activation`` the stage is
    ``W h + b``; ``residual`` adds the input.
    """

    weight: str
    bias: str
    slope: str | None
    activation: bool
    residual: bool


class TanhNetwork(nn.Module):
    """A chain of :class:`Stage` maps on R^inputs, with Xavier weights and zero biases.

    Parameters
    ----------
    inputs, width, depth, outputs
        Sizes; ``depth`` is the number of hidden tanh layers.
    residual
        False: ``inputs -> width`` and ``depth - 1`` square hidden layers. True: a linear lift
        ``inputs -> width`` and ``depth`` layers ``y + tanh(W y + b)``; that the lift carries no
        activation and does not count in ``depth`` is our choice, the paper does not say.
    adaptive
        ``tanh(10 a z)`` with one trainable slope a per hidden layer, initially 0.1
        (Jagtap, Kawaguchi, Karniadakis 2020).

    Attributes
    ----------
    stages : tuple of Stage
    layers : tuple of tuples of parameter names
        What a decomposition treats as one layer: the hidden layers; the lift belongs to the
        first, the linear output to the last (our choice, the paper does not say).
    """

    def __init__(
        self, inputs: int, width: int, depth: int, outputs: int, residual: bool = False, adaptive: bool = False
    ) -> None:
        super().__init__()
        self.sizes, self.residual = (inputs, width, depth, outputs), residual
        if min(inputs, width, depth, outputs) < 1:
            raise ValueError(f"a network needs positive sizes, got {inputs} inputs, width {width}, depth {depth}")
        sizes = [inputs, *[width] * depth, outputs] if not residual else [inputs, *[width] * (depth + 1), outputs]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        first = 1 if residual else 0
        self.slopes = nn.ParameterList(nn.Parameter(torch.tensor(0.1)) for _ in range(depth if adaptive else 0))
        stages = []
        for i in range(len(self.maps)):
            hidden = first <= i < first + depth
            stages.append(
                Stage(
                    weight=f"maps.{i}.weight",
                    bias=f"maps.{i}.bias",
                    slope=f"slopes.{i - first}" if hidden and adaptive else None,
                    activation=hidden,
                    residual=hidden and residual,
                )
            )
        self.stages = tuple(stages)
        names = [[n for n in (s.weight, s.bias, s.slope) if n] for s in stages]
        layers = names[first : first + depth]
        layers[0] = [n for group in names[:first] for n in group] + layers[0]
        layers[-1] = layers[-1] + names[-1]
        self.layers = tuple(tuple(layer) for layer in layers)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw Xavier normal weights from ``generator``; biases 0, slopes 0.1."""
        for linear in self.maps:
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_normal_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
        for slope in self.slopes:
            nn.init.constant_(slope, 0.1)

    def coarsened(self, factor: int) -> TanhNetwork:
        """A residual network of that many times fewer layers, at the means over the layers that come together.

        Its layers take as many times the step of forward Euler, in the variable u = y / factor: see :meth:`sources`.

        Raises
        ------
        InputError
            If the network is not residual, if the factor does not divide the layers, or is below 2.
        """
        inputs, width, depth, outputs = self.sizes
        if not self.residual:
            raise InputError("a plain MLP has no depth hierarchy: its layers are no steps; take -network residual")
        check_blocks(depth, factor)
        coarse = TanhNetwork(inputs, width, depth // factor, outputs, True, len(self.slopes) > 0)
        coarse = coarse.to(next(self.parameters())).train(self.training)
        average(self, coarse, factor)
        return coarse

    def sources(self, factor: int) -> dict[str, Source]:
        r"""What each parameter is a copy of in the network that is coarser by a factor c.

        A layer of the coarse network takes c steps of the fine one, :math:`y + c \tanh(10 a (W y + b))`. With u = y / c
        it has the form of a layer again, :math:`u + \tanh(10 a (c W u + b))`: W is 1 / c times the coarse weight, the
        lift c times the coarse one, weight and bias, and the weight of the output 1 / c times the coarse one; biases b,
        slopes a and the bias of the output are the same.
        """
        found = {}
        depth = self.sizes[2]
        for i in range(depth + 2):
            k = 0 if i == 0 else 1 + (i - 1) // factor if i <= depth else 1 + depth // factor
            found[f"maps.{i}.weight"] = Source(f"maps.{k}.weight", 1 / factor if i else float(factor))
            found[f"maps.{i}.bias"] = Source(f"maps.{k}.bias", 1.0 if i else float(factor))
        for i in range(len(self.slopes)):
            found[f"slopes.{i}"] = Source(f"slopes.{i // factor}", 1.0)
        return found

    def insertions(self, factor: int) -> dict[str, str | None]:
        """What each parameter is equal to in a network with that many times fewer layers, whose function it keeps.

        The first of ``factor`` layers is one of the smaller network; the others have that one's slope, and zeros, with
        which a layer hands on what comes in.
        """
        found: dict[str, str | None] = {}
        depth = self.sizes[2]
        for i in range(depth + 2):
            inserted = 0 < i <= depth and (i - 1) % factor > 0
            for kind in ("weight", "bias"):
                found[f"maps.{i}.{kind}"] = None if inserted else f"maps.{1 + (i - 1) // factor if i else 0}.{kind}"
        for i in range(len(self.slopes)):
            found[f"slopes.{i}"] = f"slopes.{i // factor}"
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, outputs) at points (N, inputs)."""
        slopes = iter(self.slopes)
        for stage, linear in zip(self.stages, self.maps, strict=True):
            z = linear(x)
            if stage.activation:
                z = torch.tanh(z if stage.slope is None else 10 * next(slopes) * z)
            x = x + z if stage.residual else z
        return x
