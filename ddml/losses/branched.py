"""The mean of a criterion over samples, of networks side by side, each of its tile of a sample, and one behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddml.data.tiled import TiledSamples
from ddml.errors import InputError
from ddml.numbers import Number, as_number
from ddml.parameters import parameter_table

from .branch import PROBES, Branch, width_of
from .branches import BranchedCharges, Branches, RestrictedBranchedCharges
from .modules import is_chain, trained
from .restricted import Frozen, RestrictedLoss
from .samples import SampledLoss
from .work import ACTIVATION, CRITERION, Besides


class Joined(Protocol):
    """Networks of tiles and the one behind them, see :class:`ddml.networks.coherent.Coherent`.

    Attributes
    ----------
    nets : ModuleList
        Each maps samples (B, ...) of its tile to (B, K).
    coarse : Module
        Maps (B, N K) to outputs (B, ...).
    shapes : list of tuple of int
        Of the tiles.
    """

    nets: nn.ModuleList
    coarse: nn.Module
    shapes: Sequence[tuple[int, ...]]

    def linked(self, logits: Tensor) -> Tensor:
        """What the coarse net is given of logits (..., K)."""


class Kept(NamedTuple):
    """What networks that do not move bring.

    Attributes
    ----------
    moving : tuple of int
        The others.
    inputs : Tensor
        To the sum that leaves the first coarse layer (B, h); or to its inputs (B, N K), where that layer moves, too.
    summed : bool
        Which of the two.
    """

    moving: tuple[int, ...]
    inputs: Tensor
    summed: bool


Adding = Callable[[Tensor, Tensor], None]
"""Adds what comes of the loss's gradient by some outputs (B, K) to its gradient by theta (n,)."""


