"""Features of deep kernel machines by name: kernel expansions, a user's modules, hidden layers of classifiers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ddml import plugins
from ddml.data.classified import Classified
from ddml.errors import InputError
from ddml.kernel_machines.features import kernel_expansion, last_hidden
from ddml.kernel_machines.functions import median_distance
from ddml.kernel_machines.gradients import smooth
from ddml.kernel_machines.rules import WIDTH
from ddml.problems.classification import Classifier

EXPANSION = "expansion"
RUN_FILES = (".h5", ".hdf5")


def feature_map(
    name: str, centres: int, features: int, seed: int, data: Classified, trained: Callable[[str], object]
) -> tuple[nn.Module, str]:
    """The module from samples as a kernel machine has them (B, d) to their features, and what it is in words.

    Parameters
    ----------
    name
        :data:`EXPANSION`, ``path/to/file.py:Name``, or the run file of a classifier.
    centres, features
        Of an expansion, whose inner kernel is of half the median distance.
    seed
        Of the choice of centres, and of a user's module.
    data
        The samples that it is trained on.
    trained
        From the name of a run file to what was trained.

    Raises
    ------
    InputError
        One that there is not; more centres than samples; a classifier of other samples, or that is no chain of layers.
    """
    if name == EXPANSION:
        n = len(data.samples)
        if centres > n:
            raise InputError(f"option -centres must be at most {n}, the samples; got {centres}")
        rows = np.sort(np.random.default_rng(seed).choice(n, centres, replace=False))
        inner = smooth("rbf", WIDTH * median_distance(data.samples, seed))
        return kernel_expansion(inner, data.samples[rows], features), f"kernel expansion on {centres} centres"
    if name.endswith(RUN_FILES):
        network = trained(name)
        if not isinstance(network, Classifier):
            raise InputError(f"option -network: {name} is no run of a classifier")
        if network.inputs.shape != data.inputs.shape:
            raise InputError(f"{name} is of samples {network.inputs.shape}, the data have {data.inputs.shape}")
        hidden = last_hidden(network.network).requires_grad_(True)
        return nn.Sequential(Between(data, network), *hidden.children()), f"last hidden layer of {name}"
    torch.manual_seed(seed)
    kind = plugins.load(name, {EXPANSION: None}, "network")
    with plugins.blamed(name, {}, "network"):
        module = kind(data.samples.shape[1]) if callable(kind) else kind
    if not isinstance(module, nn.Module):
        raise InputError(f"network '{name}' must give a torch module for samples of {data.samples.shape[1]} numbers")
    return module, f"network {name}"


class Between(nn.Module):
    """From samples as a kernel machine has them to those that a classifier's network takes.

    Parameters
    ----------
    data
        How samples are scaled here.
    network
        How they are there.
    """

    shift: Tensor
    scale: Tensor
    there: Tensor
    divisor: Tensor

    def __init__(self, data: Classified, network: Classifier) -> None:
        super().__init__()
        self.shape = data.inputs.shape
        view = (1, -1, *[1] * (len(self.shape) - 1))
        for name in ("shift", "scale"):
            numbers = torch.tensor(getattr(data.inputs, name), dtype=torch.float64).view(view)
            self.register_buffer(name, numbers.to(network.shift.dtype))
        self.register_buffer("there", network.shift.clone())
        self.register_buffer("divisor", network.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        stored = x.reshape(len(x), *self.shape) * self.scale + self.shift
        return (stored - self.there) / self.divisor
