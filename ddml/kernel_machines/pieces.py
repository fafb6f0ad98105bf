"""Pieces of a symmetric matrix times a few columns by C code, which reads each of them once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddml import kernels

FASTER, REGISTER = "avx512", 64  # the library whose products are faster than torch's, and the bytes of its vectors
NAMES = {torch.float64: "double", torch.float32: "float"}


class PieceProducts:
    """Products of pieces, and of their transposes, with a table; sums in float64, within a piece as it is stored.

    Parameters
    ----------
    table
        V (n, k), float64 or float32, by place.

    Attributes
    ----------
    width : int
        k and some columns more, of what sums are added to.
    """

    def __init__(self, table: Tensor) -> None:
        found = _function(NAMES[table.dtype])
        assert found is not None
        self._multiply, (n, k), size = found, table.shape, table.itemsize
        lanes = REGISTER // size
        self.width = -(-k // lanes) * lanes
        self._table = torch.zeros(n, self.width, dtype=table.dtype)
        self._table[:, :k] = table
        self._row, self._given = self.width * size, self._table.data_ptr()

    def add(self, block: Tensor, rows: slice, columns: slice, twice: bool, sums: Tensor) -> None:
        """Add the product with entries (rows, columns) to sums (n, width); ``twice``: that with their transpose too."""
        whole, out = block.contiguous(), sums.data_ptr()
        self._multiply(
            whole.data_ptr(), *whole.shape, self.width,
            self._given + rows.start * self._row, self._given + columns.start * self._row,
            out + 8 * rows.start * self.width, out + 8 * columns.start * self.width if twice else None,
        )  # fmt: skip


def compiled(table: Tensor) -> PieceProducts | None:
    """What multiplies a table, if it was built, runs here and is faster than torch (with two columns and more)."""
    if table.shape[1] < 2 or _function(NAMES[table.dtype]) is None:
        return None
    return PieceProducts(table)


@cache
def _function(name: str) -> Callable[..., Any] | None:
    found = kernels.library()
    if found is None or found[0] != FASTER:
        return None
    function = found[1][f"multiply_piece_{name}"]
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 3, *[ctypes.c_void_p] * 4]
    function.restype = None
    return function
