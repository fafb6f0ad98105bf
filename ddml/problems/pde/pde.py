"""Partial differential equations as lists of residual terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddml.data.sequences import spread
from ddml.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interior:
    """Hammersley points of the whole domain; ``count`` defaults to the run's number of points."""

    count: int | None = None


class Face:
    """Hammersley points where one coordinate has a fixed value: ``Face(t=0)``, ``Face(x=1, count=200)``.

    ``count`` defaults to N^((d-1)/d) for N points in d dimensions.
    """

    def __init__(self, count: int | None = None, **fixed: float) -> None:
        if len(fixed) != 1:
            raise InputError(f"a face fixes one coordinate, as in Face(t=0); got {fixed}")
        self.count = count
        ((self.coordinate, self.value),) = fixed.items()


@dataclass(frozen=True)
class Periodic:
    """Pairs of points on the two faces of one coordinate; ``u.opposite`` is the field on the far one."""

    coordinate: str
    count: int | None = None


class Points:
    """Given points (M, d) with data (M,) each, which the residual takes by name: ``Points(xs, measured=ys)``."""

    def __init__(self, coordinates: ArrayLike, **data: ArrayLike) -> None:
        # copies: the caller may fill the same array anew
        self.coordinates = np.atleast_2d(np.array(coordinates, dtype=float))
        columns = {name: np.array(values, dtype=float) for name, values in data.items()}
        self.data = {name: v[:, 0] if v.ndim == 2 and v.shape[1] == 1 else v for name, v in columns.items()}


@dataclass(frozen=True)
class Term:
    """``weight`` times the mean over points of the sum of squares of ``residual``.

    Parameters
    ----------
    residual
        Called as ``residual(*fields, *coordinates, **coefficients, **data)`` with
        :class:`ddml.problems.pde.fields.Field` and tensors (N,); gives a tensor (N,) or a tuple of them.
    where
        Interior, Face, Periodic or Points.
    weight
        Factor of the term in the loss.
    name
        For messages; default: the residual's.
    """

    residual: Callable[..., Tensor | tuple[Tensor, ...]]
    where: Interior | Face | Periodic | Points = field(default_factory=Interior)
    weight: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.name or getattr(self.residual, "__name__", "residual")


