"""Solutions of users' problems: what ``exact`` is given, and what it may give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import user_problems as users
from torch import Tensor

from ddml.errors import InputError
from ddml.problems import PROBLEMS
from ddml.problems.pde.accuracy import reference


def solution(t: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-0.1 * torch.pi**2 * t) * torch.sin(torch.pi * x)


def with_exact(function: Callable[[Any, Any], Any]) -> users.Heat:
    class Stated(users.Heat):
        def exact(self, t: Any, x: Any) -> Any:
            return function(t, x)

    return Stated()


WRITTEN = {
    "in torch": solution,
    "in NumPy": lambda t, x: np.exp(-0.1 * np.pi**2 * t) * np.sin(np.pi * x),
    "in NumPy, of arrays": lambda t, x: np.exp(-0.1 * np.pi**2 * t.numpy()) * np.sin(np.pi * x.numpy()),
    "by a function of arrays": lambda t, x: np.where(t < 9, np.asarray(solution(t, x)), 0),
    "in single precision": lambda t, x: solution(t, x).float(),
    "with a gradient": lambda t, x: solution(t.clone().requires_grad_(), x),
    "in a tuple": lambda t, x: (solution(t, x),),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_exact_may_be_written_in_torch_or_numpy(name: str) -> None:
    points, found = reference(with_exact(WRITTEN[name]), 300)
    t, x = points.T
    expected = np.exp(-0.1 * np.pi**2 * t) * np.sin(np.pi * x)
    assert found is not None
    assert found.dtype == np.float64
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6 if "single" in name else 1e-14, atol=1e-15)


def test_exact_is_given_tensors_in_double_precision() -> None:
    seen: list[Any] = []

    def looks(t: Tensor, x: Tensor) -> Tensor:
        seen.extend((t, x))
        return solution(t, x)

    reference(with_exact(looks), 100)
    assert [(type(c), c.dtype, c.dim()) for c in seen] == [(Tensor, torch.float64, 1)] * 2


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda t, x: x.astype(float), r"Stated\.exact raised AttributeError: .*begin with t, x = t\.numpy\(\), x\."),
        (lambda t, x: np.where(t > 0, 1.0, 0.0) * x, r"Stated\.exact raised TypeError: .*it is given torch tensors"),
        (lambda t, x: 1 / 0, r"Stated\.exact raised ZeroDivisionError"),
        (
            lambda t, x: t[:3],
            r"Stated\.exact must give one array \(\d+,\) of .*; got \(3,\) of torch\.float64",
        ),
        (lambda t, x: 0.0, r"Stated\.exact must give one array .*; got the float 0\.0"),
        (lambda t, x: solution(t, x) * 1j, r"Stated\.exact must give one array .*; got \(\d+,\) of torch\.complex128"),
        (lambda t, x: (t, x), r"Stated\.exact must give one array"),
        (lambda t, x: "sine", r"Stated\.exact must give one array .*; got str"),
    ],
)
def test_what_exact_may_not_do_is_refused_in_one_line(function: Callable[[Any, Any], Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        reference(with_exact(function), 100)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PROBLEMS)
def test_our_problems_take_tensors(name: str) -> None:
    problem = PROBLEMS[name]()
    _, values = reference(problem, 60)
    assert values is not None
    assert np.isfinite(values).all()
