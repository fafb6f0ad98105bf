"""Fields: what a residual sees of the functions that a network represents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.jets.evaluator import Index


class Field:
    """A function at some points: itself (N,) where arithmetic asks for it, and its derivatives.

    ``u * u.x``, ``torch.sin(u)``, ``u.xx``, ``u.tx``: a derivative is named by the letters of its
    coordinates. On a periodic pair of faces ``u.opposite`` is the same function on the other face.
    """

    def __init__(
        self, name: str, letters: Sequence[str], get: Callable[[Index], Tensor], opposite: Field | None = None
    ):
        self._name, self._letters, self._get = name, letters, get
        self._opposite = opposite

    @property
    def value(self) -> Tensor:
        """The function's values (N,)."""
        return self._get(())

    @property
    def opposite(self) -> Field:
        """The function on the opposite face.

        Raises
        ------
        InputError
            Where the points are no periodic pair.
        """
        if self._opposite is None:
            raise InputError(f"{self._name}.opposite exists on Periodic faces only")
        return self._opposite

    def __getattr__(self, letters: str) -> Tensor:
        if letters.startswith("_"):
            raise AttributeError(letters)
        if not all(letter in self._letters for letter in letters):
            known = ", ".join(self._letters)
            raise InputError(f"{self._name}.{letters}: no such derivative, the coordinates are {known}")
        return self._get(tuple(sorted(self._letters.index(letter) for letter in letters)))

    def __add__(self, other: Any) -> Tensor:
        return self.value + _value(other)

    def __sub__(self, other: Any) -> Tensor:
        return self.value - _value(other)

    def __rsub__(self, other: Any) -> Tensor:
        return _value(other) - self.value

    def __mul__(self, other: Any) -> Tensor:
        return self.value * _value(other)

    def __truediv__(self, other: Any) -> Tensor:
        return self.value / _value(other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _value(other) / self.value

    def __pow__(self, other: Any) -> Tensor:
        return self.value ** _value(other)

    def __rpow__(self, other: Any) -> Tensor:
        return _value(other) ** self.value

    def __neg__(self) -> Tensor:
        return -self.value

    def __abs__(self) -> Tensor:
        return self.value.abs()

    def __lt__(self, other: Any) -> Tensor:
        return self.value < _value(other)

    def __le__(self, other: Any) -> Tensor:
        return self.value <= _value(other)

    def __gt__(self, other: Any) -> Tensor:
        return self.value > _value(other)

    def __ge__(self, other: Any) -> Tensor:
        return self.value >= _value(other)

    def __bool__(self) -> bool:
        raise InputError(f"{self._name} is not true or false: it is a number at each point; torch.where chooses")

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let torch functions take a field for its values."""
        values = torch.utils._pytree.tree_map(_value, (tuple(args), dict(kwargs or {})))
        return function(*values[0], **values[1])


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Field) else x
