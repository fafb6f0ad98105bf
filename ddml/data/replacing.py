"""A file in the place of another one: when it is whole, or not at all."""

from __future__ import annotations

import io
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddml.regular import check_target


class Disk(io.FileIO):
    """A file that HDF5 writes, to which nothing seems to go wrong.

    HDF5 crashes when it closes a file that it could not write. So all bytes are taken, and dropped behind the first
    error or signal; :meth:`check` raises what there was.
    """

    def __init__(self, path: str, signals: list[int]) -> None:
        super().__init__(path, "x+")
        self.signals = signals
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all bytes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None and not self.signals:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Change the size."""
        try:
            if self.error is None:
                super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def check(self) -> None:
        """Raise the error, or a KeyboardInterrupt, if there was one."""
        if self.signals:
            raise KeyboardInterrupt
        if self.error is not None:
            raise self.error


@contextmanager
def replacing(path: str | Path) -> Iterator[Disk]:
    """A new file that takes the place of ``path`` behind the block; whatever is raised in it leaves what was there.

    SIGINT and SIGTERM are held back until then where this is the main thread: the block should look for them, and for
    errors of the disk, with :meth:`Disk.check`.

    Raises
    ------
    OSError
        If the file cannot be written.
    InputError
        If what is there is no regular file.
    """
    check_target(path)
    path = os.path.realpath(path)
    new = f"{path}.{uuid.uuid4().hex[:8]}.new"  # which no other program has
    with _held_back() as signals:
        try:
            with Disk(new, signals) as disk:
                yield disk
                disk.check()
                os.fsync(disk.fileno())
            os.replace(new, path)
        finally:
            Path(new).unlink(missing_ok=True)


@contextmanager
def _held_back() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; behind the block the first of them does what it would have done."""
    found: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, lambda n, _: found.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's
        if found:
            signal.raise_signal(found[0])
