"""What :func:`solvers.minimise` is given: whether it can be used, and is the same on all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
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

    Of a loss its kind, its parameters and where they begin are compared, of one over samples their number and the
    losses of the first and the last of them there.
    """
    if comm.size == 1:
        return
    words = solver if isinstance(solver, str) else type(solver).__name__
    mine = {"the solver": words, **{name: _told(value) for name, value in settings.items()}}
    every = comm.allgather({**mine, **(_of_loss(loss) if isinstance(loss, Loss) else {})})
    wrong = [name for name in every[0] if not all(_same(every[0][name], other.get(name)) for other in every)]
    if wrong:
        raise CollectiveError(
            f"all ranks must give the same, but they differ in {', '.join(wrong)}; what is drawn at random needs a "
            "seed, say torch.manual_seed(0) and numpy.random.default_rng(0)"
        )


def _told(value: Any) -> str:
    return repr(sorted((k, str(v)) for k, v in value.items())) if isinstance(value, Mapping) else repr(value)


def _of_loss(loss: Loss) -> dict[str, Any]:
    table = repr([(p.name, tuple(p.shape)) for p in loss.parameters])
    found: dict[str, Any] = {"the kind of loss": type(loss).__name__, "the network's parameters": table}
    try:
        theta = loss.initial()
    except RuntimeError:  # they have been dropped
        return found
    values = theta.detach().cpu().numpy()
    found["the initial parameters"] = hashlib.blake2b(values.tobytes()).hexdigest()
    if isinstance(loss, ModuleLoss):
        few = min(PROBES, loss.count)
        ends = (loss.part(0, few), loss.part(loss.count - few, loss.count))
        found["the number of samples"] = loss.count
        found["the losses of samples"] = [float(part.value(theta)) for part in ends]
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return bool(np.allclose(one, other, rtol=ALIKE, atol=0.0, equal_nan=True))
    return bool(one == other)
