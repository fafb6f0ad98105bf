"""Run files: everything comes back, with the same bits."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc
from run_files import (
    ARRAYS,
    ATTRIBUTES,
    PARAMETERS,
    SCALARS,
    SIZE,
    assert_values,
    comm,
    numbers,
    same,
    save,
    small,
    some_history,
    vector,
)

from ddml.runs.history import COLUMNS, History
from ddml.runs.run_file import inspect, read, write


@pytest.mark.ranks
@pytest.mark.parametrize("written", ["even", "first", "uneven"])
@pytest.mark.parametrize("reading", ["even", "first", "uneven"])
def test_everything_comes_back_with_the_same_bits_on_other_ownership_ranges(
    shared_tmp: Path, written: str, reading: str
) -> None:
    theta = vector(numbers(2), written)
    memory = [vector(numbers(seed), written) for seed in range(3, 7)]
    state = {**SCALARS, "arrays": ARRAYS, "lbfgs": {"s": memory[:2], "y": memory[2:3]}, "momentum": memory[3]}
    save(shared_tmp / "run.h5", theta, state)

    other = vector(np.zeros(SIZE), reading)
    found, history = read(str(shared_tmp / "run.h5"), other)
    assert_values(other, numbers(2))
    vectors = [*found["lbfgs"].pop("s"), *found["lbfgs"].pop("y"), found.pop("momentum")]
    for seed, made in enumerate(vectors, 3):
        assert made.getSizes() == other.getSizes()
        assert_values(made, numbers(seed))
    same(found, {**SCALARS, "arrays": ARRAYS, "lbfgs": {}})
    assert len(history) == 5
    for name in COLUMNS:
        assert history[name].tobytes() == some_history()[name].tobytes()
    for made in (theta, other, *memory, *vectors):
        made.destroy()


@pytest.mark.ranks
def test_a_file_of_all_ranks_can_be_read_by_one_and_the_other_way(shared_tmp: Path) -> None:
    small(shared_tmp / "all.h5", 2.0)
    alone = vector(np.zeros(SIZE), on=MPI.COMM_SELF)
    state, _ = read(str(shared_tmp / "all.h5"), alone)
    assert_values(alone, np.full(SIZE, 2.0))
    assert_values(state["m"], np.full(SIZE, -2.0))
    state["m"].destroy()
    if comm.rank == comm.size - 1:
        alone.set(4.0)
        write(str(shared_tmp / "one.h5"), alone, parameters=PARAMETERS, state={}, history=History(), attributes={})
    alone.destroy()
    comm.barrier()
    theta = vector(np.zeros(SIZE))
    assert read(str(shared_tmp / "one.h5"), theta)[0] == {}
    assert_values(theta, np.full(SIZE, 4.0))
    theta.destroy()


def test_numpy_scalars_come_back_as_the_python_numbers(shared_tmp: Path) -> None:
    theta = vector(numbers(0))
    save(shared_tmp / "run.h5", theta, {"x": np.float64(0.1), "i": np.int64(3), "b": np.bool_(True)})
    same(read(str(shared_tmp / "run.h5"), theta)[0], {"x": 0.1, "i": 3, "b": True})
    theta.destroy()


def test_numpy_generator_goes_on_where_it_stopped(shared_tmp: Path) -> None:
    generator = np.random.default_rng(5)
    generator.normal(size=7)
    theta = vector(numbers(0))
    save(shared_tmp / "run.h5", theta, {"sampler": generator.bit_generator.state})
    other = np.random.default_rng()
    other.bit_generator.state = read(str(shared_tmp / "run.h5"), theta)[0]["sampler"]
    np.testing.assert_array_equal(generator.normal(size=9), other.normal(size=9))
    theta.destroy()


def test_header(shared_tmp: Path) -> None:
    small(shared_tmp / "run.h5")
    header = inspect(str(shared_tmp / "run.h5"), comm)
    assert header.parameters == PARAMETERS
    assert (header.size, header.rows) == (SIZE, 5)
    same({name: header.attributes[name] for name in ATTRIBUTES}, ATTRIBUTES)
    assert header.attributes["format"] == "ddml run"
    assert header.attributes["ranks"] == comm.size
    assert header.attributes["numpy_version"] == np.__version__
    assert header.attributes["petsc_version"] == ".".join(map(str, PETSc.Sys.getVersion()))


def test_plain_h5py_reads_the_file(shared_tmp: Path) -> None:
    theta, momentum = vector(numbers(2), "uneven"), vector(numbers(3), "uneven")
    save(shared_tmp / "run.h5", theta, {"level": {"m": [momentum]}, "radius": 0.25})
    with h5py.File(shared_tmp / "run.h5", "r", locking=False) as file:
        assert file["parameters/theta"][()].tobytes() == numbers(2).tobytes()
        assert file["solver/level/m/0"][()].tobytes() == numbers(3).tobytes()
        assert file["solver/radius"][()] == 0.25
        np.testing.assert_array_equal(file["history/loss"], some_history()["loss"])
        assert file.attrs["problem"] == "burgers"
    theta.destroy()
    momentum.destroy()


def test_a_network_without_parameters_and_an_empty_history(shared_tmp: Path) -> None:
    theta = vector(np.zeros(0))
    write(str(shared_tmp / "run.h5"), theta, parameters=(), state={}, history=History(), attributes={})
    assert inspect(str(shared_tmp / "run.h5"), comm).parameters == ()
    state, history = read(str(shared_tmp / "run.h5"), theta)
    assert state == {} and len(history) == 0
    theta.destroy()
