"""Small run files, and what is compared in them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import RunFileError
from ddml.runs.history import History
from ddml.runs.run_file import ParameterEntry, inspect, read, write

comm = MPI.COMM_WORLD


SIZE = 3000


def vector(values: np.ndarray, split: str = "even", on: MPI.Comm = comm) -> PETSc.Vec:
    """A vector of the given global values with one of three ways of ownership."""
    local = {
        "even": PETSc.DECIDE,
        "first": values.size if on.rank == 0 else 0,
        "uneven": values.size - (on.size - 1) * (values.size // 7) if on.rank == on.size - 1 else values.size // 7,
    }[split]
    made = PETSc.Vec().createMPI((local, values.size), comm=on)
    first, last = made.getOwnershipRange()
    made.setArray(values[first:last])
    return made


def numbers(seed: int, size: int = SIZE) -> np.ndarray:
    """Numbers of all magnitudes, special values among them."""
    values = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64).view(np.float64)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324]
    return values


def assert_values(made: PETSc.Vec, expected: np.ndarray) -> None:
    """Every rank's range has the same bits."""
    first, last = made.getOwnershipRange()
    assert made.getArray(readonly=True).tobytes() == expected[first:last].tobytes()


PARAMETERS = (
    ParameterEntry("net.0.weight", (50, 40), 0),
    ParameterEntry("net.0.bias/ü", (999,), 2000),
    ParameterEntry("scale", (), 2999),
)


ATTRIBUTES = {"problem": "burgers", "-tao_max_it": 100, "seed": -(2**63), "tolerance": 0.1, "resume": True, "empty": ""}


SCALARS: dict[str, Any] = {
    "radius": 0.1,
    "special": [math.inf, -math.inf, -0.0, 5e-324, 1 / 3],
    "iteration": 7,
    "counters": [2**63 - 1, -(2**63), 2**63, -(2**130), 0],
    "accepted": True,
    "rejected": False,
    "reason": "descent ü\n",
    "empty text": "",
    "nothing": None,
    "mixed": [1, 1.0, True, None, "x", [], {}, [2.5]],
    "empty list": [],
    "empty dict": {},
    "levels": {"b": {"9": 1, "10": 2.0}, "a": {"kind": "fine"}},
    "long": [float(i) for i in range(2000)],
}


ARRAYS = {
    "doubles": numbers(1, 50).reshape(5, 10),
    "singles": np.array([1.5, -0.0], np.float32),
    "bytes": np.arange(256, dtype=np.uint8),
    "flags": np.array([True, False]),
    "words": np.array([2**64 - 1], np.uint64),
    "scalar": np.array(3, np.int16),
    "no rows": np.zeros((0, 3)),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "complex": np.array([1 + 2j]),
}


def some_history(rows: int = 5) -> History:
    history = History()
    for row in range(rows):
        history.append(iteration=row, loss=1 / (row + 3), work=row * 1.1)
    return history


def save(path: Path, theta: PETSc.Vec, state: dict[str, Any], rows: int = 5) -> None:
    write(str(path), theta, parameters=PARAMETERS, state=state, history=some_history(rows), attributes=ATTRIBUTES)


def small(path: Path, version: float = 1.0) -> None:
    """Write a small whole file: theta = version, state version and one momentum."""
    theta = vector(np.full(SIZE, version))
    momentum = vector(np.full(SIZE, -version))
    save(path, theta, {"version": version, "m": momentum})
    theta.destroy()
    momentum.destroy()


def refused(path: Path, message: str) -> None:
    """Both readers refuse the file on every rank with the same one line, and change nothing."""
    theta = vector(np.full(SIZE, 3.0))
    texts = []
    for attempt in (lambda: inspect(str(path), comm), lambda: read(str(path), theta)):
        with pytest.raises(RunFileError, match=message) as caught:
            attempt()
        texts.append(str(caught.value))
    assert_values(theta, np.full(SIZE, 3.0))
    theta.destroy()
    assert len({text for rank in comm.allgather(texts) for text in rank}) == 1
    assert "\n" not in texts[0]


def same(found: Any, expected: Any) -> None:
    """Equal in type and bits, all the way down."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, float):
        assert found.hex() == expected.hex()
    else:
        assert found == expected
