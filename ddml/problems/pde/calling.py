"""The one place where the functions of a problem are called: what they are given, and what they may give.

Strangers write them. They get tensors of their own, so that ``x -= 0.5`` reaches nothing of ours, and give a tensor, or
several in a tuple or list, of shape (N,) or (N, 1) and the precision of the run or a higher one. Everything else is
refused in one line that names the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddml.data.sequences import spread
from ddml.errors import InputError
from ddml.losses.modules import evaluated

from .fields import Field
from .pde import PDE, Array, Term
from .program import NotElementwise

# what torch says where users do what is not foreseen, and what to say instead
MEANINGS = {
    "in-place operation": "changes a field, a derivative or a coefficient in place: take a copy, as in v = 1 * u.x",
    "differentiated Tensor": "differentiates by autograd: derivatives of fields are u.t, u.xx and so on",
    "does not require grad": "differentiates by autograd: derivatives of fields are u.t, u.xx and so on",
}

PROBES = 64  # points where functions are tried before there are others (our choice)


def inputs(problem: PDE, dtype: torch.dtype = torch.float64) -> int:
    """How many inputs the network has: as many as ``embed`` gives tensors, of points all over the domain."""
    points = torch.as_tensor(spread(PROBES, problem.bounds), dtype=dtype)
    return embed(problem, points.T).shape[1]


def embed(problem: PDE, coordinates: Tensor) -> Tensor:
    """What the network is given (N, K) at N points, from their coordinates (d, N)."""
    return _stacked(problem, "embed", coordinates, None)


def lift(problem: PDE, coordinates: Tensor) -> Tensor:
    """The lift (N, F) of the fields at N points, from their coordinates (d, N)."""
    return _stacked(problem, "lift", coordinates, len(problem.fields))


def factor(problem: PDE, coordinates: Tensor) -> Tensor:
    """The factor (N, F) of the fields at N points, from their coordinates (d, N)."""
    return _stacked(problem, "factor", coordinates, len(problem.fields))


def exact(problem: PDE, coordinates: Tensor) -> Array | None:
    """The exact fields (N, F) at N points, from their coordinates (d, N) in float64; None if they are not known.

    Raises
    ------
    InputError
        If ``exact`` raises, or gives anything but real numbers, one a point for each field, in torch or NumPy.
    """
    name, letters = f"{type(problem).__name__}.exact", list(problem.domain)
    check_arguments(name, problem.exact, letters)
    arrays = ", ".join(f"{letter}.numpy()" for letter in letters)
    try:
        given = problem.exact(*coordinates.clone())
        parts = list(given) if isinstance(given, tuple | list) else [given]
        values = [np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in parts]
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__}: {_line(error)}; it is given torch tensors, as lift and residual "
            f"are: where NumPy needs arrays, begin with {', '.join(letters)} = {arrays}"
        ) from error
    if given is None:
        return None
    count = coordinates.shape[1]
    right = all(v.shape in ((count,), (count, 1)) and v.dtype.kind in "fiub" for v in values)
    if not right or len(values) != len(problem.fields):
        raise InputError(
            f"{name} must give one array ({count},) of real numbers for each of {problem.fields}; got {said(given)}"
        )
    return np.stack([v.reshape(count) for v in values], axis=-1).astype(float)


def residual(
    term: Term,
    fields: Sequence[Field],
    coordinates: Sequence[Tensor],
    coefficients: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
) -> list[Tensor]:
    """The pieces (N,) of a term's residual at N points; a complex one gives two, its real and imaginary part.

    Parameters
    ----------
    term
        Whose it is.
    fields
        Of the problem.
    coordinates, data
        Tensors (N,).
    coefficients
        Single numbers, or (N,) each.

    Raises
    ------
    InputError
        If the user's code raises, or gives anything but one number a point.
    """
    name, count, dtype = f"term {term.label}", len(coordinates[0]), coordinates[0].dtype
    own = {key: values.clone() for key, values in data.items()}
    given = _called(name, term.residual, *fields, *(c.clone() for c in coordinates), **coefficients, **own)
    pieces = _tensors(given, count, dtype, residual=True)
    if not pieces:
        raise InputError(
            f"{name} must give one number a point, shape ({count},) of {dtype}, or several such in a tuple;"
            f" got {said(given)}"
        )
    return [part for p in pieces for part in ((p.real, p.imag) if p.is_complex() else (p,))]


def check_network(network: nn.Module, inputs: Tensor, fields: int) -> None:
    """Refuse a network that fails on some inputs (N, K), or does not give a column for each field.

    Raises
    ------
    InputError
        See :func:`ddml.losses.modules.evaluated`.
    """
    outputs = evaluated(network, inputs)
    if not isinstance(outputs, Tensor) or outputs.shape != (len(inputs), fields):
        raise InputError(
            f"the network must give {(len(inputs), fields)}, a column for each field, for inputs"
            f" {tuple(inputs.shape)}; got {said(outputs)}"
        )


def check_arguments(
    name: str, function: Callable[..., Any], expected: Sequence[str], named: Sequence[str] = ()
) -> None:
    """Refuse a function that does not take what it will be given, or that takes it in another order by its names.

    Parameters
    ----------
    name
        For the message.
    function
        Of a user.
    expected, named
        Names of what it is given by position, and by name.

    Raises
    ------
    InputError
        As for ``residual(self, u, x, t)`` where the domain has t before x.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, say
        return
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [p.name for p in signature.parameters.values() if p.kind in positional][: len(expected)]
    right = all(taken == given for taken, given in zip(names, expected, strict=False) if taken in expected)
    try:
        signature.bind(*expected, **dict.fromkeys(named))
    except TypeError:
        right = False
    if not right:
        given = ", ".join([*expected, *(f"{key}={key}" for key in named)])
        raise InputError(f"{name} takes {signature}, but it is given ({given}), in this order")


