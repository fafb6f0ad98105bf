"""Work units against operations that are counted layer by layer, and on any number of ranks."""

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from ddml.data.sample_sets import TensorSamples
from ddml.decomposition.decomposition import Decomposition
from ddml.decomposition.subdomains import Subdomains
from ddml.layout import ParameterLayout
from ddml.losses import work
from ddml.losses.loss import Loss
from ddml.networks.tanh import TanhNetwork
from ddml.norms.build import modular_norm
from ddml.norms.kronecker import BLOCKS, SOLVE, KroneckerNorm
from ddml.norms.norm import DistributedModularNorm
from ddml.objectives.objective import Objective
from ddml.objectives.residual import ResidualObjective
from ddml.objectives.restricted import restricted
from ddml.problems import Burgers, KleinGordon, PDELoss
from ddml.problems.classification import ClassificationLoss

Sizes = Sequence[tuple[int, int]]
CHAIN = ((6, 5), (5, 4), (4, 3))


def classifier(samples: int = 60) -> ClassificationLoss:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    inputs = torch.randn(samples, 6, dtype=torch.float64)
    return ClassificationLoss(network, TensorSamples(inputs, torch.arange(samples) % 3), 3)


def burgers(points: int = 90) -> PDELoss:
    network = TanhNetwork(2, 6, 3, 1).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(Burgers(), network, points)


class Counted:
    """The multiply-adds of a sample in a chain of layers (inputs, outputs), layer by layer.

    ``joined`` products more belong to the last layer.
    """

    def __init__(self, sizes: Sizes, bend: float, end: float, joined: int = 0) -> None:
        self.sizes, self.bends, self.end, self.joined = sizes, [bend * o for _, o in sizes], end, joined

    def product(self, number: int) -> int:
        inputs, outputs = self.sizes[number]
        return (inputs + 1) * outputs + (self.joined if number == len(self.sizes) - 1 else 0)

    def forward(self, first: int, last: int | None = None) -> float:
        total = work.KEPT * self.sizes[first][0] if first and last is None else 0.0
        for number in range(first, len(self.sizes) if last is None else last):
            total += self.product(number) + self.bends[number]
        return total + (self.end if last is None else work.KEPT * self.sizes[last][0])

    def backward(self, active: Collection[int]) -> tuple[float, float]:
        """The adjoint down to the outputs of the lowest active layer, and the gradients of the active weights."""
        adjoint, weights, number = self.end, 0.0, len(self.sizes) - 1
        while True:
            adjoint += self.bends[number]
            weights += self.product(number) if number in active else 0
            if number == min(active):
                return adjoint, weights
            adjoint += self.product(number)
            number -= 1

    def gradient(self, first: int, active: Collection[int]) -> float:
        return self.forward(first) + sum(self.backward(active))

    @property
    def whole(self) -> float:
        return self.gradient(0, range(len(self.sizes)))


def counted_classifier() -> Counted:
    return Counted(CHAIN, work.ACTIVATION, 3 * work.CRITERION)


