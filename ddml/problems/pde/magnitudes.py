"""How large everything in a problem is where a training begins, and the scales that follow from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddml.data.sequences import one_of_each, spread
from ddml.errors import InputError
from ddml.options import NEVER, Option

from . import calling
from .linearisation import ResidualGraph
from .pde import PDE, Periodic
from .points import TermPoints
from .residuals import PDEResiduals
from .scales import Scales, mapped_inputs, power_of_ten, spread_of

OPTIONS = (
    Option("map_inputs", "auto", "Coordinates that the network is given as -1 to 1; auto: those not of order 1, where "
           "the problem has no embed.", choices=("auto", "always", "never"), changes=NEVER),
    Option("balance_terms", "auto", "Weights that make all terms alike at the start; auto: where no weights are given "
           "and terms are orders of magnitude apart.", choices=("auto", "always", "never"), changes=NEVER),
    Option("scales", None, "Of coordinates, fields and terms, as a run file has them; none: nothing is scaled "
           "(default: what the problem, its lift and its data say).", changes=NEVER),
)  # fmt: skip

# our choices
POINTS = 256  # of each term where magnitudes are taken
FIELDS = 30.0  # a network need not be scaled whose output is to be between this and its inverse
GUESSED = 1e4  # the same where the lift alone says that it is small, or the source of an equation how large it is
TERMS = 1e4  # terms that are further apart in the loss are balanced
ALONE = 1e8  # a loss of one term that is further from 1 is scaled
PARTS = 1e6  # parts of a residual, and weighted terms, that are further apart are noted
GIVEN = 30.0  # inputs of a network are noted that are beyond this, or vary by less than its inverse
DERIVATIVES = 1e3  # of networks have as many times the relative rounding errors of numbers
LONGEST = 1000  # characters that PETSc's database of options hands back


@dataclass(frozen=True)
class Magnitude:
    """Of a term at the initial parameters; everything is a root of a mean square over its points.

    Attributes
    ----------
    label : str
        Of the term.
    residual : float
        Of the residual, all its pieces together.
    parts : mapping of derivatives to float
        Of a field or derivative times the derivative of the residual by it, the largest first, as in ``u.xx``.
    rest : float
        Of what that leaves of the residual: sources and data.
    weight : float
        Of the term in the loss.
    wanted : mapping of fields to float
        What the network would have to be, where the term alone says what a field is.
    """

    label: str
    residual: float
    parts: dict[str, float]
    rest: float
    weight: float
    wanted: dict[int, float]

    @property
    def loss(self) -> float:
        """The term's share of the loss."""
        return self.weight * self.residual**2

    def __str__(self) -> str:
        """The line of a header."""
        inside = [f"{name} {size:.1e}" for name, size in list(self.parts.items())[:6]]
        return f"{self.label} {self.residual:.1e} ({', '.join([*inside, f'rest {self.rest:.1e}'])})"


def magnitudes(loss: PDEResiduals) -> list[Magnitude]:
    """Those of all terms of a loss, at its initial parameters."""
    theta = loss.initial()
    loss.evaluator.bind(theta)
    found = []
    for term, points in zip(loss.problem_terms, loss.sets, strict=True):
        jets = loss.evaluator.forward(points.inputs.flatten(1, 2)).clone()
        graph = loss.graph(points, jets, loss.leaves(theta))
        parts: dict[str, float] = defaultdict(float)
        rest = torch.zeros(len(points), dtype=loss.dtype, device=loss.device)
        for piece in graph.pieces:
            left = piece.detach()
            for (k, _, f), value, slope in zip(graph.places, graph.inputs, _slopes(graph, piece), strict=False):
                part = value.detach() * slope
                parts[loss.statement.name((f, loss.indices[k])).rstrip(".")] += float(part.square().mean())
                left = left - part
            rest = rest + left.square()
        squares = sum(float(p.detach().square().mean()) for p in graph.pieces)
        sizes = {name: size**0.5 for name, size in sorted(parts.items(), key=lambda item: -item[1])}
        wanted = {} if isinstance(term.where, Periodic) else _wanted(graph, points)
        found.append(Magnitude(term.label, squares**0.5, sizes, float(rest.mean()) ** 0.5, term.weight, wanted))
    return found


def rounding(found: Sequence[Magnitude], dtype: torch.dtype) -> float:
    """About the loss that rounding leaves, as derivatives of networks are rounded."""
    parts = (m.weight * max([m.rest, *m.parts.values()]) ** 2 for m in found)
    return (DERIVATIVES * torch.finfo(dtype).eps) ** 2 * sum(parts)


def _slopes(graph: ResidualGraph, piece: Tensor) -> list[Tensor]:
    """The derivative (N,) of a piece by each field and derivative that it asks for."""
    asked = graph.inputs[: len(graph.places)]
    if not (asked and piece.requires_grad):
        return [torch.zeros_like(value) for value in asked]
    slopes = torch.autograd.grad(piece.sum(), asked, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(value) if s is None else s for s, value in zip(slopes, asked, strict=True)]


def _wanted(graph: ResidualGraph, points: TermPoints) -> dict[int, float]:
    """What a term wants of the network's outputs, where it is of the values of one field and nothing else."""
    if len(graph.places) != 1 or graph.places[0][0] != 0 or len(graph.pieces) != 1:
        return {}
    f, value, piece = graph.places[0][2], graph.inputs[0].detach(), graph.pieces[0]
    slope = _slopes(graph, piece)[0]
    factor = torch.ones_like(value) if points.mix is None else points.mix[0, 0, :, 0, f]
    lift = torch.zeros_like(value) if points.lift is None else points.lift[0, :, 0, f]
    wanted = value - piece.detach() / slope - lift
    known = torch.isfinite(wanted)
    size = float(factor[known].norm())
    return {f: float(wanted[known].norm()) / size} if size > 0 else {}


