"""Choosing a norm by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddml.errors import InputError
from ddml.losses.loss import Loss
from ddml.losses.restricted import RestrictedLoss
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective

from .kronecker import KroneckerNorm
from .modular import EXACT, TOLERANCE, ModularNorm
from .norm import DistributedModularNorm, InfinityNorm, Norm, TwoNorm
from .structure import modular


def modular_norm(
    loss: Loss,
    masses: Sequence[float] | None = None,
    convolution: str = "unfolded",
    tolerance: float = TOLERANCE,
    exact: int = EXACT,
) -> ModularNorm:
    """The modular norm of a loss's parameters, that of a restricted one as of vectors that are 0 elsewhere.

    Parameters
    ----------
    loss
        Of a torch module's outputs.
    masses
        Of the module's layers with weights, in their order; of the whole module also where the loss is restricted.
    convolution, tolerance, exact
        See :mod:`ddml.norms.modular`.

    Raises
    ------
    InputError
        If the loss has no module, or one with other masses or without modular structure; if it cuts a tensor.
    """
    if isinstance(loss, RestrictedLoss):
        return modular_norm(loss.loss, masses, convolution, tolerance, exact).restricted(loss.ranges)
    if loss.module is None:
        raise InputError(f"a {type(loss).__name__} has no modular norm: choose -norm 2 or infinity")
    structure = modular(loss.module, loss.parameters, masses, convolution)
    # matrix products in half precision lose more than a tolerance of a few per cent
    like = torch.empty(0, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
    return ModularNorm(loss.size, tuple(structure.blocks()), torch.finfo(loss.dtype).eps, like, tolerance, exact)


def make_norm(objective: Objective, name: str, settings: Any, prefix: str, whole: Norm | None = None) -> Norm:
    """The norm of that name for an objective's parameters.

    Parameters
    ----------
    objective
        What is minimised.
    name
        ``2``, ``infinity``, ``kfac`` or ``modular``.
    settings
        Of the norm, as options of a trust-region method give them.
    prefix
        Of these options.
    whole
        That of the objective which this one is a restriction of: K-FAC's is measured once, for all subdomains.

    Raises
    ------
    InputError
        If the loss has no such norm, or not with such masses.
    """
    if name == "2":
        return TwoNorm()
    if name == "infinity":
        return InfinityNorm()
    if name == "kfac":
        if isinstance(whole, KroneckerNorm) and isinstance(objective, RestrictedObjective):
            return whole.restricted(objective.layout, objective.loss.ranges, objective)
        return KroneckerNorm(objective, settings.curvature_fraction or 0.1, settings.curvature_interval)
    try:
        masses = None if settings.masses is None else [float(m) for m in settings.masses.split(",")]
    except ValueError:
        raise InputError(
            f"option -{prefix}masses must be numbers separated by commas, got '{settings.masses}'"
        ) from None
    found = modular_norm(objective.loss, masses, settings.convolution, settings.polar_tolerance, settings.polar_exact)
    return DistributedModularNorm(found, objective.layout, objective)
