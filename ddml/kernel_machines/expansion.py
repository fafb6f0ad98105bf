"""A trained kernel machine as a torch module."""

from __future__ import annotations

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
        parts = [self.kernel(part, self.points) @ self.alpha for part in x.reshape(len(x), -1).split(AT_ONCE)]
        found = torch.cat(parts)
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
        parts = [self.features(part).flatten(1) for part in x.reshape(len(x), -1).to(self.dtype).split(AT_ONCE)]
        found: Tensor = self.expansion(torch.cat(parts).to(self.expansion.points.dtype))
        return found
