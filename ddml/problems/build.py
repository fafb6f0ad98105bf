"""Problems by name, with their networks, for drivers and run files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddml import plugins
from ddml.errors import InputError
from ddml.networks.build import build_network

from . import PDE, PROBLEMS
from .pde import calling


def build_problem(settings: Any) -> tuple[PDE, nn.Module, str]:
    """The problem ``settings.problem``, its network with initial parameters, and that one in words.

    Parameters
    ----------
    settings
        ``problem``, ``seed``, ``dtype`` and values of :data:`ddml.networks.build.OPTIONS`; where width and depth are
        left open, they become the problem's.

    Raises
    ------
    InputError
        A problem that there is not, or that declares what cannot be; see :func:`ddml.networks.build.build_network`.
    """
    problem_class = plugins.load(settings.problem, PROBLEMS, "problem")
    problem = problem_class() if isinstance(problem_class, type) else problem_class
    if not isinstance(problem, PDE):
        raise InputError(f"problem '{settings.problem}' is no ddml.problems.PDE")
    problem.check()
    settings.width, settings.depth = settings.width or problem.width, settings.depth or problem.depth
    inputs = calling.inputs(problem, getattr(torch, settings.dtype))
    return problem, *build_network(settings, inputs, len(problem.fields))
