"""The run file: round trips, kills, full disks, damage; on any number of ranks."""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import RunFileError
from ddml.runs import sealed
from ddml.runs.history import COLUMNS, History
from ddml.runs.run_file import ParameterEntry, check_writable, inspect, read, write

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


def test_another_size_is_refused(shared_tmp: Path) -> None:
    small(shared_tmp / "run.h5")
    theta = vector(np.full(SIZE + 1, 5.0))
    with pytest.raises(RunFileError, match=r"holds 3000 parameters, 3001 were expected"):
        read(str(shared_tmp / "run.h5"), theta)
    assert_values(theta, np.full(SIZE + 1, 5.0))
    theta.destroy()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": {1, 2}}, r"solver/x.*not set"),
        ({"x": [{"y": 1j}]}, r"solver/x/0/y.*not complex"),
        ({"x": np.array(["a"])}, r"solver/x: an array must hold numbers"),
        ({"x": {1: 2}}, r"solver/x: a key must be a str"),
        ({"a/b": 1}, "without '/'"),
        ({"": 1}, "not empty"),
        ({"x": "a\0b"}, "NUL"),
        ({"x": "\ud800"}, "surrogates"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused(shared_tmp: Path, state: dict[str, Any], message: str) -> None:
    path = shared_tmp / "run.h5"
    small(path)
    before = path.read_bytes()
    theta = vector(numbers(0))
    with pytest.raises(RunFileError, match=message):
        save(path, theta, state)
    theta.destroy()
    assert path.read_bytes() == before
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]


def test_a_vector_of_another_layout_is_refused_on_all_ranks(comm: MPI.Comm, shared_tmp: Path) -> None:
    if comm.size == 1:
        pytest.skip("one rank knows one layout")
    theta = vector(np.zeros(SIZE))
    other = PETSc.Vec().createMPI((SIZE if comm.rank == 0 else 0, SIZE), comm=comm)
    with pytest.raises(RunFileError, match=r"solver/m: a vector must have theta's layout"):
        save(shared_tmp / "run.h5", theta, {"m": other})
    theta.destroy()
    other.destroy()


def test_a_vector_of_another_size_comes_back_in_equal_shares(comm: MPI.Comm, shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    size = 3 * SIZE + 1
    other = PETSc.Vec().createMPI((size if comm.rank == comm.size - 1 else 0, size), comm=comm)
    begin, end = other.getOwnershipRange()
    other.setArray(np.sqrt(np.arange(begin, end, dtype=float)))
    save(shared_tmp / "run.h5", theta, {"m": other})
    state, _ = read(str(shared_tmp / "run.h5"), theta)
    begin, end = state["m"].getOwnershipRange()
    assert end - begin - size // comm.size in (0, 1)
    assert np.array_equal(state["m"].array_r, np.sqrt(np.arange(begin, end, dtype=float)))
    for vec in (theta, other, state["m"]):
        vec.destroy()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"format": "x"}, "use another name"),
        ({"a": [1]}, "must be a str, int, float or bool, not a list"),
        ({"a": 2**63}, "64 bits"),
    ],
)
def test_attributes_that_cannot_be_kept_are_refused(shared_tmp: Path, attributes: Any, message: str) -> None:
    theta = vector(np.zeros(3))
    with pytest.raises(RunFileError, match=message):
        write(str(shared_tmp / "r.h5"), theta, parameters=(), state={}, history=History(), attributes=attributes)
    theta.destroy()


