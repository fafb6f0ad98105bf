"""Which device each rank computes on, and what is said of it."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mpi4py import MPI
from petsc4py import PETSc

from ddml.errors import CollectiveError, InputError
from ddml.parallel import agreed, cause
from ddml.vectors import CPU, share

LISTED = 8  # ranks that the header names one by one (our choice)
VEC_TYPES = ("vec_type", "dm_vec_type")
HOST_TYPES = ("standard", "mpi", "seq")


@dataclass(frozen=True)
class Card:
    """A rank's GPU.

    Attributes
    ----------
    host, identity : str
        Of the node, and of the card: ranks with the same ones share it.
    number, visible : int
        Which one it is of those that this rank sees, and how many these are.
    name : str
    memory : int
        Bytes.
    """

    host: str
    identity: str
    number: int
    visible: int
    name: str
    memory: int


@dataclass(frozen=True)
class Device:
    """Where this rank computes, where its vectors are, and on rank 0 the cards of all ranks."""

    torch: torch.device
    cards: tuple[Card, ...] = ()
    named: bool = False
    vectors: torch.device = CPU

    def words(self) -> str:
        """Lines for the header: device, binding, and what is on the host; nothing of a CPU. Of rank 0."""
        if not self.cards:
            return ""
        return described(self.cards, self.named, PETSc.Sys.hasExternalPackage("cuda"), self.vectors.type == "cuda")


def number_of(asked: int | None, place: int, visible: int) -> int:
    """The number of a rank's card.

    Parameters
    ----------
    asked
        The K of ``cuda:K``, if one was given.
    place
        The rank's number on its node.
    visible
        How many cards it sees. A single one is taken as it is: a scheduler has bound the rank.

    Raises
    ------
    InputError
        If there is none, or not that one.
    """
    if visible < 1:
        raise InputError("option -device: no CUDA device is visible; nvidia-smi lists all, CUDA_VISIBLE_DEVICES some")
    if asked is None:
        return place % visible
    if not 0 <= asked < visible:
        there = "cuda:0" if visible == 1 else f"cuda:0 to cuda:{visible - 1}"
        raise InputError(f"option -device: there is no cuda:{asked}, visible is {there}")
    return asked


def on_card(asked: Mapping[str, str], computes: str, petsc_has_cuda: bool) -> bool:
    """Whether vectors are on a card: what -vec_type says, else where torch computes if PETSc can keep them there.

    Parameters
    ----------
    asked
        Values of PETSc's options :data:`VEC_TYPES`, those that are given.
    computes
        Where torch does: cpu or cuda.

    Raises
    ------
    InputError
        Where they cannot be as it is asked.
    """
    if asked.get("dm_vec_type", "standard") not in HOST_TYPES:
        raise InputError("option -dm_vec_type: vectors of parameters have no grid; say where they are by -vec_type")
    kind = asked.get("vec_type")
    if kind is None:
        return computes == "cuda" and petsc_has_cuda
    if kind in HOST_TYPES:
        return False
    if kind != "cuda":
        raise InputError(f"option -vec_type must be standard (on the host) or cuda, got '{kind}'")
    if computes != "cuda":
        raise InputError("option -vec_type cuda: vectors are on a card with -device cuda only, where torch uses them")
    if not petsc_has_cuda:
        raise InputError("option -vec_type cuda: this PETSc was built without CUDA (docs/gpu.md); leave it out")
    return True


def described(cards: Sequence[Card], named: bool, petsc_has_cuda: bool, vectors_there: bool = False) -> str:
    """The header's lines on the cards of all ranks, in their order."""
    kinds = Counter((card.name, card.memory) for card in cards)
    what = ", ".join(f"{name} ({memory} bytes)" for name, memory in kinds)
    if named:
        how = "as -device says"
    elif all(card.visible == 1 for card in cards):
        how = "the only one that each rank sees"
    else:
        how = "rank within the node modulo visible devices"
    several = len({card.host for card in cards}) > 1
    ranks = [f"rank {r} cuda:{c.number}{f' of {c.host}' * several}" for r, c in enumerate(cards[:LISTED])]
    more = f", and {len(cards) - LISTED} more" if len(cards) > LISTED else ""
    most = max(Counter((card.host, card.identity) for card in cards).values())
    shared = f"; up to {most} ranks share a card" if most > 1 else ""
    if vectors_there:
        vectors, subdomains = "on the card: vectors (VECCUDA; PETSc's own sums, in no fixed order)\n", ", subdomains"
        host = "on the host: "
    else:
        without = "as -vec_type says" if petsc_has_cuda else "PETSc without CUDA"
        vectors, subdomains = "", ""
        host = f"on the host: vectors ({without}; parameters and gradients are copied once an evaluation), "
    return (
        f"device {what}: {', '.join(ranks)}{more} ({how}){shared}\n{vectors}{host}sums over ranks, "
        f"K-FAC factors, dense matrices (inverse Hessians, Jacobian rows, small polar factors){subdomains}"
    )


