"""Reference solutions of the test problems, accurate to ten digits, and the cache that keeps them.

The problems are those of Kopaničáková, Kothari, Karniadakis and Krause, "Enhancing training of physics-informed
neural networks using domain-decomposition based preconditioning strategies" (SIAM J. Sci. Comput. 46, 2024, S46-S67;
arXiv 2306.17648), whose own references are finite-element solutions.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.polynomial.chebyshev import chebder, chebvander
from numpy.polynomial.legendre import legroots
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_sylvester

Array = NDArray[np.float64]

_FORMAT = 1  # part of every file name: raise it whenever the same parameters come to mean other arrays
_CHUNK = 2048  # points evaluated at a time: bounds the temporary arrays to a few MB


def cached(name: str, compute: Callable[[], dict[str, Array]], **parameters: object) -> dict[str, Array]:
    """Load the arrays of a computation from the cache, or compute and store them.

    The file lies in the folder ``references`` of ``$DDML_CACHE``, ``$XDG_CACHE_HOME/ddml`` or ``~/.cache/ddml`` (the
    first that is set). It appears under its name only when complete, so any number of processes may call this at the
    same time. A file that cannot be read is computed anew, a folder that cannot be written is no error. Not collective.

    Parameters
    ----------
    name : str
        Name of the computation, the first part of the file name.
    compute : callable
        Called without arguments when the cache has nothing; returns the arrays by name.
    **parameters : object
        All that the arrays depend on, discretisation included: numbers, strings and tuples, told apart by ``repr``.

    Returns
    -------
    dict of str to ndarray
        The arrays of `compute`, bit for bit.
    """
    text = ",".join(f"{key}={value!r}" for key, value in sorted(parameters.items()))
    digest = hashlib.sha256(f"{_FORMAT};{name};{text}".encode()).hexdigest()[:12]
    path = _cache_folder() / (re.sub(r"[^\w.,=+-]", "", f"{name}-{text}")[:120] + f"-{digest}.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception:  # a damaged archive raises nearly anything, and none of it matters: the arrays can be had again
        arrays = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            complete = Path(scratch) / path.name
            np.savez(complete, allow_pickle=False, **arrays)
            complete.replace(path)
    except OSError:
        pass
    return arrays


def burgers(t: ArrayLike, x: ArrayLike, viscosity: float = 0.01 / np.pi) -> Array:
    r"""Solve Burgers' equation with the initial value :math:`-\sin(\pi x)`.

    .. math:: u_t + u u_x = \nu u_{xx}, \quad u(0, x) = -\sin(\pi x), \quad u(t, \pm 1) = 0.

    Parameters
    ----------
    t, x : array_like
        Points in [0, 1] x [-1, 1], of equal shape.
    viscosity : float, default 0.01/pi
        The viscosity :math:`\nu`, in (0, 1].

    Returns
    -------
    ndarray
        The solution, of the shape of `t` and `x`.

    Raises
    ------
    ValueError
        A point or the viscosity is out of its range.

    Notes
    -----
    The Cole-Hopf integral (Basdevant et al., Computers and Fluids 14, 1986) in
    :math:`z = \eta / \sqrt{4 \nu t}`,

    .. math:: u = -\frac{\int \sin(\pi y) \, e^{p} dz}{\int e^{p} dz}, \quad y = x - \sqrt{4 \nu t} \, z, \quad
              p = -\frac{\cos(\pi y)}{2 \pi \nu} - z^2,

    by the trapezoid rule with step 0.1, which converges exponentially as the integrands are entire, with `p` shifted
    by its maximum. Beyond :math:`|z| = \sqrt{t / 4 \nu} + 6.5` lies less than exp(-42) of the integrals. The relative
    L2 error is below 1e-14 for viscosities in [1e-4, 1] against three times smaller steps on a wider interval; also
    compared to a Chebyshev and implicit Runge-Kutta solution (1e-12).
    """
    if not 0 < viscosity <= 1:
        raise ValueError(f"expected a viscosity in (0, 1], received {viscosity}: the quadrature is made for these")
    t, x, shape = _points(t=(t, 0, 1), x=(x, -1, 1))
    count = np.ceil(10 * (np.sqrt(t.max(initial=0) / (4 * viscosity)) + 6.5))
    z = np.arange(-count, count + 1) / 10
    u = np.empty_like(t)
    for part in _parts(u):
        y = np.pi * (x[part, None] - np.sqrt(4 * viscosity * t[part, None]) * z)
        p = -np.cos(y) / (2 * np.pi * viscosity) - z**2
        weights = np.exp(p - p.max(axis=1, keepdims=True))
        u[part] = -np.sum(weights * np.sin(y), axis=1) / np.sum(weights, axis=1)
    return u.reshape(shape)


def diffusion_advection(
    x: ArrayLike, y: ArrayLike, diffusion: float = 1e-2, velocity: tuple[float, float] = (1.0, 1.0)
) -> Array:
    r"""Solve the stationary diffusion-advection problem on the unit square.

    .. math:: -\mu \Delta u + b \cdot \nabla u = 1 \text{ in } (0, 1)^2, \quad u = 0 \text{ on the boundary}.

    Parameters
    ----------
    x, y : array_like
        Points in the unit square, of equal shape.
    diffusion : float, default 1e-2
        The diffusion coefficient :math:`\mu` > 0; with a unit velocity resolved from 1e-3 on.
    velocity : tuple of float, default (1, 1)
        The velocity :math:`b`.

    Returns
    -------
    ndarray
        The solution, of the shape of `x` and `y`.

    Raises
    ------
    ValueError
        A point is outside the square, the diffusion is not positive, or the layers are too thin to be resolved.

    Notes
    -----
    Chebyshev collocation of degree 320, solved as a Sylvester equation by Schur factorisation: the problem is
    separable, but the eigenvectors that fast diagonalisation needs are conditioned like exp(1 / 2 mu). The corner
    singularities (r^2 log r) limit the convergence to degree^-6. For the default parameters the relative L2 error is
    2e-12 and the largest one 2e-9 (at a corner), against degree 512 on 600^2 Gauss points; without velocity, or with
    one along an axis, compared to the series solution (1e-10 or better). The coefficients are cached.
    """
    x, y, shape = _points(x=(x, 0, 1), y=(y, 0, 1))
    _check_positive(diffusion)
    coefficients = _diffusion_advection(float(diffusion), (float(velocity[0]), float(velocity[1])))
    degree = len(coefficients) - 1
    u = np.empty_like(x)
    for part in _parts(u):
        u[part] = np.sum(chebvander(2 * x[part] - 1, degree) @ coefficients * chebvander(2 * y[part] - 1, degree), 1)
    return u.reshape(shape)


def allen_cahn(t: ArrayLike, x: ArrayLike, diffusion: float = 1e-3) -> Array:
    r"""Solve the Allen-Cahn equation with the initial value :math:`x^2 \cos(\pi x)`.

    .. math:: u_t - D u_{xx} - 5 (u - u^3) = 0, \quad u(0, x) = x^2 \cos(\pi x), \quad u(t, \pm 1) = -1.

    Parameters
    ----------
    t, x : array_like
        Points in [0, 1] x [-1, 1], of equal shape.
    diffusion : float, default 1e-3
        The diffusion coefficient :math:`D` > 0; resolved from 5e-4 on.

    Returns
    -------
    ndarray
        The solution, of the shape of `t` and `x`.

    Raises
    ------
    ValueError
        A point is out of its range, the diffusion is not positive, or the layers are too thin to be resolved.

    Notes
    -----
    Chebyshev collocation of degree 384 in :math:`s = 2 x^2 - 1` (degree 768 in x: the solution is even), Radau IIA
    collocation with 12 stages on 65 panels in t, whose polynomials are the solution between the steps too. The panels
    shrink towards t = 0, where the data are incompatible at x = ±1: the equation asks for :math:`u_t = D (\pi^2 - 2)`
    there, the boundary value for 0. For the default parameter the relative L2 error in x is below 2e-12 at any time
    and the largest error 3e-11 (at the corners, t = 3e-8), against degree 480 with 16 stages on smaller panels; at
    t = 0.3 and 1 also compared to a Chebyshev and implicit Runge-Kutta solution of [0, 1] (1e-10). The coefficients
    are cached.
    """
    t, x, shape = _points(t=(t, 0, 1), x=(x, -1, 1))
    _check_positive(diffusion)
    edges, coefficients = _allen_cahn(float(diffusion))
    stages, degree = coefficients.shape[1] - 1, coefficients.shape[2] - 1
    panels = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(edges) - 2)
    local = 2 * (t - edges[panels]) / np.diff(edges)[panels] - 1
    u = np.empty_like(t)
    for part in _parts(u):
        in_time, in_space = chebvander(local[part], stages), chebvander(2 * x[part] ** 2 - 1, degree)
        for panel in np.unique(panels[part]):
            here = panels[part] == panel
            u[part][here] = np.sum(in_time[here] @ coefficients[panel] * in_space[here], axis=1)
    return u.reshape(shape)


@lru_cache
def _diffusion_advection(diffusion: float, velocity: tuple[float, float], degree: int = 320) -> Array:
    """Chebyshev coefficients in 2x - 1 and 2y - 1, shape (degree + 1, degree + 1)."""

    def compute() -> dict[str, Array]:
        nodes, first, second = _chebyshev(degree)
        along_x, along_y = ((-4 * diffusion * second + 2 * b * first)[1:-1, 1:-1] for b in velocity)
        inner = solve_sylvester(along_x, along_y.T, np.ones_like(along_x))
        to_coefficients = np.linalg.inv(chebvander(nodes, degree))
        return {"coefficients": to_coefficients @ np.pad(inner, 1) @ to_coefficients.T}

    c = cached("diffusion_advection", compute, diffusion=diffusion, velocity=velocity, degree=degree)["coefficients"]
    _check_resolution(max(np.abs(c[-8:]).max(), np.abs(c[:, -8:]).max()) / np.abs(c).max(), diffusion)
    return c


@lru_cache
def _allen_cahn(diffusion: float, degree: int = 384, stages: int = 12, panels: int = 50) -> tuple[Array, Array]:
    """Panel edges in time, and Chebyshev coefficients in local time and 2 x^2 - 1: (panel, stages + 1, degree + 1).

    In s = 2 x^2 - 1 the second derivative is u_xx = 8 (1 + s) u_ss + 4 u_s, and s = -1 needs no boundary condition.
    The unknown u + 1 vanishes at s = 1. Each panel is solved by fixed-point iteration on the reaction, the diffusion
    being inverted exactly through its eigenvectors; as a panel is at most 0.02 long and the derivative of the reaction
    at most 10, an iteration gains about a digit.
    """

    def compute() -> dict[str, Array]:
        nodes, first, second = _chebyshev(degree)
        operator = diffusion * (8 * (1 + nodes[:, None]) * second + 4 * first)[1:, 1:]
        eigenvalues, vectors = np.linalg.eig(operator)
        inverse_vectors = np.linalg.inv(vectors)
        radau = np.concatenate([[-1.0], legroots([0.0] * (stages - 1) + [-1.0, 1.0])])
        radau[-1] = 1.0
        in_time = np.linalg.inv(chebvander(radau, stages))
        in_space = np.linalg.inv(chebvander(nodes, degree))
        d_time = 2 * (chebvander(radau, stages - 1) @ chebder(np.eye(stages + 1)) @ in_time)[1:]
        graded = 1e-6 * 2.0 ** np.arange(15)
        edges = np.concatenate([[0.0], graded, np.linspace(graded[-1], 1, panels + 1)[1:]])
        squares = (1 + nodes[1:]) / 2
        start = squares * np.cos(np.pi * np.sqrt(squares)) + 1
        coefficients = []
        for width in np.diff(edges):
            solve = np.linalg.inv(d_time[:, 1:] / width - eigenvalues[:, None, None] * np.eye(stages))
            values = np.tile(start, (stages, 1))
            for _ in range(16):
                u = values - 1
                right = (5 * (u - u**3) - np.outer(d_time[:, 0] / width, start)) @ inverse_vectors.T
                values = (np.matmul(solve, right.T[:, :, None])[:, :, 0].T @ vectors.T).real
            inner = np.vstack([start, values])
            coefficients.append(in_time @ (np.pad(inner, ((0, 0), (1, 0))) - 1) @ in_space.T)
            start = values[-1]
        return {"edges": edges, "coefficients": np.array(coefficients)}

    arrays = cached("allen_cahn", compute, diffusion=diffusion, degree=degree, stages=stages, panels=panels)
    c = arrays["coefficients"]
    _check_resolution(max(np.abs(c[:, 0, -8:]).max(), np.abs(c[:, -1]).max()), diffusion)
    return arrays["edges"], c


def _check_positive(diffusion: float) -> None:
    if not diffusion > 0:
        raise ValueError(f"expected a positive diffusion, received {diffusion}")


def _check_resolution(tail: float, diffusion: float) -> None:
    if not tail < 5e-11:
        raise ValueError(
            f"expected a diffusion for which the last Chebyshev coefficients are below 5e-11, received {diffusion} "
            f"with {tail:.1e}: its layers are not resolved, so take it closer to the default"
        )


def _chebyshev(degree: int) -> tuple[Array, Array, Array]:
    """Chebyshev points from 1 to -1 and their differentiation matrices of first and second order.

    Differences of nodes by trigonometric identities and diagonals by row sums keep the rounding errors small
    (Weideman and Reddy, ACM TOMS 26, 2000).
    """
    angles = np.pi * np.arange(degree + 1) / degree
    differences = 2 * np.sin((angles[:, None] + angles) / 2) * np.sin((angles - angles[:, None]) / 2)
    np.fill_diagonal(differences, 1)
    signs = (-1.0) ** np.arange(degree + 1)
    signs[[0, -1]] *= 2
    first = np.outer(signs, 1 / signs) / differences
    np.fill_diagonal(first, 0)
    first -= np.diag(first.sum(axis=1))
    second = first @ first
    return np.cos(angles), first, second - np.diag(second.sum(axis=1))


def _points(**coordinates: tuple[ArrayLike, float, float]) -> tuple[Array, Array, tuple[int, ...]]:
    """Check two coordinates, each with its bounds, and return them flat, with their common shape."""
    arrays = []
    for name, (values, low, high) in coordinates.items():
        array = np.asarray(values, dtype=np.float64)
        if not np.all((array >= low - 1e-12) & (array <= high + 1e-12)):
            raise ValueError(f"expected {name} in [{low}, {high}], received [{array.min()}, {array.max()}]")
        arrays.append(array)
    first, second = np.broadcast_arrays(*arrays)
    return first.ravel(), second.ravel(), first.shape


def _parts(array: Array) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, array.size, _CHUNK)]


def _cache_folder() -> Path:
    if folder := os.environ.get("DDML_CACHE"):
        return Path(folder) / "references"
    home = os.environ.get("HOME") or tempfile.gettempdir()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home) / ".cache") / "ddml" / "references"