def find(
    problem: PDE, network: nn.Module, dtype: torch.dtype, device: torch.device, settings: Any
) -> tuple[Scales, list[Magnitude], list[str]]:
    """The scales of a problem for a network, what is how large then, and notes on what stays out of scale.

    All of it follows from the problem and the initial parameters: it is the same on any rank.

    Parameters
    ----------
    problem, network, dtype, device
        As for :class:`ddml.problems.pde.loss.PDELoss`.
    settings
        Values of :data:`OPTIONS`.

    Raises
    ------
    InputError
        ``-map_inputs always`` of a problem with an ``embed``; more scales than fit an option.
    """

    def loss_of(scales: Scales) -> PDEResiduals:
        loss = PDEResiduals(problem, network, POINTS, dtype, device, scales=scales)
        return loss.with_sets([s.rows(torch.from_numpy(one_of_each(len(s), POINTS))) for s in loss.sets])

    scales = Scales(mapped_inputs(problem, settings.map_inputs))
    loss = loss_of(scales)
    found = magnitudes(loss)
    fields = _field_sizes(problem, found, dtype)
    if fields:
        scales = Scales(scales.inputs, fields)
        found = magnitudes(loss_of(scales))
    weights = _weights(found, settings.balance_terms)
    found = [replace(m, weight=m.weight * weights.get(i, 1.0)) for i, m in enumerate(found)]
    balanced = Scales(scales.inputs, scales.fields, weights)
    if len(str(balanced)) > LONGEST:
        raise InputError(
            f"the scales of {len(found)} terms do not fit a run file: give weights, or -balance_terms never"
        )
    return balanced, found, notes(problem, balanced, found, dtype)


def _field_sizes(problem: PDE, found: Sequence[Magnitude], dtype: torch.dtype) -> dict[str, float]:
    """What the network's outputs are to be multiplied with, where they should not be of order 1."""
    points = torch.as_tensor(spread(POINTS, problem.bounds), dtype=dtype)
    lift, factor = calling.lift(problem, points.T).numpy(), calling.factor(problem, points.T).numpy()
    sizes = {}
    for f, name in enumerate(problem.fields):
        largest = float(np.abs(factor[:, f]).max()) or 1.0
        if name in problem.scale:
            sizes[name] = float(problem.scale[name]) / largest
            continue
        wanted = [m.wanted[f] for m in found if f in m.wanted]
        varies = float(np.ptp(lift[:, f])) / 2 or float(np.abs(lift[:, f]).max())
        size, low, high = max([*wanted, varies / largest]), 1 / (FIELDS if wanted else GUESSED), FIELDS
        forced = max(map(_forced, found), default=0.0) if len(problem.fields) == 1 else 0.0
        if not wanted and size < low and forced > size:
            size, low, high = forced, 1 / GUESSED, GUESSED
        size = size or 1 / largest
        if np.isfinite(size) and not low <= size <= high:
            sizes[name] = power_of_ten(size)
    return sizes


def _forced(magnitude: Magnitude) -> float:
    """How much larger the source of an equation is than what the fields give; 0 where there is none."""
    largest = max(magnitude.parts.values(), default=0.0)
    return magnitude.rest / largest if magnitude.rest > 1e-12 * largest > 0 else 0.0


def _weights(found: Sequence[Magnitude], how: str) -> dict[int, float]:
    """What the terms' weights are to be multiplied with."""
    sizes = {i: m.loss for i, m in enumerate(found) if m.loss > 0 and np.isfinite(m.loss)}
    if how == "never" or not sizes or (how == "auto" and any(m.weight != 1 for m in found)):
        return {}
    apart = spread_of(list(sizes.values())) > TERMS if len(found) > 1 else spread_of([1.0, *sizes.values()]) > ALONE
    return {i: power_of_ten(1 / size) for i, size in sizes.items()} if apart or how == "always" else {}


def notes(problem: PDE, scales: Scales, found: Sequence[Magnitude], dtype: torch.dtype) -> list[str]:
    """What stays out of scale, and what to change."""
    said = []
    points = torch.as_tensor(spread(POINTS, problem.bounds), dtype=dtype)
    given = scales.embed(problem, points.T)
    for i, column in enumerate(given.T):
        low, high = float(column.min()), float(column.max())
        if max(-low, high) > GIVEN or high - low < 1 / GIVEN:
            cure = "-map_inputs auto maps it" if type(problem).embed is PDE.embed else "let embed give -1 to 1"
            said.append(f"input {i} of the network is from {low:.6g} to {high:.6g}: {cure}")
    for m in found:
        parts = {name: size for name, size in m.parts.items() if size > 0}
        if parts and spread_of(list(parts.values())) > PARTS:
            first, last = next(iter(parts)), list(parts)[-1]
            said.append(
                f"in term {m.label}, {last} is {parts[last] / parts[first]:.0e} of {first} at the start: are its"
                " coefficients in the units of domain and fields?"
            )
    sizes = {m.label: m.loss for m in found if m.loss > 0}
    if len(sizes) > 1 and spread_of(list(sizes.values())) > PARTS:
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        said.append(
            f"term {small} is {sizes[small] / sizes[large]:.0e} of term {large} in the loss at the start: other"
            " weights, or -balance_terms always"
        )
    return said
