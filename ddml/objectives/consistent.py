"""Objectives on parts of the samples that agree with the whole one to first order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.parallel import split

from .composed import sampled
from .linear import LinearTerm
from .objective import Objective
from .restricted import RestrictedObjective, restricted_parts


def sample_parts(count: int, parts: int, overlap: float = 0.0, seed: int = 0) -> list[NDArray[np.int64]]:
    """Deal ``count`` samples at random into parts whose sizes differ by at most one, each widened by an overlap.

    ``overlap`` is a fraction of a part: so many samples of the part behind it are in it, too. Sorted.

    Raises
    ------
    InputError
        More parts than samples, less than one, or an overlap below 0 or above 1.
    """
    if not 1 <= parts <= count:
        raise InputError(f"{count} samples can be dealt into 1 to {count} subdomains, not {parts}")
    if not 0 <= overlap <= 1:
        raise InputError(f"the overlap of sample subdomains must be a fraction from 0 to 1, got {overlap:g}")
    order = np.random.default_rng(seed).permutation(count)
    edges = split(count, parts)
    wide = [round(overlap * (b - a)) if parts > 1 else 0 for a, b in pairwise(edges)]
    return [np.sort(order[np.arange(edges[p], edges[p + 1] + wide[p]) % count]) for p in range(parts)]


def whole_copies(loss: Loss, parts: int) -> Subdomains:
    """Subdomains that each hold all parameters, so that E_s divides by N."""
    everything = ((slice(0, loss.size),),) * parts
    return Subdomains(loss.size, everything, everything, (1 / parts,) * parts)


class ConsistentObjective(RestrictedObjective):
    r"""The loss on some of the samples with a linear term that makes its gradient at a point that of the whole.

    .. math:: h_p(\theta) = L_p(\theta) + \langle \nabla L(\theta_k) - \nabla L_p(\theta_k), \theta - \theta_k \rangle

    (Gross, Krause 2009; Trotti et al. 2023). The term is in the value and in the gradient. :meth:`know` sets
    theta_k; it takes one evaluation of L_p. Where L has linear terms, L_p has them, too. Everything is collective on
    the group of the subdomain.

    Parameters
    ----------
    objective
        L, of the whole network on all samples.
    decomposition
        Of :func:`whole_copies`.
    s
        The number p of the subdomain, one of this rank's.
    overlap, seed
        See :func:`sample_parts`.
    """

    def __init__(
        self, objective: Objective, decomposition: Decomposition, s: int, overlap: float = 0.0, seed: int = 0
    ) -> None:
        self.whole, self.decomposition, self.s = objective, decomposition, s
        self.widening, self.seed = overlap, seed
        part = self._sampled()
        loss, parts = restricted_parts(part, decomposition, s, part.parts.split_over(decomposition.group))
        super().__init__(loss, decomposition.group_layout(s), part.stop, part.parts.blocks, parts)
        self.inherit(part)
        self.theta0, self.dg = self.layout.vector(), self.layout.vector()
        self.linear = (*self.linear, LinearTerm(self.dg, self.theta0))
        self.start = 0.0

    def _sampled(self) -> Objective:
        parts = len(self.decomposition.subdomains)
        part = sampled(self.whole, sample_parts(self.whole.loss.count, parts, self.widening, self.seed)[self.s])
        # no group has more ranks than this, and a block is then as large as one of the whole objective
        part.parts.cut_into(-(-self.whole.parts.blocks // parts))
        return part

    def follow(self, objective: Objective, parts: object) -> None:
        """Take the part of the samples that the whole objective has now."""
        part = self._sampled()
        super().follow(part, part.parts.split_over(self.decomposition.group))

    def know(self, x: PETSc.Vec, value: float, g: PETSc.Vec) -> None:
        """Make x theta_k, where the whole loss has the gradient g; ``start`` is h_p there."""
        self.dg.set(0.0)
        x.copy(self.theta0)
        own = x.duplicate()
        self.start = super().value_gradient(x, own)
        self.dg.waxpy(-1.0, own, g)
        super().know(x, self.start, g)
        own.destroy()

    def destroy(self) -> None:
        """See :meth:`RestrictedObjective.destroy`."""
        super().destroy()
        self.theta0.destroy()
        self.dg.destroy()
