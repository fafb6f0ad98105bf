"""Kernels and K + mu I against dense numpy, in any precision, under any limit of memory, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from scipy.spatial.distance import cdist

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, median_distance, named
from ddml.kernel_machines.functions import Kernel, check_symmetry, squared_distances, users

RNG = np.random.default_rng(11)
CLOUD = RNG.standard_normal((301, 4)) + 50.0
TWINS = np.concatenate([CLOUD, CLOUD[:60], CLOUD[60:90] + 1e-7])
PIXELS = RNG.integers(0, 3, (150, 5, 4)).astype(np.uint8)
SAMPLES = {"cloud": CLOUD, "twins": TWINS, "pixels": PIXELS}
WIDTH = 2.0


def dense(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An independent computation, from differences."""
    x, y = (np.asarray(a, dtype=np.float64).reshape(len(a), -1) for a in (x, y))
    d = cdist(x, y) / WIDTH
    if name == "rbf":
        return np.exp(-(d**2) / 2)
    if name == "laplace":
        return np.exp(-d)
    if name == "matern32":
        return (1 + np.sqrt(3) * d) * np.exp(-np.sqrt(3) * d)
    if name == "matern52":
        return (1 + np.sqrt(5) * d + 5 * d**2 / 3) * np.exp(-np.sqrt(5) * d)
    return (x @ y.T / WIDTH**2 + 1) ** 3


NAMES = ("rbf", "laplace", "matern32", "matern52", "polynomial")


def made(comm: MPI.Comm, samples: np.ndarray, name: str = "rbf", **settings: Any) -> KernelOperator:
    layout = SampleLayout(SampleDomain.by_tree(samples, 8, 0.1), comm)
    return KernelOperator(named(name, WIDTH), samples, 0.3, layout, **settings)


def product(operator: KernelOperator, V: np.ndarray) -> np.ndarray:
    """By PETSc's shell matrix."""
    matrix, layout = operator.matrix(V.shape[1]), operator.layout
    x, y = matrix.createVecs()
    layout.set(x, V)
    matrix.mult(x, y)
    found = layout.get(y)
    for thing in (matrix, x, y):
        thing.destroy()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dense_matrix(comm: MPI.Comm, name: str, samples: str) -> None:
    x = SAMPLES[samples]
    K = dense(name, x, x) + 0.3 * np.eye(len(x))
    scale = np.linalg.norm(K, 2)
    for columns in (1, 3):
        V = np.cos(np.arange(len(x) * columns, dtype=float) ** 1.3).reshape(-1, columns)
        found = product(made(comm, x, name), V)
        assert np.linalg.norm(found - K @ V) <= 1e-13 * scale * np.linalg.norm(V)
        rough = product(made(comm, x, name, dtype="float32"), V)
        assert np.linalg.norm(rough - K @ V) <= 3e-6 * scale * np.linalg.norm(V)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["rbf", "laplace", "polynomial"])
def test_products_have_the_same_bits_on_any_ranks_kept_or_not(comm: MPI.Comm, name: str, dtype: str) -> None:
    row = 4 * 8 * len(TWINS)
    V = np.cos(np.arange(len(TWINS) * 2.0)).reshape(-1, 2)
    for memory in (1e9, 70 * row, 7.5 * row, row):  # kept; blocks of a unit, of some samples, of one
        together = made(comm, TWINS, name, memory=memory, dtype=dtype)
        alone = made(MPI.COMM_SELF, TWINS, name, memory=memory, dtype=dtype)
        assert together.block == alone.block
        assert product(together, V).tobytes() == product(alone, V).tobytes()
    unit = made(comm, TWINS, name, memory=1e9, dtype=dtype).block
    computed = made(comm, TWINS, name, memory=unit * row, dtype=dtype)
    kept = made(comm, TWINS, name, memory=1e9, dtype=dtype)
    assert computed.kept is None or comm.size > 1  # as all of them together have room
    assert kept.kept is not None
    assert computed.block == kept.block == unit
    assert product(kept, V).tobytes() == product(computed, V).tobytes()
    assert "kept" in repr(kept)
    assert ("in each product by blocks of" in repr(computed)) == (not computed.keeps)


