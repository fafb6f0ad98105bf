"""Coarse nets: from what the networks of all tiles say to the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ddml.errors import InputError
from ddml.options import Option

from .classifiers import mlp, parse_widths
from .fusions import LEAST, LINKS

OPTIONS = (
    Option("link", "probabilities", f"What the coarse net is given of the local nets' outputs: log_probabilities are "
           f"cut off at {LEAST:g}.", choices=LINKS),
    Option("coarse_net", "linear", "linear, or dense with hidden layers of -coarse_widths and ReLU.",
           choices=("linear", "dense")),
    Option("coarse_widths", "128", "Hidden layers of a dense coarse net: their neurons, as in 128,64."),
)  # fmt: skip


def coarse_seed(seed: int) -> int:
    """The seed of a coarse net, drawn from the global one; local nets have others (our choice)."""
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])


def build_coarse(settings: Any, networks: int, classes: int) -> tuple[nn.Sequential, str]:
    """A net of :func:`ddml.networks.fusions.joined` outputs, (B, N K) to (B, K), and its description.

    Parameters
    ----------
    settings
        Values of :data:`OPTIONS`, ``seed``, of which its own is drawn, and ``dtype``.
    networks
        N.
    classes
        K.

    Raises
    ------
    InputError
        A dense net without hidden layers, or with others than of so many neurons.
    """
    widths: list[int] = []
    if settings.coarse_net == "dense":
        widths = parse_widths(settings.coarse_widths, "coarse_widths")
        if not widths:
            raise InputError("option -coarse_widths is empty: -coarse_net linear is the net without hidden layers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(coarse_seed(settings.seed))
        module = mlp((networks * classes,), classes, widths)
    sizes = "-".join(map(str, [networks * classes, *widths, classes]))
    return module.to(getattr(torch, settings.dtype)).eval(), f"{settings.coarse_net} {sizes}"
