r"""Kronecker-factored curvature of networks, K-FAC (Martens, Grosse 2015; Grosse, Martens 2016 for convolutions).

For a layer with the weight W (o, i), its bias one more column, and inputs a (a 1 appended) the Fisher matrix of W is
nearly :math:`A \otimes G`, with A the mean of :math:`a a^T` and G that of :math:`\gamma \gamma^T`, where
:math:`\gamma` is the gradient of a sample's loss by the layer's outputs for a label drawn from the network's own
distribution. A layer that a sample passes at several positions, a convolution at the patches, a linear one at the
places of a sequence, any one at each of its calls, has A summed over the positions of a sample, and G the mean over
them ("expand" in Eschenhagen et al. 2023).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.parameters import Parameter

from .loss import Loss

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A layer with a weight matrix.

    Attributes
    ----------
    name : str
        Of its module.
    entries : array of int (o, i + 1), or (o, i) without a trained bias, (o, 1) with nothing else
        Where the matrix is in theta.
    weight : bool
        Whether the weight is trained.
    """

    name: str
    entries: NDArray[np.int64]
    weight: bool = True

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of A, and of G."""
        rows, columns = self.entries.shape
        return columns, rows


class KroneckerLoss(Loss):
    """A loss with Kronecker-factored statistics of its layers."""

    @abstractmethod
    def kronecker_layers(self) -> tuple[Layer, ...]:
        """The layers.

        Raises
        ------
        InputError
            If there are none, or parameters outside of them.
        """

    @abstractmethod
    def kronecker_statistics(self, theta: Tensor, draws: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A and G of each layer, summed over this loss's samples with their weights.

        ``draws`` (count,) are uniform random numbers that pick the labels.
        """

    @abstractmethod
    def kronecker_charge(self) -> float:
        """Work units of :meth:`kronecker_statistics` on all samples."""


def layers(module: nn.Module, parameters: Sequence[Parameter]) -> tuple[Layer, ...]:
    """The layers of a module whose parameters are ``parameters``.

    Raises
    ------
    InputError
        If a parameter is not the weight or bias of a Linear or an ungrouped Conv2d or Conv3d layer, or of several
        layers.
    """
    table, found = {p.name: p for p in parameters}, list[Layer]()
    known, first = set(table), {id(p): name for name, p in module.named_parameters()}
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        for own, parameter in layer.named_parameters(recurse=False):
            if first[id(parameter)] != prefix + own and first[id(parameter)] in known:
                raise InputError(
                    f"K-FAC knows no weights tied between layers, {prefix}{own} is that of {first[id(parameter)]}: "
                    "choose another -norm"
                )
        weight, bias = table.get(f"{prefix}weight"), table.get(f"{prefix}bias")
        simple = isinstance(layer, nn.Linear) or (
            isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and layer.padding_mode == "zeros"
        )
        if not simple or (weight is None and bias is None):
            continue
        columns = []
        if weight is not None:
            columns.append(np.arange(weight.range.start, weight.range.stop).reshape(weight.shape[0], -1))
        if bias is not None:
            columns.append(np.arange(bias.range.start, bias.range.stop)[:, None])
        for used in (weight, bias):
            if used is not None:
                del table[used.name]
        found.append(Layer(name, np.hstack(columns), weight is not None))
    if table:
        raise InputError(
            f"K-FAC knows layers of kind Linear, and Conv2d and Conv3d without groups and padded with zeros; parameter "
            f"{next(iter(table))} is of none: choose another -norm"
        )
    return tuple(found)


