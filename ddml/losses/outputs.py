"""Outputs of networks side by side that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What networks side by side give for some samples.

    Attributes
    ----------
    logits : Tensor
        (N, S, K).
    numbers : Tensor
        Of the samples, int64 on the host (S,).
    """

    logits: Tensor
    numbers: Tensor

    def of(self, numbers: Tensor) -> Tensor | None:
        """Those (N, B, K) for samples of these numbers (B,); None where some are not among them."""
        if torch.equal(numbers, self.numbers):
            return self.logits
        ordered, order = self.numbers.sort()
        places = torch.searchsorted(ordered, numbers).clamp(max=max(len(ordered) - 1, 0))
        if not len(ordered) or not torch.equal(ordered[places], numbers):
            return None
        return self.logits[:, order[places].to(self.logits.device)]
