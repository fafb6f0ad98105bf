"""Files that others have made: what is compressed is known by its bytes, what cannot be read is one line with its name.

Decoders and archives raise nearly anything for a file that is damaged or no file of theirs: zlib.error, struct.error,
SyntaxError, NotImplementedError, MemoryError and more. :func:`readable` makes one error of them, for all formats.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

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
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {kind}{path}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An exception in words, without line breaks."""
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
        If there is no such file, or it cannot be read.
    """
    with readable(path, kind):
        if not Path(path).is_file():
            raise InputError(f"cannot read {kind}{path}: there is no such file")
        with open(path, "rb") as file:
            head = file.read(max(map(len, PACKERS)))
    return next((module for magic, module in PACKERS.items() if head.startswith(magic)), None)


@contextmanager
def opened(path: str | Path, kind: str = "") -> Iterator[IO[bytes]]:
    """A file open for reading, unpacked if it is compressed; errors of the block as in :func:`readable`."""
    module: Any = packer(path, kind)
    with readable(path, kind), open(path, "rb") if module is None else module.open(path) as file:
        yield file
