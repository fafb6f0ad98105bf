"""Which residuals the compiled kernels evaluate: those that can be traced and then give torch's values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddml.data.sequences import one_of_each
from ddml.jets.evaluator import Index

from .points import TermPoints
from .program import NotElementwise, Program
from .statement import Statement

# points of a term on which its residual is traced, and on which it is checked (our choice)
TRACED, CHECKED = 16, 64


def rows_to_trace(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of points, of ``count``, on which to trace a residual and on which to check it.

    One of each of equal parts of the set, a fifth of them for the trace. Few points are all checked.
    """
    parts = TRACED + CHECKED
    if count < parts:
        every = np.arange(count)
        return np.resize(every, TRACED), every
    rows = one_of_each(count, parts)
    chosen = np.arange(TRACED) * parts // TRACED
    return rows[chosen], np.delete(rows, chosen)


class Tracing:
    """Makes programs of a statement's residuals.

    Parameters
    ----------
    statement
        The terms.
    indices
        Derivatives that the network's jets carry.
    rule
        Entries of the product rule, see :func:`ddml.problems.pde.points.product_rule`.
    """

    def __init__(self, statement: Statement, indices: Sequence[Index], rule: Sequence[tuple[int, int, int]]) -> None:
        self.statement, self.rule = statement, rule
        self.position = {index: k for k, index in enumerate(indices)}
        self.places = [(k, f) for k in range(len(indices)) for f in range(len(statement.problem.fields))]

    def program(self, points: TermPoints, agrees: Callable[[Program, TermPoints], bool]) -> Program:
        """The residual of a term, traced on some of its points and checked on others.

        Parameters
        ----------
        points
            All points of the term.
        agrees
            Says whether a program has torch's loss and gradient at some points.

        Raises
        ------
        NotElementwise
            If the kernels do not know something that the residual does: torch evaluates it.
        """
        if points.periodic:
            raise NotElementwise("periodic pairs")
        if len(points) == 0:
            raise NotElementwise("no points")
        traced, checked = (points.rows(torch.from_numpy(rows)) for rows in rows_to_trace(len(points)))
        try:
            program = self._trace(traced)
            if not agrees(program, checked):
                raise NotElementwise("other values than in torch on points that were not traced")
        except NotElementwise:
            raise
        except Exception as error:  # of the user's code, or of torch on what the code does there
            raise NotElementwise(f"{type(error.__cause__ or error).__name__} in the trace") from error
        return program

    def fixed(self, points: TermPoints) -> list[Tensor]:
        """What a residual may depend on besides fields and coefficients: coordinates, data, lift, product rule."""
        lift = [] if points.lift is None else list(points.lift[:, :, 0].permute(0, 2, 1).flatten(0, 1))
        mix = [] if points.mix is None else [points.mix[k, j, :, 0, f] for k, j, f in self.rule]
        return [*points.coordinates, *points.data.values(), *lift, *mix]

    def _trace(self, points: TermPoints) -> Program:
        names, dimension = list(points.data), len(points.coordinates)

        def residual(fixed: list[Tensor], jets: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
            coordinates, fixed = fixed[:dimension], fixed[dimension:]
            data, fixed = dict(zip(names, fixed, strict=False)), fixed[len(names) :]
            lift = dict(zip(self.places, fixed, strict=False)) if points.lift is not None else {}
            mix = dict(zip(self.rule, fixed[len(lift) :], strict=True)) if points.mix is not None else {}
            network = dict(zip(self.places, jets, strict=True))

            def get(index: Index, f: int, side: int) -> Tensor:
                k = self.position[index]
                value = network[k, f]
                if mix:
                    parts = [mix[k, j, f] * network[j, f] for j in range(len(self.position)) if (k, j, f) in mix]
                    value = sum(parts[1:], parts[0])
                return value + lift[k, f] if lift else value

            return self.statement.residual(points.term, get, coordinates, data, coefficients, False)

        return Program(residual, self.fixed(points), self.places, len(self.statement.coefficients))
