"""VTK's XML files of points with columns of numbers: a few lines, and then the numbers as they are in memory.

The format is that of Kitware, VTK File Formats (https://docs.vtk.org/en/latest/vtk_file_formats), "appended raw".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from ddml.errors import InputError

Floats = NDArray[np.float64]
TYPES = {"<f8": "Float64", "<i8": "Int64", "|u1": "UInt8"}
VERTEX = 1  # a cell of one point


class _Appended:
    """Arrays that stand behind the XML, and how they are named in it."""

    def __init__(self) -> None:
        self.arrays: list[NDArray[Any]] = []
        self.size = 0

    def add(self, name: str, array: NDArray[Any], components: int = 1) -> str:
        """The element of an array."""
        offset, kind = self.size, TYPES[array.dtype.str]
        self.arrays.append(np.ascontiguousarray(array))
        self.size += 8 + array.nbytes
        return (
            f'<DataArray type="{kind}" Name={quoteattr(name)} NumberOfComponents="{components}" format="appended" '
            f'offset="{offset}"/>\n'
        )

    def file(self, kind: str, attributes: str, piece: str, content: str) -> Iterator[bytes]:
        """The whole file, in pieces."""
        head = (
            '<?xml version="1.0"?>\n'
            f'<VTKFile type="{kind}" version="1.0" byte_order="LittleEndian" header_type="UInt64">\n'
            f'<{kind}{attributes}>\n<Piece {piece}>\n{content}</Piece>\n</{kind}>\n<AppendedData encoding="raw">\n_'
        )
        yield head.encode()
        for array in self.arrays:
            yield np.uint64(array.nbytes).astype("<u8").tobytes()
            yield array.tobytes()
        yield b"\n</AppendedData>\n</VTKFile>\n"


def image(axes: Sequence[Floats], columns: Mapping[str, Floats]) -> Iterator[bytes]:
    """A .vti file, of a grid with equal steps along each axis.

    ``columns`` (N,) are at the points of the axes' product, the last axis running fastest; those of VTK's x, y and z
    are the axes in their order, of which there may be three.

    Raises
    ------
    InputError
        More than three axes.
    """
    extent, appended = _extent(axes), _Appended()
    steps = [(a[-1] - a[0]) / (len(a) - 1) if len(a) > 1 else 1.0 for a in _three(axes)]
    numbers = {"Origin": [a[0] for a in _three(axes)], "Spacing": steps}
    attributes = "".join(f' {name}="{" ".join(repr(float(v)) for v in vs)}"' for name, vs in numbers.items())
    content = _point_data(appended, {name: _x_first(axes, c) for name, c in columns.items()})
    return appended.file("ImageData", f' WholeExtent="{extent}"{attributes}', f'Extent="{extent}"', content)


def rectilinear(axes: Sequence[Floats], columns: Mapping[str, Floats]) -> Iterator[bytes]:
    """A .vtr file, of a grid with any steps; see :func:`image`."""
    extent, appended = _extent(axes), _Appended()
    content = _point_data(appended, {name: _x_first(axes, c) for name, c in columns.items()})
    named = zip("xyz", _three(axes), strict=True)
    content += f"<Coordinates>\n{''.join(appended.add(name, axis) for name, axis in named)}</Coordinates>\n"
    return appended.file("RectilinearGrid", f' WholeExtent="{extent}"', f'Extent="{extent}"', content)


def unstructured(coordinates: Sequence[Floats], columns: Mapping[str, Floats]) -> Iterator[bytes]:
    """A .vtu file of single points, with up to three coordinates (N,) and columns (N,).

    Raises
    ------
    InputError
        More than three coordinates.
    """
    _check(len(coordinates))
    count, appended = len(coordinates[0]), _Appended()
    places = np.zeros((count, 3))
    places[:, : len(coordinates)] = np.stack(coordinates, axis=1)
    content = _point_data(appended, columns)
    content += f"<Points>\n{appended.add('Points', places, 3)}</Points>\n<Cells>\n"
    content += appended.add("connectivity", np.arange(count)) + appended.add("offsets", np.arange(1, count + 1))
    content += appended.add("types", np.full(count, VERTEX, np.uint8)) + "</Cells>\n"
    return appended.file("UnstructuredGrid", "", f'NumberOfPoints="{count}" NumberOfCells="{count}"', content)


def _point_data(appended: _Appended, columns: Mapping[str, Floats]) -> str:
    return f"<PointData>\n{''.join(appended.add(name, c) for name, c in columns.items())}</PointData>\n"


def _check(count: int) -> None:
    if count > 3:
        raise InputError(f"VTK's files have three coordinates, these points {count}: write .csv or .npz")


def _three(axes: Sequence[Floats]) -> list[Floats]:
    return [*axes, *[np.zeros(1)] * (3 - len(axes))]


def _extent(axes: Sequence[Floats]) -> str:
    _check(len(axes))
    return " ".join(f"0 {len(axis) - 1}" for axis in _three(axes))


def _x_first(axes: Sequence[Floats], column: Floats) -> Floats:
    """A column with the first axis running fastest."""
    return column.reshape([len(axis) for axis in axes]).T.ravel()
