"""The history of a run: one row per iteration, kept in memory on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

COLUMNS = (
    "iteration",
    "time",
    "loss",
    "test_loss",
    "gradient_norm",
    "step",
    "work",
    "work_critical",
    "error",
    "error_network_norm",
    "accuracy",
)

MEASURES = ("test_loss", "error", "error_network_norm", "accuracy")  # which not every row has

UNITS = {  # of columns that have one
    "time": "s",
    "work": "full gradients",
    "work_critical": "full gradients",
    "communication": "numbers",
}

MOST_LEVELS = 10  # of a hierarchy, that have a column (our choice)
WORK_OF_LEVELS = tuple(f"work_level_{number}" for number in range(MOST_LEVELS))
OF_SYSTEMS = ("residual", "disagreement", "communication")  # columns of runs that solve a linear system
_NAMES = (*COLUMNS, *WORK_OF_LEVELS, *OF_SYSTEMS)


def _index(name: str) -> int:
    if name not in _NAMES:
        raise ValueError(
            f"a history has no column {name!r}; its columns are {', '.join(COLUMNS)}, {WORK_OF_LEVELS[0]}, ..."
        )
    return _NAMES.index(name)


class History:
    """Table of float64 with one row per iteration; every rank holds the same one.

    The columns are ``iteration``, ``time`` (s, accumulated over restarts), ``loss`` (on the samples of that iteration,
    where there are batches those of the batch), ``test_loss`` (the loss on samples that are not trained on),
    ``gradient_norm``, ``step`` (radius or step length), ``work`` (work units, summed over subdomains and levels),
    ``work_critical`` (work units along the critical path), ``error`` (relative L2 error against the reference),
    ``error_network_norm`` (the same measured in the norm of the network's own outputs) and ``accuracy`` (0 to 1). What
    was not given is NaN. Solvers on levels also give ``work_level_0``, that of the coarsest, and so on; those of a
    system its relative ``residual``, the relative ``disagreement`` of subdomains on what they share, and
    ``communication``, the numbers that subdomains have been sent.

    Nothing here is collective: that all ranks append the same numbers is up to the caller.
    """

    def __init__(self) -> None:
        # One row of the array per column of the table, so that a column is contiguous.
        self._values: NDArray[np.float64] = np.empty((len(_NAMES), 64))
        self._rows = 0

    @classmethod
    def from_columns(cls, columns: Mapping[str, ArrayLike]) -> History:
        """Make a history of whole columns.

        Parameters
        ----------
        columns : mapping of str to array_like, shape (rows,)
            Any of the columns; the others are NaN.

        Returns
        -------
        History
            A history that shares no memory with `columns`.

        Raises
        ------
        ValueError
            For an unknown name, or columns that are not one-dimensional and of the same length.
        """
        arrays = {_index(name): np.asarray(values, dtype=np.float64) for name, values in columns.items()}
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            found = ", ".join(f"{_NAMES[index]} {array.shape}" for index, array in arrays.items())
            raise ValueError(f"the columns of a history must be one-dimensional and of the same length, not {found}")
        history = cls()
        history._rows = shapes.pop()[0] if shapes else 0
        history._values = np.full((len(_NAMES), max(history._rows, 64)), np.nan)
        for index, array in arrays.items():
            history._values[index, : history._rows] = array
        return history

    def append(self, **values: float) -> None:
        """Add one row; amortised constant time.

        Parameters
        ----------
        **values : float
            The row's values by column name; columns that are not named become NaN.

        Raises
        ------
        ValueError
            For a name that is no column; the history is then unchanged.
        """
        row = {_index(name): float(value) for name, value in values.items()}
        if self._rows == self._values.shape[1]:
            self._values = np.concatenate([self._values, np.empty_like(self._values)], axis=1)
        self._values[:, self._rows] = np.nan
        for index, value in row.items():
            self._values[index, self._rows] = value
        self._rows += 1

    def complete(self, **values: float) -> None:
        """Put values into the last row.

        Raises
        ------
        ValueError
            For a name that is no column, or a history without rows.
        """
        if not self._rows:
            raise ValueError("a history without rows has no last one")
        for index, value in {_index(name): float(value) for name, value in values.items()}.items():
            self._values[index, self._rows - 1] = value

    def truncate(self, rows: int) -> None:
        """Keep the first rows only.

        Parameters
        ----------
        rows : int
            How many rows to keep, from 0 to ``len(self)``.

        Raises
        ------
        ValueError
            When the history does not have that many rows.
        """
        if not 0 <= rows <= self._rows:
            raise ValueError(f"cannot keep {rows} rows of a history that has {self._rows}")
        self._rows = rows

    def last(self, name: str) -> float:
        """Value of a column in the last row.

        Parameters
        ----------
        name : str
            The column.

        Returns
        -------
        float
            The value; NaN where the last row has none or the history is empty.

        Raises
        ------
        ValueError
            For an unknown name.
        """
        index = _index(name)
        return float(self._values[index, self._rows - 1]) if self._rows else float("nan")

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Copy of one column, shape (rows,); an unknown name is a ValueError."""
        return self._values[_index(name), : self._rows].copy()

    def used(self) -> list[str]:
        """Names of the columns that have values."""
        return [name for name in _NAMES if not np.isnan(self[name]).all()]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

    def __repr__(self) -> str:
        """Return the number of rows and the columns that have values."""
        used = self.used()
        return f"History({self._rows} rows: {', '.join(used) or 'no values'})"
