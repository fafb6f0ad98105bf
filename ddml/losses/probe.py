"""What a few samples show of a module and a criterion: whether they make a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddml.data.sample_sets import SampleSet
from ddml.errors import InputError

from .modules import evaluated, not_finite

Criterion = Callable[[Any, Tensor], Tensor]

CHANCES = 8  # evaluations that must agree: of a few samples one by chance can (our choice)


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """A block behind which a module's buffers, running statistics say, are as they were."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


def check(module: nn.Module, criterion: Criterion, probe: SampleSet) -> Any:
    """The module's outputs for the probe, of any type.

    Raises
    ------
    InputError
        Where they show that module and criterion do not make a loss.
    """
    half, inputs = max(len(probe) // 2, 1), probe.inputs.clone()
    fresh = inputs._version
    outputs = evaluated(module, inputs)
    if inputs._version != fresh:
        raise InputError("the network changes its inputs (in place): it must leave them as they are")
    with torch.enable_grad():
        values = _values(criterion, module(inputs), probe.targets)
    if values.shape != (len(probe),):
        raise InputError(
            f"the criterion must give one loss per sample, of {len(probe)} samples a tensor ({len(probe)},), "
            f"it gives {tuple(values.shape)}"
        )
    if not values.requires_grad:
        raise InputError(
            "the criterion's losses have no derivative by the network's outputs: "
            "numbers of errors have none, nor has what is detached"
        )
    first = values.detach()
    wrong = not_finite(inputs, outputs, first)
    if wrong:
        raise InputError(wrong)
    with torch.no_grad():
        again = [module(inputs[:half]) for _ in range(CHANCES)]
        losses = [criterion(each, probe.targets[:half]) for each in again]
    if all(_agree(first[:half], each) for each in losses):
        return outputs
    if isinstance(outputs, Tensor) and all(_agree(outputs[:half], each) for each in again):
        raise InputError(
            "the criterion gives a sample another loss beside other samples: each must be of that sample's outputs and "
            f"targets alone, and the shapes are {tuple(outputs.shape)} and {tuple(probe.targets.shape)}"
        )
    remedy = "call the module's eval()" if _training(module) else "eval() has been called, so take out what does so"
    raise InputError(f"a sample's output depends on others (batch statistics) or on chance (dropout): {remedy}")


def refuse_shortcuts(module: nn.Module, criterion: Criterion, probe: SampleSet) -> None:
    """Raise an InputError where a criterion depends on parameters other than by the outputs of the module.

    Those of ``module``, a copy, need no gradient meanwhile: what the criterion gets to need one has another source.
    """
    with torch.enable_grad():
        values = _values(criterion, module(probe.inputs), probe.targets)
    if values.requires_grad:
        raise InputError(
            "the criterion depends on parameters itself, beside the network's outputs, and nothing would train those: "
            "ddml.DecayedLoss has a penalty of weights; of others the network can return what the criterion needs as a "
            "further output, or they have requires_grad False"
        )


def _values(criterion: Criterion, outputs: Any, targets: Tensor) -> Tensor:
    try:
        values = criterion(outputs, targets)
    except Exception as error:
        of = f"outputs {tuple(outputs.shape)} and " if isinstance(outputs, Tensor) else ""
        reason = next(iter(f"{error}".splitlines()), "")
        raise InputError(
            f"the criterion fails on {of}targets {tuple(targets.shape)} of {targets.dtype}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not isinstance(values, Tensor):
        raise InputError(f"the criterion must give one loss per sample, a tensor, it gives a {type(values).__name__}")
    if values.is_complex():
        raise InputError(f"the criterion must give one loss per sample, a real number, it gives {values.dtype}")
    return values


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def _training(module: nn.Module) -> bool:
    return any(part.training for part in module.modules())