@pytest.mark.ranks
def test_what_is_kept_fits_the_limit(comm: MPI.Comm) -> None:
    for memory in (1e9, 2e6, 1e6, 5e5, 1e5, 2e4):
        operator = made(comm, TWINS, memory=memory)
        kept = sum(block.nbytes for unit in (operator.kept or {}).values() for block in unit)
        blocks = 8 * len(TWINS) * operator.block
        assert kept + blocks <= memory
        assert len(set(comm.allgather(operator.kept is None))) == 1


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_residuals_are_true_in_any_precision(comm: MPI.Comm, dtype: str) -> None:
    operator = made(comm, CLOUD, "laplace", dtype=dtype)
    V = np.sin(np.arange(len(CLOUD) * 2.0)).reshape(-1, 2)
    K = dense("laplace", CLOUD, CLOUD) + 0.3 * np.eye(len(CLOUD))
    Y, rows = K @ V, operator.layout.rows
    found = operator.residual(Y[rows], V[rows])
    assert np.abs(found).max(initial=0.0) < 1e-11
    assert operator.products == 2


def test_distances_of_near_samples_have_all_their_digits() -> None:
    x = torch.as_tensor(CLOUD)
    y = x + 1e-9 * torch.as_tensor(RNG.standard_normal(CLOUD.shape))
    found = squared_distances(x, y).sqrt()
    expected = torch.as_tensor(cdist(CLOUD, y.numpy()))
    assert torch.allclose(found.diagonal(), expected.diagonal(), rtol=1e-12)
    assert torch.allclose(found, expected, rtol=1e-9)
    assert (squared_distances(x, x.clone()).diagonal() == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_diagonals_are_those_of_the_matrix(name: str) -> None:
    kernel, x = named(name, WIDTH), torch.as_tensor(CLOUD)
    assert torch.allclose(kernel.diagonal(x), kernel(x, x.clone()).diagonal(), rtol=1e-12)
    mine = users(kernel, "mine.py:k")
    assert torch.allclose(mine.diagonal(x), kernel.diagonal(x), rtol=1e-12)


@pytest.mark.parametrize("count", [2, 50, 1500])
def test_the_median_distance(count: int) -> None:
    x = RNG.standard_normal((count, 3))
    expected = np.median(cdist(x, x)[np.triu_indices(count, 1)])
    assert median_distance(x) == pytest.approx(expected, rel=1e-6 if count <= 1000 else 0.05)
    assert median_distance(x) == median_distance(x)


@pytest.mark.ranks
def test_a_users_kernel_is_a_file(comm: MPI.Comm, shared_tmp: Path) -> None:
    file = shared_tmp / "mine.py"
    if comm.rank == 0:
        file.write_text("import torch\n\ndef k(x, y):\n    return torch.exp(-torch.cdist(x, y, p=1) / 4)\n")
    comm.barrier()
    layout = SampleLayout(SampleDomain.by_tree(CLOUD, 4), comm)
    operator = KernelOperator(named(f"{file}:k"), CLOUD, 0.3, layout)
    K = np.exp(-cdist(CLOUD, CLOUD, "cityblock") / 4) + 0.3 * np.eye(len(CLOUD))
    V = np.sin(np.arange(len(CLOUD), dtype=float))[:, None]
    assert np.abs(product(operator, V) - K @ V).max() < 1e-12


def late(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """NaN for tables of more samples than are tried."""
    return torch.full((len(x), len(y)), torch.nan, dtype=x.dtype) if len(y) > 32 else torch.exp(-torch.cdist(x, y))


BAD: dict[str, tuple[Any, str]] = {
    "shape": (lambda x, y: (x @ y.T)[:, :-1], r"must give a tensor \(32, 32\).*got \(32, 31\)"),
    "diagonal only": (lambda x, y: (x * y).sum(dim=1), r"got \(32,\)"),
    "precision": (lambda x, y: (x @ y.T).float(), "got .* of torch.float32"),
    "array": (lambda x, y: (x @ y.T).numpy(), "got ndarray"),
    "nothing": (lambda x, y: None, "got NoneType"),
    "NaN": (lambda x, y: torch.log(x @ y.T - 1e4), "not finite"),
    "infinite": (lambda x, y: 1 / torch.zeros(len(x), len(y), dtype=x.dtype), "not finite"),
    "unsymmetric": (lambda x, y: x @ torch.triu(torch.ones(4, 4, dtype=x.dtype)) @ y.T, "is not symmetric"),
    "of one side": (lambda x, y: x[:, :1] + 0 * (x @ y.T), "is not symmetric"),
    "negative": (lambda x, y: -torch.exp(-torch.cdist(x, y)), "is not positive"),
    "zero": (lambda x, y: 0 * (x @ y.T), "is not positive"),
    "exception": (lambda x, y: x @ y, "kernel 'mine.py:k' raised RuntimeError"),
    "later": (late, "not finite"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", BAD)
def test_a_users_kernel_that_cannot_be_one_is_refused_on_all_ranks(comm: MPI.Comm, name: str) -> None:
    function, words = BAD[name]
    layout = SampleLayout(SampleDomain.by_tree(CLOUD, 4), comm)
    with pytest.raises(InputError, match=words):
        _ = KernelOperator(users(function, "mine.py:k"), CLOUD, 0.3, layout).kept


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("rbf", {"width": 0.0}, "width of a kernel must be above 0, got 0"),
        ("laplace", {"width": -1.0}, "must be above 0, got -1"),
        ("matern32", {"width": float("nan")}, "must be above 0, got nan"),
        ("matern52", {"width": float("inf")}, "must be above 0, got inf"),
        ("polynomial", {"degree": 0}, "degree of a polynomial kernel must be 1 or more, got 0"),
        ("gauss", {}, "unknown kernel 'gauss'; there are rbf, laplace"),
        ("there_is_no.py:k", {}, "there is no file"),
    ],
)
def test_kernels_that_there_are_not_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        named(name, **settings)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shift": -0.1}, "lambda must be 0 or more, got -0.1"),
        ({"shift": float("nan")}, "lambda must be 0 or more, got nan"),
        ({"shift": float("inf")}, "lambda must be 0 or more, got inf"),
        ({"memory": 9631.0}, "9631 bytes is below one block .* are 9632"),
        ({"memory": 0.0}, "0 bytes is below one block"),
        ({"memory": -1e9}, "-1e[+]09 bytes is below one block"),
        ({"dtype": "float16"}, "one of float64, float32; got 'float16'"),
        ({"samples": CLOUD[:-1]}, "the layout has 301 samples, got 300"),
        ({"samples": np.where(CLOUD > 52, np.nan, CLOUD)}, "values that are not finite"),
    ],
)
def test_operators_that_cannot_be_are_refused(comm: MPI.Comm, settings: dict[str, Any], words: str) -> None:
    layout = SampleLayout(SampleDomain.by_tree(CLOUD, 4), comm)
    arguments = {"samples": CLOUD, "shift": 0.3} | settings
    with pytest.raises(InputError, match=words):
        KernelOperator(named("rbf", WIDTH), layout=layout, **arguments)


