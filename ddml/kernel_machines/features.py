r"""Feature maps phi of deep kernels :math:`k(\phi_\theta(x), \phi_\theta(y))`: torch modules on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddml.data.sample_sets import TensorSamples
from ddml.errors import InputError
from ddml.losses.module import ModuleLoss
from ddml.losses.modules import evaluated, is_chain
from ddml.numbers import Number

from .domain import table
from .functions import Kernel

Penalty = Callable[[Tensor], Tensor]
"""From parameters (p,) to a number, differentiable: what is added to the functional."""


NO_LOSS = "a deep kernel is no sum over samples: use a solver of all parameters and all samples, as tr or ssbroyden"


class FeatureLoss(ModuleLoss):
    r"""The features of samples as what an :class:`ddml.objectives.deep.DeepKernelObjective` is made of.

    It is :math:`\sum_i \langle c_i, \phi_\theta(x_i) \rangle`, whose gradient by theta is what cotangents c of the
    features give; the module is differentiated in chunks of samples. What stands before the first trained layer of an
    ``nn.Sequential`` is computed once.

    Parameters
    ----------
    module
        phi: any torch module, from a batch of inputs (B, ...) to (B, ...), each sample on its own.
    inputs
        (n, ...).
    batch
        Samples of a chunk.

    Raises
    ------
    InputError
        See :class:`ddml.losses.module.ModuleLoss`.

    Attributes
    ----------
    width : int
        q, the features of a sample.
    """

    gauss_newton = False
    hessian = False

    def __init__(self, module: nn.Module, inputs: Any, batch: int = 4096) -> None:
        dtype = next((p.dtype for p in module.parameters()), torch.float64)
        x = torch.as_tensor(inputs).to(dtype)
        probe = evaluated(module, x[:1])
        if not isinstance(probe, Tensor) or probe.ndim < 2 or not probe.numel():
            raise InputError("a feature map must give a tensor with a row of features for each sample")
        self.width = probe[0].numel()
        super().__init__(module, _linear, x, torch.ones(1, self.width, dtype=dtype).expand(len(x), -1), batch)
        self.weight = 1.0

    def features(self, theta: Tensor, kept: Any = None) -> Tensor:
        """(n, q), in float64; ``kept`` is the :meth:`prefix` of layer 0."""
        rows = [outputs.flatten(1).double() for outputs, _ in self.outputs(theta, kept)]
        return torch.cat([torch.empty(0, self.width, dtype=torch.float64), *rows])

    def of_inputs(self, theta: Tensor, inputs: Any) -> Tensor:
        """The features (m, q) of other inputs (m, ...)."""
        x = torch.as_tensor(inputs).to(self.dtype)
        return self.on(TensorSamples(x, torch.empty(len(x), 0)), 1.0).features(theta)

    def pull(self, theta: Tensor, cotangents: Tensor, gradient: Tensor, kept: Any = None) -> None:
        """Add to a gradient (p,) what cotangents (n, q) of the features give."""
        at = self.on(TensorSamples(self.inputs, cotangents.to(self.dtype)), 1.0)
        super(FeatureLoss, at).value_gradient(theta, gradient, kept)

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`; it is no loss that a solver may take for one, say on a subdomain."""
        raise InputError(NO_LOSS)

    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`terms`."""
        raise InputError(NO_LOSS)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`terms`."""
        raise InputError(NO_LOSS)


def _linear(outputs: Tensor, cotangents: Tensor) -> Tensor:
    return (outputs.flatten(1) * cotangents).sum(dim=1)


class KernelColumns(nn.Module):
    """From samples (B, ...) to k(x, z_j) of centres z, (B, m); nothing of it is trained.

    Parameters
    ----------
    kernel
        k.
    centres
        (m, ...).
    """

    def __init__(self, kernel: Kernel, centres: Any) -> None:
        super().__init__()
        self.kernel = kernel
        self.centres: Tensor
        self.register_buffer("centres", torch.as_tensor(table(centres)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.kernel(x.flatten(1).double(), self.centres)


def kernel_expansion(kernel: Kernel, centres: Any, outputs: int) -> nn.Sequential:
    r"""The inner layer of concatenated kernels: :math:`\phi(x) = \sum_j c_j k(x, z_j)`, c (m, q) to be trained.

    It begins with the q leading principal components of the centres in the kernel's native space (kernel PCA;
    Schoelkopf, Smola, Mueller 1998), functions of norm 1.

    Parameters
    ----------
    kernel
        k, the inner one.
    centres
        z (m, ...), inducing points.
    outputs
        q, 1 to m.

    Raises
    ------
    InputError
        More outputs than centres, or fewer than one; centres whose kernel matrix has fewer directions.
    """
    columns = KernelColumns(kernel, centres)
    m = len(columns.centres)
    if not 1 <= outputs <= m:
        raise InputError(f"an expansion on {m} centres has 1 to {m} outputs, got {outputs}")
    gram = columns(columns.centres.clone()).numpy()
    values, vectors = np.linalg.eigh(gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean())
    values, vectors = values[: -outputs - 1 : -1], vectors[:, : -outputs - 1 : -1]
    if not values[-1] > m * np.finfo(float).eps * values[0]:
        raise InputError(f"the kernel of {m} centres has fewer than {outputs} principal components: take other centres")
    linear = nn.Linear(m, outputs, bias=False, dtype=torch.float64)
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(outputs)])
    with torch.no_grad():
        linear.weight.copy_(torch.as_tensor((signs * vectors / np.sqrt(values)).T))
    return nn.Sequential(columns, linear)


def native_penalty(expansion: nn.Sequential, rho: float) -> Penalty:
    r"""The Tikhonov term of a :func:`kernel_expansion`: :math:`\rho\, \mathrm{tr}(C^T K_{zz} C)`.

    Raises
    ------
    InputError
        A negative rho, or a module that is no expansion.
    """
    _check(rho)
    columns = next(iter(expansion.children()), None)
    if not isinstance(columns, KernelColumns):
        raise InputError("the Tikhonov term of an inner layer is that of a kernel expansion: of a network use a decay")
    gram = columns(columns.centres.clone())

    def penalty(theta: Tensor) -> Tensor:
        C = theta.view(-1, len(gram))
        return rho * ((C @ gram) * C).sum()

    return penalty


def decay(rho: float) -> Penalty:
    r""":math:`\rho |\theta|^2`.

    Raises
    ------
    InputError
        A negative rho.
    """
    _check(rho)
    return lambda theta: rho * theta.square().sum()


def _check(rho: float) -> None:
    if not 0 <= rho < float("inf"):
        raise InputError(f"the inner Tikhonov term must have a factor of 0 or more, got {rho}")


def last_hidden(network: nn.Module) -> nn.Sequential:
    """A classifier without its last layer with parameters and what is behind it: its last hidden layer as features.

    The parameters are shared.

    Raises
    ------
    InputError
        If it is no chain of layers, or has one layer with parameters only.
    """
    children = list(network.children()) if is_chain(network) else []
    places = [i for i, child in enumerate(children) if any(True for _ in child.parameters())]
    if len(places) < 2:
        raise InputError("the last hidden layer is that of an nn.Sequential of two layers and more")
    return nn.Sequential(*children[: places[-1]])
