"""The reference solutions against their equations, finer discretisations and independent methods; their cache."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.polynomial.chebyshev import chebvander
from numpy.polynomial.legendre import leggauss
from scipy.integrate import solve_ivp
from scipy.io import loadmat

from ddml.problems.equations import references
from ddml.problems.equations.references import Array, allen_cahn, burgers, cached, diffusion_advection

SHOCK = Path(__file__).parents[3] / "shared" / "data" / "pinn_reference" / "burgers_shock.mat"
VISCOSITY = 0.01 / np.pi


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compute every reference anew, so that no file of an earlier version is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDML_CACHE", str(tmp_path_factory.mktemp("cache")))
        references._allen_cahn.cache_clear()
        references._diffusion_advection.cache_clear()
        yield


def relative_error(u: Array, exact: Array) -> float:
    return float(np.linalg.norm(u - exact) / np.linalg.norm(exact))


def differentiation(count: int) -> tuple[Array, Array]:
    """Chebyshev points on [-1, 1] and the matrix that differentiates their interpolant, from barycentric weights."""
    nodes = np.cos(np.pi * np.arange(count) / (count - 1))
    weights = (-1.0) ** np.arange(count)
    weights[[0, -1]] /= 2
    matrix = weights / weights[:, None] / (nodes[:, None] - nodes + np.eye(count))
    np.fill_diagonal(matrix, 0)
    return nodes, matrix - np.diag(matrix.sum(axis=1))


def patch_derivatives(
    solution: Callable[[Array, Array], Array], centre: tuple[float, float], radius: float, count: int = 14
) -> tuple[Array, Array, Array, Array, Array]:
    """u, u_1, u_2, u_11 and u_22 on the inner points of a small square, by differentiating an interpolant of u."""
    nodes, matrix = differentiation(count)
    matrix = matrix / radius
    u = solution(*np.meshgrid(centre[0] + radius * nodes, centre[1] + radius * nodes, indexing="ij"))
    second = matrix @ matrix
    inner = slice(3, -3), slice(3, -3)
    return u[inner], (matrix @ u)[inner], (u @ matrix.T)[inner], (second @ u)[inner], (u @ second.T)[inner]


def half_interval(
    initial: Callable[[Array], Array], reaction: Callable[[Array, Array], Array], diffusion: float, even: bool,
    final: float, count: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Solve u_t = D u_xx + reaction(u, u_x) on [0, 1] by collocation and Radau steps: an independent solution.

    The value at 1 stays, that at 0 is zero (odd solutions) or follows from u_x = 0 (even ones).
    """
    nodes, matrix = differentiation(count)
    x, first = (nodes + 1) / 2, 2 * matrix
    second = first @ first
    start = initial(x)

    def extended(inner: Array) -> Array:
        u = np.concatenate([start[:1], inner, [0.0]])
        if even:
            u[-1] = -first[-1] @ u / first[-1, -1]
        return u

    def rate(_: float, inner: Array) -> Array:
        u = extended(inner)
        return (diffusion * second @ u + reaction(u, first @ u))[1:-1]

    result = solve_ivp(rate, (0.0, final), start[1:-1], method="Radau", rtol=1e-10, atol=1e-12)
    return x, extended(result.y[:, -1])


# --- Burgers


def test_burgers_initial_and_boundary_values() -> None:
    x, t = np.linspace(-1, 1, 201), np.linspace(0, 1, 101)
    np.testing.assert_allclose(burgers(np.zeros_like(x), x), -np.sin(np.pi * x), atol=1e-14)
    np.testing.assert_allclose(burgers(1e-12 + 0 * x, x), -np.sin(np.pi * x), atol=1e-11)
    for side in (-1.0, 0.0, 1.0):
        np.testing.assert_allclose(burgers(t, side + 0 * t), 0, atol=1e-13)


@pytest.mark.parametrize("centre, radius", [((0.3, 0.4), 0.05), ((0.5, 0.003), 0.003), ((0.9, -0.01), 0.005)])
def test_burgers_solves_its_equation(centre: tuple[float, float], radius: float) -> None:
    u, u_t, u_x, _, u_xx = patch_derivatives(burgers, centre, radius)
    np.testing.assert_allclose(u_t + u * u_x, VISCOSITY * u_xx, atol=1e-7 * np.abs(u * u_x).max())


@pytest.mark.parametrize("viscosity, count", [(VISCOSITY, 176), (0.1, 40)])
def test_burgers_against_an_implicit_solution(viscosity: float, count: int) -> None:
    x, u = half_interval(
        lambda x: -np.sin(np.pi * x) * (x < 1), lambda u, u_x: -u * u_x, viscosity, even=False, final=0.6, count=count
    )
    assert relative_error(burgers(np.full_like(x, 0.6), x, viscosity), u) < 1e-9


