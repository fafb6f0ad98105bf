"""Files that others have made: what is compressed is known by its bytes, what cannot be read is one line with its name.

Decoders and archives raise nearly anything for a file that is damaged or no file of theirs: zlib.error, struct.error,
SyntaxError, NotImplementedError, MemoryError and more. :func:`readable` makes one error of them, for all formats.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ddml import regular
from ddml.errors import InputError

# the first bytes of what is compressed, and the module that unpacks it
PACKERS = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
SUFFIXES = ("", ".gz", ".bz2", ".xz")  # that names have then; they tell nothing here

_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, struct.error)


@contextmanager
def readable(path: str | Path, kind: str = "") -> Iterator[None]:
    """Make whatever goes wrong in this block an InputError of one line with the file's name.

    The block must hold nothing but a decoder's work on that file, since any exception counts as the file's fault.
    ``kind`` says what the file is, with a space behind it. Warnings of decoders are not shown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"cannot read {kind}{path}: {error}") from error
    except Exception as error:
        raise InputError(f"cannot read {kind}{path}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An exception in words, without line breaks."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # which else has quotation marks
    text = " ".join(str(said).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"it asks for more memory than there is ({text})"
    # what bz2 says of damage is an OSError without a number
    return f"it is cut off or damaged: {text}" if isinstance(error, (*_DAMAGE, OSError)) else text


def packer(path: str | Path, kind: str = "") -> ModuleType | None:
    """The module that unpacks a file, by its first bytes; None for one that is not compressed.

    Raises
    ------
    InputError
        If there is no such file, it is none, or it cannot be read.
    """
    with readable(path, kind), regular.opened(path) as file:
        return _packer(file)


def _packer(file: IO[bytes]) -> ModuleType | None:
    head = file.read(max(map(len, PACKERS)))
    file.seek(0)
    return next((module for magic, module in PACKERS.items() if head.startswith(magic)), None)


class Unpacked(io.RawIOBase):
    """The bytes that come out of a compressed file, which are not many more than its size justifies."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        super().__init__()
        self.source, self.size = source, size

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as there are bytes; an InputError where there are too many."""
        found: int = self.source.readinto(buffer)  # type: ignore[attr-defined]
        check_unpacked(self.source.tell(), self.size)
        return found

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position and return it."""
        return self.source.seek(offset, whence)


def check_unpacked(unpacked: int, size: int) -> None:
    """Refuse a file of that size which is to unpack, or has unpacked, to so many bytes."""
    if unpacked > regular.justified(size):
        raise InputError(f"its {size} bytes unpack to {unpacked} or more: store them less packed")


@contextmanager
def opened(path: str | Path, kind: str = "") -> Iterator[IO[bytes]]:
    """A file open for reading, unpacked if it is compressed; errors of the block as in :func:`readable`.

    Of a compressed one no more bytes come than :func:`ddml.regular.justified`. It is an io.BufferedReader whose
    ``raw`` is an :class:`Unpacked` then.
    """
    with readable(path, kind), regular.opened(path) as file:
        module: Any = _packer(file)
        if module is None:
            yield file
            return
        with module.open(file) as source:
            yield io.BufferedReader(Unpacked(source, os.fstat(file.fileno()).st_size), 1 << 20)
