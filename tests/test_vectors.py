"""How torch sees the entries of PETSc's vectors: in place, wherever they are."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

import ddml
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.parameters import parameter_table
from ddml.vectors import CPU, entries, home, owned, share, vector, write
from solvers import Minimisation, minimise

CARD = torch.device("cuda", 0)
HAS_CUDA = PETSc.Sys.hasExternalPackage("cuda")
SIZE = 2000


def layout(comm: MPI.Comm, everything_on_rank: int | None = None) -> ParameterLayout:
    """Of some parameters; if a rank is given, it owns all of them."""
    ranges = None if everything_on_rank is None else [SIZE * (r > everything_on_rank) for r in range(comm.size + 1)]
    return ParameterLayout(parameter_table([("a", (30, 50)), ("b", (500,))]), comm, ranges)


def numbers(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("owner", [None, 0])
def test_vectors_and_tensors_are_the_same_memory_on_all_ranks(comm: MPI.Comm, owner: int | None) -> None:
    x = layout(comm, owner).vector()
    for seen in (entries(x), owned(x)):
        assert len(seen) == x.getLocalSize() and seen.dtype == torch.float64 and seen.device == CPU
        assert len(seen) == 0 or seen.data_ptr() == x.array_r.ctypes.data
    before = x.array_r.ctypes.data
    write(x, numbers(x.getLocalSize()))
    assert x.array_r.ctypes.data == before and seen.tolist() == numbers(x.getLocalSize()).tolist()
    x.scale(2.0)
    assert seen.tolist() == (2 * numbers(x.getLocalSize())).tolist()


@pytest.mark.parametrize(
    "given",
    [
        numbers, lambda n: numbers(n, torch.float32), lambda n: numbers(n, torch.bfloat16),
        lambda n: torch.arange(n), lambda n: numbers(2 * n)[::2], lambda n: numbers(3 * n).view(n, 3)[:, 1],
        lambda n: torch.full((n,), math.nan), lambda n: torch.zeros(1, dtype=torch.float64).expand(n),
        lambda n: numbers(n).requires_grad_().detach(),
    ],
)  # fmt: skip
def test_what_is_written_is_what_numpy_writes(comm: MPI.Comm, given: Callable[[int], torch.Tensor]) -> None:
    x, known = layout(comm).vector(), layout(comm).vector()
    tensor = given(x.getLocalSize())
    write(x, tensor)
    with known as array:
        array[:] = tensor.to(torch.float64).numpy()
    assert x.array_r.tobytes() == known.array_r.tobytes()


def test_petsc_knows_that_entries_were_written(comm: MPI.Comm) -> None:
    x = layout(comm).vector()
    assert x.norm() == 0.0  # which PETSc remembers
    write(x, torch.ones(x.getLocalSize()))
    assert x.norm() == pytest.approx(math.sqrt(SIZE), rel=1e-14)
    state = x.stateGet()
    entries(x), owned(x)
    assert x.stateGet() == state
    write(x, torch.zeros(x.getLocalSize()))
    assert x.stateGet() > state and x.norm() == 0.0


def test_a_tensor_outlives_the_vector_that_it_was_seen_of(comm: MPI.Comm) -> None:
    x = layout(comm).vector()
    write(x, numbers(x.getLocalSize()))
    seen = entries(x)
    x.destroy()
    assert seen.tolist() == numbers(len(seen)).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_over_ranks_and_back(comm: MPI.Comm, dtype: torch.dtype) -> None:
    for chosen in (layout(comm), layout(comm, comm.size - 1)):
        g = chosen.vector()
        shares = [numbers(SIZE, dtype) * (rank + 1) for rank in range(comm.size)]
        chosen.reduce(shares[comm.rank], g)
        total = sum(shares[1:], shares[0])
        most = 4 * comm.size * torch.finfo(dtype).eps * float(total.abs().max())
        assert np.abs(chosen.gather(g).numpy() - total.double().numpy()).max() <= most
        assert chosen.gather(g, dtype).dtype == dtype
        if comm.size == 1:
            assert chosen.gather(g).data_ptr() == g.array_r.ctypes.data
            assert chosen.gather(g).tolist() == shares[0].double().tolist()


def test_all_entries_are_handed_out_on_the_device_that_is_asked_for(comm: MPI.Comm) -> None:
    x = layout(comm).vector()
    for dtype, device in itertools.product((torch.float64, torch.float32), ("cpu", "meta")):
        found = layout(comm).gather(x, dtype, torch.device(device))
        assert (found.device.type, found.dtype, len(found)) == (device, dtype, SIZE)


def test_vectors_are_on_the_host_unless_a_card_and_petsc_allow_it() -> None:
    for name in ("cpu", "meta"):
        assert home(torch.device(name)) == CPU
    assert HAS_CUDA or home(CARD) == CPU


def regression() -> ddml.ModuleLoss:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    module = torch.nn.Linear(1, 3).double()
    return ddml.ModuleLoss(module, lambda y, t: (y - t).square().sum(1), x, x.expand(-1, 3))


@pytest.mark.skipif(HAS_CUDA, reason="make gpu tries it")
@pytest.mark.parametrize(
    "make",
    [
        lambda comm: share(CARD), lambda comm: vector(comm, 3, 3 * comm.size, CARD),
        lambda comm: ParameterLayout(parameter_table([("a", (9,))]), comm, device=torch.device("cuda")).vector(),
        lambda comm: Minimisation(regression(), "tr", comm, vectors=CARD),
        lambda comm: minimise(regression(), "lbfgs", comm, vectors=torch.device("cuda:5")),
    ],
)  # fmt: skip
def test_a_card_is_refused_of_a_petsc_without_cuda(comm: MPI.Comm, make: Callable[[MPI.Comm], object]) -> None:
    with pytest.raises(InputError, match="this PETSc was built without CUDA"):
        make(comm)


def test_where_vectors_are_said_to_be_on_the_host_nothing_changes(comm: MPI.Comm) -> None:
    said, found = (minimise(regression(), "lbfgs", comm, iterations=4, vectors=where) for where in (CPU, None))
    assert said.losses.tobytes() == found.losses.tobytes()
