"""Numbers and vectors on a device, read so that the process waits for the device once.

On another device than the CPU torch only queues what is to be computed; whoever reads a number waits until all before
it is done. So losses there give numbers that stay on the device, and who needs them reads all of an evaluation
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Number = float | Tensor
"""A float, or a tensor () in float64 on a device that nobody has waited for."""


def as_number(scalar: Tensor) -> Number:
    """A tensor () as a float if it is on the CPU; else in float64, where it is."""
    return float(scalar.item()) if scalar.device.type == "cpu" else scalar.detach().double()


def read(numbers: Sequence[Number]) -> list[float]:
    """Numbers as floats; waits once."""
    waiting = [n for n in numbers if isinstance(n, Tensor)]
    found = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(found) if isinstance(n, Tensor) else n for n in numbers]


def host(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Tensors of one type on the host, in another precision if that is given; those of a device in one copy."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.to(dtype=dtype) for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype=dtype).cpu()
    edges = np.cumsum([0, *(tensor.numel() for tensor in tensors)]).tolist()
    return [flat[a:b].view(tensor.shape) for (a, b), tensor in zip(pairwise(edges), tensors, strict=True)]
