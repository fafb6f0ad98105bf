"""Tables of points: what is written is read back, by us and by VTK where it is installed."""

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ddml.data import tables
from ddml.data.tables import Table
from ddml.errors import InputError

AXES = {1: [np.linspace(-1, 2, 4)], 2: [np.linspace(0, 0.5, 3), np.linspace(-1, 2, 4)]}
AXES[3] = [*AXES[2], np.linspace(5, 6, 2)]
KINDS = {"vti": "ImageData", "vtr": "RectilinearGrid", "vtu": "UnstructuredGrid"}


def grid(dimension: int) -> Table:
    axes = AXES[dimension]
    points = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")])
    columns = {"u": np.sin(points).sum(0) / 3, 'a "b" <c>': points.prod(0)}
    return Table(dict(zip("txy", points, strict=False)), columns, axes)


def appended(path: Path) -> tuple[ElementTree.Element, dict[str, np.ndarray]]:
    """The XML of a VTK file without its data, and these by name, read as the format says."""
    head, _, data = path.read_bytes().partition(b'<AppendedData encoding="raw">\n_')
    root = ElementTree.fromstring(head + b"</VTKFile>")
    found = {}
    for element in root.iter("DataArray"):
        begin = int(element.attrib["offset"])
        size = int(np.frombuffer(data, "<u8", 1, begin)[0])
        kind = {"Float64": "<f8", "Int64": "<i8", "UInt8": "|u1"}[element.attrib["type"]]
        found[element.attrib["Name"]] = np.frombuffer(data[begin + 8 : begin + 8 + size], kind)
    return root, found


@pytest.mark.parametrize("dimension", AXES)
@pytest.mark.parametrize("suffix", KINDS)
def test_vtk_files_hold_the_columns(suffix: str, dimension: int, tmp_path: Path) -> None:
    table, path = grid(dimension), tmp_path / f"out.{suffix}"
    tables.write(path, table)
    root, found = appended(path)
    assert root.attrib["type"] == KINDS[suffix]
    order = np.arange(len(table.columns["u"])).reshape([len(a) for a in AXES[dimension]])
    order = order.ravel() if suffix == "vtu" else order.T.ravel()  # x runs fastest in VTK
    for name, column in table.columns.items():
        np.testing.assert_array_equal(found[name], column[order])
    points = np.zeros((len(order), 3))
    points[:, :dimension] = np.stack(list(table.coordinates.values()), axis=1)
    if suffix == "vtu":
        np.testing.assert_array_equal(found["Points"].reshape(-1, 3), points)
    elif suffix == "vtr":
        for letter, axis in zip("xyz", AXES[dimension], strict=False):
            np.testing.assert_array_equal(found[letter], axis)
    else:
        spacing = [float(v) for v in root[0].attrib["Spacing"].split()][:dimension]
        np.testing.assert_allclose(spacing, [a[1] - a[0] for a in AXES[dimension]])
        origin = [float(v) for v in root[0].attrib["Origin"].split()]
        assert origin == points[0].tolist()
    if find_spec("vtk") is None:
        return
    import vtk
    from vtkmodules.util.numpy_support import vtk_to_numpy

    reader = getattr(vtk, f"vtkXML{KINDS[suffix]}Reader")()
    reader.SetFileName(str(path))
    reader.Update()
    read = reader.GetOutput()
    np.testing.assert_allclose([read.GetPoint(i) for i in range(len(order))], points[order], atol=1e-15)
    for name, column in table.columns.items():
        np.testing.assert_array_equal(vtk_to_numpy(read.GetPointData().GetArray(name)), column[order])


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = {"t": rng.normal(size=25_000) * 1e-300, "file": rng.normal(size=25_000)}
    table = Table(points, {"word": np.array(["a, b", 'c"'] * 12_500), "u.x": rng.normal(size=25_000)})
    for suffix in ("csv", "npz"):
        path = tmp_path / f"out.{suffix}"
        tables.write(path, table)
        np.testing.assert_array_equal(tables.points(path, ["file", "t"]), np.stack([points["file"], points["t"]], 1))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["word"] for row in rows] == table.columns["word"].tolist()
    assert [float(row["u.x"]) for row in rows] == table.columns["u.x"].tolist()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["word"], table.columns["word"])


def test_grids_keep_their_shape_in_npz(tmp_path: Path) -> None:
    tables.write(tmp_path / "out.npz", grid(3))
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["u"].shape == (3, 4, 2) and arrays["t"].shape == (3,)
        t, x, y = (arrays[name] for name in "txy")
        expected = np.sin(t)[:, None, None] + np.sin(x)[:, None] + np.sin(y)
        np.testing.assert_allclose(arrays["u"], expected / 3, rtol=1e-14)


