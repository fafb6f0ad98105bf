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
