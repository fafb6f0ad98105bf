"""A trained kernel machine as a torch module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .functions import Kernel

AT_ONCE = 512  # samples that are evaluated together (our choice)


class KernelExpansion(nn.Module):
    """f(x) = sum over i of alpha_i k(x_i, x), an output a class; of two classes minus it, and it.

    Parameters
    ----------
    kernel
        k.
    points
        x_i (n, d), as the kernel takes them.
    columns
        Of alpha.

    Attributes
    ----------
    alpha : Parameter
        (n, columns), zero.
    """

    points: Tensor

    def __init__(self, kernel: Kernel, points: Tensor, columns: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("points", points)
        self.alpha = nn.Parameter(torch.zeros(len(points), columns, dtype=points.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (B, K) of samples (B, ...)."""
        parts = _parts(x.flatten(1))
        found = torch.cat([self.kernel(part, self.points) @ self.alpha for part in parts])
        return torch.cat([-found, found], dim=1) if found.shape[1] == 1 else found


class DeepExpansion(nn.Module):
    """The expansion of features: f(x) = sum over i of alpha_i k(phi(x_i), phi(x)).

    Parameters
    ----------
    features
        phi, from samples (B, d).
    expansion
        On the features of points.
    """

    def __init__(self, features: nn.Module, expansion: KernelExpansion) -> None:
        super().__init__()
        self.features, self.expansion = features, expansion
        self.dtype = next(features.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (B, K) of samples (B, ...)."""
        parts = [self.features(part).flatten(1) for part in _parts(x.flatten(1).to(self.dtype))]
        found: Tensor = self.expansion(torch.cat(parts).to(self.expansion.points.dtype))
        return found


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Samples (B, d) in parts; torch.export, which does not know how many there will be, gets them together."""
    return (x,) if torch.compiler.is_compiling() else x.split(AT_ONCE)
