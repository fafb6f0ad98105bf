"""What a kernel machine costs by the two-level preconditioner, and the subdomains and pivots that cost least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddml.errors import InputError
from ddml.summation import leaves

from .halves import WIDTH
from .layout import UNIT
from .operator import TEMPORARIES

# All numbers of this file are our choices: measured on one core of a Xeon with AVX-512, of which only ratios matter.
# Multiply-adds a second in float64: of products of samples; of setting up with them; of products of K with few columns;
# of an application of the preconditioner. Those in float32 are twice as many. Seconds for an entry that is picked out
# of K, and that an application takes for each subdomain.
LARGE, SET_UP, FEW, APPLIED, PICKED, EACH = 25e9, 15e9, 11e9, 4.5e9, 1e-8, 2e-4
VALUES = 32  # multiply-adds that as much time takes as a value of a kernel from a distance
# iterations to 1e-6 with a tenth of the samples as pivots, 16 subdomains, an overlap of 0.1 and lambda 0.1, and by
# which power they grow with one over lambda, the number of subdomains, and one over the share of pivots
BASE, OF_LAMBDA, OF_PARTS, OF_PIVOTS = 19.0, 0.15, 0.15, 0.3
LEAST_LAMBDA, MOST_LAMBDA = 1e-3, 1.0  # between which it matters
# by what iterations are more without overlap, and less with a large one, and the overlap that is large
NO_OVERLAP, OVERLAPPED, OVERLAP = 1.5, 0.85, 0.055
SINGLE = 1e-3  # least lambda, relative to the largest k(x, x), with which factors in float32 cost no iterations
OVERLAPS = (0.0, 0.05, 0.1, 0.2)  # that are tried
# what is chosen: subdomains, at least, and where their cores have more samples than that, at least; samples in each of
# them, at least; and pivots, at most
FEWEST, SUBDOMAINS, CORE, LEAST, MOST = 4, 16, 512, 64, 2000
SURE = 0.95  # of the memory is used before the sizes of subdomains are known
EXCHANGED = 128  # columns of F that subdomains get at a time
SIZES = {"float64": 8, "float32": 4}


@dataclass(frozen=True)
class Task:
    """What a preconditioner is for.

    Parameters
    ----------
    samples, dimension, columns
        n, d, and k, the number of outputs.
    shift
        lambda, relative to the largest k(x, x).
    ranks
        P; subdomains and rows are shared evenly.
    kept
        Whether K is kept, so that a product does not compute it.
    memory
        Bytes of a rank for the factors of subdomains and coarse space.
    dtype, factors
        ``float64`` or ``float32``: what K and what factors are computed in.
    """

    samples: int
    dimension: int
    columns: int
    shift: float
    ranks: int = 1
    kept: bool = True
    memory: float = math.inf
    dtype: str = "float64"
    factors: str = "float32"

    @classmethod
    def within(
        cls,
        limit: float,
        samples: int,
        dimension: int,
        columns: int,
        shift: float,
        ranks: int = 1,
        dtype: str = "float64",
    ) -> Task:
        """The task of an operator that gets so many bytes a rank, which keeps K where it fits into them."""
        unit = math.ceil(samples / leaves(samples, UNIT))
        block = min(unit, limit // (TEMPORARIES * 8 * samples))
        needed = samples * (samples + unit) / 2 * SIZES[dtype] / ranks + (TEMPORARIES - 1) * 8 * samples * block
        kept, factors = needed <= limit, "float32" if shift >= SINGLE else "float64"
        spare = math.inf if kept else limit - TEMPORARIES * 8 * block * min(WIDTH, samples)
        return cls(samples, dimension, columns, shift, ranks, kept, spare, dtype, factors)


@dataclass(frozen=True)
class Choice:
    """Subdomains and pivots, and what they are expected to cost.

    Attributes
    ----------
    subdomains, overlap, coarse_rank
        p of a tree, its overlap, and pivots.
    iterations, seconds
        To a residual of 1e-6, with the set-up; seconds of a machine like the one it was measured on.
    bytes
        Of factors, on a rank, while they are made.
    """

    subdomains: int
    overlap: float
    coarse_rank: int
    iterations: float
    seconds: float
    bytes: float


def choices(task: Task) -> Choice:
    """The subdomains of a tree, their overlap and the pivots with which one rank is expected to be done first.

    There are at least 4 subdomains, or up to 16 with cores of 512 samples, where samples are enough: the choice is the
    same for any number of ranks up to that, unless memory makes it differ.

    Raises
    ------
    InputError
        If the memory is not enough for any.
    """
    n = task.samples
    counts = [1 << i for i in range(n.bit_length())]
    fewest = max(FEWEST, min(SUBDOMAINS, math.ceil(n / CORE)), task.ranks)
    enough = [p for p in counts if p >= fewest and n >= LEAST * p]
    enough = enough or [max(p for p in counts if p == 1 or (p < 2 * max(FEWEST, task.ranks) and p <= n))]
    found = []
    for p, overlap in itertools.product(enough, OVERLAPS):
        sizes = [n / p * (1 + overlap) ** math.log2(p)] * p
        found += [
            Choice(p, overlap, r, iterations(task, sizes, r), seconds(task, sizes, r), memory(task, sizes, r))
            for r in _within(task, sizes, SURE)
        ]
    if not found:
        raise InputError(_too_little(task, min(memory(task, [n / p] * p, _ranks(n)[0]) for p in enough)))
    return min(found, key=lambda choice: choice.seconds)


def coarse_rank(task: Task, sizes: Sequence[float]) -> int:
    """The number of pivots with which one rank is expected to be done first, by the sizes of given subdomains.

    Raises
    ------
    InputError
        If the memory is not enough for any.
    """
    found = _within(task, sizes)
    if not found:
        raise InputError(_too_little(task, memory(task, sizes, _ranks(task.samples)[0])))
    return min(found, key=lambda rank: seconds(task, sizes, rank))


def _within(task: Task, sizes: Sequence[float], share: float = 1.0) -> list[int]:
    """Numbers of pivots that fit a share of the memory."""
    return [rank for rank in _ranks(task.samples) if memory(task, sizes, rank) <= share * task.memory]


def _ranks(n: int) -> list[int]:
    """Numbers of pivots that are tried: from a hundredth of the samples on."""
    least = max(n // 128, 1)
    return sorted({min(round(least * 2 ** (i / 2)), n, max(MOST, least)) for i in range(13)})


def _too_little(task: Task, needed: float) -> str:
    return (
        f"of the memory limit {task.memory:.3g} bytes a rank are left, less than {needed:.3g} that factors of "
        f"subdomains of {task.samples} samples need on {task.ranks} ranks: use more subdomains, ranks or memory"
    )


def iterations(task: Task, sizes: Sequence[float], rank: int) -> float:
    """Iterations to 1e-6, by the sizes (p,) of subdomains with overlap; roughly."""
    p, n = len(sizes), task.samples
    if p == 1:
        return 2.0  # its factor solves the system
    overlap = max(sum(sizes) / n, 1.0) ** (1 / math.log2(p)) - 1
    shift = min(max(task.shift, LEAST_LAMBDA), MOST_LAMBDA)
    found = BASE * (0.1 / shift) ** OF_LAMBDA * (p / 16) ** OF_PARTS * (n / (10 * rank)) ** OF_PIVOTS
    return found * (OVERLAPPED + (NO_OVERLAP - OVERLAPPED) * math.exp(-overlap / OVERLAP))


def seconds(task: Task, sizes: Sequence[float], rank: int) -> float:
    """What set-up and iterations take on one rank; not K itself where it is kept, which all have in common."""
    n, d, k = task.samples, task.dimension, task.columns
    faster, kernels = 8 / SIZES[task.factors], 8 / SIZES[task.dtype]
    squares, whole = sum(m * m for m in sizes), sum(sizes)
    large = rank**2 * d + (0 if task.kept else n * rank * (d + VALUES) + squares * (d + VALUES) / 2 / faster)
    set_up = n * rank**2 / 2 + rank**3 / 3
    set_up += (squares * rank + sum(m**3 for m in sizes) / 6 + whole * rank**2 / 2) / faster
    pick = PICKED * (squares + n * rank) if task.kept else 0.0
    product = n * n * (k / FEW + (0 if task.kept else (d + VALUES) / 2 / LARGE)) / kernels
    applied = ((squares + 2 * whole * rank) / faster + rank**2) * k / APPLIED + EACH * len(sizes)
    return large / LARGE + set_up / SET_UP + pick + (iterations(task, sizes, rank) + 1) * (product + applied)


def memory(task: Task, sizes: Sequence[float], rank: int) -> float:
    """Bytes that a rank takes at most for factors and coarse space while it makes them."""
    share, size = math.ceil(len(sizes) / task.ranks) / len(sizes), SIZES[task.factors]
    whole, largest = sum(sizes) * share, max(sizes)
    kept = size * (sum(m * m for m in sizes) * share + rank * (whole + task.samples * share))
    return kept + whole * EXCHANGED * (2 * size + 8) + 32 * rank**2 + largest * task.dimension * (8 + size)
