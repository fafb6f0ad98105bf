"""Files that are whole or refused: a checksum over all bytes, an atomic replacement, errors agreed over the ranks.

HDF5 is kept away from the disk when a file is written: a full disk makes the library (1.10.8, with and without MPI)
end the process with a segmentation fault when it closes the file. So HDF5 builds its structures in memory (`Image`),
and ordinary writes bring them to the disk.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO
from uuid import uuid4

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ddml.errors import RunFileError
from ddml.parallel import agreed_file
from ddml.regular import check_target, opened

Bytes = NDArray[np.uint8]

FORMAT_VERSION = 1
# The seal occupies HDF5's user block, the part of a file before its HDF5 content; 512 bytes is the smallest.
SEAL_SIZE = 512
_SEAL_START = b"ddml run file, format "
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SEAL = re.compile(rb"ddml run file, format (\d+), (\d+) bytes, checksum ([0-9a-f]{16})\n")

_PIECE = 8192  # words per step of the checksum: 64 KiB stay in the cache
_MULTIPLIER = np.uint64(0xD1342543DE82EF95)
_STRIDE = 0x9E3779B97F4A7C15
_RAMP = np.arange(_PIECE, dtype=np.uint64) * np.uint64(_STRIDE)


class Image(io.RawIOBase):
    """File in memory for h5py's ``fileobj`` driver that keeps what was written, not the space between.

    Space that HDF5 allocates and never writes costs no memory, so that rank 0 can lay out a file whose large
    vectors are on other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writes: list[tuple[int, Bytes]] = []
        self._position = 0
        self.size = 0

    def at(self, start: int, stop: int) -> Bytes:
        """Bytes from `start` to `stop`, shape (stop - start,); zero where nothing was written."""
        content = np.zeros(stop - start, np.uint8)
        for offset, data in self._writes:
            first, last = max(offset, start), min(offset + data.size, stop)
            if first < last:
                content[first - start : last - start] = data[first - offset : last - offset]
        return content

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` from the current position and return its length."""
        buffer[:] = self.at(self._position, self._position + len(buffer)).data
        self._position += len(buffer)
        return len(buffer)

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        """Keep a copy of `data` at the current position and return its length in bytes."""
        copied = np.frombuffer(bytes(data), np.uint8)
        self._writes.append((self._position, copied))
        self._position += copied.size
        self.size = max(self.size, self._position)
        return copied.size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the size, and return it; HDF5 only ever asks for the end of what it has allocated."""
        self.size = self._position if size is None else size
        return self.size

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def checksum(data: Bytes, position: int) -> int:
    """Return the part that some bytes contribute to the checksum of the file they stand in.

    The checksum of a file is the sum, modulo 2^64, of h(w_i, i) over its 64-bit words w_i. For each i the mixing
    function h is a bijection of w_i, so that damage to a single word is always found. As a sum it does not depend
    on how the words are dealt out to ranks.

    Parameters
    ----------
    data : ndarray of uint8, shape (bytes,)
        The bytes; the last word is filled up with zeros.
    position : int
        Where they stand in the file (bytes, a multiple of 8).
    """
    if position % 8:
        raise ValueError(f"the checksum needs a position that is a multiple of 8, not {position}")
    total = 0
    for start in range(0, data.size, 8 * _PIECE):
        piece = data[start : start + 8 * _PIECE]
        if piece.size % 8:
            piece = np.concatenate([piece, np.zeros(-piece.size % 8, np.uint8)])
        words = piece.view("<u8")
        first = np.uint64((position + start) // 8 * _STRIDE % 2**64)
        mixed = (_RAMP[: words.size] + first) ^ words
        mixed *= _MULTIPLIER
        mixed ^= mixed >> np.uint64(32)
        total += int(mixed.sum())
    return total % 2**64


def _sum(comm: MPI.Comm, part: int) -> int:
    return int(comm.allreduce(part, MPI.SUM)) % 2**64


def _seal(size: int, total: int) -> bytes:
    line = b"%s%d, %d bytes, checksum %016x\n" % (_SEAL_START, FORMAT_VERSION, size, total)
    return (line + b"HDF5 content follows; h5py and h5dump read this file as it is.\n").ljust(SEAL_SIZE, b"\0")


def _write_at(descriptor: int, data: Bytes, position: int) -> None:
    rest = data.data
    while rest.nbytes:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written


def beside(path: str, comm: MPI.Comm, problem: tuple[str, str]) -> tuple[str, str]:
    """Where a file really stands, and a name beside it, ``<path>.<8 digits>.new``, that nobody else has. Collective.

    Raises
    ------
    RunFileError
        With the parts `problem` of its text, as of :func:`ddml.parallel.agreed_file`: the working folder has gone.
    """
    names = "", ""
    with agreed_file(comm, *problem):
        if comm.rank == 0:
            real = os.path.realpath(path)
            names = real, f"{real}.{uuid4().hex[:8]}.new"
    real, new = comm.bcast(names)
    return real, new


def store(
    path: str,
    comm: MPI.Comm,
    image: Image | None,
    reserved: Sequence[tuple[int, int]],
    pieces: Sequence[tuple[int, Bytes]],
) -> None:
    """Bring an image and the vectors that belong into it to the disk, in place of `path`.

    Collective on `comm`. The bytes go to a new file of `beside`, are flushed to the disk by every rank that wrote some,
    and rank 0 renames the file and flushes the folder: a kill at any moment leaves the old file or the new one.

    Parameters
    ----------
    path : str
        The file; a symbolic link is followed.
    comm : MPI.Comm
        The ranks that write.
    image : Image or None
        On rank 0 the closed HDF5 file; not used elsewhere.
    reserved : sequence of (int, int)
        Start and stop (bytes) of the vectors in the file; the image holds the rest. Equal on all ranks.
    pieces : sequence of (int, ndarray of uint8)
        Position and bytes of this rank's part of the vectors; over all ranks they fill `reserved` exactly.

    Raises
    ------
    RunFileError
        On all ranks, when any rank could not write; `path` is then what it was before.
    """
    problem = (f"cannot write {path}", "the file that was there is unchanged; check the folder and its free space")
    path, new = beside(path, comm, problem)
    with agreed_file(comm, *problem):
        check_target(path)
    try:
        part = 0
        with agreed_file(comm, *problem):
            if image is not None:
                stops = [SEAL_SIZE, *(stop for _, stop in sorted(reserved))]
                starts = [*(start for start, _ in sorted(reserved)), image.size]
                with open(new, "xb", buffering=0) as file:
                    os.truncate(file.fileno(), image.size)
                    for start, stop in zip(stops, starts, strict=True):
                        data = image.at(start, stop)
                        _write_at(file.fileno(), data, start)
                        part += checksum(data, start)
        with agreed_file(comm, *problem):
            if pieces:
                with open(new, "r+b", buffering=0) as file:
                    for position, data in pieces:
                        _write_at(file.fileno(), data, position)
                        part += checksum(data, position)
                    os.fsync(file.fileno())
        total = _sum(comm, part)
        with agreed_file(comm, *problem):
            if image is not None:
                with open(new, "r+b", buffering=0) as file:
                    _write_at(file.fileno(), np.frombuffer(_seal(image.size, total), np.uint8), 0)
                    os.fsync(file.fileno())
                with suppress(FileNotFoundError):
                    shutil.copymode(path, new)  # of the file whose place it takes
                os.replace(new, path)
                folder = os.open(os.path.dirname(path), os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
    except Exception:
        if comm.rank == 0:
            with suppress(OSError):
                os.unlink(new)
        comm.barrier()  # when a rank hears of it, the new file is gone
        raise


def _read_seal(path: str, file: IO[bytes]) -> tuple[int, int]:
    """Return size and checksum that the seal promises; say what else the file is when it has none."""
    advice = "give a file that ddml wrote with -output"
    seal = file.read(SEAL_SIZE)
    found = os.fstat(file.fileno()).st_size
    if not seal.startswith(_SEAL_START):
        if seal.startswith(_HDF5):
            raise RunFileError(f"{path} is an HDF5 file but not a run file of ddml; {advice}")
        what = f"its {found} bytes do not start as those of a run file do" if found else "it is empty"
        raise RunFileError(f"{path} is not a run file of ddml: {what}; {advice}")
    match = _SEAL.match(seal)
    version = int(match[1]) if match else 0
    if match and version > FORMAT_VERSION:
        raise RunFileError(
            f"{path} has run file format {version}, this ddml reads formats up to {FORMAT_VERSION}; use a newer ddml"
        )
    size, total = (int(match[2]), int(match[3], 16)) if match else (0, 0)
    if not match or (found >= SEAL_SIZE and seal != _seal(size, total)):
        raise RunFileError(f"{path} is damaged: its first {SEAL_SIZE} bytes are not as written; restart from a copy")
    if found != size:
        raise RunFileError(f"{path} is damaged: {size} bytes were written, {found} are there; restart from a copy")
    return size, total


def _opened(path: str) -> IO[bytes]:
    advice = "give a file that ddml wrote with -output"
    if os.path.isdir(path):
        raise RunFileError(f"{path} is a folder, not a run file; {advice}")
    try:
        return opened(path)
    except FileNotFoundError:
        raise RunFileError(f"there is no run file {path}; {advice}") from None


@contextmanager
def verified(path: str, comm: MPI.Comm) -> Iterator[IO[bytes]]:
    """A run file, open on every rank for the block, of which every byte is found to be as it was written.

    Collective on `comm`; each rank reads its share of the file. Another file may take its place meanwhile: the one that
    is open stays what it is.

    Raises
    ------
    RunFileError
        On all ranks, when the file is missing, foreign, of a newer format or damaged.
    """
    problem = (f"cannot read {path}", "check the path and that every rank sees the file")
    promise: tuple[int, int] = (0, 0)
    with ExitStack() as stack:
        with agreed_file(comm, *problem):
            file = stack.enter_context(_opened(path))
            if comm.rank == 0:
                promise = _read_seal(path, file)
        size, expected = comm.bcast(promise)
        words = -(-(size - SEAL_SIZE) // 8)
        start, stop = (SEAL_SIZE + 8 * (words * rank // comm.size) for rank in (comm.rank, comm.rank + 1))
        part = 0
        with agreed_file(comm, *problem):
            file.seek(0)
            if file.read(SEAL_SIZE) != _seal(size, expected):
                raise RunFileError(f"{path} was replaced while it was read: another run writes it; begin again")
            file.seek(start)
            while start < stop and (data := file.read(min(1 << 20, stop - start))):
                part += checksum(np.frombuffer(data, np.uint8), start)
                start += len(data)
        if _sum(comm, part) != expected:
            raise RunFileError(f"{path} is damaged: its bytes do not match their checksum; restart from a copy")
        yield file