def test_points_of_another_shape_and_equal_samples_without_a_width_are_refused() -> None:
    operator = made(MPI.COMM_SELF, CLOUD)
    with pytest.raises(InputError, match="samples have 4 numbers here, got 3"):
        operator.prepared(CLOUD[:, :3])
    for coefficients in (np.zeros((300, 2)), np.zeros((302, 2)), np.zeros(301), np.zeros((301, 2, 2))):
        with pytest.raises(InputError, match="301 samples need a row of coefficients each"):
            operator.predict(coefficients, CLOUD)
    for samples in (np.ones((20, 3)), np.ones((1, 3)), np.repeat([[0.0], [1.0]], [30, 2], axis=0)):
        with pytest.raises(InputError, match="median distance of the samples is 0"):
            median_distance(samples)


def test_a_symmetric_kernel_of_few_samples_passes() -> None:
    for count in (1, 2, 33, 100):
        check_symmetry(named("rbf"), torch.as_tensor(CLOUD[:count]))
    assert repr(Kernel("mine", torch.cdist, torch.ones_like, True)) == "mine"


@pytest.mark.ranks
def test_an_error_of_a_kernel_in_a_product_reaches_all_ranks(comm: MPI.Comm) -> None:
    calls: list[int] = []

    def fails_later(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) > 3 and comm.rank == comm.size - 1:
            raise ValueError("out of luck")
        return torch.exp(-torch.cdist(x, y))

    layout = SampleLayout(SampleDomain.by_tree(CLOUD, 4), comm)
    operator = KernelOperator(users(fails_later, "mine.py:k"), CLOUD, 0.3, layout, memory=4 * 8 * 301)
    matrix = operator.matrix()
    x, y = matrix.createVecs()
    with pytest.raises(PETSc.Error) as raised:
        matrix.mult(x, y)
    for thing in (matrix, x, y):
        thing.destroy()
    assert "out of luck" in str(raised.value.__cause__)
