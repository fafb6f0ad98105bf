"""A problem's terms, checked, and what their residuals are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddml.data.sequences import one_of_each
from ddml.errors import InputError
from ddml.jets.evaluator import Index

from . import calling
from .conditions import checked_terms
from .fields import Field
from .pde import PDE, Array
from .points import TermPoints, term_points
from .scales import Scales


class Positions(dict[Index, int]):
    """Where derivatives stand in jets; another one is refused by its name.

    Parameters
    ----------
    indices
        The derivatives in the jets.
    letters
        Of the coordinates.
    """

    def __init__(self, indices: Sequence[Index], letters: Sequence[str]) -> None:
        super().__init__((index, k) for k, index in enumerate(indices))
        self.letters = list(letters)

    def __missing__(self, index: Index) -> int:
        letters = "".join(self.letters[i] for i in index)
        raise InputError(f"asks for a derivative {letters} now and did not at the start: it must ask for all each time")


class Statement:
    """The terms of a problem, evaluated in torch: residuals from jets of the fields.

    Parameters
    ----------
    problem
        What to solve.
    dtype, device
        Of everything that torch computes.
    scales
        Of coordinates, fields and terms.

    Attributes
    ----------
    terms : list of Term
        In the order in which samples are numbered; their weights are those stated times the scales'.
    coefficients : tuple of str
        Names of the problem's trainable numbers.
    notes : list of str
        What may not be meant in it, a sentence each.

    Raises
    ------
    InputError
        If the problem declares what cannot be (:meth:`ddml.problems.pde.pde.PDE.check`,
        :func:`ddml.problems.pde.conditions.checked_terms`).
    """

    def __init__(self, problem: PDE, dtype: torch.dtype, device: torch.device, scales: Scales | None = None) -> None:
        problem.check()
        self.problem, self.dtype, self.device, self.scales = problem, dtype, device, scales or Scales()
        self.notes: list[str] = []
        stated = checked_terms(problem, problem.terms(), self.notes)
        if not set(self.scales.terms) <= set(range(len(stated))):
            raise InputError(f"the scales are of terms {list(self.scales.terms)}, where there are {len(stated)} terms")
        self.terms = [replace(t, weight=t.weight * self.scales.terms.get(i, 1.0)) for i, t in enumerate(stated)]
        self.coefficients = tuple(problem.coefficients)

    def initial(self) -> Tensor:
        """Initial values of the coefficients."""
        return torch.tensor(list(self.problem.coefficients.values()), dtype=self.dtype, device=self.device)

    def derivatives(self, term: int, x: Array, data: dict[str, Array]) -> set[tuple[int, Index]]:
        """The derivatives that a term asks for, as field and index, at points x (N, G, d) with data (N,).

        The user's code is tried on the first and the last point and some of all parts of the set. Fields and
        coefficients are to be differentiated, as in a gradient: code that changes them in place is refused. Code that
        gives other values when it is called again is noted.

        Raises
        ------
        InputError
            If the residual raises, asks for a derivative that does not exist, has the wrong shape, or depends on
            nothing that is trained.
        """
        found: set[tuple[int, Index]] = set()
        rows = np.unique([0, *one_of_each(len(x), calling.PROBES), len(x) - 1])
        tensor = partial(torch.tensor, dtype=self.dtype, device=self.device)
        probe, count = tensor(x[rows]), len(rows)

        def get(index: Index, f: int, side: int) -> Tensor:
            found.add((f, index))
            return tensor([0.5] * count).requires_grad_()

        values = {name: tensor(v[rows]) for name, v in data.items()}
        coefficients = [tensor(v).requires_grad_() for v in self.problem.coefficients.values()]
        stated, letters = self.terms[term], list(self.problem.domain)
        positional, named = [*self.problem.fields, *letters], [*self.coefficients, *data]
        calling.check_arguments(f"term {stated.label}", stated.residual, positional, named)
        pieces, again = (
            self.residual(term, get, probe[:, 0].T, values, coefficients, probe.shape[1] == 2) for _ in range(2)
        )
        if not all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(pieces, again, strict=False)):
            self.notes.append(f"term {stated.label} gives other values when it is called again: chance, or a state?")
        if not any(piece.requires_grad for piece in pieces):
            raise InputError(
                f"term {stated.label} depends on no field and no coefficient: detach, numpy and comparisons cut off"
            )
        return found

    def name(self, derivative: tuple[int, Index]) -> str:
        """A derivative as residuals name it, ``u.xx``."""
        field, index = derivative
        letters = "".join(list(self.problem.domain)[i] for i in index)
        return f"{self.problem.fields[field]}.{letters}"

    def points(self, indices: Sequence[Index], term: int, scale: float, x: Array, data: dict[str, Array]) -> TermPoints:
        """Points x (N, G, d) of a term, with data (N,): see :func:`ddml.problems.pde.points.term_points`."""
        tensor = partial(torch.as_tensor, dtype=self.dtype, device=self.device)
        values = {name: tensor(v) for name, v in data.items()}
        return term_points(self.problem, indices, term, scale, tensor(x), values, self.scales)

    def at(self, points: TermPoints, get: Callable[..., Tensor], coefficients: Sequence[Tensor]) -> list[Tensor]:
        """The pieces (N,) of the residual at some points; ``get`` as for :meth:`residual`."""
        return self.residual(points.term, get, points.coordinates, points.data, coefficients, points.periodic)

    def residual(
        self,
        term: int,
        get: Callable[..., Tensor],
        coordinates: Tensor | Sequence[Tensor],
        data: dict[str, Tensor],
        coefficients: Sequence[Tensor],
        pair: bool,
    ) -> list[Tensor]:
        """The pieces (N,) of a term's residual at N points, see :func:`ddml.problems.pde.calling.residual`.

        Parameters
        ----------
        term
            Its number.
        get
            Called as ``get(index, f=field, side=side)``, gives that derivative (N,).
        coordinates, data, coefficients
            Tensors (N,) each; the coefficients are single numbers, or as many.
        pair
            Whether the points are pairs on periodic faces.
        """
        letters, fields = list(self.problem.domain), []
        for f, name in enumerate(self.problem.fields):
            far = Field(name, letters, partial(get, f=f, side=1)) if pair else None
            fields.append(Field(name, letters, partial(get, f=f, side=0), far))
        named = dict(zip(self.coefficients, coefficients, strict=True))
        return calling.residual(self.terms[term], fields, list(coordinates), named, data)
