"""The built-in problems' conditions and references, and users' problems trained to an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import user_problems as users
from mpi4py import MPI

from ddml.jets.evaluator import closure
from ddml.jets.nested import nested_jets
from ddml.networks.tanh import TanhNetwork
from ddml.problems import PROBLEMS, Field, PDELoss
from ddml.problems.pde.accuracy import SolutionError, reference
from solvers import minimise


def make_loss(problem, width: int = 16, depth: int = 2, points: int = 400) -> PDELoss:
    probe = [torch.zeros(2, dtype=torch.float64)] * len(problem.domain)
    network = TanhNetwork(len(problem.embed(*probe)), width, depth, len(problem.fields)).double()
    network.reset_parameters(torch.Generator().manual_seed(0))
    return PDELoss(problem, network, points)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("burgers", [(0.0, 0.3), (0.4, -1.0), (0.4, 1.0)]),
        ("klein_gordon", [(0.0, 0.3), (5.0, -1.0), (5.0, 1.0)]),
        ("diffusion_advection", [(0.0, 0.3), (1.0, 0.3), (0.3, 0.0), (0.3, 1.0)]),
        ("allen_cahn", [(0.0, 0.3), (0.4, -1.0), (0.4, 1.0)]),
    ],
)
def test_hard_conditions_hold_for_any_parameters(name: str, points: list[tuple[float, float]]) -> None:
    loss = make_loss(PROBLEMS[name]())
    theta = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = {
        "burgers": lambda t, x: -np.sin(np.pi * x) if t == 0 else 0.0,
        "klein_gordon": lambda t, x: x if t == 0 else x * np.cos(t),
        "diffusion_advection": lambda x, y: 0.0,
        "allen_cahn": lambda t, x: x**2 * np.cos(np.pi * x) if t == 0 else -1.0,
    }[name]
    found = loss.fields(theta, np.array(points))[:, 0]
    np.testing.assert_allclose(found, [expected(*p) for p in points], atol=1e-14)


def test_klein_gordon_starts_at_rest_and_its_lift_is_no_solution() -> None:
    problem = PROBLEMS["klein_gordon"]()
    loss = make_loss(problem)
    theta = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, h = np.linspace(-1, 1, 5), 1e-4
    after, before = (loss.fields(theta, np.stack([np.full(5, t), x], axis=1)) for t in (h, -h))
    np.testing.assert_allclose((after - before) / (2 * h), 0, atol=1e-7)
    zero = torch.zeros(loss.size, dtype=torch.float64)
    assert loss.value(zero) > 0.1


@pytest.mark.parametrize(
    ("name", "points", "bound"),
    [
        ("burgers", [(0.2, 0.6), (0.5, -0.4), (0.7, 0.8)], 1e-5),
        ("klein_gordon", [(1.0, 0.3), (7.0, -0.8)], 1e-6),
        ("diffusion_advection", [(0.2, 0.3), (0.6, 0.5)], 1e-5),
        ("allen_cahn", [(0.2, 0.5), (0.7, -0.3)], 1e-5),
    ],
)
def test_reference_satisfies_the_equation(name: str, points: list[tuple[float, float]], bound: float) -> None:
    """Derivatives of the reference by sixth-order differences, put into the problem's own residual."""
    problem = PROBLEMS[name]()
    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
    second = np.array([2, -27, 270, -490, 270, -27, 2]) / 180
    h = 2e-3
    for point in points:

        def along(axis: int, weights: np.ndarray, order: int, point: tuple[float, float] = point) -> torch.Tensor:
            places = np.tile(point, (7, 1))
            places[:, axis] += h * np.arange(-3, 4)
            return torch.tensor([float(problem.exact(*torch.tensor(places.T)) @ weights) / h**order])

        def get(index: tuple[int, ...], point: tuple[float, float] = point) -> torch.Tensor:
            if not index:
                return torch.as_tensor(problem.exact(*torch.tensor(point, dtype=torch.float64)[:, None]))
            return along(index[0], first if len(index) == 1 else second, len(index))

        field = Field("u", list(problem.domain), get)
        coordinates = torch.tensor(point, dtype=torch.float64)[:, None]
        assert abs(float(problem.residual(field, *coordinates))) < bound


def train(problem, comm: MPI.Comm, iterations: int, **network: int) -> tuple[dict[str, float], PDELoss, np.ndarray]:
    loss = make_loss(problem, **network)
    found = minimise(loss, "lbfgs", comm, {"memory": 50, "momentum": 1.0}, iterations=iterations, blocks=6)
    theta = found.theta
    return dict(SolutionError(loss, comm, 1000)(theta)), loss, theta.numpy()