class PDE:
    """A problem: fields on a box, what they satisfy, and what is known of the solution.

    A subclass states ``domain`` and ``residual``; everything else has a default. The fields are
    ``u = lift + factor * network(embed(coordinates))``: where the factor is zero the lift is a
    Dirichlet condition that holds exactly, where it has a double zero its normal derivative is a
    Neumann condition that holds exactly, and a periodic ``embed`` makes u periodic. Other
    conditions are further terms. What these functions get and may give says
    :mod:`ddml.problems.pde.calling`.

    Attributes
    ----------
    domain : mapping of a coordinate's letter to its (low, high)
    fields : tuple of str
        Names of the unknown functions, one network output each.
    coefficients : mapping of names to initial values
        Trainable numbers of the equation (inverse problems), passed to residuals by name.
    true_coefficients : mapping of names to values
        What they should become, for the report.
    scale : mapping of fields to numbers above 0
        How much they vary, in the user's units: factor * network is made of that size where they are named.
    width, depth : int
        Default network size.
    compiled : bool
        Whether residuals may be traced once and run by the compiled kernels: they must depend on their
        arguments and on numbers that do not change. False for those that count their calls, say. Torch evaluates those
        that compute outside torch, or take numbers for each point from elsewhere, whatever this says.
    """

    domain: Mapping[str, tuple[float, float]]
    fields: tuple[str, ...] = ("u",)
    coefficients: Mapping[str, float] = {}
    true_coefficients: Mapping[str, float] = {}
    scale: Mapping[str, float] = {}
    width: int = 20
    depth: int = 4
    compiled: bool = True

    def residual(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The equation, zero for the solution: the default interior term."""
        raise InputError(f"{type(self).__name__} defines neither residual() nor terms()")

    def terms(self) -> Sequence[Term]:
        """All terms of the loss."""
        return [Term(self.residual)]

    def lift(self, *coordinates: Any, **_: Any) -> Tensor | tuple[Tensor, ...]:
        """What the fields are where the factor is zero; one tensor (N,) for all fields, or one each."""
        return torch.zeros_like(coordinates[0])

    def factor(self, *coordinates: Any, **_: Any) -> Tensor | tuple[Tensor, ...]:
        """What the network is multiplied with; one tensor (N,) for all fields, or one each."""
        return torch.ones_like(coordinates[0])

    def embed(self, *coordinates: Any, **_: Any) -> Tensor | tuple[Tensor, ...]:
        """What the network is given in the place of the coordinates: a tensor (N,) for each of its inputs."""
        return coordinates

    def exact(self, *coordinates: Any, **_: Any) -> Any:
        """The solution at points, for the error; None where it is not known.

        It is given what :meth:`lift` and :meth:`residual` are given, one tensor (N,) a coordinate, always in float64
        on the CPU, and gives one tensor or NumPy array (N,) for each field, several in a tuple; NaN where it is not
        known.
        """
        return None

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Low and high of each coordinate."""
        return list(self.domain.values())

    def check(self) -> None:
        """Check what a subclass declares.

        Raises
        ------
        InputError
            A domain that is no mapping of single letters to intervals; field names that collide; coefficients that are
            no finite numbers; a size of a field that is not above 0.
        """
        name = type(self).__name__
        domain = getattr(self, "domain", None)
        if not isinstance(domain, Mapping) or not domain:
            raise InputError(f"{name}.domain must map coordinates to intervals, as in {{'t': (0, 1), 'x': (-1, 1)}}")
        for letter, interval in domain.items():
            if not isinstance(letter, str) or len(letter) != 1 or not letter.isalpha():
                raise InputError(f"{name}.domain: a coordinate is one letter (derivatives are u.xx), got '{letter}'")
            ends = interval if isinstance(interval, tuple | list) and len(interval) == 2 else (np.nan, np.nan)
            numbers = all(isinstance(end, int | float | np.number) for end in ends)
            if not (numbers and np.isfinite(ends).all() and ends[0] < ends[1]):
                raise InputError(f"{name}.domain['{letter}'] must be (low, high), finite, low < high; got {interval}")
        if not isinstance(self.coefficients, Mapping):
            raise InputError(f"{name}.coefficients must map names to numbers, as in {{'k': 1.0}}")
        for coefficient, value in self.coefficients.items():
            if not isinstance(value, int | float | np.floating | np.integer) or not np.isfinite(value):
                raise InputError(f"{name}.coefficients['{coefficient}'] must be a number, finite; got {value!r}")
        names = not isinstance(self.fields, str) or len(self.fields) == 1
        if not names or not isinstance(self.fields, Sequence) or not all(isinstance(f, str) for f in self.fields):
            raise InputError(f"{name}.fields must be a tuple of names, as in ('u',); got {self.fields!r}")
        if len(set(self.fields)) < len(self.fields):
            raise InputError(f"{name}.fields must be different from each other: {self.fields}")
        if not self.fields or set(self.fields) & set(domain):
            raise InputError(f"{name}.fields must name at least one field, and none like a coordinate: {self.fields}")
        for field_name, size in self.scale.items():
            if field_name not in self.fields or not (isinstance(size, int | float) and 0 < size < np.inf):
                raise InputError(f"{name}.scale['{field_name}'] must be of a field, finite and above 0; got {size!r}")

    def points(self, term: Term, count: int) -> tuple[Array, dict[str, Array]]:
        """Points (N, G, d) of a term for a run with ``count`` points, and their data; G = 2 on periodic pairs."""
        where, letters = term.where, list(self.domain)
        if isinstance(where, Points):
            return where.coordinates[:, None, :], where.data
        if isinstance(where, Interior):
            return spread(where.count or count, self.bounds)[:, None, :], {}
        axis = letters.index(where.coordinate)
        others = self.bounds[:axis] + self.bounds[axis + 1 :]
        default = round(count ** (len(others) / len(letters)))
        inner = spread((where.count or default) if others else 1, others)
        faces = [where.value] if isinstance(where, Face) else list(self.bounds[axis])
        return np.stack([np.insert(inner, axis, v, axis=1) for v in faces], axis=1), {}