def bind(comm: MPI.Comm, name: str) -> Device:
    """The device of that name (``cpu``, ``cuda``, ``cuda:K``) for this rank, which torch uses from now on. Collective.

    Raises
    ------
    InputError
        On all ranks: another name, a torch without CUDA, a card that there is not or that does not answer; vectors
        that cannot be where -vec_type says.
    """
    with agreed(comm):
        device = _parsed(name)
        database = PETSc.Options()
        asked = {key: database.getString(key) for key in VEC_TYPES if database.hasName(key)}
        there = on_card(asked, device.type, PETSc.Sys.hasExternalPackage("cuda"))
    if device.type == "cpu":
        return Device(torch.device("cpu"))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = node.rank
    node.Free()
    with agreed(comm):
        card = _card(device.index, place)
    cards = comm.gather(card)
    device, named = torch.device("cuda", card.number), device.index is not None
    if there:
        with agreed(comm):
            share(device)
    return Device(device, tuple(cards or ()), named, device if there else CPU)


def _parsed(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"option -device must be cpu, cuda or cuda:K, got '{name}'") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"option -device must be cpu, cuda or cuda:K, got '{name}'")
    if device.type == "cuda" and not torch.backends.cuda.is_built():
        raise InputError(
            f"option -device: torch {torch.__version__} was built without CUDA: cannot compute on '{name}'; install a "
            "torch with CUDA, or leave -device out"
        )
    return device


def _card(asked: int | None, place: int) -> Card:
    number = number_of(asked, place, torch.cuda.device_count())
    with short_of_memory():
        try:
            torch.cuda.set_device(number)
            torch.zeros(1, device=torch.device("cuda", number))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise InputError(f"option -device: cannot compute on 'cuda:{number}': {line}") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 has 24 bits here: line searches and trust regions count on them
    about = torch.cuda.get_device_properties(number)
    return Card(
        socket.gethostname(), str(about.uuid), number, torch.cuda.device_count(), about.name, about.total_memory
    )


@contextmanager
def short_of_memory() -> Iterator[None]:
    """A block in which a card, or the memory, may turn out to be too small: one line then, with the bytes.

    Raises
    ------
    InputError
        In place of torch's OutOfMemoryError and Python's MemoryError, also where PETSc has wrapped it. It is of this
        rank: others may not have it.
    """
    try:
        yield
    except Exception as error:
        found = cause(error, torch.OutOfMemoryError)
        if found is not None:
            raise CollectiveError(memory_line(str(found))) from error
        short = cause(error, MemoryError)
        if short is not None:
            raise CollectiveError(f"the memory is too small for this many samples: {short}") from error
        raise


def memory_line(said: str) -> str:
    """What to say where torch says this: how much was asked for, and how much there is."""
    sentences = [s.strip() for line in said.splitlines() for s in line.split(". ")]
    bytes_named = [s.rstrip(".") for s in sentences if any(u in s for u in ("iB", "bytes", "MB", "GB"))][:2]
    return (
        f"option -device: a card's memory is short: {'. '.join(bytes_named) or said.splitlines()[0]}; take fewer "
        "samples at a time (-chunk), fewer points or samples, or fewer ranks a card"
    )
