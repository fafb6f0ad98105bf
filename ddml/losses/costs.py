"""What a forward pass through each layer of a torch module costs, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .work import ACTIVATION, CRITERION, KEPT, Besides


def _inner(arguments: Any, outputs: Tensor) -> int:
    """Of a product of matrices, or of inputs with a weight (outputs, inputs)."""
    return outputs.numel() * int(arguments[0].shape[-1])


def _inner_added(arguments: Any, outputs: Tensor) -> int:
    return _inner(arguments[1:], outputs)


def _convolution(arguments: Any, outputs: Tensor) -> int:
    """Of a convolution with a weight (C_out, C_in / groups, ...)."""
    weight = arguments[1]
    return outputs.numel() * (weight.numel() // weight.shape[0])


def _transposed(arguments: Any, outputs: Tensor) -> int:
    """Of a transposed convolution with a weight (C_in, C_out / groups, ...)."""
    inputs, weight = arguments[:2]
    return inputs.numel() * (weight.numel() // weight.shape[0])


_PRODUCTS: dict[Any, Callable[[Any, Tensor], int]] = {
    **dict.fromkeys(
        (nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.mv, Tensor.matmul, Tensor.__matmul__,
         Tensor.mm, Tensor.bmm, Tensor.mv), _inner,
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm), _inner_added),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
}  # fmt: skip


class _Products(TorchFunctionMode):
    """Counts multiply-adds while it is entered. torch's own FlopCounterMode takes seconds to import what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        outputs = function(*arguments, **(named or {}))
        if function in _PRODUCTS:
            self.total += _PRODUCTS[function]((*arguments, *(named or {}).values()), outputs)
        return outputs


def _numbers(outputs: Any) -> int:
    if isinstance(outputs, Tensor):
        return outputs.numel()
    return sum(_numbers(o) for o in outputs) if isinstance(outputs, list | tuple) else 0


@torch.no_grad()
def forward_costs(module: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Cost for one sample of each module inside ``module`` that has parameters of its own, by its name.

    The cost is the number of multiply-adds in matrix products, linear maps and convolutions, counted while the module
    computes, plus the number of outputs (a bias, or a scale, takes one operation for each). That is the number of
    weights and biases for a linear layer, and that number times the number of output positions for a convolution.
    Modules that are called several times add up; what a module with children does itself is counted without them.
    What torch computes inside other functions (attention, recurrent cells) is not seen.

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
    counter = _Products()
    open_calls: list[list[float]] = []  # operations at the start, and those of owners inside

    def enter(_: nn.Module, __: Any) -> None:
        open_calls.append([counter.total, 0.0])

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_: nn.Module, __: Any, outputs: Any) -> None:
            start, inside = open_calls.pop()
            spent = counter.total - start
            if open_calls:
                open_calls[-1][1] += spent
            costs[name] = costs.get(name, 0.0) + (spent - inside + _numbers(outputs)) / len(inputs)

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


@torch.no_grad()
def multiplications(module: nn.Module, inputs: Tensor) -> int:
    """How many multiply-adds of matrix products, linear maps and convolutions a sample of ``inputs`` (B, ...) takes."""
    with _Products() as counter:
        module(inputs)
    return counter.total // len(inputs)


@torch.no_grad()
def forward_numbers(module: nn.Module, inputs: Tensor) -> dict[str, tuple[int, int]]:
    """How many numbers of a sample enter and leave each part of ``module`` that is called, by its name.

    Of ``inputs`` (B, ...); where a part is called several times what it gives adds up. The module itself has the
    empty name.
    """
    found: dict[str, tuple[int, int]] = {}

    def count(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, given: Any, outputs: Any) -> None:
            entering, leaving = _numbers(list(given)) // len(inputs), _numbers(outputs) // len(inputs)
            found[name] = entering, leaving + found.get(name, (0, 0))[1]

        return hook

    hooks = [part.register_forward_hook(count(name)) for name, part in module.named_modules()]
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_work(
    module: nn.Module, inputs: Tensor | None, sizes: Mapping[str, int], chain: bool
) -> tuple[tuple[float, ...], Besides]:
    """Multiply-adds of a sample in each layer of ``module``, and what it takes besides.

    Parameters
    ----------
    module
        Any module.
    inputs
        A sample (1, ...); without one the products are counted as one for each parameter, and nothing besides.
    sizes
        Parameters of each layer, by the name of the part that has them.
    chain
        Whether a layer is all that is inside its part, as children of an ``nn.Sequential`` are, or that part alone.
    """
    if inputs is None:
        return tuple(map(float, sizes.values())), Besides()
    costs, numbers, given = forward_costs(module, inputs), forward_numbers(module, inputs), dict.fromkeys(sizes, 0)
    found = tuple(
        sum(c for name, c in costs.items() if (name.split(".")[0] if chain else name) == owner) or float(size)
        for owner, size in sizes.items()
    )
    for name, part in module.named_modules():
        owner = name.split(".")[0] if chain else name
        if owner in given and name in numbers and any(True for _ in part.parameters(recurse=False)):
            given[owner] += numbers[name][1]
    return found, Besides(
        tuple(ACTIVATION * given[owner] for owner in sizes),
        tuple(KEPT * numbers[owner][0] if owner in numbers else 0.0 for owner in sizes),
        CRITERION * numbers[""][1],
    )


# numbers in the widest layer of a batch: what went fastest (measured on CPUs, our choice), and on other devices, which
# want one pass over all samples as long as they have the memory (not measured, our choice)
CACHED, QUEUED = 1 << 21, 1 << 27


@torch.no_grad()
def suitable_batch(module: nn.Module, inputs: Tensor, most: int = 4096) -> int:
    """Samples per forward pass for which what a layer gives stays in a CPU's cache; ``inputs`` (B, ...) to try.

    ``most`` bounds them on a CPU; on another device they are as many as its memory is likely to hold.
    """
    widest = [_numbers(inputs)]
    hooks = [
        part.register_forward_hook(lambda _, __, outputs: widest.append(_numbers(outputs))) for part in module.modules()
    ]
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if inputs.device.type != "cpu":
        return max(QUEUED * len(inputs) // max(widest), 16)
    return min(max(CACHED * len(inputs) // max(widest), 16), most)