@pytest.mark.skipif(not SHOCK.exists(), reason="the data set of Raissi et al. is not here")
def test_burgers_against_the_data_set_of_raissi() -> None:
    data = loadmat(SHOCK)
    t, x = np.meshgrid(data["t"].ravel(), data["x"].ravel())
    assert relative_error(burgers(t, x), data["usol"]) < 1e-11


@pytest.mark.parametrize("viscosity", [0.0, -1.0, 2.0, np.nan])
def test_burgers_refuses_other_viscosities(viscosity: float) -> None:
    with pytest.raises(ValueError, match="viscosity"):
        burgers(0.5, 0.5, viscosity)


# --- diffusion and advection


def test_diffusion_advection_has_converged() -> None:
    points, weights = leggauss(200)
    basis = chebvander(points, 400)
    fine = basis @ references._diffusion_advection(1e-2, (1.0, 1.0), degree=400) @ basis.T
    error = diffusion_advection(*np.meshgrid((points + 1) / 2, (points + 1) / 2, indexing="ij")) - fine
    assert weights @ error**2 @ weights < (1e-11) ** 2 * (weights @ fine**2 @ weights)


def test_diffusion_advection_boundary_values_and_symmetry() -> None:
    s, other = np.linspace(0, 1, 101), np.linspace(0, 1, 101) ** 2
    for side in (0.0, 1.0):
        np.testing.assert_allclose(diffusion_advection(s, side + 0 * s), 0, atol=1e-13)
        np.testing.assert_allclose(diffusion_advection(side + 0 * s, s), 0, atol=1e-13)
    np.testing.assert_allclose(diffusion_advection(s, other), diffusion_advection(other, s), atol=1e-12)


