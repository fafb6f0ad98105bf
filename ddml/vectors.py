"""Vectors of PETSc on the host or on a card, and how torch sees the entries that a rank owns: in place, by DLPack.

On a card they are VECCUDA, and the sums over them PETSc's own. That has not been run on a GPU yet.

PETSc and torch both queue what a card is to do on CUDA's default stream, unless somebody asks for another one: then
neither has to wait for the other (:func:`share`).
"""

from __future__ import annotations

from functools import cache

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from .errors import InputError
from .origins import GPU_AWARE_MPI

CPU = torch.device("cpu")


def home(device: torch.device) -> torch.device:
    """Where vectors are, if nobody says it, of a loss on this device: there, if that is a card and PETSc is ready."""
    return device if device.type == "cuda" and PETSc.Sys.hasExternalPackage("cuda") and _mpi_is_known() else CPU


def _mpi_is_known() -> bool:
    """Whether PETSc was told what MPI can do; if it finds out itself that it cannot, it ends the process."""
    return any(PETSc.Options().hasName(name) for name in GPU_AWARE_MPI)


def vector(comm: MPI.Comm, local: int, size: int, device: torch.device = CPU) -> PETSc.Vec:
    """A new vector of ``size`` entries, of which this rank owns ``local``; the caller destroys it. Collective.

    Raises
    ------
    InputError
        See :func:`share`.
    """
    if device.type != "cuda":
        return PETSc.Vec().createMPI((local, size), comm=comm)
    share(device)
    vec = PETSc.Vec().create(comm)
    vec.setSizes((local, size))
    vec.setType(PETSc.Vec.Type.CUDA)
    return vec


@cache
def share(device: torch.device) -> None:
    """Make PETSc and torch work on the same card, in one stream.

    Where both already do, nothing is changed. Torch's stream is this thread's; another one that is set later has to be
    joined with CUDA's default stream by whoever sets it, as CUDA graphs do.

    Raises
    ------
    InputError
        If PETSc works on no card, was not told when it was initialised whether MPI can read from cards, or has a stream
        of its own.
    """
    if not PETSc.Sys.hasExternalPackage("cuda"):
        raise InputError("vectors cannot be on a card: this PETSc was built without CUDA (docs/gpu.md)")
    if not _mpi_is_known():
        raise InputError(
            "vectors cannot be on a card: initialise PETSc with the option -use_gpu_aware_mpi 0 (or 1, where MPI is)"
        )
    context = PETSc.DeviceContext.getCurrent()
    kind, stream = context.getDevice().getDeviceType(), context.getStreamType()
    if kind != "CUDA" or not stream.startswith("DEFAULT"):
        raise InputError(
            f"vectors cannot be on a card: PETSc works on {kind} with a stream of type {stream}: leave -device_enable "
            "and -root_device_context_stream_type out, or take -vec_type standard"
        )
    number = torch.cuda.current_device() if device.index is None else device.index
    if context.getDevice().getDeviceId() != number:
        context.setDevice(PETSc.Device.create(kind, number))
        context.setUp()
    torch.cuda.set_stream(torch.cuda.default_stream(number))


def entries(x: PETSc.Vec) -> Tensor:
    """The entries of x that this rank owns, in x's memory wherever that is; to be read only."""
    return torch.utils.dlpack.from_dlpack(x.toDLPack("r"))


def owned(x: PETSc.Vec) -> Tensor:
    """The entries of x that this rank owns, on the host: in x's memory if that is there; to be read only."""
    return entries(x).cpu()


def write(x: PETSc.Vec, given: Tensor) -> None:
    """Overwrite the entries of x that this rank owns, from any device and in any precision."""
    torch.utils.dlpack.from_dlpack(x.toDLPack("w")).copy_(given)
