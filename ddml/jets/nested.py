"""Jets of any torch code by nested reverse-mode autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ddml.losses.modules import occurrences

from .evaluator import ByAutograd, Index


def nested_jets(function: Callable[[Tensor], Tensor], points: Tensor, indices: Sequence[Index]) -> Tensor:
    """Jets (K, N, outputs) of any torch function (N, d) -> (N, outputs), each row on its own, by nested autograd."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        value = function(points)
        columns = []
        for output in range(value.shape[1]):
            known: dict[Index, Tensor] = {(): value[:, output]}
            gradients: dict[Index, Tensor] = {}
            for index in indices[1:]:
                parent = index[:-1]
                if parent not in gradients:
                    lower = known[parent]
                    gradients[parent] = (
                        torch.autograd.grad(lower.sum(), points, create_graph=True, materialize_grads=True)[0]
                        if lower.requires_grad
                        else torch.zeros_like(points)
                    )
                known[index] = gradients[parent][:, index[-1]]
            columns.append(torch.stack([known[i] for i in indices]))
        return torch.stack(columns, dim=-1)


class NestedJets(ByAutograd):
    """Jets of any torch module by nested reverse-mode autograd: for networks that the others do not know.

    Parameters
    ----------
    module
        Maps (N, inputs) to (N, outputs), each row on its own.
    offsets
        Begin and shape of each parameter in the vector theta.
    indices
        Derivatives, closed as by :func:`ddml.jets.evaluator.closure`.
    """

    def __init__(
        self, module: nn.Module, offsets: Mapping[str, tuple[int, torch.Size]], indices: Sequence[Index]
    ) -> None:
        self.module = module
        self.offsets = offsets
        known = {id(p): offsets[name] for name, p in module.named_parameters() if name in offsets}
        self.places = occurrences(module, known)
        self.indices = tuple(indices)

    def prefix(self, inputs: Tensor, first: int) -> Tensor:
        """The inputs themselves: nothing is known of the inside of the module."""
        return inputs

    def jets(self, theta: Tensor, inputs: Tensor, first: int = 0) -> Tensor:
        """Jets (K, N, outputs), differentiable by theta; ``inputs`` (K, N, d) must be plain coordinates."""
        parameters = {n: theta[b : b + s.numel()].view(s) for n, (b, s) in self.places.items()}
        function = partial(torch.func.functional_call, self.module, parameters, tie_weights=False)
        return nested_jets(lambda x: function((x,)), inputs[0], self.indices)
