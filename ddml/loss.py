"""Losses on one process: torch code from a parameter vector to a number and its derivatives.

A loss knows nothing of MPI or PETSc. :class:`ddml.objective.Objective` splits it over ranks with
:meth:`Loss.part` and hands it parameter vectors as torch tensors that share PETSc's memory.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from . import kronecker, work
from .costs import forward_costs, forward_numbers
from .errors import InputError
from .modular import ModularNorm, modular
from .sample_sets import SampleSet, TensorSamples

CHANCES = 8  # evaluations that must agree: of a few samples one by chance can (our choice)


@dataclass(frozen=True)
class Parameter:
    """A parameter tensor and where it begins in the global vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def range(self) -> slice:
        """The entries of the global vector."""
        return slice(self.offset, self.offset + self.size)


def parameter_table(named: Sequence[tuple[str, Sequence[int]]]) -> tuple[Parameter, ...]:
    """Parameters one behind the other, from names and shapes."""
    table: list[Parameter] = []
    for name, shape in named:
        table.append(Parameter(name, tuple(shape), table[-1].range.stop if table else 0))
    return tuple(table)


class Loss(ABC):
    """A sum over samples of a function of a parameter vector theta (n,).

    Attributes
    ----------
    parameters : tuple of Parameter
        What theta is made of.
    layers : tuple of tuples of int
        Parameter numbers of each layer, in the order in which data pass through them: the atoms
        of a decomposition.
    costs : tuple of float
        Multiply-adds of a sample's product with the weights of each layer, see :mod:`ddml.work`.
    besides : Besides
        What a sample takes besides, see there.
    count : int
        Number of samples.
    gauss_newton : bool
        Whether there is a :meth:`gauss_newton_product`.
    """

    parameters: tuple[Parameter, ...]
    layers: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    besides = work.Besides()
    count: int
    dtype: torch.dtype
    device: torch.device
    gauss_newton: bool = False

    @property
    def size(self) -> int:
        """n, the length of theta."""
        return self.parameters[-1].range.stop

    @abstractmethod
    def part(self, begin: int, end: int) -> Loss:
        """The terms of samples begin to end, as they stand: the parts of a loss sum to it."""

    @abstractmethod
    def sampled(self, rows: Tensor) -> Loss:
        """The loss of a data set of these samples only (numbers, int64), normalised anew."""

    @abstractmethod
    def initial(self) -> Tensor:
        """Initial parameters (n,)."""

    @abstractmethod
    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """Scalars that sum to the loss, differentiable by theta, one per chunk of samples."""

    def prefix(self, theta: Tensor, first: int) -> Any:
        """What enters layer ``first`` for all samples; None where :meth:`keeps` says no."""
        return None

    def explain(self, theta: Tensor) -> str:
        """Where the loss is not finite, in words."""
        return "some samples give NaN or infinity"

    def keeps(self, first: int) -> bool:
        """Whether what enters layer ``first`` can be kept by :meth:`prefix`."""
        return False

    def modular_norm(self, masses: Sequence[float] | None = None, convolution: str = "unfolded") -> ModularNorm:
        """The modular norm of theta, see :mod:`ddml.networks.modular`.

        Raises
        ------
        InputError
            If the loss has no modular structure, or one with other masses.
        """
        raise InputError(f"a {type(self).__name__} has no modular norm: choose -norm 2 or infinity")

    def kronecker_layers(self) -> tuple[kronecker.Layer, ...]:
        """The layers with Kronecker factors, see :mod:`ddml.kronecker`.

        Raises
        ------
        InputError
            If there are none, or parameters outside of them.
        """
        raise InputError(f"a {type(self).__name__} has no K-FAC norm: choose another -norm")

    def kronecker_statistics(self, theta: Tensor, draws: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A and G of each layer, summed over this loss's samples with their weights.

        ``draws`` (count,) are uniform random numbers that pick the labels.

        Raises
        ------
        InputError
            If there are none.
        """
        raise InputError(f"a {type(self).__name__} has no K-FAC norm: choose another -norm")

    def kronecker_charge(self) -> float:
        """Work units of :meth:`kronecker_statistics` on all samples.

        Raises
        ------
        InputError
            If there are none.
        """
        raise InputError(f"a {type(self).__name__} has no K-FAC norm: choose another -norm")

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> float:
        """The loss at theta; ``kept`` from :meth:`prefix` with the same parameters before its layer."""
        return sum((float(term) for term in self.terms(theta, kept)), 0.0)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """The loss at theta; its gradient is added to ``gradient`` (n,).

        ``active`` limits the gradient to some layers: what is added elsewhere is undefined.
        """
        leaf = theta.detach().requires_grad_()
        value = 0.0
        for term in self.terms(leaf, kept):
            gradient += torch.autograd.grad(term, leaf, retain_graph=True)[0]  # terms may share a graph
            value += float(term.detach())
        return value

    def hessian_product(self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None) -> None:
        """Add the Hessian at theta times ``direction`` (n,) to ``product`` (n,)."""
        leaf = theta.detach().requires_grad_()
        for term in self.terms(leaf, kept):
            first = torch.autograd.grad(term, leaf, create_graph=True)[0]
            if first.requires_grad:
                product += torch.autograd.grad(first, leaf, direction, retain_graph=True)[0]

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """Add the Gauss-Newton matrix at theta times ``direction`` (n,) to ``product`` (n,).

        ``kept`` and ``active`` as for :meth:`value_gradient`; the direction is 0 outside of the active layers.

        Raises
        ------
        InputError
            If the loss has none.
        """
        raise InputError(f"a {type(self).__name__} has no Gauss-Newton matrix")

    def layer_numbers(self, ranges: Sequence[slice]) -> frozenset[int]:
        """The layers that have a parameter in one of these ranges of theta."""
        touched = [any(r.start < p.range.stop and p.range.start < r.stop for r in ranges) for p in self.parameters]
        return frozenset(i for i, layer in enumerate(self.layers) if any(touched[k] for k in layer))

    def passes(self, first: int = 0, active: frozenset[int] | None = None) -> work.Passes:
        """Multiply-adds of an evaluation for a sample: from layer ``first`` on, by ``active`` layers (default: all)."""
        layers = frozenset(range(len(self.layers))) if active is None else active
        return work.passes(self.costs, self.besides, first, layers)

    @property
    def operations(self) -> float:
        """Multiply-adds of a loss and gradient of the whole network for a sample."""
        return self.besides.repeats * self.passes().gradient

    def charge(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """Work units of an evaluation on all samples, see :mod:`ddml.work`."""
        found = self.passes(first, active)
        return (found.gradient if gradient else found.forward) / self.passes().gradient

    def prefix_charge(self, first: int) -> float:
        """Work units of :meth:`prefix`."""
        return work.prefix(self.costs, self.besides, first) / self.passes().gradient if self.keeps(first) else 0.0

    def hessian_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of :meth:`hessian_product` on all samples."""
        return self.passes(first, active).hessian / self.passes().gradient

    def gauss_newton_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of :meth:`gauss_newton_product` on all samples."""
        return self.passes(first, active).gauss_newton / self.passes().gradient


class RestrictedLoss(Loss):
    """A loss as a function of some ranges of theta, the rest frozen (see :func:`ddml.restricted.restricted`).

    What enters the first active layer is computed once, by :meth:`freeze`, and kept; backward
    passes stop there.
    """

    def __init__(self, loss: Loss, ranges: Sequence[slice]) -> None:
        self.loss = loss
        self.gauss_newton = loss.gauss_newton
        self.ranges = tuple(ranges)
        self.parameters = parameter_table([(f"{r.start}:{r.stop}", (r.stop - r.start,)) for r in ranges])
        self.layers = (tuple(range(len(ranges))),)
        self.costs = (1.0,)
        self.count, self.dtype, self.device = loss.count, loss.dtype, loss.device
        self.active = loss.layer_numbers(ranges)
        self.first = min(self.active)
        self.kept: Any = None
        self.full = torch.zeros(loss.size, dtype=loss.dtype, device=loss.device)
        self.full_gradient = torch.zeros_like(self.full)
        self.also: frozenset[int] = frozenset()

    def freeze(self, theta: Tensor) -> None:
        """Freeze all parameters at theta (n of the whole loss,) and keep what enters the subdomain."""
        self.full.copy_(theta)
        self.kept = self.loss.prefix(self.full, self.first)

    def take(self, theta: Tensor, ranges: Sequence[slice] | None = None) -> Tensor:
        """The entries of a full vector that lie in ``ranges`` (default: the subdomain's), as a copy."""
        return torch.cat([theta[r] for r in (self.ranges if ranges is None else ranges)])

    def _insert(self, part: Tensor, full: Tensor) -> Tensor:
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            full[r] = part[parameter.range]
        return full

    def part(self, begin: int, end: int) -> RestrictedLoss:
        """See :meth:`Loss.part`; call before :meth:`freeze`."""
        return RestrictedLoss(self.loss.part(begin, end), self.ranges)

    def sampled(self, rows: Tensor) -> RestrictedLoss:
        """See :meth:`Loss.sampled`; call before :meth:`freeze`."""
        return RestrictedLoss(self.loss.sampled(rows), self.ranges)

    def initial(self) -> Tensor:
        """The subdomain's parameters where the loss is frozen."""
        return self.take(self.full)

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        full = self.full.clone()
        pieces, end = [], 0
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            pieces += [full[end : r.start], theta[parameter.range]]
            end = r.stop
        return self.loss.terms(torch.cat([*pieces, full[end:]]), self.kept)

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """The loss with these parameters (n_s,) in the subdomain."""
        return self.loss.value(self._insert(theta, self.full), self.kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """The loss; its gradient by the subdomain's parameters is added to ``gradient`` (n_s,).

        ``also`` names further layers whose gradient is left in ``full_gradient``.
        """
        self.full_gradient.zero_()
        value = self.loss.value_gradient(
            self._insert(theta, self.full), self.full_gradient, self.kept, self.active | self.also
        )
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            gradient[parameter.range] += self.full_gradient[r]
        return value

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`Loss.gauss_newton_product`: behind the kept prefix, linearised in the active layers."""
        change, image = torch.zeros_like(self.full), torch.zeros_like(self.full)
        self.loss.gauss_newton_product(
            self._insert(theta, self.full), self._insert(direction.to(change), change), image, self.kept, self.active
        )
        product += self.take(image)

    def modular_norm(self, masses: Sequence[float] | None = None, convolution: str = "unfolded") -> ModularNorm:
        """The norm of a vector that is zero outside the subdomain; masses are those of the whole network."""
        return self.loss.modular_norm(masses, convolution).restricted(self.ranges)

    @property
    def _begin(self) -> int:
        """The layer where evaluations start."""
        return self.first if self.loss.keeps(self.first) else 0

    @property
    def operations(self) -> float:
        """Those of the whole network: work units are its."""
        return self.loss.operations

    def charge(self, first: int = 0, active: frozenset[int] | None = None, gradient: bool = True) -> float:
        """Work units of one evaluation behind the kept prefix."""
        return self.loss.charge(self._begin, self.active | self.also, gradient)

    def prefix_charge(self, first: int = 0) -> float:
        """Work units of :meth:`freeze`."""
        return self.loss.prefix_charge(self.first)

    def hessian_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of a Hessian product: torch differentiates by all layers from the first active one on."""
        begin = self._begin
        return self.loss.hessian_charge(begin, frozenset(range(begin, len(self.loss.layers))))

    def gauss_newton_charge(self, first: int = 0, active: frozenset[int] | None = None) -> float:
        """Work units of a Gauss-Newton product behind the kept prefix."""
        return self.loss.gauss_newton_charge(self._begin, self.active)


class ModuleLoss(Loss):
    """Mean of a criterion over samples, of any torch module.

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
        If the module is not deterministic (dropout in training mode, batch statistics), or the
        criterion does not give one number per sample.
    """

    gauss_newton = True

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        batch: int = 4096,
    ) -> None:
        self._build(module, criterion, TensorSamples(inputs, targets), batch)

    def _build(
        self, module: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], samples: SampleSet, batch: int
    ) -> None:
        self.module, self.criterion, self.batch = module, criterion, batch
        self.samples = samples
        self.count = len(samples)
        self.weight = 1 / max(self.count, 1)
        named = list(module.named_parameters())
        self.parameters = parameter_table([(name, p.shape) for name, p in named])
        self.dtype, self.device = named[0][1].dtype, named[0][1].device
        self._stepped = isinstance(module, nn.Sequential)
        owners = {name: name.split(".")[0] if self._stepped else name.rpartition(".")[0] for name, _ in named}
        groups: dict[str, list[int]] = {}
        for number, parameter in enumerate(self.parameters):
            groups.setdefault(owners[parameter.name], []).append(number)
        self.layers = tuple(tuple(g) for g in groups.values())
        stages = list(module._modules)
        self.layer_stage = [stages.index(k) if self._stepped else 0 for k in groups]
        self._check()
        costs = forward_costs(module, samples.part(0, min(self.count, 1)).inputs) if self.count else {}
        self.costs = tuple(
            sum(c for name, c in costs.items() if (name.split(".")[0] if self._stepped else name) == owner)
            or float(sum(self.parameters[i].size for i in group))
            for owner, group in groups.items()
        )
        self.besides = self._besides(tuple(groups))
        # evaluations that need no derivative by theta itself are those of a copy whose parameters lie in theta, which
        # takes half the time of functional_call where batches are small
        self._copy = copy.deepcopy(module)
        self._leaves = list(self._copy.parameters())

    def _besides(self, owners: Sequence[str]) -> work.Besides:
        """What a sample takes besides products, by the numbers that enter and leave the module's parts."""
        if not self.count:
            return work.Besides()
        numbers = forward_numbers(self.module, self.samples.part(0, 1).inputs)
        given = dict.fromkeys(owners, 0)
        for name, part in self.module.named_modules():
            owner = name.split(".")[0] if self._stepped else name
            if owner in given and name in numbers and any(True for _ in part.parameters(recurse=False)):
                given[owner] += numbers[name][1]
        return work.Besides(
            tuple(work.ACTIVATION * given[owner] for owner in owners),
            tuple(work.KEPT * numbers[owner][0] if owner in numbers else 0.0 for owner in owners),
            work.CRITERION * numbers[""][1],
        )

    @property
    def inputs(self) -> Tensor:
        """The inputs (N, ...)."""
        return self.samples.inputs

    @property
    def targets(self) -> Tensor:
        """The targets (N, ...)."""
        return self.samples.targets

    def _check(self) -> None:
        probe = self.samples.part(0, min(self.count, 8))
        half = max(len(probe) // 2, 1)
        with torch.no_grad():
            first = self.criterion(self.module(probe.inputs), probe.targets)
            again = [self.criterion(self.module(probe.inputs[:half]), probe.targets[:half]) for _ in range(CHANCES)]
        if first.shape != (len(probe),):
            shape = f"({len(probe)},)"
            raise InputError(f"the criterion must give one loss per sample, {shape}, got {tuple(first.shape)}")
        if not all(torch.allclose(first[:half], second, rtol=1e-3, atol=1e-6) for second in again):
            raise InputError(
                "a sample's output depends on others (batch statistics) or on chance (dropout): "
                "call the module's eval()"
            )

    def on(self, samples: SampleSet, weight: float | None = None) -> Self:
        """The loss of other samples, each with that weight (default: their mean)."""
        other = object.__new__(type(self))
        weight = 1 / max(len(samples), 1) if weight is None else weight
        other.__dict__.update(self.__dict__, samples=samples, count=len(samples), weight=weight)
        return other

    def part(self, begin: int, end: int) -> Self:
        """See :meth:`Loss.part`."""
        return self.on(self.samples.part(begin, end), self.weight)

    def sampled(self, rows: Tensor) -> Self:
        """See :meth:`Loss.sampled`."""
        return self.on(self.samples.take(rows))

    def initial(self) -> Tensor:
        """The module's parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self.module.parameters()])

    def modular_norm(self, masses: Sequence[float] | None = None, convolution: str = "unfolded") -> ModularNorm:
        """See :meth:`Loss.modular_norm`; masses are of the layers with weights, in their order."""
        structure = modular(self.module, self.parameters, masses, convolution)
        return ModularNorm(self.size, tuple(structure.blocks()), torch.finfo(self.dtype).eps)

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        r"""See :meth:`Loss.gauss_newton_product`: the sum of :math:`J^T \nabla^2 c\, J`, c the criterion.

        Positive semidefinite where the criterion is convex in the outputs, as cross entropy is.
        """
        wanted = sorted(k for i, layer in enumerate(self.layers) if active is None or i in active for k in layer)
        module = self._behind(self._at(theta.detach(), frozenset(wanted)), kept)
        leaves, ranges = [self._leaves[k] for k in wanted], [self.parameters[k].range for k in wanted]
        directions = [direction[r].to(leaf).view_as(leaf) for r, leaf in zip(ranges, leaves, strict=True)]
        for outputs, y in self._batches(module, kept):
            w = torch.zeros_like(outputs, requires_grad=True)
            transposed = torch.autograd.grad(outputs, leaves, w, create_graph=True)
            change = torch.autograd.grad(transposed, w, directions)[0]
            at = outputs.detach().requires_grad_()
            slope = torch.autograd.grad(self.criterion(at, y).sum() * self.weight, at, create_graph=True)[0]
            if slope.requires_grad:  # not where the criterion is linear
                bent = torch.autograd.grad(slope, at, change)[0]
                for r, g in zip(ranges, torch.autograd.grad(outputs, leaves, bent), strict=True):
                    product[r] += g.reshape(-1)

    def _at(self, theta: Tensor, wanted: frozenset[int] = frozenset()) -> nn.Module:
        """The copy of the module at theta; the parameters of these numbers are leaves to differentiate by."""
        for number, (leaf, parameter) in enumerate(zip(self._leaves, self.parameters, strict=True)):
            leaf.requires_grad_(number in wanted)
            leaf.data = theta[parameter.range].view(parameter.shape)
        return self._copy

    def _behind(self, module: nn.Module, kept: Any) -> nn.Module:
        """What of a module is left to compute behind a prefix."""
        return module[kept[0] :] if kept is not None and isinstance(module, nn.Sequential) else module

    def _batches(self, forward: Callable[[Tensor], Tensor], kept: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and targets, batch by batch."""
        if self.count == 0:
            return
        batches = self.inputs.split(self.batch) if kept is None else kept[1]
        for x, y in zip(batches, self.targets.split(self.batch), strict=True):
            yield forward(x), y

    def keeps(self, first: int) -> bool:
        """See :meth:`Loss.keeps`."""
        return self.layer_stage[first] > 0

    @torch.no_grad()
    def prefix(self, theta: Tensor, first: int) -> Any:
        """What enters layer ``first`` of a sequential module, per batch; None for other modules."""
        if not self.keeps(first):
            return None
        stage, module = self.layer_stage[first], self._at(theta)
        assert isinstance(module, nn.Sequential)
        return stage, [module[:stage](x) for x in self.inputs.split(self.batch)] if self.count else []

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        module = self._behind(self.module, kept)
        own = {name for name, _ in module.named_parameters()}
        views = {p.name: theta[p.range].view(p.shape) for p in self.parameters if p.name in own}
        for outputs, y in self._batches(lambda x: torch.func.functional_call(module, views, (x,)), kept):
            yield self.criterion(outputs, y).sum() * self.weight

    @torch.no_grad()
    def outputs(self, theta: Tensor, kept: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs (B, ...) and targets (B, ...), batch by batch."""
        yield from self._batches(self._behind(self._at(theta), kept), kept)

    @torch.no_grad()
    def value(self, theta: Tensor, kept: Any = None) -> float:
        """See :meth:`Loss.value`."""
        return sum((float(self.criterion(o, y).sum() * self.weight) for o, y in self.outputs(theta, kept)), 0.0)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """See :meth:`Loss.value_gradient`; the other layers' parameters get no gradient at all."""
        wanted = frozenset(k for i, layer in enumerate(self.layers) if active is None or i in active for k in layer)
        module = self._behind(self._at(theta.detach(), wanted), kept)
        numbers = sorted(wanted)
        value = 0.0
        for outputs, y in self._batches(module, kept):
            term = self.criterion(outputs, y).sum() * self.weight
            gradients = torch.autograd.grad(term, [self._leaves[k] for k in numbers])
            for k, g in zip(numbers, gradients, strict=True):
                gradient[self.parameters[k].range] += g.reshape(-1)
            value += float(term.detach())
        return value
