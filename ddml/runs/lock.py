"""One program at a time on one run file: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mpi4py import MPI

from ddml.errors import RunFileError

_WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a file system without locks


@contextmanager
def locked(path: str | None, comm: MPI.Comm) -> Iterator[list[str]]:
    """Hold a run file for this program within a block; gives what a user should know. Collective, as is its end.

    Rank 0 holds a lock (``flock``) on ``<path>.lock``, which the system takes from a process that ends, however that
    happens; the file is removed at the end of the block, and what a killed one has left is no obstacle. What killed
    programs have left of files that they were writing is removed, too.

    Parameters
    ----------
    path : str or None
        The run file, which need not be there; a symbolic link is followed. None: there is none, nothing is held. Nor
        is anything where its folder is missing: whoever writes or reads there will say so.

    Raises
    ------
    RunFileError
        On all ranks, when another program holds it, or when the lock cannot be made.
    """
    held, refusal, notes = -1, "", list[str]()
    name = ""
    if path is not None and comm.rank == 0:
        try:
            name = f"{os.path.realpath(path)}.lock"
            held, other = _take(name)
            if held < 0:
                refusal = (
                    f"{path} is in use by {other or 'another program'}: wait for its end, or give another -output "
                    f"(if there is no such program on any node any more, remove {name})"
                )
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            if error.errno in _WITHOUT:
                notes.append(f"the file system of {path} has no locks: see that no other run writes the same file")
            else:
                refusal = f"cannot write {path}: {error.strerror} ({name}); give -output a file in a folder that is "
                refusal += "yours to write"
    refusal, notes = comm.bcast((refusal, notes))
    if refusal:
        raise RunFileError(refusal)
    try:
        if held >= 0:
            for left in glob.glob(f"{glob.escape(name.removesuffix('.lock'))}.*.new"):
                with suppress(OSError):
                    os.unlink(left)
        yield notes
    finally:
        if held >= 0:
            with suppress(OSError):
                os.unlink(name)
            os.close(held)


def _take(name: str) -> tuple[int, str]:
    """The descriptor of a lock that is held now, or -1 and who holds it."""
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(name).st_ino:
                with suppress(OSError):  # a full disk
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                return descriptor, ""
        except BlockingIOError:
            other = os.pread(descriptor, 400, 0).decode(errors="replace")
            os.close(descriptor)
            return -1, other
        except FileNotFoundError:
            pass  # who held it has just removed it
        except OSError:
            os.close(descriptor)
            os.unlink(name)
            raise
        os.close(descriptor)
