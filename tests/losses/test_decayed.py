"""Weight decay: a linear layer with it is scikit-learn's logistic regression; what is penalised, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import DIGITS, LABELS, close, decayed, digits, gradient_of, per_sample, point, product_of, sequential
from torch import nn

import solvers
from ddml.errors import InputError
from ddml.losses.decayed import DecayedLoss


def linear(decay: float, samples: int = 90) -> DecayedLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(64, 10).double()
    return DecayedLoss(module, per_sample, DIGITS[:samples] / 16, LABELS[:samples], decay, batch=40)


def by_numpy(loss: DecayedLoss, theta: Any) -> tuple[float, Any]:
    """Value and gradient (n,) of a linear layer by the textbook's formulas."""
    x, y = loss.inputs.numpy(), loss.targets.numpy()
    W, b = theta[:640].reshape(10, 64), theta[640:]
    z = x @ W.T + b
    z -= z.max(axis=1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    value = -np.log(p[np.arange(len(y)), y]).mean() + loss.decay / 2 * (W**2).sum()
    slope = (p - np.eye(10)[y]) / len(y)
    return value, np.concatenate([(slope.T @ x + loss.decay * W).reshape(-1), slope.sum(axis=0)])


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.5, 20.0])
def test_values_and_gradients_are_those_of_numpy(decay: float) -> None:
    loss = linear(decay)
    theta = point(loss)
    value, gradient = by_numpy(loss, theta.numpy())
    found = gradient_of(loss, theta)
    assert found[0] == loss.value(theta) == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("decay", [1e-3, 3e-2, 1.0])
def test_it_is_scikit_learns_logistic_regression(decay: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    loss = linear(decay)
    result = solvers.minimise(loss, "lbfgs", options={"momentum": 1, "memory": 20}, iterations=3000, tolerance=1e-9)
    model = linear_model.LogisticRegression(C=1 / (decay * loss.count), solver="newton-cg", tol=1e-9)
    model.fit(loss.inputs.numpy(), loss.targets.numpy())
    found, expected = result.theta[:640].view(10, 64).numpy(), model.coef_
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    bias = result.theta[640:].numpy()  # defined but for a constant
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=1e-4)
    theirs = torch.cat([torch.from_numpy(expected).reshape(-1), torch.from_numpy(model.intercept_)])
    assert result.loss == pytest.approx(float(loss.value(theirs)), rel=1e-8)


def test_the_gauss_newton_matrix_of_a_linear_layer_is_the_hessian() -> None:
    loss = linear(0.7)
    theta, v = point(loss), point(loss, 1)
    product = torch.zeros_like(v)
    loss.gauss_newton_product(theta, v, product)
    assert close(product, product_of(loss, theta, v), 1e-11)
    parts = torch.zeros_like(v)
    for part in (loss.part(0, 13), loss.part(13, 90)):
        part.gauss_newton_product(theta, v, parts)
    assert close(parts, product, 1e-12)


def test_other_samples_have_the_whole_penalty() -> None:
    loss = decayed(sequential, 3.0)
    theta = point(loss)
    few, plain = loss.sampled(torch.tensor([3, 5])), decayed(sequential, 0.0).sampled(torch.tensor([3, 5]))
    weights = torch.cat([theta[p.range] for p in loss.parameters if "weight" in p.name])
    assert few.value(theta) == pytest.approx(plain.value(theta) + 1.5 * float(weights @ weights), rel=1e-12)


def test_no_decay_has_the_bits_of_the_plain_loss() -> None:
    plain, found = digits(sequential), decayed(sequential, 0.0)
    theta = point(plain)
    (value, gradient), (again, same) = gradient_of(plain, theta), gradient_of(found, theta)
    assert value == again == found.value(theta) and torch.equal(gradient, same)


@pytest.mark.parametrize("decay", [-1e-9, float("nan"), float("inf"), -3])
def test_decays_that_are_none_are_refused(decay: float) -> None:
    with pytest.raises(InputError, match="a weight decay must be 0 or more"):
        linear(decay)
