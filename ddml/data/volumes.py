"""Volumes that lie in files of their own, scans (NIfTI) and arrays of numpy, with a table of their labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ddml.errors import InputError

from .arrays import MAGIC, load, stored_type
from .data_set import Array
from .unpacking import opened, readable

COLUMNS = ("file", "label")  # of a table
HEADS = {348: "Nifti1Image", 540: "Nifti2Image"}  # bytes of a head of NIfTI, which are its first number


def table(path: Path) -> tuple[list[Path], Array]:
    """Files and labels (N,), as words, of a CSV file with the columns ``file`` and ``label``.

    Files are looked for in the folder of the table.

    Raises
    ------
    InputError
        A table that cannot be read, lacks one of the columns, has no row, a row without a file or a label, or a file
        in two rows.
    """
    with opened(path, "table ") as file, readable(path, "table "):
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), skipinitialspace=True))
    found: list[tuple[str, str]] = []
    for number, row in enumerate(rows, 2):
        if set(COLUMNS) - row.keys():
            raise InputError(f"table {path} must have the columns file and label; it has {', '.join(map(str, row))}")
        name, label = ((row[column] or "").strip() for column in COLUMNS)
        if not name or not label:
            raise InputError(f"table {path}, line {number}: there must be a file and its label")
        if any(name == other for other, _ in found):
            raise InputError(f"table {path}, line {number}: {name} stands there twice")
        found.append((name, label))
    if not found:
        raise InputError(f"table {path} has no row below the names of its columns")
    return [path.parent / name for name, _ in found], np.array([label for _, label in found])


def volume(path: Path) -> Array:
    """A volume (C, D, H, W) of a scan, or of an array (D, H, W) or (C, D, H, W) of numpy (.npy), compressed or not.

    Scans are turned to the axes that are closest to right, front and up (RAS); D counts from below, H from the back, W
    from the left. They need nibabel.

    Raises
    ------
    InputError
        A file that is neither or is damaged; another number of axes; numbers that are not finite.
    """
    with opened(path, "volume ") as file:
        head = file.read(len(MAGIC[0]))
        file.seek(0)
        found = load(path, ())[""] if head == MAGIC[0] else _scan(file.read())
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4 or 0 in found.shape:
        raise InputError(f"volume {path} must have the axes (D, H, W) or (C, D, H, W), got {found.shape}")
    found = found.astype(stored_type(f"volume {path}", found))
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError(f"volume {path} must be finite, and has NaN or infinity")
    return found


def _scan(content: bytes) -> Array:
    head = content[:4]
    kind = next((name for size, name in HEADS.items() if head in (size.to_bytes(4, "little"), size.to_bytes(4))), None)
    if kind is None:
        raise InputError("it is neither a scan (NIfTI) nor an array of numpy")
    try:
        import nibabel
    except ImportError as error:
        raise InputError("scans need nibabel, which is not installed; pip install nibabel") from error
    image = nibabel.as_closest_canonical(getattr(nibabel, kind).from_bytes(content))
    found = np.asarray(image.dataobj)
    while found.ndim > 3 and found.shape[-1] == 1:
        found = found[..., 0]
    if found.ndim != 3:
        raise InputError(f"a scan has three axes, this one {found.shape}")
    return found.transpose(2, 1, 0)


def resized(values: Array, sides: Sequence[int]) -> Array:
    """A volume (C, D, H, W) with other sides (D, H, W), interpolated linearly, in float32."""
    if values.shape[1:] == tuple(sides):
        return values.astype(np.float32)
    factors = [1.0, *(n / old for n, old in zip(sides, values.shape[1:], strict=True))]
    found: Any = ndimage.zoom(values.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
    return found
