"""Which device a rank gets, what the header says of it, and what is refused; of cards that are not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calling import check_refusal, refusal  # first: drivers are on the path behind it
from common.device import Card, bind, described, memory_line, number_of, on_card, short_of_memory
from launch import HERE, SMALL
from mpi4py import MPI

from ddml.errors import InputError

NO_CUDA = not torch.backends.cuda.is_built()


@pytest.mark.parametrize(
    ("asked", "place", "visible", "expected"),
    [
        (None, 0, 1, 0), (None, 3, 1, 0), (None, 0, 4, 0), (None, 3, 4, 3), (None, 5, 4, 1), (None, 7, 2, 1),
        (0, 3, 1, 0), (2, 0, 4, 2), (3, 9, 4, 3),
    ],
)  # fmt: skip
def test_a_rank_gets_the_card_of_its_place(asked: int | None, place: int, visible: int, expected: int) -> None:
    assert number_of(asked, place, visible) == expected


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        (7, 4, "no cuda:7, visible is cuda:0 to cuda:3"), (1, 1, "no cuda:1, visible is cuda:0"),
        (4, 4, "no cuda:4"), (-1, 2, "no cuda:-1"), (None, 0, "no CUDA device is visible"), (0, 0, "no CUDA device"),
    ],
)  # fmt: skip
def test_a_card_that_is_not_there_is_refused(asked: int | None, visible: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        number_of(asked, 0, visible)


CARD = Card("n1", "a", 0, 2, "NVIDIA H100", 85 * 10**9)
OTHER = replace(CARD, identity="b", number=1)


def test_the_header_names_device_binding_and_what_is_on_the_host() -> None:
    device, host = described([CARD, OTHER], False, False).splitlines()
    assert device == (
        "device NVIDIA H100 (85000000000 bytes): rank 0 cuda:0, rank 1 cuda:1 "
        "(rank within the node modulo visible devices)"
    )
    for what in ("vectors (PETSc without CUDA", "K-FAC factors", "dense matrices", "sums over ranks"):
        assert what in host


@pytest.mark.parametrize(
    ("cards", "named", "expected"),
    [
        ([CARD, CARD], False, "up to 2 ranks share a card"),
        ([CARD, OTHER, CARD, CARD], False, "up to 3 ranks share a card"),
        ([replace(CARD, visible=1), replace(CARD, visible=1, identity="b")], False, "the only one that each rank sees"),
        ([CARD, CARD], True, "as -device says"),
        ([CARD, replace(CARD, host="n2")], False, "rank 0 cuda:0 of n1, rank 1 cuda:0 of n2"),
        ([CARD, replace(CARD, name="T4", memory=5)], False, "NVIDIA H100 (85000000000 bytes), T4 (5 bytes)"),
        ([replace(CARD, identity=str(i)) for i in range(11)], False, "rank 7 cuda:0, and 3 more"),
    ],
)
def test_the_header_says_who_shares_what(cards: list[Card], named: bool, expected: str) -> None:
    assert expected in described(cards, named, True)


@pytest.mark.parametrize(
    "cards", [[CARD], [CARD, OTHER], [replace(CARD, visible=1, identity=str(i)) for i in range(4)]]
)
def test_nobody_shares_where_each_has_a_card(cards: list[Card]) -> None:
    assert "share" not in described(cards, False, False)


@pytest.mark.parametrize("name", ["pinn", "classify"])
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("meta", "cpu, cuda or cuda:K"), ("gpu", "cpu, cuda or cuda:K"), ("cuda:x", "cpu, cuda or cuda:K"),
        ("cuda:-1", "cpu, cuda or cuda:K"), ("mps", "cpu, cuda or cuda:K"),
        *((each, "was built without CUDA") for each in ("cuda", "cuda:0", "cuda:7") if NO_CUDA),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_is_refused_on_all_ranks(
    name: str, device: str, expected: str, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_refusal(name, ["-device", device, "-output", str(shared_tmp / "run.h5")], expected, shared_tmp, capfd)


@pytest.mark.parametrize(
    ("asked", "computes", "petsc_has_cuda", "expected"),
    [
        ({}, "cpu", False, False), ({}, "cpu", True, False), ({}, "cuda", False, False), ({}, "cuda", True, True),
        ({"vec_type": "cuda"}, "cuda", True, True), ({"vec_type": "standard"}, "cuda", True, False),
        ({"vec_type": "mpi"}, "cuda", True, False), ({"vec_type": "seq"}, "cpu", False, False),
        ({"dm_vec_type": "standard"}, "cuda", True, True),
        ({"vec_type": "cuda"}, "cpu", True, "with -device cuda only"),
        ({"vec_type": "cuda"}, "cpu", False, "with -device cuda only"),
        ({"vec_type": "cuda"}, "cuda", False, "this PETSc was built without CUDA"),
        *(({"vec_type": kind}, "cuda", True, f"standard .* or cuda, got '{kind}'")
          for kind in ("mpicuda", "hip", "kokkos", "CUDA", "")),
        ({"dm_vec_type": "cuda"}, "cuda", True, "-dm_vec_type"),
        ({"dm_vec_type": "kokkos"}, "cpu", False, "by -vec_type"),
    ],
)  # fmt: skip
def test_vectors_are_where_they_can_be(
    asked: dict[str, str], computes: str, petsc_has_cuda: bool, expected: bool | str
) -> None:
    if isinstance(expected, bool):
        assert on_card(asked, computes, petsc_has_cuda) is expected
        return
    with pytest.raises(InputError, match=expected):
        on_card(asked, computes, petsc_has_cuda)


def test_the_header_says_what_is_on_the_card() -> None:
    _, card, host = described([CARD, OTHER], False, True, True).splitlines()
    assert card == "on the card: vectors (VECCUDA; PETSc's own sums, in no fixed order)"
    assert "vectors" not in host and "K-FAC factors" in host and "subdomains" in host
    assert "vectors (as -vec_type says" in described([CARD], False, True)


@pytest.mark.parametrize("name", ["pinn", "classify"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-vec_type cuda", "with -device cuda only"), ("-vec_type mpicuda -device cpu", "got 'mpicuda'"),
        ("-vec_type kokkos", "got 'kokkos'"), ("-dm_vec_type cuda", "-dm_vec_type"),
    ],
)  # fmt: skip
def test_vectors_elsewhere_are_refused(
    name: str, words: str, expected: str, shared_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_refusal(name, [*words.split(), "-output", str(shared_tmp / "run.h5")], expected, shared_tmp, capfd)


def test_a_cpu_is_bound_without_a_word(comm: MPI.Comm) -> None:
    for name in ("cpu", "cpu:0"):
        found = bind(comm, name)
        assert found.torch == torch.device("cpu") and found.words() == ""


TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 10.21 GiB is "
    "free. Including non-PyTorch memory, this process has 68.88 GiB memory in use.\nSee documentation"
)


def test_a_short_memory_is_told_with_the_bytes() -> None:
    line = memory_line(TORCH_SAYS)
    assert "Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 10.21 GiB is free;" in line
    assert "\n" not in line and "-chunk" in line
    assert "something else" in memory_line("something else")


def test_a_short_memory_is_told_whatever_has_wrapped_it() -> None:
    with pytest.raises(InputError, match=r"Tried to allocate 20\.00 GiB"), short_of_memory():
        try:
            raise torch.OutOfMemoryError(TORCH_SAYS)
        except RuntimeError as error:
            raise ValueError("error code 101") from error
    with pytest.raises(ZeroDivisionError), short_of_memory():
        raise ZeroDivisionError


def test_a_memory_that_is_short_in_the_middle_of_a_run_ends_it_with_one_line() -> None:
    problem = f"{HERE / 'faulty_problems.py'}:RunsOutOfMemory"
    line = refusal("pinn", *SMALL, "-problem", problem, "-solver", "lbfgs", "-max_it", 90, "-summation_blocks", 6)
    assert "Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB" in line


@pytest.mark.parametrize("name", ["pinn", "classify"])
def test_launches_are_recorded_on_gpus_only(name: str, shared_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-capture", "-output", str(shared_tmp / "run.h5"), *SMALL[6:]] if name == "pinn" else ["-capture"]
    check_refusal(name, words, "-capture is for -device cuda", shared_tmp, capfd)
