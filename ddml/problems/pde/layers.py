"""The layers of a network under a problem: their parameters, their stages, and what a point costs in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ddml.jets.build import all_stages_trained
from ddml.losses import work
from ddml.networks.tanh import TanhNetwork
from ddml.parameters import Parameter


class NetworkLayers(NamedTuple):
    """What :class:`ddml.losses.loss.Loss` says of layers, and the network's stages in each.

    Attributes
    ----------
    numbers : tuple of tuples of int
        Parameters of each layer; coefficients of the problem belong to the last.
    stages : list of lists of int
        Stages of each layer; empty where the inside of the network is not known.
    costs : tuple of float
        Multiply-adds of a point's products with the weights of each layer.
    besides : Besides
        What a point takes besides, for each derivative that is propagated.
    """

    numbers: tuple[tuple[int, ...], ...]
    stages: list[list[int]]
    costs: tuple[float, ...]
    besides: work.Besides


def network_layers(
    network: nn.Module,
    offsets: Mapping[str, tuple[int, torch.Size]],
    parameters: Sequence[Parameter],
    derivatives: int,
    fields: int,
) -> NetworkLayers:
    """The layers of a network whose parameters stand in theta.

    Parameters
    ----------
    network
        Any; a :class:`ddml.networks.tanh.TanhNetwork` all of whose parameters are trained shows its stages.
    offsets
        Begin and shape of the network's parameters in theta, the first of ``parameters``.
    parameters
        All of theta, coefficients included.
    derivatives
        K, how many are propagated.
    fields
        F, how many there are.
    """
    numbers = {p.name: i for i, p in enumerate(parameters)}
    rest = list(range(len(offsets), len(parameters)))
    if not (isinstance(network, TanhNetwork) and all_stages_trained(network, offsets)):
        leaves: dict[str, list[int]] = {}
        for name, number in list(numbers.items())[: len(offsets)]:
            leaves.setdefault(name.rpartition(".")[0], []).append(number)
        groups = list(leaves.values())
        costs = tuple(float(sum(parameters[i].size for i in g)) for g in groups)
        groups[-1] = groups[-1] + rest
        return NetworkLayers(tuple(map(tuple, groups)), [], costs, work.Besides(repeats=derivatives))
    groups = [[numbers[name] for name in layer] for layer in network.layers]
    groups[-1] = groups[-1] + rest
    stage_of = {name: i for i, s in enumerate(network.stages) for name in (s.weight, s.bias, s.slope) if name}
    stages = [sorted({stage_of[n] for n in layer}) for layer in network.layers]
    shapes = [offsets[s.weight][1] for s in network.stages]
    bent = [shape[0] if stage.activation else 0 for stage, shape in zip(network.stages, shapes, strict=True)]
    return NetworkLayers(
        tuple(map(tuple, groups)),
        stages,
        tuple(float(sum(shapes[i].numel() + shapes[i][0] for i in own)) for own in stages),
        work.Besides(
            tuple(work.TANH * sum(bent[i] for i in own) for own in stages),
            tuple(work.KEPT * shapes[own[0]][1] for own in stages),
            work.TANH * fields,
            derivatives,
        ),
    )
