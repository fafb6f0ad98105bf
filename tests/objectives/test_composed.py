"""Objectives made of objectives made of objectives, against dense evaluations of what they shall be."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.errors import InputError
from ddml.layout import ParameterLayout
from ddml.losses.loss import Loss
from ddml.losses.module import ModuleLoss
from ddml.networks.tanh import TanhNetwork
from ddml.objectives.composed import sampled, shifted
from ddml.objectives.consistent import ConsistentObjective, sample_parts, whole_copies
from ddml.objectives.linearisation import Linearisation
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import RestrictedObjective, restricted
from ddml.parallel import cause
from ddml.problems import Burgers, PDELoss
from solvers import configure

# Dense evaluations --------------------------------------------------------------------------------------------------


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
        return torch.autograd.functional.hessian(self, x) @ v

    def gauss_newton_product(self, x: Tensor, v: Tensor) -> Tensor:
        J = torch.autograd.functional.jacobian(lambda y: self.outputs(self.embed(y), self.rows), x)
        if self.name == "burgers":
            return 2 * J.T @ (J @ v)
        p = self.outputs(self.embed(x), self.rows).softmax(dim=1)
        B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("skn,skl,slm,m->n", J, B, J, v) / len(self.rows)


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
        self.frozen = numbers(objective.size, 9)
        if not letters:
            return
        letter, n, count = letters[0], objective.size, objective.loss.count
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
        def linear(x: Tensor) -> Tensor:
            gap = self.dense.gradient(self.frozen) - part.gradient(self.frozen)
            return part.linear(x) + gap @ (x - self.frozen)

        return part.but(linear=linear)

    def freeze(self, seed: int) -> None:
        """Freeze all that is made of this objective at a point of that seed."""
        self.frozen = numbers(self.objective.size, 9, seed)
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


def assert_is(objective: Objective, dense: Dense, seed: int) -> None:
    """Value, gradient and products, at two points."""
    layout, n = objective.layout, objective.size
    for point in range(2):
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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("letters", WORDS)
def test_compositions_are_what_they_say(comm: MPI.Comm, name: str, letters: str) -> None:
    objective, dense = whole(name, comm, 0 if letters.count("S") % 2 else 5)
    top = Node(objective, dense, letters)
    for seed in (0, 1):  # what was made before a point was frozen goes with it
        top.freeze(seed)
        for leaf in top.leaves():
            assert_is(leaf.objective, leaf.dense, seed)
    top.destroy()


@pytest.mark.parametrize("letters", [word for word in WORDS if "C" not in word])
def test_residuals_are_those_of_the_composition_or_refused_in_words(comm: MPI.Comm, letters: str) -> None:
    objective, dense = whole("burgers", comm, 0)
    top = Node(objective, dense, letters)
    top.freeze(0)
    for leaf in top.leaves():
        composed, layout = leaf.objective, leaf.objective.layout
        assert isinstance(composed, ResidualObjective)
        x, v = numbers(composed.size, 3), numbers(composed.size, 4)
        at, direction, back = put(layout, x), put(layout, v), layout.vector()
        r, Jv = composed.residual_vector(), composed.residual_vector()
        J = torch.autograd.functional.jacobian(lambda y, d=leaf.dense: d.outputs(d.embed(y), d.rows), x)
        outputs = leaf.dense.outputs(leaf.dense.embed(x), leaf.dense.rows).detach()
        mine = slice(*r.getOwnershipRange())
        composed.jacobian_product(at, direction, Jv)
        assert np.allclose(Jv.array_r, (J @ v)[mine], rtol=1e-10, atol=1e-12)
        composed.jacobian_transpose_product(at, Jv, back)
        assert np.allclose(layout.gather(back), J.T @ (J @ v), rtol=1e-10, atol=1e-12)
        if "T" in letters:
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                composed.residual(at, r)
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                composed.linear_model(at, [direction])
            with pytest.raises(InputError, match="linear term is no sum of squared residuals"):
                Linearisation(composed, at, assembled=True)
        else:
            composed.residual(at, r)
            assert np.allclose(r.array_r, outputs[mine], rtol=1e-10, atol=1e-12)
            W = torch.stack([J @ v, outputs])
            assert np.allclose(composed.linear_model(at, [direction]), W @ W.T, rtol=1e-10, atol=1e-12)
    top.destroy()


def test_a_restriction_is_not_frozen_without_the_linear_terms(comm: MPI.Comm) -> None:
    objective, dense = whole("classifier", comm, 5)
    top = Node(objective, dense, "TR")
    for node in top.children[0].children:
        with pytest.raises(InputError, match=r"has 1 linear terms, and freeze\(\) got 0: pass its linear_terms"):
            node.objective.freeze(numbers(objective.size, 0))  # type: ignore[attr-defined]
    top.destroy()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("letters", ["T", "TT", "RT"])
def test_a_shifted_objective_follows_its_objective(comm: MPI.Comm, name: str, letters: str) -> None:
    """And what is then restricted, sampled and shifted again is the new one."""
    objective, dense = whole(name, comm, 5)
    top = Node(objective, dense, letters)
    rows = torch.arange(2, 12)
    old = objective.loss
    objective.replace(old.sampled(rows), 0.5, np.arange(4))
    if letters == "RT":
        parts = objective.parts.split_over(top.decomposition.group)  # type: ignore[union-attr]
        for child in top.children:
            child.objective.follow(objective, parts)  # type: ignore[attr-defined]
    top.freeze(0)
    for leaf in top.leaves():
        followed = leaf.objective
        assert followed.version == 1
        assert followed.loss.count == 10
        assert followed.fraction == 0.5
        moved = leaf.dense.but(rows=rows)
        assert_is(followed, moved, 0)
        part = sampled(followed, [0, 3, 5])
        assert part.fraction == pytest.approx(0.15, rel=1e-13)
        assert_is(part, moved.but(rows=rows[[0, 3, 5]]), 0)
        if letters != "RT":
            assert np.array_equal(followed.replacement.overlap, np.arange(4))
    top.destroy()


@pytest.mark.parametrize("letters", ["T", "S", "ST", "TS", "RS", "RT", "RST"])
def test_all_work_is_charged_to_one_counter(comm: MPI.Comm, letters: str) -> None:
    """A gradient its fraction, a shift nothing, and a prefix once each time that it is computed."""
    loss = classifier()[0]
    layout = ParameterLayout(loss.parameters, comm)
    objective: Objective = Objective(loss, layout)
    kept, gradient = 0.0, 1.0
    made = [objective]
    if letters.startswith("R"):
        decomposition = Decomposition(Subdomains.of_layers(loss, [[1]]), layout, parallel=True)
        made = list(restricted(objective, decomposition).values())
        kept, gradient = loss.charges.prefix(1), loss.charges.evaluation(1, frozenset({1}))
    fraction = 7 / 13 if "S" in letters else 1.0
    for base in made:
        composed = base
        for letter in letters.removeprefix("R"):
            x, g = composed.layout.vector(), composed.layout.vector()
            composed = sampled(composed, range(0, 13, 2)) if letter == "S" else shifted(composed, x, x)
        for _ in range(2):
            base.work.reset()
            spent = kept
            if isinstance(base, RestrictedObjective):
                base.freeze(loss.initial())
                assert base.work.total == pytest.approx(kept, rel=1e-13)
            for evaluation in range(3):
                composed.value_gradient(x, g)
                again = fraction * kept if evaluation == 0 and "S" in letters else 0.0
                spent += fraction * gradient + again
                assert base.work.total == pytest.approx(spent, rel=1e-13)
            assert base.work.gradients == 3
            assert composed.work is base.work


# Solvers ------------------------------------------------------------------------------------------------------------


def minimise(
    objective: Objective, solver: str, start: Tensor, settings: dict[str, Any], prefix: str, iterations: int
) -> Any:
    """The losses and the final parameters of a few iterations."""
    database, x = PETSc.Options(), put(objective.layout, start)
    for key, value in settings.items():
        database.setValue(prefix + key, value)
    tao = PETSc.TAO().create(objective.comm)
    tao.setOptionsPrefix(prefix)
    configure(tao, solver)
    objective.attach(tao)
    tao.setSolution(x)
    tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
    tao.setMaximumIterations(iterations)
    tao.setFromOptions()
    tao.setUp()
    losses: list[float] = []
    tao.setMonitor(lambda tao: losses.append(tao.getSolutionStatus()[1]))
    tao.solve()
    found = SimpleNamespace(losses=losses, theta=objective.layout.gather(x).numpy().copy())
    tao.destroy()
    x.destroy()
    return found


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("aspqn", {"subdomains": 3, "decomposition": "layers"}),
        ("mspqn", {"subdomains": 3, "decomposition": "layers", "overlap": 1}),
        ("mspqn_dense", {"window": 2}),
        ("apts_weights", {"window": 2, "norm": "infinity"}),
        ("apts_data", {"subdomains": 2, "norm": "infinity"}),
    ],
)
def test_schwarz_methods_minimise_a_shifted_objective(
    comm: MPI.Comm, least_squares: Any, sum_over_rows: Any, prefix: str, solver: str, settings: dict[str, Any]
) -> None:
    """As they do a loss with the linear term written into each sample."""
    plain = least_squares([3, 2, 4], bend=0.1)
    slope, start = numbers(9, 5), plain.start + 0.1
    count, function = plain.count, plain.function

    def tilted(theta: Tensor, rows: Tensor) -> Tensor:
        return function(theta, rows) + slope @ (theta - start) / count

    written = sum_over_rows(tilted, plain.rows, [3, 2, 4], plain.start)
    layout = ParameterLayout(plain.parameters, comm)
    objective = shifted(Objective(plain, layout), put(layout, slope), put(layout, start))
    found = minimise(objective, solver, plain.start, settings, prefix, 2)
    expected = minimise(Objective(written, layout), solver, plain.start, settings, prefix, 2)
    assert found.losses == pytest.approx(expected.losses, rel=1e-8)
    assert found.theta == pytest.approx(expected.theta, rel=1e-6)
    assert found.losses[-1] < found.losses[0] - 0.1


@pytest.mark.parametrize("model", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("solver", ["apts_weights", "apts_data"])
def test_local_curvature_may_be_that_of_some_of_the_samples(
    comm: MPI.Comm, train: Any, solver: str, model: str
) -> None:
    """Halving the samples changes the local models a little; with all of them it is the method without the option."""
    loss, settings = classifier()[0], {"window": 1} if solver == "apts_weights" else {"subdomains": 2}
    runs = [
        train(loss, solver, 8, blocks=6, model=model, norm="2", **settings, **fraction)
        for fraction in ({"curvature_fraction": 0.5}, {"curvature_fraction": 1.0}, {})
    ]
    some, every, default = (run.losses for run in runs)
    assert np.array_equal(every, default)
    assert not np.array_equal(some, every)
    assert some[-1] < some[0] - 0.7 * (every[0] - every[-1])


def test_a_solver_of_squares_refuses_a_linear_term(comm: MPI.Comm, prefix: str) -> None:
    loss = burgers()[0]
    layout = ParameterLayout(loss.parameters, comm)
    objective = shifted(ResidualObjective(loss, layout), layout.vector(), layout.vector())
    with pytest.raises(PETSc.Error) as caught:
        minimise(objective, "gauss_newton", loss.initial(), {}, prefix, 1)
    assert "an objective with a linear term is no sum of squared residuals" in str(cause(caught.value, InputError))


def test_gauss_newton_solves_in_subdomains(comm: MPI.Comm, prefix: str) -> None:
    """The local objectives of residuals have residuals."""
    loss = burgers()[0]
    layout = ParameterLayout(loss.parameters, comm)
    settings = {"local_solver": "gauss_newton", "decomposition": "layers", "subdomains": 2}
    losses = minimise(ResidualObjective(loss, layout, blocks=6), "aspqn", loss.initial(), settings, prefix, 4).losses
    assert losses[-1] < 0.5 * losses[0]