def _calls(
    module: nn.Module, known: Sequence[Layer], inputs: Tensor, summed: Callable[[Tensor], Tensor]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each layer, for each of its calls: inputs and gradients by the outputs, as matrices, a row a position.

    ``summed`` gives a scalar from the outputs.
    """
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in known}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], outputs: Tensor) -> Tensor:
            # a layer without trained inputs still needs a graph; what follows may overwrite the clone
            outputs = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
            kept[name].append(((arguments[0] if arguments else named["input"]).detach(), outputs))
            return outputs.clone()

        return hook

    layers_by_name = dict(module.named_modules())
    hooks = [layers_by_name[layer.name].register_forward_hook(keep(layer.name), with_kwargs=True) for layer in known]
    try:
        with torch.enable_grad():
            total = summed(module(inputs))
            places = [outputs for layer in known for _, outputs in kept[layer.name]]
            gradients = iter(torch.autograd.grad(total, places, materialize_grads=True) if places else ())
    finally:
        for hook in hooks:
            hook.remove()
    for layer in known:
        part, calls = layers_by_name[layer.name], []
        for a, _ in kept[layer.name]:
            rows, gamma = _rows(part, a), next(gradients)
            gamma = gamma.movedim(1, -1) if isinstance(part, CONVOLUTIONS) else gamma
            ones = rows.new_ones(len(rows), layer.entries.shape[1] - layer.weight * rows.shape[1])
            calls.append((torch.cat([rows, ones], dim=1) if layer.weight else ones, gamma.flatten(0, -2)))
        yield calls


def check(module: nn.Module, known: Sequence[Layer], inputs: Tensor) -> None:
    """Whether the gradient of each layer's matrix is what its calls say, for some samples (B, ...).

    Raises
    ------
    InputError
        If a layer's parameters are also used without calling it, or it is called with something else than samples.
    """

    def summed(outputs: Tensor) -> Tensor:
        weights = torch.arange(outputs.numel(), dtype=outputs.dtype, device=outputs.device).cos()
        return (weights * outputs.reshape(-1)).sum()

    parts = dict(module.named_modules())
    for layer, calls in zip(known, _calls(module, known, inputs, summed), strict=True):
        part = parts[layer.name]
        used = [part.weight] if layer.weight else []
        if layer.entries.shape[1] > sum(p.numel() // len(p) for p in used):
            used.append(part.bias)
        with torch.enable_grad():
            gradients = torch.autograd.grad(summed(module(inputs)), used, materialize_grads=True)
        expected = torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1)
        seen = sum((gamma.T @ a for a, gamma in calls), torch.zeros_like(expected))
        largest = max(float(expected.abs().max()), float(seen.abs().max()))
        odd = sum(len(a) for a, _ in calls) % len(inputs) != 0
        if odd or float((seen - expected).abs().max()) > 1e-3 * largest:
            raise InputError(
                f"K-FAC knows layers by their calls on samples, and layer {layer.name} is used otherwise: choose "
                "another -norm"
            )


def statistics(
    module: nn.Module, known: Sequence[Layer], inputs: Tensor, drawn: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The sums over samples (B, ...) that A and G of each layer are means of, in double precision.

    ``drawn`` gives the loss (scalar, summed over samples) of outputs for labels that it draws.
    """
    sums = []
    for layer, calls in zip(known, _calls(module, known, inputs, drawn), strict=True):
        A, G = (torch.zeros(size, size, dtype=torch.float64, device=inputs.device) for size in layer.sizes)
        for a, gamma in calls:
            A += (a.T @ a).double()
            G += (gamma.T @ gamma).double()
        positions = sum(len(a) for a, _ in calls) / max(len(inputs), 1)
        sums.append((A, G / max(positions, 1.0)))
    return sums


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight by, (rows, i), a row a position."""
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.flatten(0, -2)
    padding = layer.padding
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]  # as torch pads
        inputs, padding = nn.functional.pad(inputs, sides), (0,) * len(total)
    if isinstance(layer, nn.Conv2d):
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        return patches.movedim(1, 2).flatten(0, 1)
    windows = nn.functional.pad(inputs, [p for p in reversed(padding) for _ in range(2)])
    for axis, (k, d, s) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True), start=2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return windows.movedim(1, 4).flatten(0, 3).flatten(1)  # of (B, C, positions, windows)