def said(given: Any) -> str:
    """What a function gave, in words."""
    if isinstance(given, tuple | list) and not given:
        return f"an empty {type(given).__name__}"
    if isinstance(given, tuple | list):
        shown = ", ".join(said(v) for v in given[:4])
        return f"{type(given).__name__} of {len(given)}: {shown}{', ...' * (len(given) > 4)}"
    if given is None:
        return "None (is there a return?)"
    if isinstance(given, Tensor | np.ndarray):
        return f"{tuple(given.shape)} of {given.dtype}{' (NumPy)' * isinstance(given, np.ndarray)}"
    return f"the {type(given).__name__} {given}" if isinstance(given, int | float | complex) else type(given).__name__


def _stacked(problem: PDE, function: str, coordinates: Tensor, width: int | None) -> Tensor:
    """The tensors of ``embed``, ``lift`` or ``factor`` as columns, of these as many as there are fields."""
    name, count, dtype = f"{type(problem).__name__}.{function}", coordinates.shape[1], coordinates.dtype
    check_arguments(name, getattr(problem, function), list(problem.domain))
    given = _called(name, getattr(problem, function), *_own(coordinates))
    parts = _tensors(given, count, dtype)
    if parts and width and len(parts) == 1:
        parts = parts * width
    if not parts or width not in (None, len(parts)):
        many = "one or several in a tuple" if width is None else "one for all fields or one each"
        raise InputError(f"{name} must give tensors ({count},) of {dtype}, {many}; got {said(given)}")
    return torch.stack(parts, dim=1)


def _own(coordinates: Tensor) -> Sequence[Tensor]:
    """Copies of coordinates (d, N); without gradients of the same strides, on which what torch rounds may depend."""
    return [c.clone() for c in coordinates] if coordinates.requires_grad else list(coordinates.clone())


def _tensors(given: Any, count: int, dtype: torch.dtype, residual: bool = False) -> list[Tensor]:
    """What a function gave, as tensors (N,) of this precision; nothing if it is something else.

    Higher precision is rounded, but in a residual, which may also be complex. Lower one would spoil the result, and
    integers have no derivatives.
    """
    parts = list(given) if isinstance(given, tuple | list) else [given]
    parts = [p.value if isinstance(p, Field) else p for p in parts]
    found = []
    for part in parts:
        if not isinstance(part, Tensor) or part.shape not in ((count,), (count, 1)):
            return []
        wanted = dtype.to_complex() if residual and part.is_complex() else dtype
        if part.dtype != wanted:  # where they are the same, nothing of torch's is called, which a trace would see
            if part.is_complex() != wanted.is_complex or torch.promote_types(part.dtype, wanted) != part.dtype:
                return []
            part = part if residual else part.to(wanted)
        found.append(part.reshape(count) if part.dim() == 2 else part)
    return found


def _called(name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a user's function; what it raises becomes one line."""
    try:
        return function(*arguments, **keywords)
    except NotElementwise:
        raise
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except (Exception, SystemExit) as error:
        text = _line(error)
        for words, meaning in MEANINGS.items():
            if words in text:
                raise InputError(f"{name} {meaning}") from error
        raise InputError(f"{name} raised {type(error).__name__}: {text}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
