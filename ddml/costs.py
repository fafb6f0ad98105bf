"""What a forward pass through each layer of a torch module costs, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _numbers(outputs: Any) -> int:
    if isinstance(outputs, Tensor):
        return outputs.numel()
    return sum(_numbers(o) for o in outputs) if isinstance(outputs, list | tuple) else 0


@torch.no_grad()
def forward_costs(module: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Cost for one sample of each module inside ``module`` that has parameters of its own, by its name.

    The cost is the number of multiply-adds in matrix products and convolutions, as torch counts them while it
    computes, plus the number of outputs (a bias, or a scale, takes one operation for each). That is the number of
    weights and biases for a linear layer, and that number times the number of output positions for a convolution.
    Modules that are called several times add up; what a module with children does itself is counted without them.

    Parameters
    ----------
    module
        Any module.
    inputs
        (B, ...), what it is called with.

    Returns
    -------
    dict
        Modules that are not called themselves, say because another one uses their weights, are missing.
    """
    costs: dict[str, float] = {}
    counter = FlopCounterMode(display=False)
    open_calls: list[list[float]] = []  # operations at the start, and those of owners inside

    def enter(_: nn.Module, __: Any) -> None:
        open_calls.append([counter.get_total_flops(), 0.0])

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_: nn.Module, __: Any, outputs: Any) -> None:
            start, inside = open_calls.pop()
            spent = counter.get_total_flops() - start
            if open_calls:
                open_calls[-1][1] += spent
            costs[name] = costs.get(name, 0.0) + ((spent - inside) / 2 + _numbers(outputs)) / len(inputs)

        return count

    hooks = []
    for name, owner in module.named_modules():
        if any(True for _ in owner.parameters(recurse=False)):
            hooks += [owner.register_forward_pre_hook(enter), owner.register_forward_hook(leave(name))]
    try:
        with counter:
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return costs