def test_an_error_on_one_rank_is_an_error_on_all(shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    state = {"x": {1} if comm.rank == comm.size - 1 else 1}
    with pytest.raises(RunFileError, match="not set"):
        save(shared_tmp / "run.h5", theta, state)
    theta.destroy()


@pytest.mark.skipif(comm.size == 1, reason="needs two ranks")
def test_vectors_that_only_some_ranks_have_are_refused(shared_tmp: Path) -> None:
    theta = vector(np.zeros(SIZE))
    with pytest.raises(RunFileError, match="rank 1 and rank 0 differ in solver/m"):
        save(shared_tmp / "run.h5", theta, {"m": theta} if comm.rank == 0 else {})
    theta.destroy()
    assert os.listdir(shared_tmp) == []


@pytest.mark.parametrize("victim", ["first", "last"])
def test_a_full_disk_on_one_rank_leaves_the_old_file(shared_tmp: Path, victim: str) -> None:
    """A limit on the size of files stands for the full disk: writes behind it fail."""
    path = shared_tmp / "run.h5"
    small(path, 1.0)
    before = path.read_bytes()
    comm.barrier()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    theta = vector(np.full(SIZE, 2.0))
    try:
        if comm.rank == (0 if victim == "first" else comm.size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(RunFileError, match=r"cannot write .*File too large.*unchanged"):
            save(path, theta, {"m": theta})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]
    comm.barrier()
    save(path, theta, {"m": theta})
    assert path.read_bytes() != before
    theta.destroy()


def test_what_an_earlier_kill_left_is_no_obstacle(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    if comm.rank == 0:
        (shared_tmp / "run.h5.new").write_bytes(b"left" * 100_000)
    comm.barrier()
    check_writable(str(path), comm)
    if comm.rank == 0:
        (shared_tmp / "run.h5.new").write_bytes(b"left" * 100_000)
    comm.barrier()
    small(path, 3.0)
    assert sorted(os.listdir(shared_tmp)) == ["run.h5"]
    theta = vector(np.zeros(SIZE))
    read(str(path), theta)[0]["m"].destroy()
    assert_values(theta, np.full(SIZE, 3.0))
    theta.destroy()


def test_a_symbolic_link_stays_one(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    if comm.rank == 0:
        path.symlink_to(shared_tmp / "elsewhere.h5")
    comm.barrier()
    small(path)
    assert path.is_symlink()
    assert sorted(os.listdir(shared_tmp)) == ["elsewhere.h5", "run.h5"]


@pytest.mark.parametrize("place", ["folder", "missing/run.h5", "file/run.h5"])
def test_unwritable_places(shared_tmp: Path, place: str) -> None:
    if comm.rank == 0:
        (shared_tmp / "folder").mkdir()
        (shared_tmp / "file").write_text("in the way")
    comm.barrier()
    with pytest.raises(RunFileError, match="cannot write"):
        check_writable(str(shared_tmp / place), comm)
    with pytest.raises(RunFileError, match="cannot write"):
        small(shared_tmp / place)
    comm.barrier()
    assert sorted(os.listdir(shared_tmp)) == ["file", "folder"]
    assert (shared_tmp / "file").read_text() == "in the way"


def test_check_writable_leaves_no_trace(shared_tmp: Path) -> None:
    check_writable(str(shared_tmp / "run.h5"), comm)
    comm.barrier()
    assert os.listdir(shared_tmp) == []
    comm.barrier()
    small(shared_tmp / "run.h5")
    before = (shared_tmp / "run.h5").read_bytes()
    check_writable(str(shared_tmp / "run.h5"), comm)
    assert (shared_tmp / "run.h5").read_bytes() == before
    assert os.listdir(shared_tmp) == ["run.h5"]


def put(path: Path, content: bytes) -> None:
    """Rank 0 writes the file."""
    comm.barrier()
    if comm.rank == 0:
        path.write_bytes(content)
    comm.barrier()


def test_every_kind_of_damage_is_refused(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    small(path)
    good = path.read_bytes()
    for length in (1, 100, 511, 512, 513, 2048, len(good) // 2, len(good) - 8, len(good) - 1):
        put(path, good[:length])
        refused(path, "is damaged|is not a run file")
    put(path, good + b"\0")
    refused(path, "is damaged")
    for position in np.random.default_rng(0).integers(0, len(good), 40):
        bad = bytearray(good)
        bad[position] ^= 1 << int(position) % 8
        put(path, bytes(bad))
        refused(path, "is damaged|is not a run file|is an HDF5 file but not")
    start = len(good) // 2 // 512 * 512
    put(path, good[:start] + bytes(512) + good[start + 512 :])
    refused(path, "do not match their checksum")
    put(path, good)
    assert inspect(str(path), comm).size == SIZE


def test_foreign_files_are_refused(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    refused(path, "there is no run file")
    refused(shared_tmp, "is a folder, not a run file")
    for content in (b"", b"x", b"garbage" * 1000, bytes(4096)):
        put(path, content)
        refused(path, "is not a run file")
    if comm.rank == 0:
        with h5py.File(path, "w") as file:
            file["parameters/theta"] = np.zeros(SIZE)
    comm.barrier()
    refused(path, "is an HDF5 file but not a run file")


def test_a_newer_format_is_refused(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "FORMAT_VERSION", 2)
        small(shared_tmp / "run.h5")
    refused(shared_tmp / "run.h5", "has run file format 2, this ddml reads formats up to 1; use a newer ddml")


def test_checksum_does_not_depend_on_the_pieces_and_finds_what_a_plain_sum_misses() -> None:
    data = np.random.default_rng(0).integers(0, 256, 200_003, dtype=np.uint8)
    whole = sealed.checksum(data, 512)
    for cut in (8, 65_536, 65_544, 199_992):
        assert (sealed.checksum(data[:cut], 512) + sealed.checksum(data[cut:], 512 + cut)) % 2**64 == whole
    ones = np.ones(4096).view(np.uint8)
    zeroed, swapped = ones.copy(), np.repeat([1.0, 2.0], 2048).view(np.uint8)
    zeroed[4096:8192] = 0
    assert sealed.checksum(zeroed, 0) != sealed.checksum(ones, 0)
    assert sealed.checksum(swapped, 0) != sealed.checksum(np.roll(swapped, 16_384), 0)


CHILD = """
import sys, numpy as np
from petsc4py import PETSc
from ddml.runs.run_file import write
from ddml.runs.history import History
path, version = sys.argv[1], int(sys.argv[2])
theta, m = (PETSc.Vec().createSeq(20000) for _ in range(2))
while True:
    version += 1
    theta.set(version)
    m.set(-version)
    history = History.from_columns({"loss": np.full(version % 50, float(version))})
    write(path, theta, parameters=(), state={"m": m, "version": version}, history=history, attributes={"v": version})
    print(version, flush=True)
"""


def killed_writer(path: Path, version: int, pause: float) -> int:
    """Start a writer behind `version`, kill it `pause` seconds after its first file; its last finished version."""
    alone = {name: text for name, text in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    command = [sys.executable, "-c", CHILD, str(path), str(version)]
    with subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stderr
        first = child.stdout.readline()
        assert first, child.stderr.read()
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        lines = [first, *child.stdout.readlines()]
    # The kill may cut the last line short.
    return int([line for line in lines if line.endswith("\n")][-1])


def test_a_kill_at_any_moment_leaves_a_whole_file(shared_tmp: Path) -> None:
    path = shared_tmp / "run.h5"
    error = ""
    if comm.rank == 0:
        try:
            theta, version = PETSc.Vec().createSeq(20_000), 0
            for pause in np.random.default_rng().uniform(0, 0.05, 15):
                done = killed_writer(path, version, pause)
                state, history = read(str(path), theta)
                version = state["version"]
                assert version in (done, done + 1)
                np.testing.assert_array_equal(theta.getArray(), float(version))
                np.testing.assert_array_equal(state["m"].getArray(), -float(version))
                np.testing.assert_array_equal(history["loss"], np.full(version % 50, float(version)))
                assert inspect(str(path), MPI.COMM_SELF).attributes["v"] == version
                state["m"].destroy()
            theta.destroy()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    assert comm.bcast(error) == ""
