"""What a loss takes of a torch module, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ddml.errors import InputError

T = TypeVar("T")


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained: those with ``requires_grad``, a tied one once, by its first name.

    The others are frozen: they are no part of theta, and stay what they are.

    Raises
    ------
    InputError
        If there are none, or some of no shape yet, of several precisions or of no real numbers.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        why = "all have requires_grad False" if list(module.parameters()) else "it has none at all"
        raise InputError(f"the network has no parameters to train: {why}")
    check_alike(named)
    return named


def check_alike(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise an InputError where parameters have no shape yet, or are of several precisions or of no real numbers."""
    first, model = named[0]
    for name, parameter in named:
        if is_lazy(parameter):
            raise InputError(f"parameter {name} has no shape yet: call the network once before")
        if not parameter.is_floating_point():
            raise InputError(f"parameter {name} is of {parameter.dtype}: only real numbers can be trained")
        if parameter.dtype != model.dtype:
            raise InputError(
                f"parameters must be of one precision: {first} is of {model.dtype}, {name} of {parameter.dtype}; "
                f"convert the network, say by its method to({model.dtype})"
            )


_FORMATS: dict[type, torch.memory_format] = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def formats(module: nn.Module) -> dict[int, torch.memory_format]:
    """The order in memory with which a module is fastest, by the ids of its parameters; of others it is theirs.

    Weights of convolutions have their channels last in float32 on a CPU, where oneDNN then does the whole network so:
    1.2 to 2 times faster with up to 16 channels, while float64 was no faster (measured, our choice). On other devices
    it was not measured. Not where groups are normalised: torch 2.13 ends with a segmentation fault where a
    ``GroupNorm`` has its channels last and what enters it needs no gradient.
    """
    if any(isinstance(part, nn.GroupNorm) for part in module.modules()):
        return {}
    return {
        id(weight): _FORMATS[type(part)]
        for part in module.modules()
        for weight in part.parameters(recurse=False)
        if type(part) in _FORMATS and weight.ndim > 1 and weight.dtype == torch.float32 and weight.device.type == "cpu"
    }


def laid_out(values: Tensor, shape: Sequence[int], order: torch.memory_format | None) -> Tensor:
    """Values (n,) as a tensor: a view, or a copy in the order in memory that :func:`formats` has asked for."""
    view = values.view(shape)
    # not contiguous(), which takes weights (C, 1, ...) for ones of either order
    return view if order is None else view.clone(memory_format=order)


def is_chain(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Sequential`` that does no more than pass data through its children."""
    hooked = any(getattr(module, f"_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre"))
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked


@torch.no_grad()
def overwritten(chain: nn.Sequential, inputs: Tensor) -> frozenset[int]:
    """Numbers of the children of a chain before which nothing can be kept as it is: something behind changes it."""
    entering: Any = inputs
    seen: list[list[tuple[Tensor, int]]] = []
    for child in chain:
        seen.append([(x, x._version) for x in _tensors(entering)])
        entering = child(entering)
    return frozenset(i for i, before in enumerate(seen) if any(x._version != version for x, version in before))


def _tensors(found: Any) -> list[Tensor]:
    """Those in what a module gives."""
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    return [x for part in parts for x in _tensors(part)]


def grouped(module: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The layers of a module by name, children of a chain and leaves of others, and the numbers of their parameters."""
    chain = is_chain(module)
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name.split(".")[0] if chain else name.rpartition(".")[0], []).append(number)
    return {owner: tuple(numbers) for owner, numbers in groups.items()}


def occurrences(module: nn.Module, known: Mapping[int, T]) -> dict[str, T]:
    """What is known of parameters, by their ids, by every name that ``torch.func.functional_call`` must replace.

    Those are several for tied parameters, and one for those of a module that has several names: where torch is to find
    them (``tie_weights``), it leaves such a module with what has replaced its parameters.
    """
    return {
        f"{prefix}.{name}" if prefix else name: known[id(p)]
        for prefix, part in module.named_modules()
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in known
    }


def evaluated(module: nn.Module, inputs: Tensor) -> Any:
    """The outputs for some inputs, of any type.

    Raises
    ------
    InputError
        If the module fails, or its outputs do not depend on any trained parameter.
    """
    try:
        with torch.enable_grad():
            outputs = module(inputs)
    except Exception as error:
        reason = next(iter(f"{error}".splitlines()), "")
        raise InputError(
            f"the network fails on inputs {tuple(inputs.shape)} of {inputs.dtype}: {type(error).__name__}: {reason}"
        ) from error
    if isinstance(outputs, Tensor):
        if not outputs.requires_grad:
            raise InputError("the network's outputs do not depend on any parameter that is trained")
        return outputs.detach()
    return outputs


def coarse_inputs(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What makes a module's inputs of those of a finer one, see :mod:`ddml.networks.depth`; None: they are the same.

    It raises an InputError where the module fails, or gives other numbers of samples.
    """
    own = getattr(module, "coarse_inputs", None)
    if own is None:
        return None

    @torch.no_grad()
    def made(x: Tensor) -> Tensor:
        try:
            found = own(x)
        except Exception as error:  # of a user's module
            raise InputError(f"the network's coarse_inputs raised {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.shape[:1] != x.shape[:1]:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the network's coarse_inputs must give a tensor of {len(x)} samples, it gave {what}")
        return found

    return made


def not_finite(inputs: Tensor, outputs: Tensor, values: Tensor, begin: int = 0) -> str:
    """Where the losses (B,) of samples are not finite, in words; nothing if they all are.

    ``begin`` is the number of the first sample.
    """
    bad = torch.nonzero(~torch.isfinite(values))
    if not len(bad):
        return ""
    row = int(bad[0, 0])
    for what, found in (
        ("has {} in its inputs", inputs[row]),
        ("has finite inputs, but {} in the network's outputs", outputs[row]),
        ("has finite outputs, but the criterion gives {}", values[row]),
    ):
        if not torch.isfinite(found).all():
            return f"sample {begin + row} " + what.format("NaN" if torch.isnan(found).any() else "infinity")
    raise AssertionError
