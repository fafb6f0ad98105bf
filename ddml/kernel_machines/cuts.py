"""How samples are cut into subdomains: trees, boxes, PETSc's partitioners of graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc
from scipy import spatial
from scipy.sparse.linalg import LinearOperator, eigsh

from ddml.errors import InputError
from ddml.options import preset
from ddml.parallel import words_of

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
Values = NDArray[Any]
"""In float64 or float32."""
Parts = list[tuple[Numbers, Numbers]]
"""The core of each subdomain and all of its samples, both increasing."""

# our choices: the side of a Gram matrix up to which its eigenvectors are computed at once, and of the graph that a
# partitioner gets the neighbours of each sample, and the principal directions in which they are looked for
DENSE, NEIGHBOURS, DIRECTIONS = 200, 8, 10
# our choices, which take a third of the time of 1,000 samples and 1e-6, and no more iterations: how many numbers the
# samples of a core have at most from which it is found along what a tree cuts it; how many they are at least; and that
# direction's relative residual
NUMBERS, AXIS_OF, ROUGH = 64000, 250, 1e-2
SPACE = 8  # vectors that Lanczos' method keeps, at least (our choice)
PARTITIONERS = ("average", "chaco", "hierarch", "parmetis", "party", "ptscotch")


def principal_directions(samples: Array, count: int = 1, rtol: float = 1e-6) -> Array:
    """The leading principal directions (d, count) of samples (m, d), the largest entry of each positive.

    Where there are fewer of them the others are zero. Those that Lanczos' method finds have residuals of ``rtol``,
    relative to their eigenvalues.
    """
    m, d = samples.shape
    centred = samples - samples.mean(axis=0)
    wanted = min(count, d, m)
    if min(m, d) <= max(DENSE, wanted):
        gram = centred.T @ centred if d <= m else centred @ centred.T
        found = np.linalg.eigh(gram)[1][:, : -wanted - 1 : -1]
    elif not centred.any():
        return np.zeros((d, count))
    else:
        operator = LinearOperator((d, d), matvec=lambda v: centred.T @ (centred @ v), dtype=np.float64)
        first = np.einsum("ij,ij->j", centred, centred)
        found = eigsh(operator, wanted, v0=first, tol=rtol, ncv=max(2 * wanted + 1, SPACE))[1][:, ::-1]
    axes = found if len(found) == d else centred.T @ found
    lengths = np.linalg.norm(axes, axis=0)
    axes = np.divide(axes, lengths, out=np.zeros_like(axes), where=lengths > 0)
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(wanted)])
    return np.hstack([axes, np.zeros((d, count - wanted))])


def widest_coordinate(samples: Array) -> Array:
    """The unit vector (d, 1) of the coordinate whose variance is largest."""
    axis = np.zeros((samples.shape[1], 1))
    axis[samples.var(axis=0).argmax()] = 1.0
    return axis


def tree(samples: Array, count: int, overlap: float, axis: Callable[[Array], Array]) -> Parts:
    """Cut samples (n, d) in two, and each half in two, until there are ``count`` parts.

    Each core is cut at the median of its coordinates along ``axis`` of itself, or of some of its samples (250 and more,
    our choice), so that cores differ by one sample at most. Each half of all samples of the part gets those of the
    other half that are nearest to the cut, ``overlap`` times as many as it has; and samples that equal the last of
    them, up to as many again (our choice): equal samples in different subdomains cost many iterations where lambda is
    small.

    Raises
    ------
    InputError
        If the count is no power of two.
    """
    if count & (count - 1):
        below = 1 << (count.bit_length() - 1)
        raise InputError(f"a tree cuts in two: the number of subdomains must be {below} or {2 * below}, got {count}")
    everything = np.arange(len(samples))
    # any direction: it puts equal samples side by side where other values are equal, too
    second = steps(samples @ np.random.default_rng(0).standard_normal(samples.shape[1]))
    parts, most = [(everything, everything)], max(AXIS_OF, NUMBERS // samples.shape[1])
    while len(parts) < count:
        axes = np.hstack([axis(samples[core[:: -(-len(core) // most)]]) for core, _ in parts])
        along = (samples @ axes).T
        parts = [
            half
            for values, (core, wide) in zip(along, parts, strict=True)
            for half in _halves(core, wide, steps(values[wide]), second[wide], overlap)
        ]
    return parts


def steps(values: Array) -> Array:
    """Values without their last digits, so that those of equal samples are equal."""
    return np.round(values * (1e9 / (np.abs(values).max() or 1.0)))


def _halves(core: Numbers, wide: Numbers, first: Array, second: Array, overlap: float) -> Parts:
    order = np.lexsort((second, first))  # of all samples of the part
    first, second, m = first[order], second[order], len(wide)
    ranks = np.flatnonzero(np.isin(wide[order], core))
    middle = len(core) // 2
    cut = int(ranks[middle])

    def beyond(side: int, step: int) -> int:
        """How many samples from the cut on are the overlap of a side of so many."""
        there = range(cut, m) if step > 0 else range(cut - 1, -1, -1)
        count = wanted = min(round(overlap * side), len(there))
        while 0 < count < min(2 * wanted, len(there)):
            last, following = there[count - 1], there[count]
            if (first[last], second[last]) != (first[following], second[following]):
                break
            count += 1
        return count

    low, high = np.sort(wide[order[ranks[:middle]]]), np.sort(wide[order[ranks[middle:]]])
    left = wide[order[: cut + beyond(cut, 1)]]
    right = wide[order[cut - beyond(m - cut, -1) :]]
    return [(low, np.sort(left)), (high, np.sort(right))]


@dataclass(frozen=True)
class Grid:
    """How many boxes there are along each of some directions (d, k); the last one counts fastest."""

    parts: tuple[int, ...]
    axes: Array


def boxes(values: Array, parts: Sequence[int], overlap: float) -> Parts:
    """Boxes of equal size over all coordinates of values (n, k), as many along each as ``parts`` says.

    The last coordinate counts fastest. The overlap is a share of a box's side, on each side. A box may be empty.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    side = np.where(high > low, high - low, 1.0) / np.array(parts)
    scaled = (values - low) / side
    home = np.minimum(scaled.astype(np.int64), np.array(parts) - 1)
    found = []
    for box in itertools.product(*map(range, parts)):
        place = np.array(box)
        core = (home == place).all(axis=1)
        near = ((scaled >= place - overlap) & (scaled <= place + 1 + overlap)).all(axis=1)
        found.append((np.flatnonzero(core), np.flatnonzero(core | (near & (overlap > 0)))))
    return found


