"""Networks by name, for drivers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddml import plugins
from ddml.errors import InputError
from ddml.options import Option

from .tanh import TanhNetwork

OPTIONS = (
    Option("network", "mlp", "mlp (plain tanh), residual (the SPQN paper's, adaptive tanh), or "
           "path/to/file.py:Class, called with the numbers of inputs and outputs."),
    Option("width", None, "Neurons a layer (default: the problem's).", kind=int, minimum=1),
    Option("depth", None, "Hidden layers (default: the problem's).", kind=int, minimum=1),
)  # fmt: skip


def build_network(settings: Any, inputs: int, outputs: int, width: int, depth: int) -> tuple[nn.Module, str]:
    """A network with initial parameters drawn from ``settings.seed``, and its description.

    Raises
    ------
    InputError
        Unknown network, or a user's class that is no torch module.
    """
    width, depth = settings.width or width, settings.depth or depth
    named = {"residual": True, "mlp": False}
    chosen = plugins.load(settings.network, named, "network")
    if settings.network in named:
        network = TanhNetwork(inputs, width, depth, outputs, residual=chosen, adaptive=chosen)
        network = network.double()
        network.reset_parameters(torch.Generator().manual_seed(settings.seed))
        return network, f"{settings.network} {inputs}-{width}x{depth}-{outputs}"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            network = chosen(inputs, outputs)
        except Exception as error:
            raise InputError(f"network '{settings.network}' raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module) or not list(network.parameters()):
        raise InputError(f"network '{settings.network}' must give a torch module with parameters")
    return network, f"{settings.network} {inputs}-{outputs}"