POINTS = {
    "missing": ("x,y\n1,2\n", "no columns t; it has x, y"),
    "no header": ("1,2\n3,4\n", "no columns t, x; it has 1, 2"),
    "nothing": ("", "no columns t, x; it has none"),
    "no points": ("t,x\n", "has no points"),
    "nan": ("t,x\n1,2\n3,nan\n", "x is nan at point 2"),
    "infinite": ("t,x\n-inf,2\n", "t is -inf at point 1"),
    "text": ("t,x\n1,two\n", "two"),
    "short line": ("t,x\n1,2\n3\n", "cannot read"),
    "empty cell": ("t,x\n1,\n", "cannot read"),
    "semicolons": ("t;x\n1;2\n", "no columns t, x"),
    "bytes": (b"t,x\n\xff\xfe,1\n", "cannot read"),
    "zeros": (b"\0" * 64, "no columns"),
    "damaged zip": (b"PK\x03\x04 and nothing", "cannot read"),
}


@pytest.mark.parametrize("case", POINTS)
def test_points_that_are_none_are_named(case: str, tmp_path: Path) -> None:
    content, expected = POINTS[case]
    path = tmp_path / ("points.npz" if "zip" in case else "points.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as said:
        tables.points(path, ["t", "x"])
    assert "points." in str(said.value) and "\n" not in str(said.value)


def test_arrays_that_are_no_points_are_named(tmp_path: Path) -> None:
    path = tmp_path / "points.npz"
    for arrays, expected in (
        ({"t": np.ones(3)}, "no columns x"),
        ({"t": np.ones(3), "x": np.ones(2)}, "unequal length"),
        ({"t": np.ones(2), "x": np.array(["a", "b"])}, "real numbers"),
        ({"t": np.ones(2), "x": np.array([1j, 2])}, "real numbers"),
        ({"t": np.ones(2), "x": np.array([None, 2])}, "Python objects"),
        ({"t": np.ones(2), "x": np.array([0, np.nan])}, "x is nan at point 2"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=expected):
            tables.points(path, ["t", "x"])
    np.savez(path, t=np.ones((2, 1)), x=np.array([1, 2]))
    assert tables.points(path, ["x", "t"]).tolist() == [[1, 1], [2, 1]]


def test_csv_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(b'\xef\xbb\xbf"x",note, t\r\n1,good,2\r\n3,"a, b",4\r\n')
    with pytest.raises(InputError, match="no columns y"):
        tables.points(path, ["t", "y"])
    assert tables.points(path, ["t", "x"]).tolist() == [[2, 1], [4, 3]]


def test_samples(tmp_path: Path) -> None:
    values = np.arange(24).reshape(3, 2, 2, 2)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", inputs=values.reshape(3, 8))
    (tmp_path / "a.csv").write_text("\n".join([",".join("abcdefgh"), *(",".join(map(str, v.ravel())) for v in values)]))
    for name in ("a.npy", "a.npz", "a.csv"):
        np.testing.assert_array_equal(tables.samples(tmp_path / name, (2, 2, 2)), values)
        with pytest.raises(InputError, match=r"must hold numbers \(N, 3\)"):
            tables.samples(tmp_path / name, (3,))


def test_nothing_but_files_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "points.csv").write_text("x\n1\n")
    (tmp_path / "device.csv").symlink_to("/dev/full")
    for name, expected in (
        ("pipe.csv", "no regular file"),
        ("folder.csv", "no regular file"),
        ("device.csv", "no regular file"),
        ("points.csv", "it is read"),
        ("none/out.csv", "no folder"),
        ("out.txt", "must be a file .csv"),
        ("out", "must be a file .csv"),
    ):
        with pytest.raises(InputError, match=expected):
            tables.check_target(tmp_path / name, [".csv"], [tmp_path / "points.csv"])
    assert tables.check_target(tmp_path / "new.csv", [".csv"]) == ".csv"


def test_what_a_format_cannot_hold_leaves_what_was_there(tmp_path: Path) -> None:
    points = {letter: np.ones(2) for letter in "abcd"}
    for suffix, table, expected in (
        ("vtu", Table(points, {"u": np.ones(2)}), "three coordinates"),
        ("vti", Table({"x": np.ones(2)}, {"u": np.ones(2)}), "give -grid"),
        ("vtr", Table(points, {"u": np.ones(1)}, [np.ones(1)] * 4), "three coordinates"),
    ):
        path = tmp_path / f"out.{suffix}"
        path.write_text("before")
        with pytest.raises(InputError, match=expected):
            tables.write(path, table)
        assert path.read_text() == "before" and len(list(tmp_path.glob(f"out.{suffix}*"))) == 1