def partition(samples: Array, count: int, name: str) -> Numbers:
    """The part of each of samples (n, d), by one of PETSc's MatPartitioning, of the graph of nearest neighbours.

    Raises
    ------
    InputError
        If PETSc was built without it, or it fails.
    """
    there = [known for known in PARTITIONERS if _is_there(known)]
    if name not in there:
        raise InputError(f"PETSc has no partitioner '{name}' here; there are {', '.join(there)}")
    n = len(samples)
    points = samples @ principal_directions(samples, min(DIRECTIONS, samples.shape[1]))
    nearest = spatial.cKDTree(points).query(points, min(NEIGHBOURS + 1, n))[1].reshape(n, -1)
    rows = np.repeat(np.arange(n), nearest.shape[1])
    pairs = np.concatenate([[rows, nearest.ravel()], [nearest.ravel(), rows]], axis=1)
    i, j = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
    pointers = np.searchsorted(i, np.arange(n + 1)).astype(PETSC_INT)
    graph = PETSc.Mat().createAIJ((n, n), csr=(pointers, j.astype(PETSC_INT), np.ones(len(j))), comm=PETSc.COMM_SELF)
    adjacency = graph.convert("mpiadj", PETSc.Mat())
    partitioner = PETSc.MatPartitioning().create(PETSc.COMM_SELF)
    partitioner.setOptionsPrefix("samples_")
    partitioner.setAdjacency(adjacency)
    partitioner.setType(name)
    with preset(samples_mat_partitioning_nparts=count):
        partitioner.setFromOptions()
    found = PETSc.IS().createGeneral([], comm=PETSc.COMM_SELF)
    try:
        partitioner.apply(found)
    except PETSc.Error as error:
        raise InputError(f"PETSc's partitioner '{name}' does not cut these samples: {words_of(error)}") from error
    labels = found.getIndices().astype(np.int64)
    for thing in (found, partitioner, adjacency, graph):
        thing.destroy()
    return labels


PETSC_INT = PETSc.IntType


def _is_there(name: str) -> bool:
    partitioner = PETSc.MatPartitioning().create(PETSc.COMM_SELF)
    try:
        partitioner.setType(name)
    except PETSc.Error:
        return False
    finally:
        partitioner.destroy()
    return True
