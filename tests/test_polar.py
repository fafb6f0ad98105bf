"""Polar factors against singular value decompositions, and published iterations on scalars."""

import pytest
import torch

from ddml import polar


def matrix(rows: int, columns: int, sigma: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    G = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    U, values, V = torch.linalg.svd(G, full_matrices=False)
    return (U * (values if sigma is None else sigma)) @ V


def factor(G: torch.Tensor) -> torch.Tensor:
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", [(32, 785), (785, 32), (10, 33), (33, 33), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e150])
def test_of_well_conditioned_matrices(shape: tuple[int, int], scale: float) -> None:
    G = matrix(*shape)
    assert (polar.polar_factor(G * scale) - factor(G)).abs().max() < 1e-12


@pytest.mark.parametrize("exponent", [-3, -5, -8, -10])
@pytest.mark.parametrize("method", [polar.polar_factor, polar.newton_schulz])
def test_of_badly_conditioned_matrices(exponent: int, method: polar.Callable[[torch.Tensor], torch.Tensor]) -> None:
    sigma = torch.logspace(0, exponent, 20, dtype=torch.float64)
    G = matrix(20, 50, sigma)
    X = method(G)
    assert abs(float((G * X).sum() / sigma.sum()) - 1) < 1e-6
    assert float(torch.linalg.matrix_norm(X, 2)) < 1 + 1e-12
    if method is polar.polar_factor:
        assert abs(float((G * X).sum() / sigma.sum()) - 1) < 1e-12
        assert (X @ X.T - torch.eye(20)).abs().max() < 1e-9


def test_newton_schulz_reaches_one_millionth() -> None:
    for shape in [(60, 90), (90, 60), (64, 64)]:
        G = matrix(*shape)
        assert (polar.newton_schulz(G) - factor(G)).abs().max() < 1e-6
        assert (polar.polar_factor(G, dense=8) - factor(G)).abs().max() < 1e-6


def test_directions_without_a_gradient_do_not_move() -> None:
    G = matrix(6, 9, torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    X = polar.polar_factor(G)
    assert torch.linalg.svdvals(X) == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-12)
    assert float((G * X).sum()) == pytest.approx(6, rel=1e-13)
    noise = matrix(6, 9, torch.tensor([3.0, 2.0, 1.0, 1.0, 1e-4, 1e-6], dtype=torch.float64))
    for eps, rank in ((polar.EPS, 6), (torch.finfo(torch.float32).eps, 5)):
        assert torch.linalg.svdvals(polar.polar_factor(noise, eps=eps)).round().sum() == rank
    dead = matrix(6, 9)
    dead[2] = 0
    assert (polar.polar_factor(dead)[2] == 0).all()
    dead[:, 4] = 0
    alive = [0, 1, 3, 4, 5]
    assert (polar.polar_factor(dead)[alive] - factor(dead[alive])).abs().max() < 1e-12
    assert polar.polar_factor(dead / 0).isnan().all()
    assert (polar.polar_factor(torch.zeros(3, 4, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize(
    ("coefficients", "steps", "expected"),
    [
        (polar.CUBIC, 5, [0.0076, 0.0758, 0.6587, 1.0000, 1.0000]),
        (polar.QUINTIC, 5, [0.2411, 1.1883, 1.0028, 1.0027, 1.0000]),
        (polar.MUON, 5, [0.4705, 0.6989, 0.7121, 0.7654, 0.6964]),
        (polar.SIX_STEPS, 6, [0.8663, 0.9988, 0.9961, 0.9962, 0.9984]),
    ],
)
def test_published_iterations_on_scalars(
    coefficients: tuple[tuple[float, ...], ...], steps: int, expected: list[float]
) -> None:
    X = torch.diag(torch.tensor([0.001, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64))
    assert torch.diag(polar.iterate(X, coefficients, steps)) == pytest.approx(expected, abs=6e-5)
