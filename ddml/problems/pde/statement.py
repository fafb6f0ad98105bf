"""A problem's terms, checked, and what their residuals are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.jets.evaluator import Index

from .fields import Field
from .pde import PDE, Array, Term
from .points import TermPoints, term_points
from .program import NotElementwise


class Statement:
    """The terms of a problem, evaluated in torch: residuals from jets of the fields.

    Parameters
    ----------
    problem
        What to solve.
    dtype, device
        Of everything that torch computes.

    Attributes
    ----------
    terms : list of Term
        In the order in which samples are numbered.
    coefficients : tuple of str
        Names of the problem's trainable numbers.

    Raises
    ------
    InputError
        If the problem declares what cannot be (:meth:`ddml.problems.pde.pde.PDE.check`).
    """

    def __init__(self, problem: PDE, dtype: torch.dtype, device: torch.device) -> None:
        problem.check()
        self.problem, self.dtype, self.device = problem, dtype, device
        self.terms: list[Term] = list(problem.terms())
        self.coefficients = tuple(problem.coefficients)

    def initial(self) -> Tensor:
        """Initial values of the coefficients."""
        return torch.tensor(list(self.problem.coefficients.values()), dtype=self.dtype, device=self.device)

    def derivatives(self, term: int, x: Array, data: dict[str, Array]) -> set[tuple[int, Index]]:
        """The derivatives that a term asks for, as field and index, at points x (N, G, d) with data (N,).

        The user's code is tried on the first, a middle and the last point. Fields and coefficients are to be
        differentiated, as in a gradient: code that changes them in place is refused.

        Raises
        ------
        InputError
            If the residual raises, asks for a derivative that does not exist or has the wrong shape.
        """
        found: set[tuple[int, Index]] = set()
        rows = sorted({0, len(x) // 2, max(len(x) - 1, 0)}) if len(x) else []
        tensor = partial(torch.tensor, dtype=self.dtype, device=self.device)
        probe, count = tensor(x[rows]), len(rows)

        def get(index: Index, f: int, side: int) -> Tensor:
            found.add((f, index))
            return tensor([0.5] * count).requires_grad_()

        values = {name: tensor(v[rows]) for name, v in data.items()}
        coefficients = [tensor(v).requires_grad_() for v in self.problem.coefficients.values()]
        self.residual(term, get, probe[:, 0].T, values, coefficients, count, probe.shape[1] == 2)
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
        return term_points(self.problem, indices, term, scale, tensor(x), values)

    def at(self, points: TermPoints, get: Callable[..., Tensor], coefficients: Sequence[Tensor]) -> list[Tensor]:
        """The pieces (N,) of the residual at some points; ``get`` as for :meth:`residual`."""
        # copies: code that changes its arguments in place, as in x -= 0.5, would move the points
        data = {name: values.clone() for name, values in points.data.items()}
        coordinates = points.coordinates.clone()
        return self.residual(points.term, get, coordinates, data, coefficients, len(points), points.periodic)

    def residual(
        self,
        term: int,
        get: Callable[..., Tensor],
        coordinates: Iterable[Tensor],
        data: dict[str, Tensor],
        coefficients: Sequence[Tensor],
        count: int,
        pair: bool,
    ) -> list[Tensor]:
        """The pieces of a term's residual at N points, as the user's code gives them.

        Parameters
        ----------
        term
            Its number.
        get
            Called as ``get(index, f=field, side=side)``, gives that derivative (N,).
        coordinates, data, coefficients
            Tensors (N,) each; the coefficients are single numbers, or as many.
        count
            N.
        pair
            Whether the points are pairs on periodic faces.

        Raises
        ------
        InputError
            If the user's code raises, or gives anything but one number a point.
        """
        stated, letters, fields = self.terms[term], list(self.problem.domain), []
        for f, name in enumerate(self.problem.fields):
            far = Field(name, letters, partial(get, f=f, side=1)) if pair else None
            fields.append(Field(name, letters, partial(get, f=f, side=0), far))
        named = dict(zip(self.coefficients, coefficients, strict=True))
        try:
            result = stated.residual(*fields, *coordinates, **named, **data)
        except (InputError, NotElementwise):
            raise
        except Exception as error:
            raise InputError(f"term {stated.label} raised {type(error).__name__}: {error}") from error
        pieces = list(result) if isinstance(result, tuple | list) else [result]
        pieces = [p.value if isinstance(p, Field) else p for p in pieces]
        for piece in pieces:
            if not isinstance(piece, Tensor) or piece.shape != (count,):
                got = tuple(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
                raise InputError(f"term {stated.label} must give one number a point, shape ({count},), got {got}")
        return pieces
