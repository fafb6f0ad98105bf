r"""Kernel functions k(x, y) of samples, evaluated by torch for tables of them.

With d the Euclidean distance and w the width:

- ``rbf``: :math:`\exp(-d^2 / 2 w^2)`;
- ``laplace``: :math:`\exp(-d / w)`;
- ``matern32``: :math:`(1 + s) e^{-s}, s = \sqrt 3 d / w`;
- ``matern52``: :math:`(1 + s + s^2 / 3) e^{-s}, s = \sqrt 5 d / w`;
- ``polynomial``: :math:`(x \cdot y / w^2 + 1)^g` of degree g.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.plugins import blamed, load

from .domain import table

# our choices: squared distances below this power of the precision, relative to the squares of the samples, are computed
# from differences; samples whose median distance stands for all, and of which a user's kernel is tried
NEAR, MEDIAN_OF, TRIED = 0.4, 1000, 32
# our choices: near samples whose differences are formed together; rows of a triangle; samples whose norms are
AT_ONCE, ROWS, NORMS = 1024, 256, 1024


Norms = tuple[Tensor, Tensor]


class Kernel:
    """A symmetric function of two samples; positive semidefinite, which is not checked.

    Parameters
    ----------
    name
        In words.
    function
        From tables x (a, d) and y (b, d) to k(x_i, y_j), (a, b), of the same precision.
    diagonal
        From x (a, d) to k(x_i, x_i), (a,).
    translates
        Whether it stays the same if both samples are moved by the same vector.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor, Tensor], Tensor],
        diagonal: Callable[[Tensor], Tensor],
        translates: bool,
    ) -> None:
        self.name, self.function, self.diagonal, self.translates = name, function, diagonal, translates

    def __call__(self, x: Tensor, y: Tensor, norms: Norms | None = None) -> Tensor:
        """See ``function``; ``norms``, the squared norms (a,) and (b,) of the samples, spare their computation."""
        return self.function(x, y)

    def lower(self, x: Tensor) -> Tensor:
        """k(x_i, x_j) (m, m) of samples (m, d), of which the lower triangle is computed; others may be anything."""
        found, squares = x.new_zeros(len(x), len(x)), squared_norms(x)
        for begin in range(0, len(x), ROWS):
            end = min(begin + ROWS, len(x))
            found[begin:end, :end] = self(x[begin:end], x[:end], (squares[begin:end], squares[:end]))
        return found

    def __repr__(self) -> str:
        return self.name


class DistanceKernel(Kernel):
    """A function of the distance of samples over a width.

    Parameters
    ----------
    name
        In words.
    profile
        From squared distances, which it overwrites, and what each is to be multiplied with, one over the square of the
        width, to k.
    width
        w.
    """

    def __init__(self, name: str, profile: Callable[[Tensor, float], Tensor], width: float) -> None:
        super().__init__(f"{name} of width {width:g}", self, lambda x: x.new_ones(len(x)), True)
        self.profile, self.scale = profile, 1 / width**2

    def __call__(self, x: Tensor, y: Tensor, norms: Norms | None = None) -> Tensor:
        """See :class:`Kernel`."""
        return self.profile(squared_distances(x, y, norms), self.scale)


def _rbf(squares: Tensor, scale: float) -> Tensor:
    return squares.mul_(-0.5 * scale).exp_()


def _laplace(squares: Tensor, scale: float) -> Tensor:
    return squares.sqrt_().mul_(-math.sqrt(scale)).exp_()


def _matern32(squares: Tensor, scale: float) -> Tensor:
    s = squares.sqrt_().mul_(math.sqrt(3 * scale))
    return torch.exp(-s).mul_(s.add_(1))


def _matern52(squares: Tensor, scale: float) -> Tensor:
    s = squares.sqrt_().mul_(math.sqrt(5 * scale))
    return torch.exp(-s).mul_((s * s).div_(3).add_(s).add_(1))


DISTANCES = {"rbf": _rbf, "laplace": _laplace, "matern32": _matern32, "matern52": _matern52}
"""Profiles of :class:`DistanceKernel`."""
NAMES = (*DISTANCES, "polynomial")


def named(name: str, width: float = 1.0, degree: int = 3) -> Kernel:
    """The kernel of that name, or the user's torch function ``path/to/file.py:Name``.

    Parameters
    ----------
    name
        One of :data:`NAMES`; or a function of tables x (a, d) and y (b, d) in a file, to (a, b).
    width
        w; the user's function has its own.
    degree
        g, of ``polynomial``.

    Raises
    ------
    InputError
        If there is no such kernel; a width or degree that is not above 0.
    """
    if not 0 < width < math.inf:
        raise InputError(f"the width of a kernel must be above 0, got {width}")
    if degree < 1:
        raise InputError(f"the degree of a polynomial kernel must be 1 or more, got {degree}")
    if name in DISTANCES:
        return DistanceKernel(name, DISTANCES[name], width)
    if name == "polynomial":
        return Kernel(
            f"polynomial of degree {degree}, width {width:g}",
            lambda x, y: (x @ y.T).div_(width**2).add_(1).pow_(degree),
            lambda x: (x * x).sum(dim=1).div_(width**2).add_(1).pow_(degree),
            False,
        )
    return users(load(name, {known: known for known in NAMES}, "kernel"), name)


