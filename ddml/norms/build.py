"""Choosing a norm by its name."""

from __future__ import annotations

from typing import Any

from ddml.errors import InputError
from ddml.objectives.objective import Objective
from ddml.objectives.restricted import RestrictedObjective

from .kronecker import KroneckerNorm
from .norm import DistributedModularNorm, InfinityNorm, Norm, TwoNorm


def make_norm(objective: Objective, name: str, settings: Any, prefix: str) -> Norm:
    """The norm of that name for an objective's parameters.

    Raises
    ------
    InputError
        If the loss has no modular norm, or not with such masses.
    """
    if name == "2":
        return TwoNorm()
    if name == "infinity":
        return InfinityNorm()
    if name == "kfac":
        if isinstance(objective, RestrictedObjective) and objective.metric is not None:
            return objective.metric.restricted(objective.layout, objective.loss.ranges, objective)
        objective.metric = KroneckerNorm(objective, settings.curvature_fraction or 0.1, settings.curvature_interval)
        return objective.metric
    try:
        masses = None if settings.masses is None else [float(m) for m in settings.masses.split(",")]
    except ValueError:
        raise InputError(
            f"option -{prefix}masses must be numbers separated by commas, got '{settings.masses}'"
        ) from None
    modular = objective.loss.modular_norm(masses, settings.convolution, settings.polar_tolerance, settings.polar_exact)
    return DistributedModularNorm(modular, objective.layout, objective)