class BranchedLoss(SampledLoss):
    """Mean of a criterion over samples, of networks of tiles and the coarse net behind them.

    A process may have the tiles of some networks only. With those of all, it is the
    :class:`ddml.losses.module.ModuleLoss` of the same module; what it does without is to keep the outputs of the other
    networks (:meth:`keep`), and to give those of its own (:meth:`outputs_of`, :meth:`linearised`). Second
    derivatives are those of :meth:`terms`, for who has all tiles; solvers are told that there are none.

    Parameters
    ----------
    module
        The networks; its trained parameters are theta.
    criterion
        Maps (outputs, targets) to one loss per sample (B,).
    samples
        In tiles.

    Attributes
    ----------
    classes : int
        K, the numbers that each of the networks gives for a sample.
    answers : int
        Numbers that the coarse net gives for a sample.
    branches : Branches

    Raises
    ------
    InputError
        Networks that fail on their tiles, are not deterministic, or give other numbers than the others.
    """

    module: nn.Module
    samples: TiledSamples  # type: ignore[mutable-override]
    hessian = False
    once = 6e7, 1000.0

    def __init__(self, module: Any, criterion: Callable[[Tensor, Tensor], Tensor], samples: TiledSamples) -> None:
        joined: Joined = module
        named = trained(module)
        self.module = self.network = module
        self.criterion, self.samples, self.count = criterion, samples, len(samples)
        self.weight = 1 / max(self.count, 1)
        self.parameters = parameter_table([(name, p.shape) for name, p in named])
        self.dtype, self.device = named[0][1].dtype, named[0][1].device
        self.linked = joined.linked
        table, generator = {id(p): k for k, (_, p) in enumerate(named)}, torch.Generator().manual_seed(0)
        self.nets: list[Branch] = []
        widths = set()
        for tile, (net, shape) in enumerate(zip(joined.nets, joined.shapes, strict=True)):
            probe = torch.rand(PROBES, *shape, generator=generator).to(named[0][1])
            widths.add(width_of(net, probe, f"the network of tile {tile}"))
            self.nets.append(Branch(net, table, self.parameters, probe))
        if len(widths) != 1:
            raise InputError(f"the networks of tiles give {sorted(widths)} numbers for a sample: they must be as many")
        self.classes = widths.pop()
        probe = torch.rand(PROBES, len(self.nets) * self.classes, generator=generator).to(named[0][1])
        self.answers = width_of(joined.coarse, probe, "the coarse net")
        self.coarse = Branch(joined.coarse, table, self.parameters, probe)
        self._trained = [p for _, p in named]
        self._structure()

    def _structure(self) -> None:
        """Layers, blocks, costs, and the first linear layer of the coarse net."""
        parts = [*self.nets, self.coarse]
        self.layers = tuple(layer for part in parts for layer in part.layers)
        ends = [sum(len(part.layers) for part in parts[:i]) for i in range(len(parts) + 1)]
        ranges = [range(a, b) for a, b in pairwise(ends)]
        self.blocks = tuple(tuple(r) for r in ranges if r)
        self.costs = tuple(c for part in parts for c in part.costs)
        self.besides = Besides(tuple(p for part in parts for p in part.pointwise), (), CRITERION * self.answers)
        children = dict(self.coarse.module.named_children()) if is_chain(self.coarse.module) else {}
        flat = next((k for k, child in enumerate(children.values()) if not isinstance(child, nn.Flatten)), 0)
        name, first = [*children.items(), ("", None)][flat]
        self.entrance = flat if isinstance(first, nn.Linear) else -1
        known = self.entrance >= 0 and name in self.coarse.names
        self.branches = Branches(tuple(ranges[:-1]), ranges[-1], ranges[-1].start if known else None)

    @property
    def charges(self) -> BranchedCharges:
        """See :attr:`.Loss.charges`."""
        n, hidden = self.branches.entrance, 0.0
        if n is not None:
            hidden = self.besides.pointwise[n] / ACTIVATION
        return BranchedCharges(self.costs, self.besides, self.branches, len(self.nets) * self.classes, hidden)

    def behind(self, active: frozenset[int]) -> frozenset[int]:
        """See :meth:`.Loss.behind`."""
        return self.branches.behind(active)

    def initial(self) -> Tensor:
        """The module's trained parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self._trained])

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Write parameters (n,), of a result, say, into the module."""
        for parameter, known in zip(self._trained, self.parameters, strict=True):
            parameter.copy_(theta[known.range].view(known.shape))

    # One of the networks ---------------------------------------------------------------------------------------------

    def check_tiles(self, nets: Collection[int]) -> None:
        """Raise an InputError where the tiles of some networks are not here."""
        missing = sorted(set(nets) - set(self.samples.tiles))
        if missing:
            raise InputError(
                f"this rank has the samples of tiles {sorted(self.samples.tiles)} only, and not of {missing}: "
                "subdomains must be single networks, treated side by side"
            )

    def _inputs(self, net: int) -> Iterator[Tensor]:
        self.check_tiles([net])
        return iter(self.samples.tiles[net].inputs.split(self.nets[net].batch) if self.count else ())

    def _put(self, found: list[Tensor]) -> Tensor:
        none = torch.zeros(0, self.classes, dtype=self.dtype, device=self.device)
        return torch.cat(found) if found else none

    @torch.no_grad()
    def outputs_of(self, net: int, theta: Tensor) -> Tensor:
        """What a network gives at theta (n,), of which only its own parameters are read: (B, K)."""
        module = self.nets[net].at(theta)
        return self._put([module(x) for x in self._inputs(net)])

    def linearised(self, net: int, theta: Tensor, active: Collection[int] | None = None) -> tuple[Tensor, Adding]:
        """As :meth:`outputs_of`, and what takes gradients by them to the parameters of active layers (default: all)."""
        branch, wanted = self.nets[net], self._wanted(active)
        module = branch.at(theta.detach(), wanted)
        leaves, ranges = branch.wanted(wanted)
        outputs = [module(x) for x in self._inputs(net)]

        def add(adjoint: Tensor, gradient: Tensor) -> None:
            pairs = [(o, a) for o, a in zip(outputs, adjoint.split(branch.batch), strict=False) if o.requires_grad]
            if pairs and leaves:
                found = torch.autograd.grad([o for o, _ in pairs], leaves, [a for _, a in pairs], allow_unused=True)
                for r, g in zip(ranges, found, strict=True):
                    if g is not None:
                        gradient[r] += g.reshape(-1)

        return self._put([o.detach() for o in outputs]), add

    def _wanted(self, active: Collection[int] | None) -> frozenset[int]:
        """Numbers of the parameters of some layers."""
        return frozenset(k for n, layer in enumerate(self.layers) if active is None or n in active for k in layer)

    # What is behind them ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, theta: Tensor, logits: Mapping[int, Tensor], active: Collection[int]) -> Kept:
        """What the networks without active layers bring, whose outputs (B, K) are these."""
        moving, entrance = self.branches.touched(active), self.branches.entrance
        features = [
            torch.zeros_like(logits[i]) if i in moving else self.linked(logits[i]) for i in range(len(self.nets))
        ]
        inputs = torch.cat(features, dim=1)
        summed = self.entrance >= 0 and bool(moving) and (entrance is None or entrance not in active)
        if summed:
            inputs = self._first(self.coarse.at(theta))[0](inputs)
        return Kept(moving, inputs, summed)

    def _outputs(self, coarse: nn.Module, logits: Mapping[int, Tensor], kept: Kept | None) -> Tensor:
        features = {i: self.linked(found) for i, found in logits.items()}
        if kept is None or not kept.summed:
            brought = {} if kept is None else dict(enumerate(kept.inputs.split(self.classes, dim=1)))
            every = {**brought, **features}
            outputs: Tensor = coarse(torch.cat([every[i] for i in range(len(self.nets))], dim=1))
            return outputs
        (_, weight), found = self._first(coarse), kept.inputs
        for i, values in features.items():
            found = found + values @ weight[:, i * self.classes : (i + 1) * self.classes].T
        for child in list(coarse.children())[self.entrance + 1 :]:
            found = child(found)
        return found

    def _first(self, coarse: nn.Module) -> tuple[nn.Module, Tensor]:
        """The first linear layer of the coarse net, and its weight."""
        layer = list(coarse.children())[self.entrance]
        assert isinstance(layer, nn.Linear)
        return layer, layer.weight

    @torch.no_grad()
    def outputs_behind(self, theta: Tensor, logits: Mapping[int, Tensor]) -> Tensor:
        """The outputs (B, ...) of the coarse net where the networks give these (B, K)."""
        return self._outputs(self.coarse.at(theta), logits, None)

    @torch.no_grad()
    def value_behind(self, theta: Tensor, logits: Mapping[int, Tensor], kept: Kept | None = None) -> Number:
        """The loss where the networks give these (B, K); those that are not here are kept."""
        return as_number(self._term(self._outputs(self.coarse.at(theta), logits, kept)))

    def gradient_behind(
        self,
        theta: Tensor,
        logits: Mapping[int, Tensor],
        gradient: Tensor,
        kept: Kept | None = None,
        active: Collection[int] | None = None,
    ) -> tuple[Number, dict[int, Tensor]]:
        """As :meth:`value_behind`, and the gradients by these outputs.

        The gradient by the coarse net's parameters in active layers (default: all) is added to ``gradient`` (n,).
        """
        wanted = self._wanted(active)
        coarse = self.coarse.at(theta.detach(), wanted)
        leaves, ranges = self.coarse.wanted(wanted)
        moving = {i: found.detach().requires_grad_() for i, found in logits.items()}
        term = self._term(self._outputs(coarse, moving, kept))
        by = [*moving.values(), *leaves]
        found = torch.autograd.grad(term, by, materialize_grads=True) if by else ()
        for r, g in zip(ranges, found[len(moving) :], strict=True):
            gradient[r] += g.reshape(-1)
        return as_number(term), dict(zip(moving, found, strict=False))

    def _term(self, outputs: Tensor) -> Tensor:
        return self.criterion(outputs, self.targets).sum() * self.weight

    # The whole -------------------------------------------------------------------------------------------------------

    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`.Loss.value`; ``kept`` from :meth:`keep`."""
        moving = range(len(self.nets)) if kept is None else kept.moving
        return self.value_behind(theta, {i: self.outputs_of(i, theta) for i in moving}, kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`.Loss.value_gradient`; ``kept`` from :meth:`keep`."""
        moving = range(len(self.nets)) if kept is None else kept.moving
        found = {i: self.linearised(i, theta, active) for i in moving}
        value, adjoints = self.gradient_behind(theta, {i: o for i, (o, _) in found.items()}, gradient, kept, active)
        for i, (_, add) in found.items():
            add(adjoints[i], gradient)
        return value

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`: one, of all samples and of all networks, whatever is kept."""
        found = [self._put([net.called(theta, x) for x in self._inputs(i)]) for i, net in enumerate(self.nets)]
        yield self.term_behind(theta, found)

    def term_behind(self, theta: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """The loss where all networks give these (B, K), differentiable by them and by theta."""
        return self._term(self.coarse.called(theta, torch.cat([self.linked(found) for found in logits], dim=1)))


class RestrictedBranchedLoss(RestrictedLoss):
    """A restricted loss of networks side by side: the outputs of those without active layers are kept.

    They are those that :meth:`.RestrictedLoss.freeze` was given, or computed from the tiles if it was given none.
    """

    loss: BranchedLoss

    def __init__(self, loss: BranchedLoss, ranges: Sequence[slice], frozen: Frozen | None = None) -> None:
        super().__init__(loss, ranges, frozen)
        loss.check_tiles(loss.branches.touched(self.active))

    def entering(self) -> Kept:
        """See :meth:`.RestrictedLoss.entering`."""
        theta, outputs = self.frozen.theta, self.frozen.outputs
        known = None if outputs is None else outputs.of(self.loss.samples.numbers)
        if known is None:
            moving = self.loss.branches.touched(self.active)
            empty = torch.zeros(self.count, self.loss.classes, dtype=self.dtype, device=self.device)
            found = [empty if i in moving else self.loss.outputs_of(i, theta) for i in range(len(self.loss.nets))]
            known = torch.stack(found)
        return self.loss.keep(theta, dict(enumerate(known)), self.active)

    def prefix_charge(self) -> float:
        """See :meth:`.RestrictedLoss.prefix_charge`."""
        return self.charges.keep(self.frozen.outputs is not None)

    @property
    def charges(self) -> RestrictedBranchedCharges:
        """See :attr:`.Loss.charges`."""
        return RestrictedBranchedCharges(self.loss.charges, self.numbers, self.also)
