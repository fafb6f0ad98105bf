r"""Kronecker-factored curvature of networks, K-FAC (Martens, Grosse 2015; Grosse, Martens 2016 for convolutions).

For a layer with the weight W (o, i), its bias one more column, and inputs a (a 1 appended) the Fisher matrix of W is
nearly :math:`A \otimes G`, with A the mean of :math:`a a^T` and G that of :math:`\gamma \gamma^T`, where
:math:`\gamma` is the gradient of a sample's loss by the layer's outputs for a label drawn from the network's own
distribution. Convolutions are layers on patches: A is summed over the patches of a sample, G is the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import InputError

if TYPE_CHECKING:
    from .loss import Parameter


@dataclass(frozen=True)
class Layer:
    """A layer with a weight matrix.

    Attributes
    ----------
    name : str
        Of its module.
    entries : array of int (o, i + 1), or (o, i) without a bias
        Where the matrix is in theta.
    """

    name: str
    entries: NDArray[np.int64]

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of A, and of G."""
        rows, columns = self.entries.shape
        return columns, rows


def layers(module: nn.Module, parameters: Sequence[Parameter]) -> tuple[Layer, ...]:
    """The layers of a module whose parameters are ``parameters``.

    Raises
    ------
    InputError
        If a parameter is not the weight or bias of a Linear or an ungrouped Conv2d layer.
    """
    table, found = {p.name: p for p in parameters}, list[Layer]()
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        weight, bias = table.get(f"{prefix}weight"), table.get(f"{prefix}bias")
        simple = isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
        )
        if weight is None or not simple:
            continue
        entries = np.arange(weight.range.start, weight.range.stop).reshape(weight.shape[0], -1)
        del table[weight.name]
        if bias is not None:
            entries = np.column_stack([entries, np.arange(bias.range.start, bias.range.stop)])
            del table[bias.name]
        found.append(Layer(name, entries))
    if table:
        raise InputError(
            f"K-FAC knows layers of kind Linear and Conv2d without groups; parameter {next(iter(table))} is of none: "
            "choose another -norm"
        )
    return tuple(found)


def statistics(
    module: nn.Module, known: Sequence[Layer], inputs: Tensor, drawn: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The sums over samples (B, ...) that A and G of each layer are means of, in double precision.

    ``drawn`` gives the loss (scalar, summed over samples) of outputs for labels that it draws.
    """
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
            # a layer without trained inputs still needs a graph; what follows may overwrite the clone
            outputs = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
            kept[name] = arguments[0].detach(), outputs
            return outputs.clone()

        return hook

    named = dict(module.named_modules())
    hooks = [named[layer.name].register_forward_hook(keep(layer.name)) for layer in known]
    try:
        with torch.enable_grad():
            loss = drawn(module(inputs))
            gradients = torch.autograd.grad(loss, [kept[layer.name][1] for layer in known])
    finally:
        for hook in hooks:
            hook.remove()
    sums = []
    for layer, gradient in zip(known, gradients, strict=True):
        a, patches = _rows(named[layer.name], kept[layer.name][0])
        gamma = gradient.movedim(1, -1).flatten(0, -2) if patches else gradient.flatten(0, -2)
        if layer.entries.shape[1] > a.shape[1]:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        sums.append(((a.T @ a).double(), (gamma.T @ gamma).double() / max(patches, 1)))
    return sums


def _rows(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """What a layer multiplies its weight by, (rows, i), and the number of patches of a sample, 0 if there are none."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2), 0
    assert not isinstance(layer.padding, str)
    patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.movedim(1, 2).flatten(0, 1), patches.shape[2]