@pytest.mark.parametrize(
    ("problem", "iterations", "bound"),
    [
        (users.Heat, 60, 1e-3),
        (users.Waves, 800, 2e-2),
        (users.SoftPeriodic, 150, 1e-2),
        (users.HardPeriodic, 100, 1e-3),
        (users.Decay, 40, 1e-3),
    ],
)
def test_users_problem_is_solved(comm: MPI.Comm, problem, iterations: int, bound: float) -> None:
    error, _, _ = train(problem(), comm, iterations)
    assert error["error"] < bound


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("blocks", [0, 1, 4, 7, 500])
def test_the_error_is_that_of_numpy_and_with_blocks_the_same_to_the_last_bit(
    comm: MPI.Comm, dtype: torch.dtype, blocks: int
) -> None:
    problem = users.Heat()
    network = TanhNetwork(2, 16, 2, 1).to(dtype)
    network.reset_parameters(torch.Generator().manual_seed(0))
    loss = PDELoss(problem, network, 100, dtype)
    theta = loss.initial()
    found, alone = (SolutionError(loss, ranks, 300, blocks)(theta) for ranks in (comm, MPI.COMM_SELF))
    if blocks:
        assert found == alone
    points, exact = reference(problem, 300)
    fields = loss.fields(theta, points)
    distance = np.linalg.norm(fields - exact)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert found["error"] == pytest.approx(distance / np.linalg.norm(exact), rel=tolerance)
    assert found["error_network_norm"] == pytest.approx(distance / np.linalg.norm(fields), rel=tolerance)


def test_inverse_problem_finds_the_coefficient(comm: MPI.Comm) -> None:
    error, loss, theta = train(users.Inverse(), comm, 150)
    assert loss.parameters[-1].name == "coefficients.nu"
    assert theta[-1] == pytest.approx(0.1, rel=1e-2)
    assert error["error"] < 1e-2


def test_hard_periodicity_is_exact() -> None:
    loss = make_loss(users.HardPeriodic())
    theta = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = loss.fields(theta, np.array([[0.3, -np.pi], [0.3, np.pi]]))
    assert ends[0, 0] == pytest.approx(ends[1, 0], abs=1e-12)


class ShiftedHeat(users.Heat):
    """The same, its functions changing their coordinates in place."""

    def embed(self, t, x):
        t *= 1.0
        return t, x

    def lift(self, t, x):
        x -= 0.5
        return torch.cos(torch.pi * x)

    def factor(self, t, x):
        x -= 0.5
        return t * (0.25 - x * x)


def test_functions_may_change_their_coordinates_in_place() -> None:
    expected, loss = make_loss(users.Heat()), make_loss(ShiftedHeat())
    theta = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert loss.value(theta) == pytest.approx(expected.value(theta), rel=1e-10)
    points = np.random.default_rng(0).random((50, 2))
    given = points.copy()
    for _ in range(2):
        np.testing.assert_allclose(loss.fields(theta, given), expected.fields(theta, points), atol=1e-12)
    np.testing.assert_array_equal(given, points)


def test_lift_and_factor_enter_the_derivatives_by_the_product_rule() -> None:
    """Second derivatives of lift + factor * network against nested autograd of the whole."""
    problem = users.Heat()
    loss = make_loss(problem, points=7)
    theta = loss.initial()
    chunk = loss.chunks[0]
    loss.evaluator.bind(theta)
    found = chunk.fields(loss.evaluator.forward(chunk.inputs.flatten(1, 2)))

    def whole(p: torch.Tensor) -> torch.Tensor:
        return (problem.lift(*p.T) + problem.factor(*p.T) * loss.network(p)[:, 0])[:, None]

    assert loss.indices == closure([(0,), (1, 1)])
    expected = nested_jets(whole, chunk.coordinates.T.contiguous(), loss.indices)
    torch.testing.assert_close(found[:, :, 0], expected.detach(), rtol=1e-12, atol=1e-12)


class Kdv(users.Heat):
    """Third derivatives, which the kernels do not have, and a mixed one, which they have."""

    def residual(self, u, t, x):
        return u.t + u * u.x + 0.01 * u.xxx + 0.1 * u.tx


class Mixed(users.Heat):
    def residual(self, u, t, x):
        return u.tx + 0.1 * u.xx


def test_derivatives_beyond_the_kernels_are_named() -> None:
    assert make_loss(Kdv(), points=20).beyond_kernels == ["u.xxx"]
    assert make_loss(Kdv(), points=20).in_torch == {0: "derivatives beyond order 2"}
    mixed = make_loss(Mixed(), points=20)
    assert mixed.beyond_kernels == []
    assert mixed.in_torch == {}


@pytest.mark.parametrize(("name", "size"), [("diffusion_advection", (20, 4)), ("allen_cahn", (20, 4))])
def test_default_networks_are_small_and_the_published_ones_are_named(name: str, size: tuple[int, int]) -> None:
    problem = PROBLEMS[name]
    assert (problem.width, problem.depth) == size
    published = {"diffusion_advection": "-width 50 -depth 10", "allen_cahn": "-width 64 -depth 6"}[name]
    assert published in (problem.__doc__ or "")
