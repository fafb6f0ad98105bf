"""The norm of Kronecker-factored curvature on distributed vectors (see :mod:`ddml.losses.kronecker`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from petsc4py import PETSc
from torch import Tensor

from ddml.data.sample_sets import spread_rows
from ddml.errors import CollectiveError, InputError
from ddml.layout import ParameterLayout
from ddml.losses.kronecker import KroneckerLoss, Layer
from ddml.losses.loss import Loss
from ddml.objectives.composed import sampled
from ddml.objectives.objective import Objective
from ddml.parameters import Parameter

from .norm import Norm, apart, dealt

EPS = float(np.finfo(float).eps)
SOLVE = 5  # multiply-adds of a product that take as long as one with a thin matrix and a triangle (measured)
BLOCKS = 4  # of samples at most: the factors of each are as large as all of them (our choice)


class KroneckerNorm(Norm):
    r"""The norm of the Kronecker-factored Fisher matrix, damped (see :mod:`ddml.losses.kronecker`).

    .. math:: \|x\|^2 = x^T M x, \quad M = \mathrm{diag}_l\, (A_l + a_l I) \otimes (G_l + c_l I) = L L^T

    with a_l and c_l the mean of the eigenvalues of A_l and G_l. The factors are running means, of weight 0.9, over
    refreshes, each from a tenth of the objective's samples, which with the labels are drawn anew; M changes with
    :meth:`refresh` only. The layers are dealt over the ranks, so that the same bits come out on any number of them.
    The weight, the damping and the tenth are what did well on MNIST, and our choice, as is the interval of the
    refreshes on full batches.

    Parameters
    ----------
    objective
        Of a :class:`ddml.losses.kronecker.KroneckerLoss`.
    fraction
        Of the samples.
    interval
        Steps on the same objective behind which the norm is refreshed.

    Raises
    ------
    InputError
        If the loss has no such layers.
    """

    is_maximum = False
    MEMORY = 0.9

    def __init__(self, objective: Objective, fraction: float = 0.1, interval: int = 10) -> None:
        self.objective, self.fraction, self.interval = objective, fraction, interval
        self.layers = _factored(objective.loss).kronecker_layers()
        comm = objective.comm
        self.mine = dealt([float(layer.entries.size * sum(layer.sizes)) for layer in self.layers], comm)
        sizes = [size**2 for layer in self.layers for size in layer.sizes]
        self.places = np.cumsum([0, *sizes]).tolist()
        self.factors = np.zeros(self.places[-1])  # of all layers, on all ranks: A, G, A, G, ...
        self.layout = objective.layout
        # sums of factors are shared as vectors are
        self.flat = ParameterLayout((Parameter("factors", (self.places[-1],), 0),), comm)
        self.refreshes = self.age = 0
        self._roots: tuple[int, dict[int, tuple[Tensor, Tensor]]] = (0, {})  # see roots
        self._inside: dict[tuple[tuple[int, int], ...], RestrictedKroneckerNorm] = {}

    def refresh(self, x: PETSc.Vec) -> None:
        """See :class:`Norm`.

        Raises
        ------
        CollectiveError
            If the network's outputs at x or their gradients are not finite.
        """
        objective, version = self.objective, self.refreshes
        rows = spread_rows(objective.loss.count, self.fraction, version)
        sub = sampled(objective, rows)
        sub.parts.cut_into(min(sub.parts.blocks, BLOCKS))
        edges = np.cumsum([0, *objective.comm.allgather(sum(part.count for part in sub.parts))])
        draws = np.random.default_rng([1, version]).random(int(edges[-1]))[edges[objective.comm.rank] :]
        theta = sub.parameters(x)
        sub.work.add(sub.fraction * _factored(sub.loss).kronecker_charge())
        sub.compute(0.0, fresh=max(sub.parts.blocks, 1) * len(self.factors))
        found, begin = np.zeros((max(len(sub.parts), 1), len(self.factors))), 0
        for row, part in zip(found, sub.parts, strict=False):
            u = torch.from_numpy(draws[begin : begin + part.count])
            begin += part.count
            if part.count:
                pieces = [m.reshape(-1) for pair in _factored(part).kronecker_statistics(theta, u) for m in pair]
                row[:] = torch.cat(pieces).cpu().numpy()
        total = self.flat.vector()
        sub.parts.sum_vectors(list(torch.from_numpy(found[: len(sub.parts)])), total, self.flat)
        new = self.flat.gather(total).numpy().copy()
        total.destroy()
        if not np.isfinite(new).all():
            raise CollectiveError("the K-FAC norm is not finite: the network's outputs or their gradients are not")
        self.factors = self.MEMORY * self.factors + (1 - self.MEMORY) * new if version else new
        self.refreshes, self.age = version + 1, 0
        self._charge_roots()

    def _charge_roots(self) -> None:
        """Charge the factorisations, where what is charged does not depend on where a run was interrupted."""
        sizes = [size for layer in self.layers for size in layer.sizes]
        self.objective.compute(sum(size**3 / 6 for size in sizes), fresh=sum(size**2 for size in sizes))

    def aged(self, x: PETSc.Vec) -> None:
        """See :class:`Norm`."""
        self.age += 1
        if self.age >= self.interval:
            self.refresh(x)

    @property
    def version(self) -> int:
        """Grows when the norm changes."""
        return self.refreshes

    @property
    def fresh(self) -> bool:
        """Whether no step has been tried since the last refresh."""
        return self.age == 0

    def damped(self, number: int) -> list[Tensor]:
        """A + a I and G + c I of a layer."""
        found = []
        for kind, size in enumerate(self.layers[number].sizes):
            # a layer without gradients is damped as the others are, nearly nothing: its steps are 0 then
            means = [self._mean(k) for k in range(kind, 2 * len(self.layers), 2)]
            amount = max(means[number], EPS * max(means))
            factor = torch.from_numpy(self._factor(2 * number + kind)).view(size, size)
            found.append(factor + amount * torch.eye(size, dtype=factor.dtype))
        return found

    def _factor(self, place: int) -> NDArray[np.float64]:
        return self.factors[self.places[place] : self.places[place + 1]]

    def _mean(self, place: int) -> float:
        """Of the eigenvalues of a factor."""
        diagonal = self._factor(place)[:: math.isqrt(self.places[place + 1] - self.places[place]) + 1]
        return float(diagonal.sum()) / len(diagonal)

    @property
    def roots(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Lower triangles, the Cholesky factors of A + a I and G + c I, of this rank's layers."""
        if self._roots[0] != self.version:
            made = {b: [torch.linalg.cholesky(factor) for factor in self.damped(b)] for b in self.mine}
            self._roots = self.version, {b: (A, G) for b, (A, G) in made.items()}
        return self._roots[1]

    def restricted(
        self, layout: ParameterLayout, ranges: Sequence[slice], objective: Objective | None = None
    ) -> RestrictedKroneckerNorm:
        """The norm of vectors that are 0 outside ``ranges`` of theta, for what is inside, in another layout.

        What it computes is charged to ``objective`` (default: the whole norm's); whoever asks for the same ranges and
        layout gets the same norm.
        """
        key = tuple((r.start, r.stop) for r in ranges)
        made = self._inside.get(key)
        if made is None or made.layout is not layout:
            objective = self.objective if objective is None else objective
            made = self._inside[key] = RestrictedKroneckerNorm(self, layout, ranges, objective)
        return made

    def __call__(self, x: PETSc.Vec) -> float:
        """See :class:`Norm`."""
        image = x.duplicate()
        self.coordinates(x, image)
        size = float(image.norm())
        image.destroy()
        return size

    def steepest(self, g: PETSc.Vec, direction: PETSc.Vec) -> float:
        """See :class:`Norm`: M^-1 g over its norm."""
        given = apart(g, direction)
        self.inverse(given, direction)
        size = math.sqrt(max(float(given.dot(direction)), 0.0))
        if given is not g:
            given.destroy()
        direction.scale(1 / size if size > 0 else 0.0)
        return size

    def coordinates(self, x: PETSc.Vec, image: PETSc.Vec) -> None:
        """Write L^T x, whose 2-norm is the norm of x, to ``image``."""
        self._apply(1, lambda X, A, G: G.T @ X @ A, x, image)

    def vector(self, coordinates: PETSc.Vec, x: PETSc.Vec) -> None:
        """Write the x with these :meth:`coordinates`, L^-T times them."""
        self._apply(1, lambda X, A, G: _left(G.T, _right(X, A), upper=True), coordinates, x)

    def covector(self, g: PETSc.Vec, image: PETSc.Vec) -> None:
        """Write L^-1 g, the gradient by the coordinates, to ``image``."""
        self._apply(1, lambda X, A, G: _left(G, _right(X, A.T, upper=True)), g, image)

    def inverse(self, g: PETSc.Vec, x: PETSc.Vec) -> None:
        """Write M^-1 g to x."""
        self._apply(2, lambda X, A, G: torch.cholesky_solve(torch.cholesky_solve(X.T, A).T, G), g, x)

    def _apply(
        self, times: int, function: Callable[[Tensor, Tensor, Tensor], Tensor], x: PETSc.Vec, image: PETSc.Vec
    ) -> None:
        """Write what a function does to each layer's matrix, so many products with both triangles."""
        roots = self.roots
        triangles = [(layer.entries.size, sum(layer.sizes), sum(s**2 for s in layer.sizes)) for layer in self.layers]
        self.objective.compute(
            SOLVE * times / 2 * sum(entries * sides for entries, sides, _ in triangles),
            times / 2 * sum(squares for *_, squares in triangles),
            2 * self.layout.size,
        )
        given, full = self.layout.gather(x), torch.zeros(self.layout.size, dtype=torch.float64)
        for b in self.mine:
            entries = torch.from_numpy(self.layers[b].entries)
            full[entries] = function(given[entries], *roots[b])
        full += 0.0  # -0 becomes 0, as it does where other ranks' zeros are added
        self.layout.reduce(full, image)

    def state(self) -> dict[str, Any]:
        """See :class:`Norm`."""
        return {"factors": self.factors, "refreshes": self.refreshes, "age": self.age}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`Norm`."""
        self.factors, self.refreshes, self.age = state["factors"], state["refreshes"], state["age"]


class RestrictedKroneckerNorm(KroneckerNorm):
    """See :meth:`KroneckerNorm.restricted`; it changes with the whole norm and is never refreshed itself.

    Raises
    ------
    InputError
        If a layer is cut otherwise than into its weight and its bias.
    """

    def __init__(
        self, whole: KroneckerNorm, layout: ParameterLayout, ranges: Sequence[slice], objective: Objective
    ) -> None:
        self.whole, self.layout, self.objective = whole, layout, objective
        place = np.full(whole.layout.size, -1)
        place[np.concatenate([np.arange(r.start, r.stop) for r in ranges])] = np.arange(layout.size)
        self.parts: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []  # layer, its rows and columns inside
        layers: list[Layer] = []
        for number, layer in enumerate(whole.layers):
            entries = place[layer.entries]
            inside = entries >= 0
            rows, columns = inside.any(axis=1), inside.any(axis=0)
            if not inside.any():
                continue
            if not np.array_equal(inside, np.outer(rows, columns)):
                raise InputError(f"-norm kfac needs subdomains of whole tensors, layer {layer.name} is cut")
            self.parts.append((number, np.flatnonzero(rows), np.flatnonzero(columns)))
            layers.append(Layer(layer.name, entries[np.ix_(rows, columns)]))
        self.layers = tuple(layers)
        self.mine = dealt([float(layer.entries.size * sum(layer.sizes)) for layer in layers], layout.comm)
        self._roots, self._inside = (-1, {}), {}

    @property
    def version(self) -> int:
        """That of the whole norm."""
        return self.whole.version

    def refresh(self, x: PETSc.Vec) -> None:
        """See :class:`Norm`; a solve that begins behind a refresh of the whole norm factorises."""
        if self.fresh:
            self._charge_roots()

    def aged(self, x: PETSc.Vec) -> None:
        """See :class:`Norm`."""
        return

    @property
    def fresh(self) -> bool:
        """Whether the whole norm is."""
        return self.whole.fresh

    def damped(self, number: int) -> list[Tensor]:
        """See :meth:`KroneckerNorm.damped`."""
        layer, rows, columns = self.parts[number]
        A, G = self.whole.damped(layer)
        return [factor[kept][:, kept] for factor, kept in ((A, columns), (G, rows))]

    def state(self) -> dict[str, Any]:
        """See :class:`Norm`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`Norm`."""
        return


def _factored(loss: Loss) -> KroneckerLoss:
    if not isinstance(loss, KroneckerLoss):
        raise InputError(f"a {type(loss).__name__} has no K-FAC norm: choose another -norm")
    return loss


def _left(T: Tensor, X: Tensor, upper: bool = False) -> Tensor:
    """T^-1 X for a triangle T."""
    return torch.linalg.solve_triangular(T, X, upper=upper)


def _right(X: Tensor, T: Tensor, upper: bool = False) -> Tensor:
    """X T^-1 for a triangle T."""
    return torch.linalg.solve_triangular(T, X, upper=upper, left=False)
