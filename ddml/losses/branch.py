"""A network whose trained parameters lie in a part of theta."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ddml.errors import InputError
from ddml.parameters import Parameter

from .costs import layer_work, suitable_batch
from .modules import formats, grouped, is_chain, laid_out
from .probe import CHANCES

PROBES = 4  # samples of random numbers that networks are tried on (our choice)

Adding = Callable[[Tensor, Tensor], None]
"""Adds what comes of the loss's gradient by some outputs (B, K) to its gradient by theta (n,)."""


class Branch:
    """One of the networks that theta has the trained parameters of.

    Parameters
    ----------
    module
        Maps samples (B, ...) to (B, K).
    table
        Numbers of parameters in theta, by the ids of those of the module.
    parameters
        What theta is made of.
    probe
        Samples to try it on.
    what
        It is, for messages.
    batch
        Samples that go through it at a time (default: what suits its widest layer).

    Attributes
    ----------
    width : int
        K.
    layers : tuple of tuples of int
        Numbers, in theta, of the parameters of each layer.
    place : slice
        In theta.
    batch : int
        Samples that go through it at a time.

    Raises
    ------
    InputError
        If it fails, is not deterministic, or gives something else.
    """

    def __init__(
        self,
        module: nn.Module,
        table: Mapping[int, int],
        parameters: Sequence[Parameter],
        probe: Tensor,
        what: str,
        batch: int | None = None,
    ) -> None:
        self.width = _width(module, probe, what)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.numbers = [table[id(p)] for _, p in named]
        self.parameters = [parameters[k] for k in self.numbers]
        self.place = slice(self.parameters[0].offset, self.parameters[-1].range.stop) if named else slice(0, 0)
        groups = grouped(module, [name for name, _ in named])
        self.layers = tuple(tuple(self.numbers[i] for i in group) for group in groups.values())
        sizes = {owner: sum(self.parameters[i].size for i in group) for owner, group in groups.items()}
        self.costs, besides = layer_work(module, probe[:1], sizes, is_chain(module))
        self.pointwise = besides.pointwise
        self.names = tuple(groups)
        self.batch = batch or suitable_batch(module, probe)
        self.module = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
        copied = dict(self.module.named_parameters())
        self.leaves = [copied[name] for name, _ in named]
        known = formats(module)
        self._formats = [known.get(id(p)) for _, p in named]

    def at(self, theta: Tensor, wanted: Collection[int] = ()) -> nn.Module:
        """The network at theta (n,); parameters of these numbers are leaves to differentiate by."""
        for i, (number, leaf) in enumerate(zip(self.numbers, self.leaves, strict=True)):
            leaf.requires_grad_(number in wanted)
            leaf.data = self._view(theta, i)
        return self.module

    def called(self, theta: Tensor, x: Tensor) -> Tensor:
        """What it gives at theta (n,), differentiable by that."""
        places = {id(leaf): i for i, leaf in enumerate(self.leaves)}
        named = [(name, places[id(p)]) for name, p in self.module.named_parameters() if id(p) in places]
        views = {name: self._view(theta, i) for name, i in named}
        found: Tensor = torch.func.functional_call(self.module, views, (x,))
        return found

    def _view(self, theta: Tensor, number: int) -> Tensor:
        """One of its parameters in theta, in its shape, in the order in memory with which the network is fastest."""
        parameter = self.parameters[number]
        return laid_out(theta[parameter.range], parameter.shape, self._formats[number])

    @torch.no_grad()
    def outputs(self, theta: Tensor, inputs: Iterable[Tensor]) -> Tensor:
        """What it gives at theta (n,) for batches of samples (B, ...), put together."""
        module = self.at(theta)
        return self._joined([module(x) for x in inputs], theta)

    def linearised(self, theta: Tensor, inputs: Iterable[Tensor], wanted: Collection[int]) -> tuple[Tensor, Adding]:
        """As :meth:`outputs`, and what takes gradients by them to the parameters of these numbers."""
        module = self.at(theta, wanted)
        leaves, ranges = self.wanted(wanted)
        outputs = [module(x) for x in inputs]

        def add(adjoint: Tensor, gradient: Tensor) -> None:
            pairs = [(o, a) for o, a in zip(outputs, adjoint.split(self.batch), strict=False) if o.requires_grad]
            if pairs and leaves:
                found = torch.autograd.grad([o for o, _ in pairs], leaves, [a for _, a in pairs], allow_unused=True)
                for r, g in zip(ranges, found, strict=True):
                    if g is not None:
                        gradient[r].add_(g.reshape(-1))

        return self._joined([o.detach() for o in outputs], theta), add

    def _joined(self, found: list[Tensor], theta: Tensor) -> Tensor:
        return torch.cat(found) if found else theta.new_zeros(0, self.width)

    def wanted(self, wanted: Collection[int]) -> tuple[list[Tensor], list[slice]]:
        """The leaves of parameters of these numbers, and where they lie in theta."""
        chosen = [i for i, number in enumerate(self.numbers) if number in wanted]
        return [self.leaves[i] for i in chosen], [self.parameters[i].range for i in chosen]


def _width(module: nn.Module, probe: Tensor, what: str) -> int:
    """How many numbers a network gives for a sample."""
    with torch.no_grad():
        try:
            outputs = module(probe)
            again = [module(probe[: len(probe) // 2]) for _ in range(CHANCES)]
        except Exception as error:
            reason = next(iter(f"{error}".splitlines()), "")
            raise InputError(
                f"{what} fails on inputs {tuple(probe.shape)}: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(probe):
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"{what} must map {tuple(probe.shape)} to ({len(probe)}, K), it gives {shape}")
    if not all(torch.allclose(outputs[: len(half)], half, rtol=1e-3, atol=1e-6) for half in again):
        raise InputError(
            f"{what} gives a sample outputs that depend on others (batch statistics) or on chance (dropout): call its "
            "eval()"
        )
    return int(outputs.shape[1])
