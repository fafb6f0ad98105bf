"""The mean of a criterion over samples, of any torch module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddml.data.sample_sets import SampleSet, TensorSamples, mapped
from ddml.numbers import Number, as_number
from ddml.parameters import parameter_table

from .costs import layer_work
from .modules import coarse_inputs, formats, grouped, is_chain, laid_out, not_finite, occurrences, overwritten, trained
from .probe import Criterion, check, refuse_shortcuts, unmoved
from .samples import SampledLoss


class ModuleLoss(SampledLoss):
    """Mean of a criterion over samples, of any torch module.

    Frozen parameters, those with ``requires_grad`` False when the loss is made, are no part of theta and stay as they
    are. Tied ones are in theta once, and belong to the first layer that has them. Those that the outputs do not
    depend on have the gradient 0.

    Parameters
    ----------
    module
        Maps a batch of inputs (B, ...) to outputs (B, ...), each sample on its own and the same
        way every time. The layers of an ``nn.Sequential`` are its children and restricted losses
        keep what enters them; those of another module are its leaves.
    criterion
        Maps (outputs, targets) to one loss per sample (B,).
    inputs, targets
        Samples in the first dimension.
    batch
        Samples per forward pass, to bound the memory.

    Raises
    ------
    InputError
        If the module is not deterministic (dropout in training mode, batch statistics) or changes its inputs; if the
        criterion does not give one number per sample that has a derivative, or depends on parameters other than by the
        outputs (a penalty of weights, say); if nothing is trained, or what is has several precisions; if there are not
        as many targets as inputs, or the first samples give NaN or infinity.
    """

    module: nn.Module
    gauss_newton = True
    once = 6e7, 1000.0

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        inputs: Tensor,
        targets: Tensor,
        batch: int = 4096,
    ) -> None:
        self._build(module, criterion, TensorSamples(inputs, targets), batch)

    def _build(self, module: nn.Module, criterion: Criterion, samples: SampleSet, batch: int) -> None:
        self.module = self.network = module
        self.criterion, self.batch = criterion, batch
        self.samples = samples
        self.count = len(samples)
        self.weight = 1 / max(self.count, 1)
        named = trained(module)
        self.parameters = parameter_table([(name, p.shape) for name, p in named])
        self._trained = [p for _, p in named]
        self._numbers = {id(p): number for number, p in enumerate(self._trained)}
        self.dtype, self.device = named[0][1].dtype, named[0][1].device
        self._stepped = is_chain(module)
        groups = grouped(module, [name for name, _ in named])
        self.layers = tuple(groups.values())
        stages = list(module._modules)
        self.layer_stage = [stages.index(k) if self._stepped else 0 for k in groups]
        probe = samples.part(0, min(self.count, 8))
        sizes = {owner: sum(self.parameters[i].size for i in group) for owner, group in groups.items()}
        with unmoved(module):
            outputs = check(module, criterion, probe)
            self.gauss_newton = self.gauss_newton and isinstance(outputs, Tensor)
            first = samples.part(0, 1).inputs if self.count else None
            self.costs, self.besides = layer_work(module, first, sizes, self._stepped)
            self._overwritten = frozenset[int]()
            if isinstance(module, nn.Sequential) and self._stepped:
                self._overwritten = overwritten(module, probe.inputs[:1])
        # evaluations that need no derivative by theta itself are those of a copy whose parameters lie in theta, which
        # takes half the time of functional_call where batches are small
        # (frozen ones are shared with it)
        self._copy = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
        self._stages = list(self._copy) if isinstance(self._copy, nn.Sequential) else []
        copied = dict(self._copy.named_parameters())
        self._leaves = [copied[parameter.name] for parameter in self.parameters]
        known = formats(module)
        self._formats = [known.get(id(p)) for p in self._trained]
        self._sizes = [parameter.size for parameter in self.parameters]
        refuse_shortcuts(self._at(self.initial()), criterion, probe)

    def of_module(self, module: nn.Module) -> Self:
        """See :meth:`.Loss.of_module`: with the same criterion, of as many samples a forward pass."""
        other = copy.copy(self)
        other.coarse_inputs = coarse_inputs(module)
        other._build(module, self.criterion, mapped(self.samples, other.coarse_inputs), self.batch)
        other.weight = self.weight
        return other

    def initial(self) -> Tensor:
        """The module's trained parameters.

        Raises
        ------
        RuntimeError
            After :meth:`drop_initial`.
        """
        if any(p.numel() != known.size for p, known in zip(self._trained, self.parameters, strict=True)):
            raise RuntimeError("the initial parameters have been dropped")
        return torch.cat([p.detach().reshape(-1) for p in self._trained])

    def drop_initial(self) -> None:
        """See :meth:`.Loss.drop_initial`; the module's trained parameters are empty until :meth:`assign`."""
        for parameter in self._trained:
            parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Write parameters (n,), of a result, say, into the module."""
        for parameter, table in zip(self._trained, self.parameters, strict=True):
            if parameter.numel() != table.size:  # they have been dropped
                parameter.data = parameter.data.new_empty(table.shape)
            parameter.copy_(theta[table.range].view(table.shape))

    @torch.no_grad()
    def explain(self, theta: Tensor) -> str:
        """See :meth:`.Loss.explain`: the first sample."""
        if not torch.isfinite(theta).all():
            return "the parameters are NaN or infinite"
        begin = 0
        for inputs, (outputs, targets) in zip(self.inputs.split(self.batch), self.outputs(theta), strict=True):
            said = not_finite(inputs, outputs, self.criterion(outputs, targets), begin)
            if said:
                return said
            begin += len(inputs)
        return super().explain(theta)

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        r"""See :meth:`.Loss.gauss_newton_product`: the sum of :math:`J^T \nabla^2 c\, J`, c the criterion.

        Positive semidefinite where the criterion is convex in the outputs, as cross entropy is.
        """
        wanted = sorted(k for i, layer in enumerate(self.layers) if active is None or i in active for k in layer)
        self._at(theta.detach(), frozenset(wanted))
        leaves, ranges = [self._leaves[k] for k in wanted], [self.parameters[k].range for k in wanted]
        directions = [direction[r].to(leaf).view_as(leaf) for r, leaf in zip(ranges, leaves, strict=True)]
        for outputs, y in self._batches(_twice(self._behind(kept)), kept):
            if not outputs.requires_grad:  # nothing of theta enters them
                continue
            w = torch.zeros_like(outputs, requires_grad=True)
            transposed = torch.autograd.grad(outputs, leaves, w, create_graph=True, allow_unused=True)
            moved = [(g, d) for g, d in zip(transposed, directions, strict=True) if g is not None]
            change = torch.autograd.grad([g for g, _ in moved], w, [d for _, d in moved])[0]
            at = outputs.detach().requires_grad_()
            slope = torch.autograd.grad(self.criterion(at, y).sum() * self.weight, at, create_graph=True)[0]
            if slope.requires_grad:  # not where the criterion is linear
                bent = torch.autograd.grad(slope, at, change)[0]
                found = torch.autograd.grad(outputs, leaves, bent, allow_unused=True)
                for r, image in zip(ranges, found, strict=True):
                    if image is not None:
                        product[r] += image.reshape(-1)

    def _at(self, theta: Tensor, wanted: frozenset[int] = frozenset()) -> nn.Module:
        """The copy of the module at theta; the parameters of these numbers are leaves to differentiate by."""
        # (cut once: small evaluations are a matter of microseconds)
        pieces = torch.split_with_sizes(theta, self._sizes)
        for number, (leaf, piece, known) in enumerate(zip(self._leaves, pieces, self.parameters, strict=True)):
            leaf.requires_grad_(number in wanted)
            leaf.data = laid_out(piece, known.shape, self._formats[number])
        return self._copy

    def _behind(self, kept: Any) -> Callable[[Tensor], Tensor]:
        """What of the copy is left to compute behind a prefix."""
        return self._copy if kept is None else _in_turn(self._stages[kept[0] :])

    def _view(self, theta: Tensor, number: int) -> Tensor:
        """A parameter of theta in its shape, in the order in memory with which the module is fastest."""
        parameter = self.parameters[number]
        return laid_out(theta[parameter.range], parameter.shape, self._formats[number])

    def _batches(self, forward: Callable[[Tensor], Tensor], kept: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and targets, batch by batch."""
        if self.count == 0:
            return
        batches = self.inputs.split(self.batch) if kept is None else kept[1]
        spared = kept is not None and kept[0] in self._overwritten
        for x, y in zip(batches, self.targets.split(self.batch), strict=True):
            yield forward(copy.deepcopy(x) if spared else x), y

    def keeps(self, first: int) -> bool:
        """See :meth:`.Loss.keeps`."""
        return self.layer_stage[first] > 0

    @torch.no_grad()
    def prefix(self, theta: Tensor, first: int) -> Any:
        """What enters layer ``first`` of a sequential module, per batch; None for other modules."""
        if not self.keeps(first):
            return None
        stage = self.layer_stage[first]
        self._at(theta)
        begin = _in_turn(self._stages[:stage])
        return stage, [begin(x) for x in self.inputs.split(self.batch)] if self.count else []

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`."""
        module = _left(self.module, kept)
        views = {name: self._view(theta, number) for name, number in occurrences(module, self._numbers).items()}

        def forward(x: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(module, views, (x,), tie_weights=False)
            return found

        for outputs, y in self._batches(_twice(forward), kept):
            yield self.criterion(outputs, y).sum() * self.weight

    @torch.no_grad()
    def outputs(self, theta: Tensor, kept: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs (B, ...) and targets (B, ...), batch by batch."""
        self._at(theta)
        yield from self._batches(self._behind(kept), kept)
        if self.large:
            _leave(self._leaves)

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`.Loss.value`."""
        return sum((as_number(self.criterion(o, y).sum() * self.weight) for o, y in self.outputs(theta, kept)), 0.0)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`.Loss.value_gradient`; the other layers' parameters get no gradient at all."""
        wanted = frozenset(k for i, layer in enumerate(self.layers) if active is None or i in active for k in layer)
        self._at(theta.detach(), wanted)
        numbers = sorted(wanted)
        leaves, batches = [self._leaves[k] for k in numbers], self._batches(self._behind(kept), kept)
        if self.large and gradient.dtype == self.dtype:
            for k in numbers:
                self._leaves[k].grad = self._view(gradient, k)
            try:  # the same bits, in less memory
                return _summed_in_place(
                    batches, lambda outputs, y: self.criterion(outputs, y).sum() * self.weight, leaves
                )
            finally:
                for k in numbers:
                    summed = self._leaves[k].grad
                    if summed is not None and self._formats[k] is not None:  # it is a copy
                        gradient[self.parameters[k].range] = summed.reshape(-1)
                _leave(self._leaves)
        value: Number = 0.0
        sums = torch.split_with_sizes(gradient, self._sizes)
        for outputs, y in batches:
            term = self.criterion(outputs, y).sum() * self.weight
            if term.requires_grad:
                for k, g in zip(numbers, torch.autograd.grad(term, leaves, allow_unused=True), strict=True):
                    if g is not None:
                        sums[k].add_(g.reshape(-1))
            value += as_number(term)
        return value


def _in_turn(stages: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The stages one behind the other, which are called sooner than an ``nn.Sequential`` of them is made."""
    return lambda x: reduce(lambda entering, stage: stage(entering), stages, x)


def _twice(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, with attention that can be differentiated twice: torch's faster kernels cannot."""

    def called(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return forward(x)

    return called


def _summed_in_place(
    batches: Iterator[tuple[Tensor, Tensor]], term: Callable[[Tensor, Tensor], Tensor], leaves: Sequence[Tensor]
) -> Number:
    """The sum of the terms; each leaf's derivative is added to its ``grad``, and freed, as soon as it is there."""
    value: Number = 0.0
    for outputs, y in batches:
        found = term(outputs, y)
        if found.requires_grad:
            found.backward(inputs=leaves)  # type: ignore[no-untyped-call]
        value += as_number(found)
        del outputs, found
    return value


def _leave(leaves: Sequence[Tensor]) -> None:
    """Let the leaves keep nothing of the theta that they were at."""
    for leaf in leaves:
        leaf.grad = None
        leaf.data = leaf.data.new_empty(0)


def _left(module: nn.Module, kept: Any) -> nn.Module:
    """What of a module is left to compute behind a prefix."""
    return module if kept is None else nn.Sequential(OrderedDict(list(module._modules.items())[kept[0] :]))  # type: ignore[arg-type]
