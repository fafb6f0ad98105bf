"""Terms of a problem that cannot be meant: refused when it is loaded, or noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddml.errors import InputError

from .pde import PDE, Array, Face, Interior, Periodic, Points, Term

# how far outside a point may be, in parts of the domain's extent: rounding of tables; and how many times smaller than
# the domain's the coordinates of a term look as if they were in another unit (our choice)
OUTSIDE, TINY = 1e-6, 1e-2


def checked_terms(problem: PDE, given: Any, notes: list[str]) -> list[Term]:
    """The terms that a problem states, with notes on what may not be meant.

    Parameters
    ----------
    problem
        Whose domain it is.
    given
        What its ``terms()`` gives.
    notes
        Sentences on points and data are appended.

    Raises
    ------
    InputError
        No list of terms; a term without points, with points or a face outside the domain, with coordinates or data
        that are not finite, or with a weight that is not above 0.
    """
    if not isinstance(given, tuple | list):
        raise InputError(f"{type(problem).__name__}.terms must return a list of Term; got {type(given).__name__}")
    for number, term in enumerate(given):
        if not isinstance(term, Term):
            raise InputError(
                f"{type(problem).__name__}.terms must return a list of Term; number {number} is {type(term).__name__}"
            )
        _check(problem, term, notes)
    return list(given)


def _check(problem: PDE, term: Term, notes: list[str]) -> None:
    """One term: the first thing that is wrong is refused."""
    label, where = f"term {term.label}", term.where
    if not callable(term.residual):
        raise InputError(f"{label}: the residual must be a function, not what it gives; got {term.residual!r:.60}")
    weight = term.weight
    if not (isinstance(weight, int | float | np.number) and np.isfinite(weight) and weight > 0):
        raise InputError(f"{label}: the weight must be a finite number above 0; got {weight!r:.60}")
    if not isinstance(where, Interior | Face | Periodic | Points):
        hint = f": write {where.__name__}(...)" if isinstance(where, type) else ""
        raise InputError(f"{label}: where must be Interior(), Face, Periodic or Points; got {where!r:.60}{hint}")
    if isinstance(where, Points):
        _check_points(problem, label, where, notes)
        return
    count = where.count
    if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
        raise InputError(f"{label}: the number of points must be 1 or more; got {count!r:.60}")
    if isinstance(where, Interior):
        return
    if where.coordinate not in problem.domain:
        known = ", ".join(problem.domain)
        raise InputError(f"{label}: no coordinate '{where.coordinate}', there are {known}")
    if isinstance(where, Face):
        value, (low, high) = where.value, problem.domain[where.coordinate]
        if not isinstance(value, int | float | np.number):
            raise InputError(f"{label}: the face {where.coordinate} must be a number; got {value!r:.60}")
        if not _inside(np.array([value], dtype=float), low, high):
            raise InputError(
                f"{label}: the face {where.coordinate} = {value} is outside the domain, where"
                f" {where.coordinate} is in [{low:.6g}, {high:.6g}]"
            )


def _check_points(problem: PDE, label: str, where: Points, notes: list[str]) -> None:
    """Given points and their data."""
    points, letters = where.coordinates, list(problem.domain)
    if points.ndim != 2 or points.shape[1] != len(letters):
        raise InputError(f"{label}: points must be (M, {len(letters)}), got {points.shape}")
    if not len(points):
        raise InputError(f"{label} has no points")
    for letter, values, (low, high) in zip(letters, points.T, problem.bounds, strict=True):
        _check_finite(f"{label}: coordinate {letter}", values)
        if not _inside(values, low, high):
            raise InputError(
                f"{label}: points are outside the domain, {letter} from {values.min():.6g} to {values.max():.6g} where"
                f" it is in [{low:.6g}, {high:.6g}]; {_order(letters, points, problem.domain)}"
            )
        if np.ptp(values) > 0 and np.abs(values).max() < TINY * max(abs(low), abs(high)):
            notes.append(
                f"{label}: {letter} of its points is from {values.min():.6g} to {values.max():.6g} only, in a domain"
                f" from {low:.6g} to {high:.6g}: are the units the same?"
            )
    for name, values in where.data.items():
        if values.shape != points.shape[:1]:
            raise InputError(f"{label}: data '{name}' must be one number a point, got {values.shape}")
        _check_finite(f"{label}: data '{name}'", values)
        if len(values) > 1 and (values == values[0]).all():
            notes.append(f"{label}: all {len(values)} values of '{name}' are {values[0]:.6g}")


def _check_finite(what: str, values: Array) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(f"{what} is not finite at {bad} of {len(values)} points: leave these out")


def _inside(values: Array, low: float, high: float) -> bool:
    rounding = OUTSIDE * (high - low)
    return bool(((values >= low - rounding) & (values <= high + rounding)).all())


def _order(letters: Sequence[str], points: Array, domain: Mapping[str, tuple[float, float]]) -> str:
    """What to look at, where points are outside: the order of the columns, or the units."""
    turned = zip(points.T[::-1], domain.values(), strict=True)
    if len(letters) > 1 and all(_inside(values, *bounds) for values, bounds in turned):
        return f"the columns must be in the order {', '.join(letters)}"
    return "are the units the same?"
