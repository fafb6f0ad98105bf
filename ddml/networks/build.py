"""Networks by name, for drivers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddml import plugins
from ddml.errors import InputError
from ddml.options import NEVER, Option

from .tanh import TanhNetwork

OPTIONS = (
    Option("network", "mlp", "mlp (plain tanh), residual (the SPQN paper's, adaptive tanh), or "
           "path/to/file.py:Class, called with the numbers of inputs and outputs.", changes=NEVER),
    Option("width", None, "Neurons a layer (default: the problem's).", kind=int, minimum=1, changes=NEVER),
    Option("depth", None, "Hidden layers (default: the problem's).", kind=int, minimum=1, changes=NEVER),
)  # fmt: skip


def build_network(settings: Any, inputs: int, outputs: int) -> tuple[nn.Module, str]:
    """A network of ``settings.width`` and ``depth``, initial parameters drawn from its ``seed``, and its description.

    Raises
    ------
    InputError
        Unknown network, or a user's class that is no torch module.
    """
    named = {"residual": True, "mlp": False}
    chosen = plugins.load(settings.network, named, "network")
    if settings.network in named:
        network = TanhNetwork(inputs, settings.width, settings.depth, outputs, residual=chosen, adaptive=chosen)
        network = network.double()
        network.reset_parameters(torch.Generator().manual_seed(settings.seed))
        return network, f"{settings.network} {inputs}-{settings.width}x{settings.depth}-{outputs}"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            network = chosen(inputs, outputs)
        except Exception as error:
            raise InputError(f"network '{settings.network}' raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module) or not list(network.parameters()):
        raise InputError(f"network '{settings.network}' must give a torch module with parameters")
    return network, f"{settings.network} {inputs}-{outputs}"
