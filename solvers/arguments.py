"""What :func:`solvers.minimise` is given: whether it can be used, and is the same on all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from ddml.errors import CollectiveError, InputError
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.objectives.objective import Objective

from .base import Solver

PROBES = 8  # samples at either end whose loss is compared (our choice)
ALIKE = 1e-4  # relative difference of losses that processors of different kinds may make (our choice)


def check(loss: Any, solver: Any, iterations: Any, blocks: Any) -> None:
    """Raise an InputError for what is of another kind, or out of range."""
    if not isinstance(loss, Loss | Objective):
        raise InputError(
            "what is minimised must be a loss, as ddml.ModuleLoss(module, criterion, inputs, targets) makes one, "
            f"got a {type(loss).__name__}"
        )
    if isinstance(solver, type):
        raise InputError(f"the solver must be a name or an object, got the class {solver.__name__}: make one of it")
    if not isinstance(solver, str | Solver):
        raise InputError(f"the solver must be a name or an object of a solver's class, got a {type(solver).__name__}")
    for name, value in (("iterations", iterations), ("blocks", 0 if blocks is None else blocks)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise InputError(f"{name} must be an integer, 0 or more, got {value}")
    if isinstance(loss, Loss) and loss.count == 0 and loss.divisible:
        raise InputError("the loss has no samples")


def compare(comm: MPI.Comm, loss: Loss | Objective, solver: str | Solver, **settings: Any) -> None:
    """Raise a CollectiveError where ranks were given different things. Collective.

    Of a loss its kind, its parameters and the number of samples are compared, of a module also the losses of the first
    and the last samples. Modules that begin at different parameters, as without a seed they do, get rank 0's.
    """
    if comm.size == 1:
        return
    words = solver if isinstance(solver, str) else type(solver).__name__
    mine = {"the solver": words, **{name: _told(value) for name, value in settings.items()}}
    if isinstance(loss, Loss):
        mine["the kind of loss"] = type(loss).__name__
        mine["the network's parameters"] = repr([(p.name, tuple(p.shape)) for p in loss.parameters])
        if loss.divisible:
            mine["the number of samples"] = repr(loss.count)
    every = comm.allgather(mine)
    _refuse([name for name in every[0] if any(other.get(name) != every[0][name] for other in every)])
    if not isinstance(loss, ModuleLoss):
        return
    theta = loss.initial()
    digests = comm.allgather(hashlib.blake2b(theta.cpu().numpy().tobytes()).hexdigest())
    if len(set(digests)) > 1:
        theta = torch.from_numpy(comm.bcast(theta.cpu().numpy())).to(theta)
        loss.assign(theta)
    few = min(PROBES, loss.count)
    ends = comm.allgather([float(loss.part(*part).value(theta)) for part in ((0, few), (loss.count - few, loss.count))])
    alike = all(np.allclose(ends[0], other, rtol=ALIKE, atol=0.0, equal_nan=True) for other in ends)
    _refuse([] if alike else ["the losses of samples at the same parameters"])


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        raise CollectiveError(
            f"all ranks must give the same, but they differ in {', '.join(wrong)}; what is drawn at random needs a "
            "seed, say numpy.random.default_rng(0)"
        )


def _told(value: Any) -> str:
    return repr(sorted((k, str(v)) for k, v in value.items())) if isinstance(value, Mapping) else repr(value)
