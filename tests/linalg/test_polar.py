"""Polar factors against singular value decompositions, and published iterations on scalars."""

import numpy as np
import pytest
import torch

from ddml.linalg import polar


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


SPECTRA = {
    "flat": torch.ones(40, dtype=torch.float64),
    "geometric": torch.logspace(0, -12, 40, dtype=torch.float64),
    "low rank": torch.tensor([1.0, 0.7, 0.2, *[0.0] * 37], dtype=torch.float64),
    "rank one": torch.tensor([1.0, *[0.0] * 39], dtype=torch.float64),
    "one large": torch.tensor([1.0, *[1e-3] * 39], dtype=torch.float64),
    "one large, worst tail": torch.tensor([1.0, *[4e-4] * 39], dtype=torch.float64),
    "harmonic": 1 / torch.arange(1, 41, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_near_factors_keep_their_promise(spectrum: str, tolerance: float, dtype: torch.dtype) -> None:
    rounding = 100 * torch.finfo(dtype).eps
    sigma = SPECTRA[spectrum]
    for rows, columns in ((40, 40), (40, 90), (90, 40)):
        for scale in (1.0, 1e-5):
            G = (scale * matrix(rows, columns, sigma)).to(dtype)
            X = polar.near_factor(G, tolerance)
            assert X is not None
            assert X.dtype == dtype
            exact = torch.linalg.svdvals(G.double())
            found = float((G.double() * X.double()).sum())
            assert (1 - tolerance) * float(exact.sum()) <= found <= (1 + rounding) * float(exact.sum())
            assert float(torch.linalg.matrix_norm(X.double(), 2)) <= 1 + rounding


def test_larger_tolerances_take_fewer_products_and_lack_more() -> None:
    G = matrix(40, 90, SPECTRA["geometric"])
    lacking = [1 - float((G * polar.near_factor(G, t)).sum()) / float(SPECTRA["geometric"].sum()) for t in (0.01, 0.5)]
    assert 0 < lacking[0] < 0.01 < lacking[1] < 0.5


def test_near_factor_of_nothing_and_with_too_little_precision() -> None:
    assert (polar.near_factor(torch.zeros(7, 4), 0.05) == 0).all()
    assert polar.near_factor(matrix(40, 90, SPECTRA["one large"]).bfloat16(), 0.05) is None


def composed(s: np.ndarray, first: int) -> np.ndarray:
    """The polynomials, one after another, of numbers."""
    for a, b, c in [polar.GROWING] * first + list(polar.FINISHING):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("first", range(9))
def test_the_polynomials_have_the_properties_that_the_proof_needs(first: int) -> None:
    low = polar.LOW / polar.GROWTH**first
    s = np.concatenate([np.geomspace(1e-9, low, 20_000), np.geomspace(low, 1, 200_000)])
    image = composed(s, first)
    assert 0 < image.min() <= image.max() <= 1 + 1e-6
    assert image[s >= low].min() >= polar.REACHED
    assert (image >= np.minimum(polar.REACHED * s / low, polar.REACHED) * (1 - 1e-12)).all()
    for coefficients in (polar.GROWING, *polar.FINISHING):  # rounding errors do not grow
        a, b, c = coefficients
        assert a * 1.01 + b * 1.01**3 + c * 1.01**5 <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_norm_bounds_are_bounds(spectrum: str, dtype: torch.dtype) -> None:
    for rows, columns in ((40, 90), (90, 40), (1, 7), (300, 40)):
        G = matrix(rows, columns, SPECTRA[spectrum][: min(rows, columns)]).to(dtype)
        exact = float(torch.linalg.matrix_norm(G.double(), 2))
        for tolerance in (0.3, 0.05, 0.001):
            bound = polar.norm_bound(G, tolerance)
            assert exact * (1 - 100 * torch.finfo(dtype).eps) <= bound <= exact * (1 + 1.001 * tolerance)
    assert polar.norm_bound(torch.zeros(3, 4), 0.1) == 0


@pytest.mark.parametrize("shape", [(1, 3), (600, 5), (513, 700)])
def test_symmetric_products(shape: tuple[int, int]) -> None:
    A = matrix(*shape)
    plus = matrix(shape[0], shape[0], seed=1)
    plus = plus + plus.T
    for made, expected in (
        (polar.symmetric_product(A), A @ A.T),
        (polar.symmetric_product(A, 2.0, plus, -3.0), 2 * A @ A.T - 3 * plus),
    ):
        assert (made - expected).abs().max() < 1e-14 * expected.abs().max()
        if shape[0] > polar.TILE:  # what is made whole is symmetric to rounding only: that depends on the processor
            half = shape[0] // 2
            assert torch.equal(made[:half, half:], made[half:, :half].T)
    assert polar.inner(A, 2 * A) == pytest.approx(2 * float((A**2).sum()), rel=1e-13)
