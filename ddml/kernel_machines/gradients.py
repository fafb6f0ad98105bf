r"""Kernels with their derivative by a sample: what features that are trained need.

Of a symmetric k only :math:`\partial_1 k` is wanted. With :math:`s = d^2 / w^2` and :math:`k = f(s)` it is
:math:`2 f'(s) (x - y) / w^2`: sums of it are two products of matrices, and no graph is kept. That of ``laplace`` is
taken as 0 at equal samples, where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.plugins import blamed, load

from .functions import NAMES, Kernel, named, squared_distances

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]


class SmoothKernel(Kernel):
    r"""A kernel, and sums of its derivative.

    Parameters
    ----------
    kernel
        k.
    pull
        From tables x (a, q), y (b, q) and weights (a, b), which are overwritten, to
        :math:`\sum_j w_{ij} \partial_1 k(x_i, y_j)`, (a, q).
    """

    def __init__(self, kernel: Kernel, pull: Pull) -> None:
        super().__init__(kernel.name, kernel.function, kernel.diagonal, kernel.translates)
        self.kernel, self.pull = kernel, pull

    def __call__(self, x: Tensor, y: Tensor, *norms: Any) -> Tensor:
        """See :class:`Kernel`."""
        return self.kernel(x, y, *norms)


def _rbf(s: Tensor) -> Tensor:
    return s.mul_(-0.5).exp_().mul_(-0.5)


def _laplace(s: Tensor) -> Tensor:
    root = s.sqrt_()
    return torch.where(root > 0, torch.exp(-root).div_(root).mul_(-0.5), 0.0)


def _matern32(s: Tensor) -> Tensor:
    return s.mul_(3).sqrt_().neg_().exp_().mul_(-1.5)


def _matern52(s: Tensor) -> Tensor:
    root = s.mul_(5).sqrt_()
    return torch.exp(-root).mul_(root.add_(1)).mul_(-5 / 6)


SLOPES = {"rbf": _rbf, "laplace": _laplace, "matern32": _matern32, "matern52": _matern52}
"""From (d / w)^2, which is overwritten, to f'."""


def smooth(name: str, width: float = 1.0, degree: int = 3) -> SmoothKernel:
    """The kernel that :func:`ddml.kernel_machines.functions.named` gives, with its derivative.

    A user's function is differentiated by torch, and has to be made of torch's operations.

    Raises
    ------
    InputError
        See there; where it is called, of a user's function without a finite derivative.
    """
    kernel = named(name, width, degree)
    if name in SLOPES:
        return SmoothKernel(kernel, lambda x, y, weights: _radial(SLOPES[name], width, x, y, weights))
    if name == "polynomial":
        return SmoothKernel(kernel, lambda x, y, weights: _polynomial(width, degree, x, y, weights))
    function = load(name, {known: known for known in NAMES}, "kernel")
    return SmoothKernel(kernel, lambda x, y, weights: _users(function, name, x, y, weights))


def _radial(slope: Callable[[Tensor], Tensor], width: float, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    weights.mul_(slope(squared_distances(x, y).div_(width**2)))
    return (weights.sum(dim=1, keepdim=True) * x).sub_(weights @ y).mul_(2 / width**2)


def _polynomial(width: float, degree: int, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    weights.mul_((x @ y.T).div_(width**2).add_(1).pow_(degree - 1))
    return (weights @ y).mul_(degree / width**2)


def _users(function: Callable[[Tensor, Tensor], Any], name: str, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), blamed(name, {}, "kernel"):
        values = function(leaf, y)
    if not isinstance(values, Tensor) or not values.requires_grad:
        raise InputError(f"kernel '{name}' cannot be differentiated: it must be made of operations of torch")
    (found,) = torch.autograd.grad(values, leaf, weights)
    if not math.isfinite(float(found.abs().sum())):
        raise InputError(f"kernel '{name}' has a derivative that is not finite, at equal samples perhaps")
    return found
