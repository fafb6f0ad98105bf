"""The model of cost: what it chooses, and that it keeps to what it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from ddml.errors import InputError
from ddml.kernel_machines import KernelOperator, SampleDomain, SampleLayout, named
from ddml.kernel_machines.costs import Task, choices, coarse_rank, iterations, memory, seconds

MNIST = Task(8192, 784, 10, 0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 100, 1000, 2048, 8192, 20_000, 60_000, 1_000_000])
@pytest.mark.parametrize("kept", [True, False])
def test_there_is_a_choice_for_any_number_of_samples(n: int, kept: bool) -> None:
    for shift in (0.0, 1e-12, 1e-3, 0.1, 10.0):
        found = choices(Task(n, 50, 3, shift, kept=kept))
        assert 1 <= found.subdomains <= n
        assert found.subdomains & (found.subdomains - 1) == 0
        assert 1 <= found.coarse_rank <= n
        assert 0 <= found.overlap < 1
        assert 0 < found.seconds < float("inf")


@pytest.mark.parametrize("n", [10, 100, 150, 1024, 4096, 30_000])
def test_it_is_the_same_on_any_number_of_ranks_until_there_are_more_than_subdomains(n: int) -> None:
    most = max(4, min(n // 512, 16))
    found = {choices(Task(n, 784, 10, 0.1, ranks=ranks)).subdomains for ranks in (1, 2, 3, 4, 8, 16) if ranks <= most}
    assert len(found) == 1
    assert choices(Task(n, 784, 10, 0.1, ranks=500)).subdomains >= min(500, n // 64)


@pytest.mark.parametrize("shift", [1.0, 0.1, 1e-3])
def test_more_is_chosen_where_products_cost_more(shift: float) -> None:
    kept, computed = (choices(replace(MNIST, shift=shift, kept=kept)) for kept in (True, False))
    assert computed.coarse_rank >= kept.coarse_rank
    assert computed.iterations <= kept.iterations
    assert computed.seconds > kept.seconds


@pytest.mark.parametrize("samples", [4096, 20_000, 60_000])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_chosen_fits_the_memory(samples: int, ranks: int) -> None:
    task = Task(samples, 784, 10, 0.1, ranks, kept=False)
    free = choices(task)
    for share in (0.9, 0.5, 0.3):
        limited = choices(replace(task, memory=share * free.bytes))
        assert limited.bytes <= share * free.bytes
        assert limited.seconds >= free.seconds
    sizes = [samples / 64.0] * 64
    most = coarse_rank(task, sizes)
    fewer = coarse_rank(replace(task, memory=0.6 * memory(task, sizes, most)), sizes)
    assert fewer < most
    with pytest.raises(InputError, match=r"limit 1e\+04 bytes a rank are left, less than .* use more subdomains"):
        choices(replace(task, memory=1e4))
    with pytest.raises(InputError, match="use more subdomains, ranks or memory"):
        coarse_rank(replace(task, memory=1e4), sizes)


@pytest.mark.parametrize("n", [10, 300, 2000])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_limit_decides_as_the_operator_does(n: int, dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((n, 3))
    layout = SampleLayout(SampleDomain.by_tree(x, 2), MPI.COMM_SELF)
    for limit in (1e5, 1e6, 1e7, 1e8, 1e9):
        if limit > 32 * n:
            operator = KernelOperator(named("rbf"), x, 0.1, layout, limit, dtype)
            task = Task.within(limit, n, 3, 1, 0.1, 1, dtype)
            assert task.kept == (operator.kept is not None)
            assert task.memory == pytest.approx(operator.spare, rel=0.1, abs=0.1 * limit)
    assert [Task.within(1e9, n, 3, 1, shift).factors for shift in (1e-4, 0.1)] == ["float64", "float32"]


@pytest.mark.parametrize("factors", ["float32", "float64"])
def test_costs_grow_with_what_they_are_of(factors: str) -> None:
    task, sizes = replace(MNIST, factors=factors), [600.0] * 16
    assert memory(task, sizes, 100) < memory(task, sizes, 200) < memory(task, [700.0] * 16, 200)
    assert memory(replace(task, ranks=2), sizes, 200) < memory(task, sizes, 200)
    assert iterations(task, sizes, 100) > iterations(task, sizes, 400)
    assert iterations(task, [512.0] * 16, 100) > iterations(task, sizes, 100)  # no overlap
    assert iterations(replace(task, shift=1e-3), sizes, 100) > iterations(task, sizes, 100)
    assert seconds(replace(task, columns=20), sizes, 100) > seconds(task, sizes, 100)
    assert seconds(replace(task, kept=False), sizes, 100) > seconds(task, sizes, 100)
    assert seconds(replace(task, dtype="float32"), sizes, 100) < seconds(task, sizes, 100)


@pytest.mark.parametrize(
    ("shift", "count", "known"),
    [(1.0, 4, 10), (1.0, 64, 13), (0.1, 4, 16), (0.1, 16, 19), (0.1, 64, 23), (0.01, 16, 24), (1e-4, 64, 35)],
)
def test_iterations_are_roughly_those_measured(shift: float, count: int, known: int) -> None:
    """2,048 images of MNIST, as in docs/kernel_machines.md."""
    size = 2048 / count * 1.1 ** (count.bit_length() - 1)
    assert known / 1.6 < iterations(Task(2048, 784, 10, shift), [size] * count, 204) < 1.6 * known
