"""Tanh networks: a plain multilayer perceptron and the residual network of the SPQN paper."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, outputs) at points (N, inputs)."""
        slopes = iter(self.slopes)
        for stage, linear in zip(self.stages, self.maps, strict=True):
            z = linear(x)
            if stage.activation:
                z = torch.tanh(z if stage.slope is None else 10 * next(slopes) * z)
            x = x + z if stage.residual else z
        return x
