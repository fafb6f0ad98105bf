"""The mean of a criterion over samples, of networks side by side, each of its tile of a sample, and one behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddml.data.tiled import TiledSamples
from ddml.errors import InputError
from ddml.numbers import Number, as_number
from ddml.parameters import parameter_table

from .branch import PROBES, Adding, Branch
from .branches import BranchedCharges, Branches, RestrictedBranchedCharges
from .head import Head, Kept
from .modules import trained
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


class BranchedLoss(SampledLoss):
    """Mean of a criterion over samples, of networks of tiles and the coarse net behind them.

    A process may have the tiles of some networks only. With those of all, it is the
    :class:`ddml.losses.module.ModuleLoss` of the same module; what it does without is to keep the outputs of the other
    networks (:meth:`.Head.keep`), and to give those of its own (:meth:`outputs_of`, :meth:`linearised`). Second
    derivatives are those of :meth:`terms`, for who has all tiles; solvers are told that there are none.

    Parameters
    ----------
    module
        The networks; its trained parameters are theta.
    criterion
        Maps (outputs, targets) to one loss per sample (B,).
    samples
        In tiles.
    batch
        Samples that go through a network of a tile at a time (default: what suits its widest layer).

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

    def __init__(
        self,
        module: Any,
        criterion: Callable[[Tensor, Tensor], Tensor],
        samples: TiledSamples,
        batch: int | None = None,
    ) -> None:
        joined: Joined = module
        named = trained(module)
        self.module = self.network = module
        self.criterion, self.samples, self.count = criterion, samples, len(samples)
        self.weight = 1 / max(self.count, 1)
        self.parameters = parameter_table([(name, p.shape) for name, p in named])
        self.dtype, self.device = named[0][1].dtype, named[0][1].device
        table, generator = {id(p): k for k, (_, p) in enumerate(named)}, torch.Generator().manual_seed(0)

        def probe(*shape: int) -> Tensor:
            return torch.rand(PROBES, *shape, generator=generator).to(named[0][1])

        self.nets = [
            Branch(net, table, self.parameters, probe(*shape), f"the network of tile {tile}", batch)
            for tile, (net, shape) in enumerate(zip(joined.nets, joined.shapes, strict=True))
        ]
        widths = sorted({net.width for net in self.nets})
        if len(widths) != 1:
            raise InputError(f"the networks of tiles give {widths} numbers for a sample: they must be as many")
        (self.classes,), count = widths, len(self.nets)
        rest = joined.coarse, table, self.parameters, probe(count * self.classes), "the coarse net"
        self.coarse = Head(joined.linked, count, self.classes, *rest)
        self.answers = self.coarse.width
        self._trained = [p for _, p in named]
        self._structure()

    def _structure(self) -> None:
        """Layers, blocks and costs."""
        parts: list[Branch] = [*self.nets, self.coarse]
        self.layers = tuple(layer for part in parts for layer in part.layers)
        *nets, head = (range(a, b) for a, b in pairwise(accumulate((len(p.layers) for p in parts), initial=0)))
        self.blocks = tuple(tuple(r) for r in (*nets, head) if r)
        self.costs = tuple(c for part in parts for c in part.costs)
        self.besides = Besides(tuple(p for part in parts for p in part.pointwise), (), CRITERION * self.answers)
        self.branches = Branches(tuple(nets), head, head.start if self.coarse.entered else None)

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
                "subdomains must be the single networks"
            )

    def _inputs(self, net: int) -> Iterator[Tensor]:
        self.check_tiles([net])
        return iter(self.samples.tiles[net].inputs.split(self.nets[net].batch) if self.count else ())

    def outputs_of(self, net: int, theta: Tensor) -> Tensor:
        """What a network gives at theta (n,), of which only its own parameters are read: (B, K)."""
        return self.nets[net].outputs(theta, self._inputs(net))

    def linearised(self, net: int, theta: Tensor, active: Collection[int] | None = None) -> tuple[Tensor, Adding]:
        """As :meth:`outputs_of`, and what takes gradients by them to the parameters of active layers (default: all)."""
        return self.nets[net].linearised(theta.detach(), self._inputs(net), self._wanted(active))

    def _wanted(self, active: Collection[int] | None) -> frozenset[int]:
        """Numbers of the parameters of some layers."""
        return frozenset(k for n, layer in enumerate(self.layers) if active is None or n in active for k in layer)

    # What is behind them ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs_behind(self, theta: Tensor, logits: Mapping[int, Tensor]) -> Tensor:
        """The outputs (B, ...) of the coarse net where the networks give these (B, K)."""
        return self.coarse.behind(self.coarse.at(theta), logits)

    @torch.no_grad()
    def value_behind(self, theta: Tensor, logits: Mapping[int, Tensor], kept: Kept | None = None) -> Number:
        """The loss where the networks give these (B, K); those that are not here are kept."""
        return as_number(self._term(self.coarse.behind(self.coarse.at(theta), logits, kept)))

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
        term = self._term(self.coarse.behind(coarse, moving, kept))
        by = [*moving.values(), *leaves]
        found = torch.autograd.grad(term, by, materialize_grads=True) if by else ()
        for r, g in zip(ranges, found[len(moving) :], strict=True):
            gradient[r].add_(g.reshape(-1))
        return as_number(term), dict(zip(moving, found, strict=False))

    def _term(self, outputs: Tensor) -> Tensor:
        return self.criterion(outputs, self.targets).sum() * self.weight

    # The whole -------------------------------------------------------------------------------------------------------

    def value(self, theta: Tensor, kept: Any = None) -> Number:
        """See :meth:`.Loss.value`; ``kept`` from :meth:`.Head.keep`."""
        moving = range(len(self.nets)) if kept is None else kept.moving
        return self.value_behind(theta, {i: self.outputs_of(i, theta) for i in moving}, kept)

    def value_gradient(
        self, theta: Tensor, gradient: Tensor, kept: Any = None, active: frozenset[int] | None = None
    ) -> Number:
        """See :meth:`.Loss.value_gradient`; ``kept`` from :meth:`.Head.keep`."""
        moving = range(len(self.nets)) if kept is None else kept.moving
        found = {i: self.linearised(i, theta, active) for i in moving}
        value, adjoints = self.gradient_behind(theta, {i: o for i, (o, _) in found.items()}, gradient, kept, active)
        for i, (_, add) in found.items():
            add(adjoints[i], gradient)
        return value

    def terms(self, theta: Tensor, kept: Any = None) -> Iterator[Tensor]:
        """See :meth:`.Loss.terms`: one, of all samples and of all networks, whatever is kept."""
        none = theta.new_zeros(0, self.classes)
        found = [[none, *(net.called(theta, x) for x in self._inputs(i))] for i, net in enumerate(self.nets)]
        yield self.term_behind(theta, [torch.cat(pieces) for pieces in found])

    def term_behind(self, theta: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """The loss where all networks give these (B, K), differentiable by them and by theta."""
        return self._term(self.coarse.called(theta, torch.cat([self.coarse.linked(found) for found in logits], dim=1)))


class RestrictedBranchedLoss(RestrictedLoss):
    """A restricted loss of networks side by side: the outputs of those without active layers are kept.

    They are those that :meth:`.RestrictedLoss.freeze` was given, or computed from the tiles if it was given none.
    """

    loss: BranchedLoss

    def __init__(self, loss: BranchedLoss, ranges: Sequence[slice], frozen: Frozen | None = None) -> None:
        super().__init__(loss, ranges, frozen)
        loss.check_tiles(loss.branches.touched(self.active))

    @property
    def kept(self) -> Kept:
        """See :attr:`.RestrictedLoss.kept`: what the other networks bring."""
        kept: Kept = self.frozen.once(self, self.freezes, self._keep)
        return kept

    def _keep(self) -> Kept:
        loss, theta, outputs = self.loss, self.frozen.theta, self.frozen.outputs
        moving = loss.branches.touched(self.active)
        known = None if outputs is None else outputs.of(loss.samples.numbers)
        if known is None:
            empty = torch.zeros(self.count, loss.classes, dtype=self.dtype, device=self.device)
            known = torch.stack([empty if i in moving else loss.outputs_of(i, theta) for i in range(len(loss.nets))])
        entrance = loss.branches.entrance
        return loss.coarse.keep(theta, list(known), moving, bool(moving) and entrance not in self.active)

    @property
    def charges(self) -> RestrictedBranchedCharges:
        """See :attr:`.Loss.charges`."""
        return RestrictedBranchedCharges(self.loss.charges, self.numbers, self.also)
