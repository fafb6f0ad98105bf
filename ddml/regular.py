"""Regular files: what may be read, and replaced, where a path may lead to a pipe, a device or a folder."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import IO

from .errors import InputError

FREE, RATIO = 256 << 20, 100  # bytes that any file may unpack to, and further ones for each of its own (our choices)


def justified(stored: int) -> int:
    """How many bytes may come out of so many that are compressed; more is refused before there is memory for it."""
    return FREE + RATIO * stored


def opened(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file, open for reading; anything else is not waited for.

    Raises
    ------
    InputError
        What is there is no regular file.
    OSError
        There is none, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"cannot read {path}: it is no regular file")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise an InputError where something is that must not be replaced: a folder, a device, a pipe."""
    with suppress(OSError):  # of which whoever writes there will hear
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot write {path}: what is there is no regular file")
