"""Seals of run files that somebody has changed."""

from pathlib import Path

import numpy as np

from ddml.runs import sealed


def sealed_anew(content: bytes) -> bytes:
    """A run file of these bytes, and a seal in front that fits them, as `ddml.runs.sealed` describes it."""
    rest = content[sealed.SEAL_SIZE :]
    total = sealed.checksum(np.frombuffer(rest, np.uint8), sealed.SEAL_SIZE)
    size = sealed.SEAL_SIZE + len(rest)
    line = b"ddml run file, format %d, %d bytes, checksum %016x\n" % (sealed.FORMAT_VERSION, size, total)
    line += b"HDF5 content follows; h5py and h5dump read this file as it is.\n"
    return line.ljust(sealed.SEAL_SIZE, b"\0") + rest


def seal_anew(path: Path) -> None:
    """Seal a run file."""
    path.write_bytes(sealed_anew(path.read_bytes()))
