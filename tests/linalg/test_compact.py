"""Vectors that are put away in less memory."""

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml.layout import ParameterLayout
from ddml.linalg.compact import CHUNK, Compact, add_rounded, aside, release
from ddml.parameters import parameter_table

SPECIAL = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-45, 1e-320, 1e300, 2.0**-149])


def vector(comm: MPI.Comm, values: np.ndarray) -> PETSc.Vec:
    vec = ParameterLayout(parameter_table([("w", (len(values),))]), comm).vector()
    begin, end = vec.getOwnershipRange()
    vec.setArray(values[begin:end])
    return vec


def filled(kind: str, rng: np.random.Generator) -> np.ndarray:
    single = rng.standard_normal(5 * CHUNK // 2).astype(np.float32).astype(np.float64)
    if kind == "mixed":
        single[7] = 1 / 3
    if kind == "special":
        single[: len(SPECIAL)] = SPECIAL
    return rng.standard_normal(len(single)) if kind == "double" else single


@pytest.mark.parametrize(("kind", "most"), [("single", 4.0), ("mixed", 7.5), ("double", 12.1), ("special", 7.5)])
def test_no_bit_is_lost(kind: str, most: float, comm: MPI.Comm) -> None:
    values = filled(kind, np.random.default_rng(0))
    vec = vector(comm, values)
    expected = vec.array_r.tobytes()
    kept = Compact.of(vec)
    if comm.size == 1:
        assert kept.nbytes <= most * len(values)
    vec.set(5.0)
    kept.load(vec)
    assert vec.array_r.tobytes() == expected
    assert comm.allreduce(kept.finite(), MPI.LAND) == (kind != "special")
    norm = vec.norm()
    with aside(vec, kept):
        assert comm.allreduce(not vec.array_r.all(), MPI.LAND)  # the memory is somebody else's: zeros are read
    assert vec.array_r.tobytes() == expected
    np.testing.assert_equal(vec.norm(), norm)
    vec.destroy()


def resident() -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_memory_is_given_back() -> None:
    vec = vector(MPI.COMM_SELF, np.ones(8_000_000))
    before = resident()
    release(vec)
    assert before - resident() > 60_000
    vec.set(1.0)
    assert vec.norm(PETSc.NormType.NORM_1) == 8_000_000
    vec.destroy()


def test_sums_are_rounded(comm: MPI.Comm) -> None:
    values = np.random.default_rng(1).standard_normal(3 * CHUNK // 2)
    vec = vector(comm, values)
    total = np.ones(vec.getLocalSize(), np.float32)
    add_rounded(total, vec)
    assert total.tobytes() == (np.float32(1) + vec.array_r).astype(np.float32).tobytes()
    vec.destroy()
