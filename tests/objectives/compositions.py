"""Objectives made of objectives, and dense evaluations of what they shall be."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.consistent import ConsistentObjective, sample_parts, whole_copies
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import RestrictedObjective, restricted
from ddml.problems import Burgers, PDELoss


def burgers() -> tuple[Loss, Callable[[Tensor, Tensor], Tensor]]:
    """A sum of squares, and its residual at some points by plain torch."""
    network = TanhNetwork(2, 3, 2, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(Burgers(), network, 13, chunk=4)
    problem = loss.problem
    points = torch.as_tensor(problem.points(problem.terms()[0], 13)[0][:, 0])

    def residual(theta: Tensor, rows: Tensor) -> Tensor:
        views = {p.name: theta[p.range].view(p.shape) for p in loss.parameters}
        t, x = (column.detach().requires_grad_() for column in points[rows].T)

        def d(values: Tensor, by: Tensor) -> Tensor:
            return torch.autograd.grad(values.sum(), by, create_graph=True)[0]

        plain = torch.func.functional_call(network, views, (torch.stack(problem.embed(t, x), dim=1),))
        u = problem.lift(t, x) + problem.factor(t, x) * plain[:, 0]
        u_x = d(u, x)
        return (d(u, t) + u * u_x - 0.01 / math.pi * d(u_x, x)) / len(rows) ** 0.5

    return loss, residual


def classifier() -> tuple[Loss, Callable[[Tensor, Tensor], Tensor]]:
    """A mean cross entropy, and the outputs for some samples by plain torch."""
    generator = torch.Generator().manual_seed(1)
    W, b, V, c = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 3), (4,), (3, 4), (3,)))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    for parameter, value in zip(module.parameters(), (W, b, V, c), strict=True):
        parameter.data = value
    inputs = torch.randn(13, 3, generator=generator, dtype=torch.float64)
    loss = ModuleLoss(module, torch.nn.CrossEntropyLoss(reduction="none"), inputs, LABELS, 4)

    def outputs(theta: Tensor, rows: Tensor) -> Tensor:
        W, b, V, c = theta[:12].view(4, 3), theta[12:16], theta[16:28].view(3, 4), theta[28:]
        return torch.tanh(inputs[rows] @ W.T + b) @ V.T + c

    return loss, outputs


LABELS = torch.as_tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2, 1])


LOSSES = {"burgers": burgers, "classifier": classifier}


class Dense:
    """What a composed objective shall be: the loss on some samples at ``embed(x)``, plus ``linear(x)``."""

    def __init__(self, name: str, outputs: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> None:
        self.name, self.outputs, self.rows = name, outputs, rows
        self.embed: Callable[[Tensor], Tensor] = lambda x: x
        self.linear: Callable[[Tensor], Any] = lambda x: 0.0

    def but(self, **changes: Any) -> "Dense":
        other = Dense(self.name, self.outputs, self.rows)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def __call__(self, x: Tensor) -> Tensor:
        outputs = self.outputs(self.embed(x), self.rows)
        if self.name == "burgers":
            return (outputs**2).sum() + self.linear(x)
        chosen = outputs[torch.arange(len(outputs)), LABELS[self.rows]]
        return (outputs.exp().sum(1).log() - chosen).mean() + self.linear(x)

    def gradient(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self(x), x)[0]

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.functional.vhp(self, x, v)[1]

    def gauss_newton_product(self, x: Tensor, v: Tensor) -> Tensor:
        def outputs(y: Tensor) -> Tensor:
            return self.outputs(self.embed(y), self.rows)

        found, Jv = torch.autograd.functional.jvp(outputs, x, v)
        if self.name == "burgers":
            BJv = 2 * Jv
        else:
            p = found.softmax(dim=1)
            B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            BJv = torch.einsum("skl,sl->sk", B, Jv) / len(self.rows)
        return torch.autograd.functional.vjp(outputs, x, BJv)[1]


# Compositions -------------------------------------------------------------------------------------------------------


def put(layout: ParameterLayout, values: Tensor) -> PETSc.Vec:
    x = layout.vector()
    x.setArray(values.detach().numpy()[slice(*x.getOwnershipRange())])
    return x


def numbers(size: int, *seed: int) -> Tensor:
    return torch.as_tensor(0.5 * np.random.default_rng(seed).standard_normal(size))


class Node:
    """An objective, what it shall be, and what is made of it by the next letters.

    R: restricted to each of two subdomains; S: sampled; T: shifted; C: consistent, on each of two parts.
    """

    def __init__(self, objective: Objective, dense: Dense, letters: str) -> None:
        self.objective, self.dense = objective, dense
        self.children: list[Node] = []
        self.decomposition: Decomposition | None = None
        self.frozen = numbers(objective.layout.size, 9)
        if not letters:
            return
        letter, n, count = letters[0], objective.layout.size, objective.loss.count
        made: list[tuple[Objective, Dense]] = []
        if letter == "S":
            rows = torch.arange(0, count, 2)
            made = [(sampled(objective, rows.numpy()), dense.but(rows=dense.rows[rows]))]
        elif letter == "T":
            slope, start = numbers(n, 1, len(letters)), numbers(n, 2, len(letters))
            derived = shifted(objective, put(objective.layout, slope), put(objective.layout, start))
            linear = dense.linear
            made = [(derived, dense.but(linear=lambda x: linear(x) + slope @ (x - start)))]
        elif letter == "R":
            ranges = (slice(0, n // 3), slice(n // 2, n - 1)), (slice(n // 4, n // 2 + 1),)
            domains = Subdomains(n, ranges, ranges, (1.0, 1.0))
            self.decomposition = Decomposition(domains, objective.layout, parallel=True)
            made = [(o, self.restricted(ranges[s])) for s, o in restricted(objective, self.decomposition).items()]
        else:
            self.decomposition = Decomposition(whole_copies(objective.loss, 2), objective.layout, parallel=True)
            for s in self.decomposition.mine:
                part = dense.but(rows=dense.rows[torch.as_tensor(sample_parts(count, 2)[s])])
                made.append((ConsistentObjective(objective, self.decomposition, s), self.consistent(part)))
        self.children = [Node(o, d, letters[1:]) for o, d in made]

    def restricted(self, ranges: tuple[slice, ...]) -> Dense:
        def insert(y: Tensor) -> Tensor:
            full, end = self.frozen.clone(), 0
            for r in ranges:
                full[r] = y[end : end + r.stop - r.start]
                end += r.stop - r.start
            return full

        dense = self.dense
        return dense.but(embed=lambda y: dense.embed(insert(y)), linear=lambda y: dense.linear(insert(y)))

    def consistent(self, part: Dense) -> Dense:
        known: dict[str, Tensor] = {}

        def linear(x: Tensor) -> Tensor:
            if known.get("at") is not self.frozen:
                known.update(at=self.frozen, gap=self.dense.gradient(self.frozen) - part.gradient(self.frozen))
            return part.linear(x) + known["gap"] @ (x - self.frozen)

        return part.but(linear=linear)

    def freeze(self, seed: int) -> None:
        """Freeze all that is made of this objective at a point of that seed."""
        self.frozen = numbers(self.objective.layout.size, 9, seed)
        if self.decomposition is not None:
            terms = self.objective.linear_terms()
            for child in self.children:
                made = child.objective
                assert isinstance(made, RestrictedObjective)
                made.freeze(self.frozen, terms)
                if isinstance(made, ConsistentObjective):
                    g = self.dense.gradient(self.frozen)
                    made.know(put(made.layout, self.frozen), 0.0, put(made.layout, g))
        for child in self.children:
            child.freeze(seed)

    def leaves(self) -> list["Node"]:
        return [leaf for child in self.children for leaf in child.leaves()] if self.children else [self]

    def destroy(self) -> None:
        for child in self.children:
            child.destroy()
            if self.decomposition is not None:
                child.objective.destroy()  # type: ignore[attr-defined]
        if self.decomposition is not None:
            self.decomposition.destroy()


def whole(name: str, comm: MPI.Comm, blocks: int) -> tuple[Objective, Dense]:
    loss, outputs = LOSSES[name]()
    layout = ParameterLayout(loss.parameters, comm)
    kind = ResidualObjective if name == "burgers" else Objective
    return kind(loss, layout, blocks=blocks), Dense(name, outputs, torch.arange(13))


def assert_is(objective: Objective, dense: Dense, seed: int, points: int = 2) -> None:
    """Value, gradient and products, at some points."""
    layout, n = objective.layout, objective.layout.size
    for point in range(points):
        x, v = numbers(n, 3, seed, point), numbers(n, 4, seed, point)
        at, direction, found = put(layout, x), put(layout, v), layout.vector()
        expected = float(dense(x).detach())
        scale = max(abs(expected), 1.0)
        assert objective.value(at) == pytest.approx(expected, rel=1e-11, abs=1e-12 * scale)
        assert objective.value_gradient(at, found) == pytest.approx(expected, rel=1e-11, abs=1e-12 * scale)
        results = [(found, dense.gradient(x))]
        for name in ("hessian_product", "gauss_newton_product"):
            product = layout.vector()
            getattr(objective, name)(at, direction, product)
            results.append((product, getattr(dense, name)(x, v)))
        for vec, right in results:
            error = np.abs(layout.gather(vec).numpy() - right.numpy()).max()
            assert error <= 1e-10 * max(float(right.abs().max()), 1e-3)
        for vec in (at, direction, *(vec for vec, _ in results)):
            vec.destroy()


WORDS = [
    "".join(letters)
    for length in (1, 2, 3)
    for letters in itertools.product("RSTC", repeat=length)
    if length < 3 or letters.count("C") < 2
]
