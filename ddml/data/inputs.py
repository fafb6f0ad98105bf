"""What the samples of a data set are to a network, for those who do not have the data set."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddml.errors import InputError

from .data_set import DataSet
from .scaling import SCALINGS, Scaling


@dataclass(frozen=True)
class Inputs:
    """Shape of a sample, names of the classes, and how stored values become inputs.

    Attributes
    ----------
    shape : tuple of int
        Of a sample.
    classes : tuple of str
    scaling : str
        One of :data:`ddml.data.scaling.SCALINGS`.
    shift, scale : tuple of float
        One for each channel, or one for all.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    scaling: str
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, dataset: DataSet, scaling: Scaling) -> Inputs:
        """Those of a data set and its scaling."""
        shift, scale = (tuple(np.atleast_1d(numbers).tolist()) for numbers in (scaling.shift, scaling.scale))
        return cls(tuple(dataset.shape), dataset.classes, scaling.kind, shift, scale)

    def __str__(self) -> str:
        """A text that :meth:`parsed` reads, to the last bit."""
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def parsed(cls, text: str) -> Inputs:
        """What a text stands for.

        Raises
        ------
        InputError
            If that is nothing of this kind.
        """
        refusal = InputError(f"the inputs of a network are not described by {text[:60]!r}")
        try:
            found: dict[str, Any] = json.loads(text)
            made = cls(
                tuple(int(n) for n in found.pop("shape")), tuple(str(c) for c in found.pop("classes")),
                str(found.pop("scaling")), *(tuple(float(v) for v in found.pop(name)) for name in ("shift", "scale")),
            )  # fmt: skip
            numbers = [*made.shift, *(1 / v for v in made.scale)]
            sizes = {len(made.shift), len(made.scale)} <= {1, made.shape[0]}
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise refusal from error
        right = not found and made.classes and made.scaling in SCALINGS and sizes and min(made.shape) > 0
        if not right or not all(map(math.isfinite, numbers)) or not "".join(made.classes).isprintable():
            raise refusal
        return made