CASES: dict[str, tuple[Callable[[], Loss], Counted]] = {
    "classifier": (classifier, counted_classifier()),
    # the linear output, six weights and a bias, belongs to the last hidden layer
    "burgers": (burgers, Counted(((2, 6), (6, 6), (6, 6)), work.TANH, work.TANH, joined=7)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parallel", [True, False])
def test_evaluations_are_charged_the_operations_they_take(comm: MPI.Comm, name: str, parallel: bool) -> None:
    make, count = CASES[name]
    loss = make()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    x, g = layout.vector(), layout.vector()
    objective.initial(x)
    objective.value(x)
    assert objective.work.total == pytest.approx(count.forward(0) / count.whole, rel=1e-13)
    objective.work.reset()
    objective.value_gradient(x, g)
    assert objective.work.total == pytest.approx(1, rel=1e-13)
    objective.work.reset()
    decomposition = Decomposition(Subdomains.by_layers(loss, 3), layout, parallel)
    for s, part in restricted(objective, decomposition).items():
        part.freeze(loss.initial())
        prefix = count.forward(0, s) if s else 0.0
        assert part.work.total == pytest.approx(prefix / count.whole, abs=1e-15)
        small, slope = part.layout.vector(), part.layout.vector()
        part.initial(small)
        part.work.reset()
        part.value(small)
        assert part.work.total == pytest.approx(count.forward(s) / count.whole, rel=1e-13)
        part.work.reset()
        part.value_gradient(small, slope)
        assert part.work.total == pytest.approx(count.gradient(s, [s]) / count.whole, rel=1e-13)
        for vec in (small, slope):
            vec.destroy()
    assert objective.work.total == 0
    decomposition.destroy()


def test_products_are_charged_the_passes_they_take(comm: MPI.Comm) -> None:
    """A Gauss-Newton product: forward, three times back, each through the active layers only."""
    loss, count = classifier(), counted_classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    x, y = layout.vector(), layout.vector()
    objective.initial(x)
    backward = sum(count.backward(range(3)))
    again = 2 * sum(count.product(i) for i in (1, 2))  # of the weights' gradients, by what enters
    for product, passes in (
        (objective.gauss_newton_product, count.forward(0) + 3 * backward),
        (objective.hessian_product, count.forward(0) + 3 * backward + again),
    ):
        objective.work.reset()
        product(x, x, y)
        assert objective.work.total == pytest.approx(passes / count.whole, rel=1e-13)
        assert objective.work.products == 1
    decomposition = Decomposition(Subdomains.by_layers(loss, 3), layout, True)
    for s, part in restricted(objective, decomposition).items():
        part.freeze(loss.initial())
        small, image = part.layout.vector(), part.layout.vector()
        part.initial(small)
        behind = range(s, 3)
        passes = {
            part.gauss_newton_product: count.forward(s) + 3 * sum(count.backward([s])),
            part.hessian_product: count.forward(s) + 3 * sum(count.backward(behind))
            + 2 * sum(count.product(i) for i in behind[1:]),
        }  # fmt: skip
        for product, expected in passes.items():
            part.work.reset()
            product(small, small, image)
            assert part.work.total == pytest.approx(expected / count.whole, rel=1e-13)
    decomposition.destroy()


@pytest.mark.parametrize("blocks", [0, 5])
def test_restricted_gauss_newton_products_are_blocks_of_the_whole_matrix(comm: MPI.Comm, blocks: int) -> None:
    loss = classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    theta = loss.initial()
    H = torch.zeros(loss.size, loss.size, dtype=torch.float64)
    for outputs, jacobian in zip(*outputs_and_jacobian(loss, theta), strict=True):
        p = outputs.softmax(0)
        H += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / loss.count
    decomposition = Decomposition(Subdomains.windows(loss, 2), layout, True)
    for s, part in restricted(objective, decomposition).items():
        part.freeze(theta)
        inside = np.concatenate([np.arange(r.start, r.stop) for r in decomposition.subdomains.ranges[s]])
        direction = np.random.default_rng(s).standard_normal(len(inside))
        x, v, image = (part.layout.vector() for _ in range(3))
        part.initial(x)
        v.setArray(direction[slice(*v.getOwnershipRange())])
        part.gauss_newton_product(x, v, image)
        expected = H.numpy()[np.ix_(inside, inside)] @ direction
        assert part.layout.gather(image).numpy() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    decomposition.destroy()


def outputs_and_jacobian(loss: ClassificationLoss, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all samples, (N, K) and (N, K, n)."""

    def outputs(theta: torch.Tensor) -> torch.Tensor:
        views = {p.name: theta[p.range].view(p.shape) for p in loss.parameters}
        return torch.func.functional_call(loss.module, views, (loss.inputs,))

    return outputs(theta).detach(), torch.autograd.functional.jacobian(outputs, theta)


# Linear algebra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 6])
def test_kfac_is_charged_its_products_and_factorisations(comm: MPI.Comm, blocks: int) -> None:
    loss, count = classifier(), counted_classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout, blocks=blocks)
    norm = KroneckerNorm(objective, 0.5)
    x, y = layout.vector(), layout.vector()
    objective.initial(x)
    unit = 60 * count.whole
    sides = [side for inputs, outputs in CHAIN for side in (inputs + 1, outputs)]
    squares = sum(side**2 for side in sides)
    norm.refresh(x)
    statistics = 30 * (count.whole + squares) + work.FRESH * max(min(blocks, BLOCKS), 1) * squares
    factors = work.DOUBLE * sum(side**3 for side in sides) / 6 + work.FRESH * squares
    assert objective.work.total == pytest.approx((statistics + factors) / unit, rel=1e-13)
    objective.work.reset()
    norm.covector(x, y)
    solves = SOLVE * sum(o * (i + 1) * (i + 1 + o) / 2 for i, o in CHAIN)
    once = work.DOUBLE * solves + work.PASSED * squares / 2 + work.FRESH * 2 * loss.size
    assert objective.work.total == pytest.approx(once / unit, rel=1e-13)
    objective.work.reset()
    norm.inverse(x, y)
    twice = 2 * (work.DOUBLE * solves + work.PASSED * squares / 2) + work.FRESH * 2 * loss.size
    assert objective.work.total == pytest.approx(twice / unit, rel=1e-13)


def test_restricted_kfac_is_charged_to_the_subdomain(comm: MPI.Comm) -> None:
    loss = classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    norm = KroneckerNorm(objective)
    decomposition = Decomposition(Subdomains.by_layers(loss, 3), layout, True)
    x = layout.vector()
    objective.initial(x)
    norm.refresh(x)
    objective.work.reset()
    for part in restricted(objective, decomposition).values():
        inside, image = part.layout.vector(), part.layout.vector()
        norm.restricted(part.layout, part.loss.ranges, part).covector(inside, image)
        assert part.work.total > 0
    assert objective.work.total == 0
    decomposition.destroy()


def test_the_modular_norm_is_charged_its_polar_factors(comm: MPI.Comm) -> None:
    loss, count = classifier(), counted_classifier()
    layout = ParameterLayout(loss.parameters, comm)
    objective = Objective(loss, layout)
    norm = DistributedModularNorm(modular_norm(loss), layout, objective)
    x, y = layout.vector(), layout.vector()
    objective.initial(x)
    norm.steepest(x, y)
    matrices = 0.0
    for inputs, outputs in CHAIN:
        least, most = sorted((inputs + 1, outputs))  # the bias is a column
        matrices += 5 * least**2 * most + 9 * least**3
    expected = work.DOUBLE * matrices + work.FRESH * 10 * loss.size
    assert objective.work.total == pytest.approx(expected / (60 * count.whole), rel=1e-13)


# The same on any number of ranks ------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Callable[[], Loss], str, dict[str, Any]]] = {
    "tr": (classifier, "tr", {}),
    "tr, K-FAC, L-BFGS": (classifier, "tr", {"norm": "kfac", "model": "lbfgs", "memory": 1}),
    "tr, K-FAC, Gauss-Newton": (classifier, "tr", {"norm": "kfac", "model": "gauss_newton", "tr_ksp_max_it": 3}),
    "astrom": (classifier, "astrom", {"coarse_steps": 2}),
    "newton": (classifier, "newton", {}),
    "apts_weights": (classifier, "apts_weights", {}),
    "apts_weights, K-FAC": (classifier, "apts_weights", {"norm": "kfac"}),
    "apts_data": (classifier, "apts_data", {"subdomains": 4}),
    "napts": (classifier, "napts", {}),
    "lbfgs": (burgers, "lbfgs", {}),
    "ssbroyden": (burgers, "ssbroyden", {}),
    "ssbroyden, factored": (burgers, "ssbroyden", {"matrix_form": "factored"}),
    "aspqn": (burgers, "aspqn", {"local_steps": 2}),
    "mspqn": (burgers, "mspqn", {"local_steps": 2}),
    "mspqn_dense": (burgers, "mspqn_dense", {"local_steps": 2}),
    "gauss_newton": (burgers, "gauss_newton", {"form": "primal", "gn_rank": 15}),
    "gauss_newton, free": (burgers, "gauss_newton", {"form": "primal", "gn_rank": 15, "jacobian": "free"}),
    "gauss_newton, dual": (lambda: burgers(30), "gauss_newton", {"form": "dual"}),
    "gauss_newton, Schwarz": (burgers, "gauss_newton", {"form": "primal", "preconditioner": "schwarz"}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", RUNS)
def test_the_work_of_a_solver_does_not_depend_on_the_number_of_ranks(
    comm: MPI.Comm, train: Callable[..., SimpleNamespace], name: str
) -> None:
    make, solver, settings = RUNS[name]
    together, alone = (
        train(make(), solver, 3, comm=ranks, blocks=12, gathered=True, **settings) for ranks in (comm, MPI.COMM_SELF)
    )
    assert together.total.tolist() == pytest.approx(alone.total.tolist(), rel=1e-12)
    assert together.critical.tolist() == pytest.approx(alone.critical.tolist(), rel=1e-12)
    assert (np.diff(alone.total) > 0).all()
    assert (alone.critical <= alone.total * (1 + 1e-12)).all()


def test_parallel_subdomains_count_as_the_longest(comm: MPI.Comm) -> None:
    """Additive phases of equal subdomains have a critical path of one of them."""
    loss = classifier()
    objective = Objective(loss, ParameterLayout(loss.parameters, comm))
    parts = [work.WorkCounter() for _ in range(3)]
    for units, part in enumerate(parts):
        part.add(units + 1.0, gradients=1)
    objective.work.add_parallel(parts)
    assert (objective.work.total, objective.work.critical, objective.work.gradients) == (6.0, 3.0, 3)


def test_jets_of_several_derivatives_are_counted_for_each() -> None:
    """Linear algebra beside a network is small against one with more derivatives."""
    found = {}
    for problem in (Burgers, KleinGordon):
        network = TanhNetwork(2, 6, 3, 1).double()
        loss = PDELoss(problem(), network, 50)
        objective = ResidualObjective(loss, ParameterLayout(loss.parameters, MPI.COMM_SELF))
        objective.compute(1000.0)
        found[problem] = objective.work.total * len(loss.indices)
    assert found[Burgers] == pytest.approx(found[KleinGordon], rel=1e-13)
