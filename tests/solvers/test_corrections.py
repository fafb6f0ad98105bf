"""How a correction of a coarse level is searched along, on functions of one variable."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from petsc4py import PETSc

from solvers.multilevel.acceptance import Search

Function = Callable[[float], tuple[float, float]]


def scalar(value: float) -> PETSc.Vec:
    vec = PETSc.Vec().createSeq(1, comm=PETSc.COMM_SELF)
    vec.set(value)
    return vec


def level_of(function: Function) -> Any:
    """One that stands at 0."""

    def value_gradient(x: PETSc.Vec, g: PETSc.Vec) -> float:
        value, slope = function(float(x.array_r[0]))
        g.set(slope)
        return value

    f, slope = function(0.0)
    return SimpleNamespace(
        f=f, x=scalar(0.0), g=scalar(slope), trial=scalar(0.0), trial_g=scalar(0.0), moved=[],
        objective=SimpleNamespace(value_gradient=value_gradient), move=lambda value: None,
    )  # fmt: skip


def parabola(t: float) -> tuple[float, float]:
    """Decreases to 1/2, and is 0 again at 1."""
    return 1.2 * t * t - 1.2 * t, 2.4 * t - 1.2


@pytest.mark.parametrize(("armijo", "length"), [(0.0, 0.5), (0.4, 0.5), (0.6, 0.25), (0.9, 0.0625)])
def test_the_decrease_that_is_wanted_shrinks_with_the_length(armijo: float, length: float) -> None:
    found = Search(10, armijo, 1e-16).try_correction(1, level_of(parabola), scalar(1.0), 0.3)
    assert found == length
    assert parabola(length)[0] <= armijo * length * -1.2
    assert Search(1, armijo, 1e-16).try_correction(1, level_of(parabola), scalar(1.0), 0.3) == 0


@pytest.mark.parametrize(("slope", "length"), [(-0.5, 1.0), (-2.0, 0.0), (2.0, 0.0)])
def test_where_rounding_hides_the_decrease_the_gradient_decides(slope: float, length: float) -> None:
    """The loss is the same everywhere, to the last bit."""

    def flat(t: float) -> tuple[float, float]:
        return 1.0, -1.0 if t == 0 else slope

    assert Search(4, 0.0, 2e-16).try_correction(1, level_of(flat), scalar(1.0), 1e-17) == length
    assert Search(4, 0.0, 2e-16).try_correction(1, level_of(flat), scalar(1.0), 0.1) == 0  # it is not hidden
