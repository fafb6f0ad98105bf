"""Losses on one process: torch code from a parameter vector to a number and its derivatives.

A loss knows nothing of MPI or PETSc. :class:`ddml.objective.Objective` splits it over ranks with
:meth:`Loss.part` and hands it parameter vectors as torch tensors that share PETSc's memory.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import kronecker, work
from .costs import forward_costs, forward_numbers
from .errors import InputError
from .modular import EXACT, TOLERANCE, ModularNorm, modular
from .modules import evaluated, not_finite, occurrences, trained
from .sample_sets import SampleSet, TensorSamples

LARGE = 1_000_000  # parameters from which memory is worth some time (our choice)
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
    large_from : int
        Parameters from which memory is worth some time.
    once : tuple of float
        Multiply-adds, and multiply-adds a parameter, that samples must cost for what is done once in each evaluation
        to take a tenth of the time (measured on one core, our choice).
    """

    parameters: tuple[Parameter, ...]
    layers: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    besides = work.Besides()
    count: int
    dtype: torch.dtype
    device: torch.device
    gauss_newton: bool = False
    large_from: ClassVar[int] = LARGE
    once: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> int:
        """n, the length of theta."""
        return self.parameters[-1].range.stop

    @property
    def large(self) -> bool:
        """Whether memory is worth some time; numbers do not depend on it."""
        return self.size >= self.large_from

    @abstractmethod
    def part(self, begin: int, end: int) -> Loss:
        """The terms of samples begin to end, as they stand: the parts of a loss sum to it."""

    @abstractmethod
    def sampled(self, rows: Tensor) -> Loss:
        """The loss of a data set of these samples only (numbers, int64), normalised anew."""

    @abstractmethod
    def initial(self) -> Tensor:
        """Initial parameters (n,)."""

    def drop_initial(self) -> None:
        """Free the memory of the initial parameters, if they take any: they are not asked for any more."""
        return

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

    def modular_norm(
        self,
        masses: Sequence[float] | None = None,
        convolution: str = "unfolded",
        tolerance: float = TOLERANCE,
        exact: int = EXACT,
    ) -> ModularNorm:
        """The modular norm of theta, see :mod:`ddml.modular`.

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
            if term.requires_grad:
                gradient += torch.autograd.grad(term, leaf, retain_graph=True)[0]  # terms may share a graph
            value += float(term.detach())
        return value

    def hessian_product(self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None) -> None:
        """Add the Hessian at theta times ``direction`` (n,) to ``product`` (n,)."""
        leaf = theta.detach().requires_grad_()
        for term in self.terms(leaf, kept):
            if not term.requires_grad:  # nothing of theta enters it
                continue
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

    @property
    def enough(self) -> float:
        """Samples that it takes for an evaluation to be nearly as efficient as one of all."""
        return max((self.once[0] + self.once[1] * self.size) / self.operations, 1.0)

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


class Frozen:
    """Where the restrictions of a loss to the same ranges of theta, and of its parts, are frozen together.

    Attributes
    ----------
    theta : Tensor
        The parameters (n of the whole loss,).
    full : Tensor
        The same with those of the subdomain where the last evaluation was.
    gradient : Tensor
        Room for a gradient (n of the whole loss,).
    number : int
        Grows when what is kept is out of date.
    kept : WeakKeyDictionary
        What enters the subdomain, of each loss that has been evaluated since.
    """

    def __init__(self, loss: Loss) -> None:
        self.theta = torch.zeros(loss.size, dtype=loss.dtype, device=loss.device)
        self.full = torch.zeros_like(self.theta)
        self.gradient = torch.zeros_like(self.theta)
        self.number = 0
        self.kept: WeakKeyDictionary[RestrictedLoss, Any] = WeakKeyDictionary()

    def freeze(self, theta: Tensor) -> None:
        """Freeze at theta, in any precision."""
        self.theta.copy_(theta)
        self.full.copy_(self.theta)
        self.release()

    def release(self) -> None:
        """Free what is kept."""
        self.kept.clear()
        self.number += 1


class RestrictedLoss(Loss):
    """A loss as a function of some ranges of theta, the rest frozen (see :func:`ddml.restricted.restricted`).

    What enters the first active layer is computed once behind each :meth:`freeze`, at the first evaluation, and kept;
    backward passes stop there.

    Parameters
    ----------
    loss
        Of all of theta; it may be a restricted one itself.
    ranges
        Sorted and disjoint.
    frozen
        That of other losses which are to be frozen together with this one (default: a new one).
    """

    def __init__(self, loss: Loss, ranges: Sequence[slice], frozen: Frozen | None = None) -> None:
        self.loss = loss
        self.frozen = Frozen(loss) if frozen is None else frozen
        self.gauss_newton = loss.gauss_newton
        self.ranges = tuple(ranges)
        self.parameters = parameter_table([(f"{r.start}:{r.stop}", (r.stop - r.start,)) for r in ranges])
        self.layers = (tuple(range(len(ranges))),)
        self.costs = (1.0,)
        self.count, self.dtype, self.device = loss.count, loss.dtype, loss.device
        self.active = loss.layer_numbers(ranges)
        self.first = min(self.active)
        self.beside: Tensor | None = None
        self.also: frozenset[int] = frozenset()
        self._charged = tuple(-1 for _ in self._numbers)

    def freeze(self, theta: Tensor) -> None:
        """Freeze all parameters at theta (n of the whole loss,), here and in all losses of the same :class:`Frozen`."""
        self.frozen.freeze(theta)

    @property
    def kept(self) -> Any:
        """What enters the subdomain (:meth:`Loss.prefix`)."""
        kept = self.frozen.kept
        if self not in kept:
            kept[self] = self.loss.prefix(self.frozen.theta, self.first)
        return kept[self]

    @property
    def _numbers(self) -> tuple[int, ...]:
        inner = self.loss._numbers if isinstance(self.loss, RestrictedLoss) else ()
        return (self.frozen.number, *inner)

    @property
    def _prefix_charges(self) -> tuple[float, ...]:
        inner = self.loss._prefix_charges if isinstance(self.loss, RestrictedLoss) else ()
        return (self.prefix_charge(), *inner)

    def owed(self) -> float:
        """Work units of what the next evaluation has to compute anew before it is behind the prefix; asked for once."""
        numbers, before = self._numbers, self._charged
        self._charged = numbers
        if numbers == before:
            return 0.0
        return sum(c for c, now, then in zip(self._prefix_charges, numbers, before, strict=True) if now != then)

    def take(self, theta: Tensor, ranges: Sequence[slice] | None = None) -> Tensor:
        """The entries of a full vector that lie in ``ranges`` (default: the subdomain's), as a copy."""
        return torch.cat([theta[r] for r in (self.ranges if ranges is None else ranges)])

    def insert(self, part: Tensor, full: Tensor | None = None) -> Tensor:
        """Write the subdomain's entries (n_s,) to a full vector, default: that of the parameters."""
        full = self.frozen.full if full is None else full
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            full[r] = part[parameter.range]
        return full

    def part(self, begin: int, end: int) -> RestrictedLoss:
        """See :meth:`Loss.part`; frozen together with this loss."""
        return type(self)(self.loss.part(begin, end), self.ranges, self.frozen)

    def sampled(self, rows: Tensor) -> RestrictedLoss:
        """See :meth:`Loss.sampled`; frozen together with this loss."""
        return type(self)(self.loss.sampled(rows), self.ranges, self.frozen)

    def initial(self) -> Tensor:
        """The subdomain's parameters where the loss is frozen."""
        return self.take(self.frozen.theta)

    def joined(self, theta: Tensor) -> Tensor:
        """All parameters (n of the whole loss,), differentiable by those of the subdomain (n_s,)."""
        full, end = self.frozen.theta, 0
        pieces = []
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            pieces += [full[end : r.start], theta[parameter.range]]
            end = r.stop
        return torch.cat([*pieces, full[end:]])

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        return self.loss.terms(self.joined(theta), self.kept)

    def value(self, theta: Tensor, kept: Any = None) -> float:
        """The loss with these parameters (n_s,) in the subdomain."""
        return self.loss.value(self.insert(theta), self.kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> float:
        """The loss; its gradient by the subdomain's parameters is added to ``gradient`` (n_s,).

        ``also`` names further layers whose gradient is left in ``beside`` (n of the whole loss,).
        """
        full = self.frozen.gradient.zero_()
        value = self.loss.value_gradient(self.insert(theta), full, self.kept, self.active | self.also)
        for parameter, r in zip(self.parameters, self.ranges, strict=True):
            gradient[parameter.range] += full[r]
        self.beside = full.clone() if self.also else None
        return value

    def gauss_newton_product(
        self, theta: Tensor, direction: Tensor, product: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> None:
        """See :meth:`Loss.gauss_newton_product`: behind the kept prefix, linearised in the active layers."""
        change, image = torch.zeros_like(self.frozen.full), torch.zeros_like(self.frozen.full)
        self.loss.gauss_newton_product(
            self.insert(theta), self.insert(direction.to(change), change), image, self.kept, self.active
        )
        product += self.take(image)

    def modular_norm(
        self,
        masses: Sequence[float] | None = None,
        convolution: str = "unfolded",
        tolerance: float = TOLERANCE,
        exact: int = EXACT,
    ) -> ModularNorm:
        """The norm of a vector that is zero outside the subdomain; masses are those of the whole network."""
        return self.loss.modular_norm(masses, convolution, tolerance, exact).restricted(self.ranges)

    @property
    def enough(self) -> float:
        """See :attr:`Loss.enough`: as many as of the whole network."""
        return self.loss.enough

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
        If the module is not deterministic (dropout in training mode, batch statistics), or the
        criterion does not give one number per sample; if nothing is trained, or what is has several precisions; if the
        first samples give NaN or infinity.
    """

    gauss_newton = True
    once = 6e7, 1000.0

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
        named = trained(module)
        self.parameters = parameter_table([(name, p.shape) for name, p in named])
        self._trained = [p for _, p in named]
        self._places = dict(zip(map(id, self._trained), self.parameters, strict=True))
        self.dtype, self.device = named[0][1].dtype, named[0][1].device
        # a subclass may do more than pass data through its children
        self._stepped = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
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
        # (frozen ones are shared with it)
        self._copy = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
        copied = dict(self._copy.named_parameters())
        self._leaves = [copied[parameter.name] for parameter in self.parameters]

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
        outputs = evaluated(self.module, probe.inputs)
        with torch.no_grad():
            first = self.criterion(outputs, probe.targets)
            again = [self.criterion(self.module(probe.inputs[:half]), probe.targets[:half]) for _ in range(CHANCES)]
        if first.shape != (len(probe),):
            shape = f"({len(probe)},)"
            raise InputError(f"the criterion must give one loss per sample, {shape}, got {tuple(first.shape)}")
        wrong = not_finite(probe.inputs, outputs, first)
        if wrong:
            raise InputError(wrong)
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
        """The module's trained parameters.

        Raises
        ------
        RuntimeError
            After :meth:`drop_initial`.
        """
        if any(p.numel() != known.size for p, known in zip(self._trained, self.parameters, strict=True)):
            raise RuntimeError("the initial parameters have been dropped")
        return torch.cat([p.detach().reshape(-1) for p in self._trained])

    @torch.no_grad()
    def explain(self, theta: Tensor) -> str:
        """See :meth:`Loss.explain`: the first sample."""
        if not torch.isfinite(theta).all():
            return "the parameters are NaN or infinite"
        begin = 0
        for inputs, (outputs, targets) in zip(self.inputs.split(self.batch), self.outputs(theta), strict=True):
            said = not_finite(inputs, outputs, self.criterion(outputs, targets), begin)
            if said:
                return said
            begin += len(inputs)
        return super().explain(theta)

    def modular_norm(
        self,
        masses: Sequence[float] | None = None,
        convolution: str = "unfolded",
        tolerance: float = TOLERANCE,
        exact: int = EXACT,
    ) -> ModularNorm:
        """See :meth:`Loss.modular_norm`; masses are of the layers with weights, in their order."""
        structure = modular(self.module, self.parameters, masses, convolution)
        # matrix products in half precision lose more than a tolerance of a few per cent
        like = torch.empty(0, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        return ModularNorm(self.size, tuple(structure.blocks()), torch.finfo(self.dtype).eps, like, tolerance, exact)

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

    def _forward(self, module: nn.Module, theta: Tensor) -> Callable[[Tensor], Tensor]:
        """The module, or a part of it, at theta, differentiable by it."""
        views = {n: theta[p.range].view(p.shape) for n, p in occurrences(module, self._places).items()}
        return lambda x: torch.func.functional_call(module, views, (x,), tie_weights=False)

    def _at(self, theta: Tensor, wanted: frozenset[int] = frozenset()) -> nn.Module:
        """The copy of the module at theta; the parameters of these numbers are leaves to differentiate by."""
        for number, (leaf, parameter) in enumerate(zip(self._leaves, self.parameters, strict=True)):
            leaf.requires_grad_(number in wanted)
            leaf.data = theta[parameter.range].view(parameter.shape)
        return self._copy

    def _behind(self, module: nn.Module, kept: Any) -> nn.Module:
        """What of a module is left to compute behind a prefix."""
        return module if kept is None else nn.Sequential(OrderedDict(list(module._modules.items())[kept[0] :]))  # type: ignore[arg-type]

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
        stage = self.layer_stage[first]
        begin = nn.Sequential(*list(self._at(theta)._modules.values())[:stage])  # type: ignore[arg-type]
        return stage, [begin(x) for x in self.inputs.split(self.batch)] if self.count else []

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`Loss.terms`."""
        for outputs, y in self._batches(self._forward(self._behind(self.module, kept), theta), kept):
            yield self.criterion(outputs, y).sum() * self.weight

    @torch.no_grad()
    def outputs(self, theta: Tensor, kept: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs (B, ...) and targets (B, ...), batch by batch."""
        yield from self._batches(self._behind(self._at(theta), kept), kept)
        if self.large:
            self._leave()

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
        if self.large and gradient.dtype == self.dtype:
            return self._summed_in_place(module, gradient, numbers, kept)
        for outputs, y in self._batches(module, kept):
            term = self.criterion(outputs, y).sum() * self.weight
            if term.requires_grad:
                gradients = torch.autograd.grad(term, [self._leaves[k] for k in numbers], allow_unused=True)
                for k, g in zip(numbers, gradients, strict=True):
                    if g is not None:
                        gradient[self.parameters[k].range] += g.reshape(-1)
            value += float(term.detach())
        return value

    def _summed_in_place(self, module: nn.Module, gradient: Tensor, numbers: Sequence[int], kept: Any) -> float:
        """As :meth:`value_gradient`, to the same bits: each gradient is added and freed as soon as it is there.

        What is kept of theta is freed, too.
        """
        leaves, value = [self._leaves[k] for k in numbers], 0.0
        try:
            for k, leaf in zip(numbers, leaves, strict=True):
                leaf.grad = gradient[self.parameters[k].range].view(self.parameters[k].shape)
            for outputs, y in self._batches(module, kept):
                term = self.criterion(outputs, y).sum() * self.weight
                if term.requires_grad:
                    term.backward(inputs=leaves)  # type: ignore[no-untyped-call]
                value += float(term.detach())
                del outputs, term
        finally:
            self._leave()
        return value

    def _leave(self) -> None:
        """Let the copy keep nothing of the theta that it was at."""
        for leaf in self._leaves:
            leaf.grad = None
            leaf.data = leaf.data.new_empty(0)

    def drop_initial(self) -> None:
        """See :meth:`Loss.drop_initial`; the module's trained parameters are empty then."""
        for parameter in self._trained:
            parameter.data = parameter.data.new_empty(0)
