"""Vectors that are put away in less memory while they are not needed, without losing a bit."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc

CHUNK = 65_536  # entries that are stored alike, and worked on at a time (our choice)
THRESHOLD = 4 << 20  # bytes of a block that goes back to the system when it is freed, see trim_at_once (our choice)

Array = NDArray[Any]


class Compact:
    """The local entries of a vector, in float32 wherever that loses nothing; gradients of float32 losses take half.

    Parameters
    ----------
    short
        (k,), the entries that float32 numbers are.
    rest
        The others, in float64: arrays (at most :data:`CHUNK`,) by the number of the chunk that they replace.
    """

    def __init__(self, short: NDArray[np.float32], rest: Mapping[int, NDArray[np.float64]] = MappingProxyType({})):
        self.short, self.rest = short, rest

    @classmethod
    def of(cls, vec: PETSc.Vec) -> Compact:
        """What this rank has of a vector."""
        array = vec.array_r
        short, rest = np.empty(len(array), np.float32), {}
        for number, (part, piece) in enumerate(zip(_chunks(short), _chunks(array), strict=True)):
            with np.errstate(over="ignore"):
                part[:] = piece
            if not (part == piece).all():
                rest[number] = piece.copy()
        return cls(short, rest)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.short.nbytes + sum(piece.nbytes for piece in self.rest.values())

    def load(self, vec: PETSc.Vec) -> None:
        """Write the entries to a vector in the same layout."""
        with vec as array:
            array[:] = self.short
            for number, piece in self.rest.items():
                array[number * CHUNK : number * CHUNK + len(piece)] = piece

    def finite(self) -> bool:
        """Whether all of this rank's entries are."""
        arrays: list[Array] = [self.short, *self.rest.values()]
        return all(_largest(a) < math.inf for a in arrays if len(a))


def _largest(array: Array) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(torch.linalg.vector_norm(torch.from_numpy(array), math.inf))


def _chunks(array: Array) -> Iterator[Array]:
    return (array[begin : begin + CHUNK] for begin in range(0, len(array), CHUNK))


def add_rounded(total: NDArray[np.float32], vec: PETSc.Vec) -> None:
    """Add a vector's local entries to an array (k,), rounded to float32."""
    for part, piece in zip(_chunks(total), _chunks(vec.array_r), strict=True):
        np.add(part, piece, out=part, casting="same_kind")


def release(vec: PETSc.Vec) -> None:
    """Give the memory behind a vector back to the system until it is written to; its values are lost."""
    with vec as array:
        begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


@contextmanager
def aside(vec: PETSc.Vec, kept: Compact) -> Iterator[None]:
    """Keep a vector that is not touched meanwhile as this :class:`Compact` of it only."""
    release(vec)
    try:
        yield
    finally:
        kept.load(vec)


def trim_at_once() -> None:
    """Make the C library give freed blocks of 4 MB and more back to the system at once, for the life of the process.

    By itself it soon keeps blocks of up to 32 MB, and what lies between them, for later: matrices of large networks.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, THRESHOLD)  # M_MMAP_THRESHOLD of glibc's malloc.h