def users(function: Callable[[Tensor, Tensor], Any], name: str) -> Kernel:
    """A user's function as a kernel; what it gives is looked at whenever it is called.

    Raises
    ------
    InputError
        Where it is called: if it raises an exception, or gives anything but finite numbers (a, b) of the samples'
        precision.
    """

    def checked(x: Tensor, y: Tensor) -> Tensor:
        with blamed(name, {}, "kernel"):
            found = function(x, y)
        expected = f"of tables of {len(x)} and {len(y)} samples must give a tensor ({len(x)}, {len(y)}) of {x.dtype}"
        if not isinstance(found, Tensor):
            raise InputError(f"kernel '{name}' {expected}, got {type(found).__name__}")
        if found.shape != (len(x), len(y)) or found.dtype != x.dtype:
            raise InputError(f"kernel '{name}' {expected}, got {tuple(found.shape)} of {found.dtype}")
        if not torch.isfinite(found).all():
            raise InputError(f"kernel '{name}' gives values that are not finite")
        return found.detach()

    def diagonal(x: Tensor) -> Tensor:
        parts = [checked(part, part).diagonal() for part in x.split(TRIED) if len(part)]
        return torch.cat([x.new_empty(0), *parts])

    return Kernel(name, checked, diagonal, False)


def check_symmetry(kernel: Kernel, x: Tensor) -> None:
    """Try a kernel on some of samples (n, d).

    Raises
    ------
    InputError
        If it is not finite or not symmetric to rounding, or the diagonal is not positive.
    """
    some = x[:: max(len(x) // TRIED, 1)][:TRIED]
    values = kernel(some, some.clone())
    scale = float(values.abs().max())
    if not math.isfinite(scale):
        raise InputError(f"kernel '{kernel}' gives values that are not finite: scale the samples, or use another width")
    if not torch.allclose(values, values.T, rtol=0, atol=1e-5 * scale):
        raise InputError(f"kernel '{kernel}' is not symmetric: k(x, y) and k(y, x) differ")
    if not (values.diagonal() > 0).all():
        raise InputError(f"kernel '{kernel}' is not positive: k(x, x) is not above 0")


def squared_norms(x: Tensor) -> Tensor:
    """The squares (n,) of the norms of samples (n, d)."""
    return torch.cat([x.new_empty(0), *((part * part).sum(dim=1) for part in x.split(NORMS))])


def squared_distances(x: Tensor, y: Tensor, norms: Norms | None = None) -> Tensor:
    """The squares (a, b) of the distances of x (a, d) and y (b, d); those of equal samples are zero.

    From products, and the squared norms of both; where samples are near each other, from differences, so that distances
    have all of their digits; what torch.export writes, which cannot follow that, has differences alone.
    """
    if torch.compiler.is_compiling():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    of_x, of_y = norms or (squared_norms(x), squared_norms(y))
    squares = torch.addmm(of_y, x, y.T, alpha=-2).add_(of_x[:, None])
    if not squares.numel():
        return squares
    bound = torch.finfo(x.dtype).eps ** NEAR * (of_x.max() + of_y.max())
    near = (squares.amin(dim=0) < bound).nonzero()[:, 0]  # few, so that looking for pairs costs little
    i, j = (squares[:, near] < bound).nonzero(as_tuple=True)
    for some_i, some_j in zip(i.split(AT_ONCE), near[j].split(AT_ONCE), strict=True):
        squares[some_i, some_j] = (x[some_i] - y[some_j]).square_().sum(dim=1)
    return squares


def median_distance(samples: Any, seed: int = 0) -> float:
    """The median distance of two of samples (n, ...), of a thousand of them at most (our choice), drawn with a seed.

    Raises
    ------
    InputError
        If it is zero: most samples are the same.
    """
    found = table(samples)
    if len(found) > MEDIAN_OF:
        found = found[np.sort(np.random.default_rng(seed).choice(len(found), MEDIAN_OF, replace=False))]
    x = torch.as_tensor(found)
    squares = squared_distances(x, x)
    upper = torch.triu_indices(len(x), len(x), 1)
    median = math.sqrt(float(np.median(squares[upper[0], upper[1]].numpy()))) if len(x) > 1 else 0.0
    if median == 0:
        raise InputError("the median distance of the samples is 0, so that no width follows from it: give one")
    return median