@pytest.mark.parametrize("velocity", [(1.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("centre, radius", [((0.5, 0.45), 0.05), ((0.97, 0.98), 0.01), ((0.03, 0.02), 0.01)])
def test_diffusion_advection_solves_its_equation(
    centre: tuple[float, float], radius: float, velocity: tuple[float, float]
) -> None:
    _, u_x, u_y, u_xx, u_yy = patch_derivatives(lambda x, y: diffusion_advection(x, y, 1e-2, velocity), centre, radius)
    np.testing.assert_allclose(-1e-2 * (u_xx + u_yy) + velocity[0] * u_x + velocity[1] * u_y, 1, atol=1e-6)


@pytest.mark.parametrize("diffusion, speed", [(1e-2, 1.0), (1.0, 0.0), (0.05, -2.0)])
def test_diffusion_advection_against_a_sine_series(diffusion: float, speed: float) -> None:
    """With b = (speed, 0): y (1 - y) / 2 mu plus a sine series in y that converges exponentially inside."""
    x, y = (c.ravel() for c in np.meshgrid(np.linspace(0.1, 0.9, 15), np.linspace(0, 1, 17)))
    exact = y * (1 - y) / (2 * diffusion)
    for k in np.pi * np.arange(1, 200, 2):
        root = np.hypot(speed, 2 * diffusion * k)
        up, down = (speed + root) / (2 * diffusion), (speed - root) / (2 * diffusion)
        left, right = np.linalg.solve([[1, np.exp(-up)], [np.exp(down), 1]], [-1, -1]) / (diffusion * k**2)
        exact += 4 / k * np.sin(k * y) * (left * np.exp(down * x) + right * np.exp(up * (x - 1)))
    assert relative_error(diffusion_advection(x, y, diffusion, (speed, 0.0)), exact) < 1e-10


# --- Allen-Cahn


def test_allen_cahn_has_converged() -> None:
    fine_edges, fine = references._allen_cahn(1e-3, degree=432, stages=14, panels=60)
    x, weights = leggauss(300)
    x = (1 + x) / 2
    rng = np.random.default_rng(0)
    for t in [1e-7, 1e-6, 1e-5, 1e-3, *rng.random(20), 1.0]:
        panel = min(int(np.searchsorted(fine_edges, t, side="right")) - 1, len(fine) - 1)
        local = 2 * (t - fine_edges[panel]) / (fine_edges[panel + 1] - fine_edges[panel]) - 1
        exact = chebvander(2 * x**2 - 1, 432) @ fine[panel].T @ chebvander([local], 14)[0]
        error = allen_cahn(np.full_like(x, t), x) - exact
        assert weights @ error**2 < (2e-11) ** 2 * (weights @ exact**2), t


def test_allen_cahn_initial_and_boundary_values() -> None:
    x, t = np.linspace(-1, 1, 201), np.linspace(0, 1, 301)
    np.testing.assert_allclose(allen_cahn(np.zeros_like(x), x), x**2 * np.cos(np.pi * x), atol=1e-12)
    for side in (-1.0, 1.0):
        np.testing.assert_allclose(allen_cahn(t, side + 0 * t), -1, atol=1e-12)


@pytest.mark.parametrize("centre", [(0.05, 0.9), (0.4, 0.0), (0.6, -0.5), (0.96, 0.45)])
def test_allen_cahn_solves_its_equation(centre: tuple[float, float]) -> None:
    u, u_t, _, _, u_xx = patch_derivatives(allen_cahn, centre, 0.02)
    np.testing.assert_allclose(u_t - 1e-3 * u_xx, 5 * (u - u**3), atol=1e-7)


@pytest.mark.parametrize("diffusion, final, count", [(1e-3, 0.3, 80), (1e-3, 1.0, 336), (1e-2, 1.0, 128)])
def test_allen_cahn_against_an_implicit_solution(diffusion: float, final: float, count: int) -> None:
    x, u = half_interval(
        lambda x: x**2 * np.cos(np.pi * x), lambda u, _: 5 * (u - u**3), diffusion, even=True, final=final, count=count
    )
    assert relative_error(allen_cahn(np.full_like(x, final), x, diffusion), u) < 1e-9


# --- arguments


@pytest.mark.parametrize("solution", [burgers, diffusion_advection, allen_cahn])
def test_arguments(solution: Callable[[Array, Array], Array]) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 1001))
    u = solution(first, second)
    assert u.shape == (3, 1001) and u.dtype == np.float64
    singly = [solution(np.array(first[2, k]), np.array(second[2, k])) for k in range(5)]
    np.testing.assert_allclose(u[2, :5], singly, rtol=1e-11)
    assert solution(np.empty((0, 2)), np.empty((0, 2))).shape == (0, 2)
    for outside in (-1.01, 1.01, np.nan):
        with pytest.raises(ValueError, match="expected"):
            solution(np.array([0.5, 0.5]), np.array([0.5, outside]))


@pytest.mark.parametrize("diffusion", [0.0, -0.01, np.nan])
def test_diffusion_must_be_positive(diffusion: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        diffusion_advection(0.5, 0.5, diffusion)
    with pytest.raises(ValueError, match="positive"):
        allen_cahn(0.5, 0.5, diffusion)


def test_unresolved_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        diffusion_advection(0.5, 0.5, 1e-4)
    with pytest.raises(ValueError, match="not resolved"):
        allen_cahn(0.5, 0.5, 1e-5)


# --- cache


class Counted:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Array]:
        self.calls += 1
        return {"a": np.linspace(0, 1, 500), "b": np.eye(3)}


def same(found: dict[str, Array]) -> bool:
    return found.keys() == {"a", "b"} and all(np.array_equal(found[k], v) for k, v in Counted()().items())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def test_cache_computes_once_for_each_set_of_parameters(folder: Path) -> None:
    compute = Counted()
    assert same(cached("name", compute, mu=0.1, text="a/b"))
    assert same(cached("name", compute, text="a/b", mu=0.1))
    assert compute.calls == 1
    cached("name", compute, mu=float(np.nextafter(0.1, 1)), text="a/b")
    cached("name", compute, mu=0.2, text="a/b")
    cached("other", compute, mu=0.1, text="a/b")
    assert compute.calls == 4
    assert all(file.suffix == ".npz" and file.is_file() for file in folder.iterdir())


def damage_start(content: bytes) -> bytes:
    return b"\0" * 40 + content[40:]


def damage_middle(content: bytes) -> bytes:
    return content[:700] + bytes(255 - byte for byte in content[700:720]) + content[720:]


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda content: content[:-100], lambda content: content[:50], lambda _: b"not an archive",
               damage_start, damage_middle]
)  # fmt: skip
def test_damaged_file_is_replaced(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    compute = Counted()
    cached("name", compute, degree=3)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(cached("name", compute, degree=3))
    assert compute.calls == 2
    assert same(cached("name", compute, degree=3))
    assert compute.calls == 2


def test_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDML_CACHE", str(tmp_path / "file"))
    compute = Counted()
    for calls in (1, 2):
        assert same(cached("name", compute))
        assert compute.calls == calls


def test_error_of_the_computation_is_passed_on_and_leaves_nothing(folder: Path) -> None:
    def fails() -> dict[str, Array]:
        raise ArithmeticError("of the computation")

    with pytest.raises(ArithmeticError, match="of the computation"):
        cached("name", fails)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("variable, below", [("XDG_CACHE_HOME", "ddml"), ("HOME", ".cache/ddml")])
def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str) -> None:
    monkeypatch.delenv("DDML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv(variable, str(tmp_path))
    cached("name", Counted(), degree=3)
    (file,) = (tmp_path / below / "references").iterdir()
    assert file.name.startswith("name-degree=3-") and file.suffix == ".npz"


def test_solutions_are_read_back_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references._diffusion_advection.cache_clear()
    u = diffusion_advection(0.3, 0.4)
    references._diffusion_advection.cache_clear()
    monkeypatch.setattr(references, "solve_sylvester", None)
    assert diffusion_advection(0.3, 0.4) == u
    assert len(list(folder.iterdir())) == 1
