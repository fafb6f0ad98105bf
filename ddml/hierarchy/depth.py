"""Hierarchies of networks of different depths, and the transfers between their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.networks.depth import BLOCK, Source, coarsened, insertions, sources
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.parallel import agreed
from ddml.parameters import Parameter

from .hierarchy import Hierarchy, Level, Transfer

MOST = 5  # levels, where nobody says how many


class Copied(NamedTuple):
    """Which parameters are copies of which, and where.

    Attributes
    ----------
    columns : ndarray of int (n fine,)
        The coarse entry that each fine one is a copy of.
    numbers : ndarray of int (n fine,)
        Which of the copies of that it is.
    scales, counts : dict of str
        Of each coarse parameter, the factor of its copies and how many there are.
    """

    columns: NDArray[np.int64]
    numbers: NDArray[np.int64]
    scales: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def match(cls, fine: Sequence[Parameter], coarse: Sequence[Parameter], named: Mapping[str, Source]) -> Copied:
        """Find, for each fine parameter, the coarse one that is named.

        Raises
        ------
        InputError
            If that is not there, or has another shape, or entries that are not copied equally often; if copies have
            different scales; if a coarse one has no copies.
        """
        columns, numbers = (np.empty(fine[-1].range.stop, dtype=np.int64) for _ in range(2))
        known = {p.name: p for p in coarse}
        scales, counts = dict[str, float](), dict.fromkeys(known, 0)
        for parameter in fine:
            name, scale, entries = named[parameter.name]
            if name not in known or (entries is None and known[name].shape != parameter.shape):
                has = f"of shape {known[name].shape}" if name in known else "not trained"
                raise InputError(
                    f"parameter {parameter.name} {parameter.shape} is a copy of {name} of a coarser network, which is "
                    f"{has} there"
                )
            if not 0 < abs(scale) < math.inf or scales.setdefault(name, scale) != scale:
                raise InputError(f"the copies of parameter {name} must have one scale, not 0; one has {scale}")
            copied, number, count = _within(parameter, known[name], entries)
            columns[parameter.range] = known[name].offset + copied
            numbers[parameter.range] = counts[name] + number
            counts[name] += count
        for name, count in counts.items():
            if not count:
                raise InputError(f"parameter {name} of a coarser network has no copies in the finer one")
        return cls(columns, numbers, scales, counts)


def _within(
    fine: Parameter, coarse: Parameter, entries: Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | int, int]:
    """Of each fine entry the coarse one and which copy of it this is; and how many copies there are of each.

    Raises
    ------
    InputError
        If there are not equally many.
    """
    if entries is None:
        return np.arange(fine.size), 0, 1
    copied = torch.as_tensor(entries).flatten().cpu().numpy()
    inside = copied.dtype == np.int64 and (copied >= 0).all() and (copied < coarse.size).all()
    times = fine.size // coarse.size
    if len(copied) != fine.size or not inside or (np.bincount(copied, minlength=coarse.size) != times).any():
        raise InputError(
            f"the entries of {coarse.name} that {fine.name} is copies of must be {fine.size} numbers from 0 to "
            f"{coarse.size - 1}, each as often"
        )
    numbers = np.empty(fine.size, dtype=np.int64)
    numbers[np.argsort(copied, kind="stable")] = np.arange(fine.size) % times
    return copied, numbers, times


class Copies(Transfer):
    r"""Between a network and one whose parameters its own are multiples of.

    :math:`I = C D` with C (n fine, n coarse) of zeros and ones, which copies each coarse entry to m places, and D the
    scale of each coarse entry; :math:`R = I^T`, and :math:`P = (I^T I)^{-1} I^T` takes the mean over the copies. C is
    kept as itself and cut into the copies' numbers, :math:`C^T = S_0 + S_1 + \dots`, so that matrices only move numbers
    and the sums over copies are in the order of the blocks: the same bits on any number of ranks.

    Parameters
    ----------
    fine, coarse
        Layouts of the parameters, on the same communicator. Collective.
    copied
        What is a copy of what.
    """

    def __init__(self, fine: ParameterLayout, coarse: ParameterLayout, copied: Copied) -> None:
        self.stretch = math.sqrt(max(m * copied.scales[name] ** 2 for name, m in copied.counts.items()))
        rank = fine.comm.rank
        rows = slice(fine.ranges[rank], fine.ranges[rank + 1])
        columns = copied.columns
        self.matrix = _ones(fine, coarse, np.arange(rows.stop - rows.start), columns[rows])
        begin, end = coarse.ranges[rank], coarse.ranges[rank + 1]
        self.picks = []
        for number in range(max(copied.counts.values())):
            places = np.flatnonzero((copied.numbers == number) & (columns >= begin) & (columns < end))
            places = places[np.argsort(columns[places])]
            self.picks.append(_ones(coarse, fine, columns[places] - begin, places))
        self.scale, self.mean, self.scaled = (coarse.vector() for _ in range(3))
        with self.scale as scales, self.mean as means:
            for parameter in coarse.parameters:
                a, b = max(parameter.offset, begin) - begin, min(parameter.range.stop, end) - begin
                if a < b:
                    scale = copied.scales[parameter.name]
                    scales[a:b], means[a:b] = scale, 1 / (copied.counts[parameter.name] * scale)

    def prolong(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """See :meth:`.Transfer.prolong`."""
        self.scaled.pointwiseMult(self.scale, coarse)
        self.matrix.mult(self.scaled, fine)

    def restrict(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`.Transfer.restrict`."""
        self._sum(fine)
        coarse.pointwiseMult(self.scale, self.scaled)

    def project(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`.Transfer.project`."""
        self._sum(fine)
        coarse.pointwiseMult(self.mean, self.scaled)

    def bound(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`.Transfer.bound`."""
        coarse.set(0.0)
        for pick in self.picks:
            pick.mult(fine, self.scaled)
            coarse.pointwiseMax(coarse, self.scaled)
        self.scale.copy(self.scaled)
        self.scaled.abs()
        coarse.pointwiseDivide(coarse, self.scaled)

    def _sum(self, fine: PETSc.Vec) -> None:
        """Write the sums over the copies to ``scaled``."""
        self.scaled.set(0.0)
        for pick in self.picks:
            pick.multAdd(fine, self.scaled, self.scaled)

    def destroy(self) -> None:
        """See :meth:`.Transfer.destroy`."""
        for thing in (self.matrix, *self.picks, self.scale, self.mean, self.scaled):
            thing.destroy()


class Insertion(Transfer):
    r"""Between a network and a deeper one of the same function, into which layers have been inserted.

    A parameter of the deeper one is equal to one of the smaller, or 0. The first of those that are equal to one entry
    moves with it, so that inner products of steps and gradients stay what they are; the projection takes it alone.

    Parameters
    ----------
    fine, coarse
        Layouts of the parameters, on the same communicator. Collective.
    named
        Of each fine parameter, the coarse one.

    Raises
    ------
    InputError
        If that is not there, or has another shape; if a coarse one has none.
    """

    def __init__(self, fine: ParameterLayout, coarse: ParameterLayout, named: Mapping[str, str | None]) -> None:
        known = {p.name: p for p in coarse.parameters}
        columns, firsts = np.full(fine.size, -1), np.full(coarse.size, -1)
        for parameter in fine.parameters:
            name = named.get(parameter.name, parameter.name)
            if name is None:
                continue
            if name not in known or known[name].shape != parameter.shape:
                raise InputError(f"parameter {parameter.name} is equal to no {name} of its shape of a smaller network")
            entries, copies = known[name].range, parameter.range
            columns[copies] = np.arange(entries.start, entries.stop)
            if firsts[entries.start] < 0:
                firsts[entries] = np.arange(copies.start, copies.stop)
        for name, parameter in known.items():
            if firsts[parameter.offset] < 0:
                raise InputError(f"no parameter is equal to {name} of a smaller network")
        self.places = firsts if (np.diff(firsts) > 0).all() else None
        rank = fine.comm.rank
        mine = columns[fine.ranges[rank] : fine.ranges[rank + 1]]
        places = np.flatnonzero(mine >= 0)
        self.matrix = _ones(fine, coarse, places, mine[places])
        chosen = firsts[coarse.ranges[rank] : coarse.ranges[rank + 1]]
        self.pick = _ones(coarse, fine, np.arange(len(chosen)), chosen)

    def prolong(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """See :meth:`.Transfer.prolong`, of parameters."""
        self.matrix.mult(coarse, fine)

    def prolong_step(self, coarse: PETSc.Vec, fine: PETSc.Vec) -> None:
        """See :meth:`.Transfer.prolong_step`: 0 in what has been inserted."""
        self.pick.multTranspose(coarse, fine)

    def restrict(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`.Transfer.restrict`."""
        self.pick.mult(fine, coarse)

    def project(self, fine: PETSc.Vec, coarse: PETSc.Vec) -> None:
        """See :meth:`.Transfer.project`."""
        self.pick.mult(fine, coarse)

    def destroy(self) -> None:
        """See :meth:`.Transfer.destroy`."""
        self.matrix.destroy()
        self.pick.destroy()


def _ones(
    rows: ParameterLayout, columns: ParameterLayout, places: NDArray[np.int64], entries: NDArray[np.int64]
) -> PETSc.Mat:
    """A matrix with a one in these of this rank's rows, increasing, at these columns. Collective."""
    rank = rows.comm.rank
    local = int(rows.counts[rank])
    held = np.zeros(local + 1, dtype=PETSc.IntType)
    held[places + 1] = 1
    sizes = ((local, rows.size), (int(columns.counts[rank]), columns.size))
    found = PETSc.Mat().createAIJ(sizes, nnz=(1, 1), comm=rows.comm)
    found.setValuesCSR(np.cumsum(held, dtype=PETSc.IntType), entries.astype(PETSc.IntType), np.ones(len(entries)))
    found.assemble()
    return found


class DepthHierarchy(Hierarchy):
    """Networks of fewer and fewer blocks on the same samples.

    The objectives of the coarse levels count their work each for itself, in work units of the finest level.

    Parameters
    ----------
    levels, transfers
        See :class:`.Hierarchy`.
    insertions
        Transfers that keep what a network computes, if they have been asked for.
    """

    def __init__(
        self, levels: Sequence[Level], transfers: Sequence[Transfer], insertions: Sequence[Transfer] = ()
    ) -> None:
        super().__init__(levels, transfers)
        self.insertions = list(insertions)
        self.version = self.levels[-1].objective.version

    def follow(self) -> None:
        """See :meth:`.Hierarchy.follow`."""
        finest = self.levels[-1].objective
        if finest.version == self.version:
            return
        self.version, with_it = finest.version, finest.replacement
        for level in self.levels[:-1]:
            loss = level.objective.loss.on_samples_of(finest.loss)
            level.objective.replace(loss, level.share * finest.fraction, with_it.overlap, with_it.report)


def depth_hierarchy(
    objective: Objective, levels: int | None = None, factor: int = 2, inserts: bool = False
) -> DepthHierarchy:
    """The hierarchy of an objective's network and of those with ``factor``, ``factor`` ** 2, ... times fewer blocks.

    The coarse networks are made by :func:`ddml.networks.depth.coarsened`, at the projections of the network's initial
    parameters. Their objectives share the samples, and blocks of sums, as that of the finest level does, and notice the
    same requests to stop. Collective.

    Parameters
    ----------
    objective
        Of the finest level, of all parameters and without linear terms.
    levels
        How many, the finest included; None: as many as the blocks allow, at most five (our choice).
    factor
        Of refinement.
    inserts
        Whether there are insertions, too.

    Raises
    ------
    InputError
        On all ranks, if the network has no so coarse one, or no layers that can be inserted, or for another objective.
    """
    if levels is not None and levels < 1:
        raise InputError(f"a hierarchy has 1 level or more, got {levels}")
    if type(objective) not in (Objective, ResidualObjective) or objective.linear:
        what = "one with linear terms" if objective.linear else f"a {type(objective).__name__}"
        raise InputError(f"a depth hierarchy takes the objective of all parameters of a network, not {what}")
    losses, copied, inserted = [objective.loss], list[Copied](), list[Mapping[str, str | None]]()
    with agreed(objective.comm):
        for number in range(1, levels or MOST):
            loss = losses[0]
            try:
                coarse = coarsened(loss.network, factor)
            except InputError as error:
                if levels is None and number > 1:
                    break
                raise InputError(f"{error} ({levels} levels)" if number > 1 else f"{error}") from error
            losses.insert(0, loss.of_module(coarse))
            assert loss.network is not None
            named = sources(loss.network, factor, [p.name for p in loss.parameters])
            copied.insert(0, Copied.match(loss.parameters, losses[0].parameters, named))
            if inserts:
                inserted.insert(0, insertions(loss.network, factor))
    made = [_level(objective, loss) for loss in losses[:-1]] + [Level(objective, _words(objective.loss), 1.0)]
    layouts = [level.objective.layout for level in made]
    pairs = list(zip(layouts[1:], layouts, strict=False))
    return DepthHierarchy(
        made,
        [Copies(*pair, found) for pair, found in zip(pairs, copied, strict=True)],
        [Insertion(*pair, found) for pair, found in zip(pairs, inserted, strict=False)],
    )


def _level(finest: Objective, loss: Loss) -> Level:
    """A coarse level with an objective of its own."""
    layout = ParameterLayout(loss.parameters, finest.comm)
    objective = type(finest)(loss, layout, finest.stop, finest.parts.blocks)
    share = loss.charges.operations / finest.loss.charges.operations
    objective.fraction = share * finest.fraction
    return Level(objective, _words(loss), share)


def depth(loss: Loss) -> tuple[int, str]:
    """How many blocks or layers a network has, and which of both it is."""
    blocks = {found[1] for p in loss.parameters if (found := BLOCK.match(p.name))}
    return (len(blocks), "block") if blocks else (len(loss.layers), "layer")


def _words(loss: Loss) -> str:
    """How deep a network is."""
    count, noun = depth(loss)
    return f"{count} {noun}" + ("s" if count > 1 else "")
