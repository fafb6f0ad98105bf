"""Classification: cross entropy of any torch module, and how well it does on samples that it never sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from ddml.data.inputs import Inputs
from ddml.data.sample_sets import SampleSet
from ddml.errors import InputError
from ddml.losses import kronecker
from ddml.losses.costs import forward_numbers, suitable_batch
from ddml.losses.module import ModuleLoss
from ddml.losses.modules import evaluated, trained
from ddml.losses.probe import unmoved
from ddml.numbers import Number, as_number, read
from ddml.parallel import own, summed

# torch goes number by number where a sample has fewer classes than a vector register has room: transposed, that many
# samples take less time (1,250 of 10 classes 0.1 ms with their derivatives, for 0.35; both limits are our choice)
FEW_CLASSES, MANY_SAMPLES = 16, 100


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)[target] of each sample: (B, K) and (B,) to (B,)."""
    few = outputs.ndim == 2 and outputs.shape[1] < FEW_CLASSES
    if few and len(outputs) >= MANY_SAMPLES and outputs.device.type == "cpu":
        return nn.functional.nll_loss(outputs.t().log_softmax(dim=0).t(), targets, reduction="none")
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class ClassificationLoss(ModuleLoss, kronecker.KroneckerLoss):
    """Mean cross entropy over samples.

    Parts and batches hold the numbers of their samples only; inputs are made of the stored values when a part is first
    evaluated. See :class:`ddml.losses.module.ModuleLoss` for what a module must be.

    Parameters
    ----------
    module
        Maps inputs (B, ...) to one number for each class, (B, K).
    samples
        Of the whole training set.
    classes
        K.
    batch
        Samples per forward pass (default: :func:`ddml.losses.costs.suitable_batch`).

    Raises
    ------
    InputError
        If the outputs have another shape, or see :class:`ddml.losses.module.ModuleLoss`.
    """

    def __init__(self, module: nn.Module, samples: SampleSet, classes: int, batch: int | None = None) -> None:
        probe = samples.part(0, 2)
        trained(module)
        with unmoved(module):
            outputs = evaluated(module, probe.inputs)
        expected = (len(probe), classes)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(f"the network must map {tuple(probe.inputs.shape)} to {expected}, it gives {found}")
        with unmoved(module):
            batch = batch or suitable_batch(module, probe.inputs)
        self._build(module, cross_entropy, samples, batch)

    def kronecker_layers(self) -> tuple[kronecker.Layer, ...]:
        """See :meth:`.KroneckerLoss.kronecker_layers`."""
        known = kronecker.layers(self.module, self.parameters)
        everything = frozenset(range(len(self.parameters)))
        kronecker.check(self._at(self.initial(), everything), known, self.samples.part(0, 2).inputs)
        return known

    def kronecker_statistics(self, theta: Tensor, draws: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See :meth:`.KroneckerLoss.kronecker_statistics`; labels are drawn from softmax(outputs)."""
        known = kronecker.layers(self.module, self.parameters)
        module = self._at(theta.detach(), frozenset(range(len(self.parameters))))
        sums: list[tuple[Tensor, Tensor]] = []
        for x, u in zip(self.inputs.split(self.batch), draws.split(self.batch), strict=True):

            def drawn(outputs: Tensor, u: Tensor = u) -> Tensor:
                chances = outputs.detach().double().softmax(dim=1).cumsum(dim=1)
                labels = (chances < u.to(chances)[:, None]).sum(dim=1).clamp(max=outputs.shape[1] - 1)
                return cross_entropy(outputs, labels).sum()

            found = kronecker.statistics(module, known, x, drawn)
            sums = [(A + C, G + D) for (A, G), (C, D) in zip(sums, found, strict=True)] if sums else found
        return [(self.weight * A, self.weight * G) for A, G in sums]

    def kronecker_charge(self) -> float:
        """See :meth:`.KroneckerLoss.kronecker_charge`: a gradient, and a a^T and gamma gamma^T of every row."""
        numbers = forward_numbers(self.module, self.samples.part(0, 1).inputs)
        known = kronecker.layers(self.module, self.parameters)
        rows = [numbers.get(layer.name, (0, 0))[1] / layer.sizes[1] for layer in known]
        products = sum(r * sum(size**2 for size in layer.sizes) for r, layer in zip(rows, known, strict=True))
        return 1.0 + products / self.charges.operations


class TestSet:
    """Accuracy and loss on other samples, which the ranks share.

    Parameters
    ----------
    loss
        Of the training set, a :class:`ClassificationLoss`.
    samples
        To test with, a :class:`ddml.data.scaling.Samples`.
    comm
        Ranks that share them.
    blocks
        As in :class:`ddml.objectives.objective.Objective`: what is summed in a fixed order is the same on any number of
        ranks to the last bit.
    """

    __test__ = False  # for pytest

    def __init__(self, loss: Any, samples: Any, comm: MPI.Comm, blocks: int = 0) -> None:
        self.comm, self.count = comm, len(samples)
        self.parts = [
            loss.on(samples.part(part.start, part.stop), 1 / self.count) for part in own(self.count, comm, blocks)
        ]

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """``accuracy``, the fraction that is classified right, and ``test_loss``, the mean. Collective.

        A sample with an output that is not finite counts as wrong; of equal outputs the first decides.
        """
        found = iter(read([value for part in self.parts for value in self.found(part, theta)]))
        totals = summed(self.comm, list(zip(found, found, strict=True)))
        return {"accuracy": float(totals[1]) / self.count, "test_loss": float(totals[0])}

    def found(self, part: Any, theta: Tensor) -> Sequence[Number]:
        """What a part of the samples has of the loss, and how many of them are classified right."""
        loss: Number = 0.0
        right: Number = 0.0
        for outputs, targets in part.outputs(theta.to(device=part.device, dtype=part.dtype)):
            loss += as_number(part.criterion(outputs, targets).sum() * part.weight)
            hits = (outputs.argmax(dim=1) == targets) & outputs.isfinite().all(dim=1)
            right += as_number(hits.sum())
        return [loss, right]


class Classifier(nn.Module):
    """A trained network behind the scaling of its inputs: it takes values as they are stored.

    Parameters
    ----------
    network
        Maps scaled inputs (B, ...) to one number for each class, (B, K).
    inputs
        What it is given.

    Attributes
    ----------
    inputs : Inputs
    classes : tuple of str
        Names of the classes, in the order of the outputs.
    shape : tuple of int
        Of a sample.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs
        self.classes, self.shape = inputs.classes, inputs.shape
        shape = (1, -1, *[1] * (len(inputs.shape) - 1))
        for name in ("shift", "scale"):
            numbers = torch.tensor(getattr(inputs, name), dtype=torch.float64).view(shape)
            self.register_buffer(name, numbers.to(next(network.parameters())))

    def forward(self, values: Tensor) -> Tensor:
        """The outputs (B, K), of which the largest is the class, for stored values (B, ...) of any type."""
        return self.network((values.to(self.shift.dtype) - self.shift) / self.scale)

    @torch.no_grad()
    def probabilities(self, values: Tensor) -> Tensor:
        """The probabilities (B, K) of the classes, softmax of the outputs in float64."""
        return self(values).double().softmax(dim=1)
