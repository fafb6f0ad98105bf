"""Sums of derivatives of kernels, against torch's of the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddml.errors import InputError
from ddml.kernel_machines.gradients import smooth

W = 1.3
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rbf": lambda d, _: torch.exp(-(d**2) / (2 * W**2)),
    "laplace": lambda d, _: torch.exp(-d / W),
    "matern32": lambda d, _: (1 + math.sqrt(3) * d / W) * torch.exp(-math.sqrt(3) * d / W),
    "matern52": lambda d, _: (1 + math.sqrt(5) * d / W + 5 * d**2 / (3 * W**2)) * torch.exp(-math.sqrt(5) * d / W),
    "polynomial": lambda _, p: (p / W**2 + 1) ** 3,
}
USERS = """
import torch

def mixed(x, y):
    return torch.exp(-torch.cdist(x, y).square()) + (x @ y.T + 1).square()

def rough(x, y):
    return torch.exp(-((x[:, None] - y).square().sum(-1)).sqrt())

def foreign(x, y):
    return torch.as_tensor((x.detach().numpy() @ y.numpy().T))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USERS)
    return path


def tables(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((7, 3), (9, 3), (7, 9)))


def by_torch(formula: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    distances = (leaf[:, None] - y).square().sum(-1).sqrt()
    return torch.autograd.grad((weights * formula(distances, leaf @ y.T)).sum(), leaf)[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_sums_of_derivatives_are_those_of_the_formula(name: str) -> None:
    x, y, weights = tables()
    expected = by_torch(FORMULAS[name], x, y, weights)
    assert torch.allclose(smooth(name, W).pull(x, y, weights.clone()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_equal_samples_have_a_derivative(name: str) -> None:
    x, _, weights = tables()
    x[3] = x[0]
    found = smooth(name, W).pull(x, x.clone(), weights[:, :7].clone())
    assert torch.isfinite(found).all()
    if name != "polynomial":  # k of a sample and itself is constant
        alone = smooth(name, W).pull(x[:1], x[:1].clone(), weights[:1, :1].clone())
        assert (alone == 0).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_smooth_kernel_is_the_kernel(name: str) -> None:
    x, y, _ = tables()
    distances = (x[:, None] - y).square().sum(-1).sqrt()
    assert torch.allclose(smooth(name, W)(x, y), FORMULAS[name](distances, x @ y.T), rtol=1e-12)


def test_users_functions_are_differentiated_by_torch(file: Path) -> None:
    x, y, weights = tables()
    expected = by_torch(lambda d, p: torch.exp(-(d**2)) + (p + 1) ** 2, x, y, weights)
    assert torch.allclose(smooth(f"{file}:mixed").pull(x, y, weights.clone()), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "words"), [("rough", "derivative that is not finite"), ("foreign", "cannot be differentiated")]
)
def test_users_functions_without_a_derivative_are_refused(file: Path, name: str, words: str) -> None:
    x, _, weights = tables()
    with pytest.raises(InputError, match=words):
        smooth(f"{file}:{name}").pull(x, x.clone(), weights[:, :7].clone())


@pytest.mark.parametrize(
    ("name", "width", "words"), [("rbf", 0.0, "width"), ("rbf", math.nan, "width"), ("sinc", 1.0, "unknown kernel")]
)
def test_kernels_that_there_are_not_are_refused(name: str, width: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        smooth(name, width)
